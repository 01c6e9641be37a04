"""The normal distribution of several channels, its covariance a part of ψ."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.models.errors import ModelError
from pnem.models.likelihoods import ExponentialFamily
from pnem.models.linear_algebra import half_log_det, marginals, squared_distance, symmetric

__all__ = ["MultivariateNormal"]

LOG_2PI = math.log(2 * math.pi)
# Items whose median is near enough to that of all.
SOME = 4096


class MultivariateNormal(ExponentialFamily):
    r"""Normal channels with a covariance of their own in every component.

    ψ holds the mean μ (C numbers) and the scale: ``"spherical"``: log σ; ``"diagonal"``: log σ_c for every channel;
    ``"full"``: the lower triangle, row by row, of L with Σ = L Lᵀ, its diagonal as logarithms; ``"tied"``: the same,
    with one Σ for all components.

    Args:
        covariance: which of these.
        floor: added to the variances that `match` finds, so that no component collapses onto a point.

    Raises:
        ModelError: an unknown covariance, or a negative floor.

    >>> MultivariateNormal("full").num_parameters(3)
    9
    """

    def __init__(self, covariance: str = "full", *, floor: float = 1e-6):
        super().__init__()
        if covariance not in ("spherical", "diagonal", "full", "tied"):
            raise ModelError(f'covariance must be "spherical", "diagonal", "full" or "tied", but is {covariance!r}')
        if not 0 <= floor < math.inf:
            raise ModelError(f"floor must be a finite variance of at least 0, but is {floor}")
        self.covariance = covariance
        self.floor = floor

    @property
    def _triangular(self) -> bool:
        return self.covariance in ("full", "tied")

    def num_parameters(self, channels: int) -> int:  # noqa: D102
        return channels + {"spherical": 1, "diagonal": channels}.get(self.covariance, channels * (channels + 1) // 2)

    def num_channels(self, parameters: int) -> int:  # noqa: D102
        channels = 1
        while self.num_parameters(channels) < parameters:
            channels += 1
        if self.num_parameters(channels) != parameters:
            raise ModelError(
                f"a {self.covariance} normal cannot have {parameters} parameters: for C channels it has "
                f"{self.num_parameters(1)}, {self.num_parameters(2)}, {self.num_parameters(3)}, ..."
            )
        return channels

    def moments(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """The mean (..., C), and L (..., C, C) with Σ = L Lᵀ."""
        C = self.num_channels(psi.shape[-1])
        mean, scale = psi[..., :C], psi[..., C:]
        if not self._triangular:
            return mean, torch.diag_embed(scale.exp().expand(*scale.shape[:-1], C))
        rows, columns = torch.tril_indices(C, C, device=psi.device)
        lower = psi.new_zeros(*psi.shape[:-1], C, C)
        diagonal = rows == columns
        lower[..., rows, columns] = torch.where(diagonal, scale.where(diagonal, torch.zeros_like(scale)).exp(), scale)
        return mean, lower

    def psi(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """ψ for a mean (..., C) and a covariance matrix (..., C, C), of which only what ψ can hold is used.

        NaN where the covariance is not positive definite, even with its diagonal raised by as much as it is rounded.
        """
        C = mean.shape[-1]
        if not self._triangular:
            variance = covariance.diagonal(dim1=-2, dim2=-1)
            if self.covariance == "spherical":
                variance = variance.mean(-1, keepdim=True)
            return torch.cat([mean, _log_scale(variance)], -1)
        lower, info = torch.linalg.cholesky_ex(covariance)
        if bool((info != 0).any()):
            rounding = 8 * C * torch.finfo(covariance.dtype).eps * covariance.diagonal(dim1=-2, dim2=-1)
            rounding = rounding * (info != 0).unsqueeze(-1)
            lower, info = torch.linalg.cholesky_ex(covariance + torch.diag_embed(rounding))
        rows, columns = torch.tril_indices(C, C, device=mean.device)
        scale = lower[..., rows, columns]
        scale = torch.where(rows == columns, scale.clamp_min(0).log(), scale)
        return torch.cat([mean, scale.masked_fill((info != 0).unsqueeze(-1), math.nan)], -1)

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        mean, lower = self.moments(psi)
        return dist.MultivariateNormal(mean, scale_tril=lower, validate_args=False)

    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:  # noqa: D102
        # By whitening, which loses no digits where the mean is large against the scale.
        C = self.num_channels(psi.shape[-1])
        if not self._triangular:
            mean, log_scale = psi[..., :C], psi[..., C:].expand(*psi.shape[:-1], C)
            constant = log_scale.sum(-1) + 0.5 * C * LOG_2PI
            return [-0.5 * ((x - mean) * (-log_scale).exp()).square().sum(-1) - constant for x in xs]
        mean, lower = self.moments(psi)
        return [-0.5 * (squared_distance(x - mean, lower) + C * LOG_2PI) - half_log_det(lower) for x in xs]

    def log_marginal(self, x: Tensor, psi: Tensor) -> Tensor:  # noqa: D102
        mean, lower = self.moments(psi)
        return marginals(
            x, mean, lower, lambda distance, half_log_det, C: -0.5 * (distance + C * LOG_2PI) - half_log_det
        )

    @property
    def independent_channels(self) -> bool:  # noqa: D102
        return not self._triangular

    def statistics(self, x: Tensor) -> Tensor:
        """[x, x xᵀ]: of the latter the squares, or the lower triangle, as the covariance needs it."""
        if not self._triangular:
            return torch.cat([x, x.square()], -1)
        products = [x[..., : c + 1] * x[..., c : c + 1] for c in range(x.shape[-1])]
        return torch.cat([x, *products], -1)

    def spread(self, channels: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([channels, channels], -1)

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        if not self._triangular:
            C = self.num_channels(psi.shape[-1])
            mean, log_scale = psi[..., :C], psi[..., C:].expand(*psi.shape[:-1], C)
            precision = (-2 * log_scale).exp()
            log_partition = 0.5 * (precision * mean.square() + LOG_2PI) + log_scale
            return torch.cat([precision * mean, -0.5 * precision], -1), log_partition
        mean, lower = self.moments(psi)
        C = mean.shape[-1]
        precision = torch.cholesky_inverse(lower)
        linear = (precision @ mean.unsqueeze(-1)).squeeze(-1)
        rows, columns = torch.tril_indices(C, C, device=psi.device)
        # Every entry off the diagonal stands for two.
        quadratic = precision[..., rows, columns] * torch.where(rows == columns, -0.5, -1.0).to(psi.dtype)
        log_partition = 0.5 * ((linear * mean).sum(-1) + C * LOG_2PI) + half_log_det(lower)
        return torch.cat([linear, quadratic], -1), log_partition.unsqueeze(-1)

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        first, second = self.split(mean)
        outer = first.unsqueeze(-1) * first.unsqueeze(-2) if self._triangular else first.square()
        return self.fit(first, second - outer, weight)

    def split(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """T (..., S) as x (..., C) and its products: (..., C, C), or squares (..., C) of independent channels."""
        if not self._triangular:
            first, second = statistics.chunk(2, -1)
            return first, second
        # S = C + C (C + 1) / 2, as P.
        C = self.num_channels(statistics.shape[-1])
        return statistics[..., :C], symmetric(statistics[..., C:], C)

    def fit(self, mean: Tensor, covariance: Tensor, weight: Tensor) -> Tensor:
        """ψ of K components, from their own means and covariances as `split` shapes them, floor added.

        What components or channels share is the mean of their own at the given weights, (..., K, 1) or (..., K, C).
        """
        if self._triangular:
            if self.covariance == "tied":
                share = (weight / weight.sum(-2, keepdim=True)).unsqueeze(-1)
                covariance = (share * covariance).sum(-3, keepdim=True).expand_as(covariance)
            return self.psi(
                mean, covariance + self.floor * torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
            )
        if self.covariance == "spherical":
            # A component that owns nothing weighs its channels equally.
            weight = weight.expand_as(covariance).clamp_min(torch.finfo(weight.dtype).tiny)
            covariance = (weight * covariance).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)
        return torch.cat([mean, _log_scale(covariance + self.floor)], -1)

    def origin(self, x: Tensor) -> Tensor:
        """The median of some items, which one far item cannot move."""
        some = x[..., :: max(1, x.shape[-2] // SOME), :].nanmedian(-2, keepdim=True).values
        if bool(some.isnan().any()):
            some = x.nanmedian(-2, keepdim=True).values.nan_to_num()
        return some

    def translate(self, psi: Tensor, shift: Tensor) -> Tensor:  # noqa: D102
        C = self.num_channels(psi.shape[-1])
        return torch.cat([psi[..., :C] + shift, psi[..., C:]], -1)

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return psi[..., : self.num_channels(psi.shape[-1])]

    def saturated_log_prob(self, x: Tensor) -> Tensor:
        """Infinite: a normal of free variance at x has unbounded density there."""
        return x.new_full(x.shape[:-1], math.inf)


def _log_scale(variance: Tensor) -> Tensor:
    """log σ; NaN where there is none."""
    return 0.5 * variance.masked_fill(variance <= 0, math.nan).log()
