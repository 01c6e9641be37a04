"""What a rollout feeds back of its predictions, and the memory it takes."""

from collections.abc import Callable

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.inference.posterior import State
from pnem.models import Bernoulli, SpatialMixture

__all__ = ["MEMORY_LIMIT", "check_memory", "fed_back"]

MEMORY_LIMIT = 2**30
"""Bytes that a rollout may take, unless its caller says otherwise."""


def fed_back(model: SpatialMixture, x: Tensor, feedback: str | None, log_mixing: Tensor) -> Callable[[Tensor], Tensor]:
    """The image that takes the place of one that nobody sees, as a function of ψ: (B, K, D, P) -> (B, D, C).

    Args:
        model: whose predictions they are.
        x: the last frame that was seen.
        feedback: see `FilteringStrategy.rollout`.
        log_mixing: log π of its components (B, K).

    Raises:
        StrategyError: an unknown feedback.
    """
    if feedback not in (None, "mean", "mode"):
        raise StrategyError(f'feedback must be "mean", "mode" or None, but is {feedback!r}')
    wanted = bool(((x == 0) | (x == 1)).all()) if feedback is None else feedback == "mode"
    bits = wanted and isinstance(model.likelihood, Bernoulli)

    def image(psi: Tensor) -> Tensor:
        prediction = model.prediction(psi, log_mixing)
        return torch.round(prediction) if bits else prediction

    return image


def check_memory(state: State, frames: int, *, memory_limit: int = MEMORY_LIMIT, remedy: str = "") -> None:
    """Raises `StrategyError`, with a remedy of the caller's, if so many states like this one take more memory."""
    each = sum(value.numel() * value.element_size() for value in state if isinstance(value, Tensor))
    if frames * each <= memory_limit:
        return
    fitting = memory_limit // each
    remedy = remedy or (
        (f"ask for at most {fitting} frames at a time, going on from the last, " if fitting else "ask ")
        + "for fewer sequences, or raise memory_limit"
    )
    raise StrategyError(
        f"a rollout of {frames} frames of {len(state.theta)} sequences takes {_megabytes(frames * each)}, but may take "
        f"{_megabytes(memory_limit)}: {remedy}"
    )


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**20:.0f} MiB"
