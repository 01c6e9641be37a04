"""What strategies ask of models, images and starts."""

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.models import SpatialMixture

__all__ = ["best_starts", "check_starts", "require_images", "require_pixels", "require_proper_prior"]


def best_starts(merit: Tensor, restarts: int) -> Tensor:
    """Of R starts of B images, as one batch (R·B,), those of highest merit: their indices (B,).

    A merit that is NaN is the lowest.
    """
    best = merit.where(~merit.isnan(), -torch.inf).reshape(restarts, -1).argmax(0)
    return best * len(best) + torch.arange(len(best), device=best.device)


def require_pixels(model: SpatialMixture, name: str) -> None:
    """Raises `StrategyError` where the model's decoder is constant, for which EM has a closed form."""
    if model.num_pixels is None:
        raise StrategyError(f"{name} needs a decoder of images, not {type(model.decoder).__name__}: use ClassicalEM")


def require_images(model: SpatialMixture, x: Tensor) -> None:
    """Raises `StrategyError` unless `x` holds images (B, D, C), and in the precision of the model's networks."""
    if x.dim() != 3:
        raise StrategyError(
            f"x has shape {tuple(x.shape)}, but images are (B, D, C): give those, or for sequences (T, B, D, C) a "
            'strategy that filters, such as RNNEM(model, task="prediction")'
        )
    if not len(x):
        raise StrategyError(f"x has shape {tuple(x.shape)}: give at least one image")
    dtype = model.mixing_logits.dtype
    if not x.is_floating_point() or (model.num_pixels is not None and x.dtype != dtype):
        raise StrategyError(
            f"x has dtype {x.dtype}, but this model computes in {dtype}: give x.to({dtype}), or convert model and "
            "strategy by .double() or .float()"
        )


def require_proper_prior(model: SpatialMixture, name: str) -> None:
    """Raises `StrategyError` unless p(θ) is a density of θ that can be drawn from."""
    if not model.has_proper_prior:
        given = f'"{model.prior}"' if isinstance(model.prior, str) else type(model.prior).__name__
        raise StrategyError(
            f"{name} needs a proper prior on θ, but this model's is {given}: build it as "
            'SpatialMixture(..., prior="standard_normal"), or with DiagonalNormal or MixtureOfNormals'
        )


def check_starts(restarts: int, iterations: int, *, given: bool) -> None:
    """Raises `StrategyError` unless both are at least 1, and restarts are not all from the same given start."""
    for name, value in (("restarts", restarts), ("iterations", iterations)):
        if not isinstance(value, int) or value < 1:
            raise StrategyError(f"{name} must be at least 1, and whole, but is {value}")
    if restarts > 1 and given:
        raise StrategyError("restarts from a given start would all be the same: leave it out, or restarts at 1")
