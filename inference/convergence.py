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
    """An optimisation stopped at its last iteration while the evidence, or the ELBO, was still rising."""


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


def has_converged(trace: Tensor, count: Tensor | int, tol: float, *, monotone: bool) -> bool:
    """Whether the last rise of the evidence (T, B) of so many items is within tol of zero, in nats per item.

    Where the method is not `monotone`, a fall is no less an end of the climb.

    Warns:
        ConvergenceWarning: it is not.
    """
    iterations, rise = len(trace), (trace[-1:] - trace[-2:-1]) / count
    rise = rise if monotone else rise.clamp_min(0)
    if iterations > 1 and bool((rise.abs() <= max(tol, 1e-9)).all()):
        return True
    if iterations == 1:
        change = "was seen only once"
    elif bool((rise > tol).any()):
        change = f"still rises by {rise.max().item():.2g} nats per item"
    else:
        change = f"fell by {-rise.min().item():.2g} nats per item, as a floor, or items beyond 10⁸ σ, can make it"
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
    # The evidence is of the parameters before the last M-step.
    broken = ~final.isfinite() | ~parameters.theta.isfinite().flatten(2).all(-1)
    final = final.masked_fill(broken, -torch.inf)
    if bool(final.amax(0).isinf().any()):
        raise ModelError(
            f"no start kept finite parameters in image {int(final.amax(0).isinf().nonzero()[0])}, as where a "
            "covariance is not positive definite because a component's items are equal or lie in a plane, or some are "
            "so far away that nothing else is seen; use a larger floor, fewer components, a simpler covariance, a "
            "prior, or leave out or rescale what is far"
        )
    best, images = final.argmax(0), torch.arange(B, device=evidence.device)
    return Parameters(*(value[best, images].unsqueeze(0) for value in parameters)), evidence[:, best, images]
