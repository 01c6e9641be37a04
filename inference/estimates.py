"""An estimate of log p(x) of every image, with its errors."""

import math
from typing import NamedTuple

from torch import Tensor

from pnem.inference.errors import StrategyError

__all__ = ["Estimate", "check_counts", "log_mean_weight"]


class Estimate(NamedTuple):
    """An estimate of log p(x) of every image, or of a bound on it, in nats per image and in double precision.

    A weight that is NaN makes its image's estimate NaN, and the mean over images with it.

    Attributes:
        log_marginal: (B,).
        monte_carlo_error: (B,), the standard error of `log_marginal` from its random draws; NaN for a single draw. From
            few draws of very unequal weights it is too small: look at `effective_sample_size`.
        effective_sample_size: (B,), (Σ w)² / Σ w², of how many equal weights the estimate is worth; None where
            nothing is weighted.
        acceptance: (B,), the share of Markov transitions that were accepted; None where there are none.

    >>> import torch
    >>> Estimate(torch.tensor([-3.0, -5.0]), torch.tensor([0.3, 0.4]))
    Estimate(mean=-4, standard_error=1, monte_carlo_error=0.25, images=2)
    """

    log_marginal: Tensor
    monte_carlo_error: Tensor
    effective_sample_size: Tensor | None = None
    acceptance: Tensor | None = None

    @property
    def mean(self) -> float:
        """The mean over images."""
        return self.log_marginal.mean().item()

    @property
    def standard_error(self) -> float:
        """Of `mean`, over images and draws: the sample standard deviation over √B; NaN for a single image."""
        count = len(self.log_marginal)
        return math.sqrt(self.log_marginal.var().item() / count) if count > 1 else math.nan

    @property
    def monte_carlo_error_of_mean(self) -> float:
        """The part of `standard_error` that is from the draws, and that more of them make smaller."""
        return self.monte_carlo_error.norm().item() / len(self.monte_carlo_error)

    def __repr__(self) -> str:
        return (
            f"Estimate(mean={self.mean:.6g}, standard_error={self.standard_error:.3g}, "
            f"monte_carlo_error={self.monte_carlo_error_of_mean:.3g}, images={len(self.log_marginal)})"
        )


def log_mean_weight(total: Tensor, squares: Tensor, samples: int) -> Estimate:
    """log 1/L Σ w and, by the delta method, its standard error, from log Σ w and log Σ w² of L independent weights.

    The error of log w̄ is that of w̄ over w̄: its square is (L Σ w² / (Σ w)² − 1) / (L − 1).
    """
    effective = (2 * total - squares).exp()
    # Of equal weights rounding can make the difference negative.
    variance = (samples / effective - 1).clamp_min(0) / (samples - 1) if samples > 1 else effective * math.nan
    return Estimate(total - math.log(samples), variance.sqrt(), effective)


def check_counts(**counts: int) -> None:
    """Raises `StrategyError` unless all are whole numbers of at least 1."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise StrategyError(f"{name} must be at least 1, and whole, but is {value!r}")
