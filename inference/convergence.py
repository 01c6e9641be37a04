"""How EM ends: what it finds, whether it converged, and which start was the best."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.inference.m_steps import Parameters
from pnem.models import SpatialMixture
from pnem.models.errors import ModelError

__all__ = ["ConvergenceWarning", "Fit", "best_start", "has_converged"]


class ConvergenceWarning(UserWarning):
    """EM stopped at its last iteration while the evidence was still rising."""


class Fit(NamedTuple):
    """What EM finds.

    Attributes:
        theta: (B, K, M); for a linear decoder, whose parameters are then the model's, (0, 1, M).
        log_mixing: (B, K), log π.
        elbo_trace: (T, B): before each M-step log p(x | θ, π) + log p(θ, π), in nats, items counted by their weights;
            for a linear decoder (T, 1): log p(x) of all images.
        converged: whether it stopped because the evidence rose no more.
    """

    theta: Tensor
    log_mixing: Tensor
    elbo_trace: Tensor
    converged: bool


def has_converged(iterations: int, rise: Tensor, tol: float) -> bool:
    """Whether the last rise of the evidence in nats per item, of every finite start, is within tol of zero.

    Warns:
        ConvergenceWarning: it is not.
    """
    if iterations > 1 and bool((rise.abs() <= max(tol, 1e-9)).all()):
        return True
    if iterations == 1:
        change = "was seen only once"
    elif bool((rise > tol).any()):
        change = f"still rises by {rise.max().item():.2g} nats per item"
    else:
        change = f"fell by {-rise.min().item():.2g} nats per item, as a floor of the likelihood can make it"
    warnings.warn(
        f"after {iterations} iterations the evidence {change} (tol={tol:.2g}): allow more iterations, or change tol or "
        "the floor",
        ConvergenceWarning,
        stacklevel=4,
    )
    return False


def best_start(model: SpatialMixture, parameters: Parameters, evidence: Tensor) -> tuple[Parameters, Tensor]:
    """The best start of each image, as a single one, and its evidence: of (T, R, B), (T, B).

    Raises:
        ModelError: no start has a finite evidence.
    """
    B = evidence.shape[-1]
    # Starts that share mixing weights between images stand or fall together.
    shared = model.mixing_kind == "learned"
    final = evidence[-1].sum(-1, keepdim=True).expand(-1, B) if shared else evidence[-1]
    final = final.masked_fill(~final.isfinite(), -torch.inf)
    if bool(final.amax(0).isinf().any()):
        raise ModelError(
            "no start kept a finite evidence: a component's covariance is not positive definite where its items are "
            "equal or lie in a plane; use a larger floor, fewer components, a simpler covariance, or a prior"
        )
    best, images = final.argmax(0), torch.arange(B, device=evidence.device)
    return Parameters(*(value[best, images].unsqueeze(0) for value in parameters)), evidence[:, best, images]
