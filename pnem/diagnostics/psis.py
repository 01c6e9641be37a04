"""How heavy the tail of importance weights is: k̂ of Pareto-smoothed importance sampling."""

import importlib
import warnings
from importlib.metadata import version

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnem.diagnostics.findings import Finding
from pnem.errors import DataError

__all__ = ["GOOD_K_HAT", "LEAST_WEIGHTS", "k_hat_findings", "psis_k_hat", "unreliable"]

# For a few thousand weights.
GOOD_K_HAT = 0.7
# The share of images that may have a larger one by the error of k̂ alone.
TOLERATED = 0.05

LEAST_WEIGHTS = 30
# A tail of weights that differ by less than a thousandth harms no estimate; in single precision it is rounding.
EQUAL = 1e-3


def psis_k_hat(log_weights: Tensor) -> Tensor:
    r"""The shape k̂ of the generalised Pareto distribution that the largest weights of each image follow.

    Weights of a tail with shape k have 1/k finite moments (Vehtari, Simpson, Gelman, Yao & Gabry 2024, "Pareto smoothed
    importance sampling"). Up to k̂ = 0.7, estimates from a few thousand of them can be trusted; above, q(θ) misses parts
    of p(θ | x), and neither estimates nor their standard errors mean much (Yao, Vehtari, Simpson & Gelman 2018). The
    tail is about 3 √L of L weights, and its fit is ArviZ's, whose major releases differ by a few hundredths.

    The weights are those of θ, with z summed out: p(x, θ) / q(θ). They are drawn where q is, and so k̂ knows nothing of
    a mode of p(θ | x) that q never visits, such as the other orders of K components.

    Args:
        log_weights: log p(x, θ_l) − log q(θ_l) of L draws for each image, (L, B).

    Returns:
        (B,), in double precision: −∞ where the largest weights are equal to a thousandth, as the exact posterior's are;
        ∞ where the tail cannot be fitted: hardly any weight is above zero, or by ArviZ 1 where many are tied; NaN where
        a weight is NaN or ∞.

    Raises:
        DataError: no tensor, a shape that is not (L, B), or L < 30.

    >>> log_weights = -0.5 * torch.rand(1000, 2).log()  # P(w > v) = v⁻², for which k = 0.5
    >>> bool((psis_k_hat(log_weights) - 0.5).abs().max() < 0.4)
    True
    """
    if not isinstance(log_weights, Tensor):
        raise DataError(
            f"log_weights must be a tensor, but is of type {type(log_weights).__name__}: give torch.as_tensor of it"
        )
    if log_weights.dim() != 2 or len(log_weights) < LEAST_WEIGHTS:
        raise DataError(
            f"log_weights has shape {tuple(log_weights.shape)}, but this needs (L, B), L ≥ {LEAST_WEIGHTS} weights for "
            "each image: the tail of fewer has too few to be fitted; take more draws, 1,000 say"
        )
    values = log_weights.detach().double().T.contiguous()
    L = values.shape[1]
    tail = values.topk(int(min(L / 5, 3 * L**0.5))).values
    valid = ~(values.isnan() | (values == torch.inf)).any(1)
    equal = valid & (tail[:, 0] - tail[:, -1] < EQUAL)
    k_hat = torch.full_like(tail[:, 0], torch.nan)
    k_hat[equal] = -torch.inf
    fitted = valid & ~equal
    if bool(fitted.any()):
        found = torch.from_numpy(_fitted(values[fitted].cpu().numpy())).to(k_hat)
        k_hat[fitted] = found.where(~found.isnan(), torch.inf)
    return k_hat


def unreliable(k_hat: Tensor) -> Tensor:
    """1 for images whose k̂ is above 0.7, or NaN, and else 0: (B,), in double precision."""
    return (~(k_hat <= GOOD_K_HAT)).double()


def k_hat_findings(k_hat: Tensor) -> list[Finding]:
    """Whether k̂ is too large for more images than its own error explains."""
    share = unreliable(k_hat).mean().item()
    if share <= TOLERATED:
        return []
    return [
        Finding(
            "unreliable importance weights",
            f"k̂ of the importance weights is above {GOOD_K_HAT} for {share:.0%} of {len(k_hat)} images",
            share,
            "q(θ) misses parts of p(θ | x): estimate log p(x) by annealed_importance_sampling, refine q by "
            "SemiAmortised, or give it a full covariance (PyroGuide); around a Delta, give a normal of another width",
        )
    ]


def _fitted(log_weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """k̂ of weights (B, L), by the ArviZ that is installed: (B,)."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # On its first import of a day ArviZ 0.23 announces its successor.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        if int(version("arviz").partition(".")[0]) < 1:
            return np.asarray(importlib.import_module("arviz").psislw(log_weights)[1])
        # It takes log-likelihoods, of which the weights are the inverse.
        array_stats = importlib.import_module("arviz_stats.base").array_stats
        return np.asarray(array_stats.psislw(-log_weights)[1])
