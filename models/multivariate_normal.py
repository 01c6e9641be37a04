"""The normal distribution of several channels, its covariance a part of ψ."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.models.errors import ModelError
from pnem.models.likelihoods import ExponentialFamily

__all__ = ["MultivariateNormal"]


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

        NaN where the covariance is not positive definite.
        """
        C = mean.shape[-1]
        if not self._triangular:
            variance = covariance.diagonal(dim1=-2, dim2=-1)
            if self.covariance == "spherical":
                variance = variance.mean(-1, keepdim=True)
            return torch.cat([mean, _log_scale(variance)], -1)
        lower, info = torch.linalg.cholesky_ex(covariance)
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
        mean, lower = self.moments(psi)
        log_determinant = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        results = []
        for x in xs:
            difference = (x - mean).unsqueeze(-1)
            white = torch.linalg.solve_triangular(lower, difference, upper=False).squeeze(-1)
            results.append(-0.5 * (white.square().sum(-1) + C * math.log(2 * math.pi)) - log_determinant)
        return results

    def statistics(self, x: Tensor) -> Tensor:
        """[x, x xᵀ]: of the latter the squares, their sum, or the lower triangle, as the covariance needs it."""
        if self.covariance == "spherical":
            return torch.cat([x, x.square().sum(-1, keepdim=True)], -1)
        if self.covariance == "diagonal":
            return torch.cat([x, x.square()], -1)
        products = [x[..., : c + 1] * x[..., c : c + 1] for c in range(x.shape[-1])]
        return torch.cat([x, *products], -1)

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        mean, lower = self.moments(psi)
        C = mean.shape[-1]
        precision = torch.cholesky_inverse(lower)
        linear = (precision @ mean.unsqueeze(-1)).squeeze(-1)
        if self.covariance == "spherical":
            quadratic = -0.5 * precision[..., :1, 0]
        elif self.covariance == "diagonal":
            quadratic = -0.5 * precision.diagonal(dim1=-2, dim2=-1)
        else:
            rows, columns = torch.tril_indices(C, C, device=psi.device)
            # Every entry off the diagonal stands for two.
            quadratic = precision[..., rows, columns] * torch.where(rows == columns, -0.5, -1.0).to(psi.dtype)
        log_partition = (
            0.5 * (linear * mean).sum(-1)
            + lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            + 0.5 * C * math.log(2 * math.pi)
        )
        return torch.cat([linear, quadratic], -1), log_partition

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        # S = C + (1, C or C (C + 1) / 2), as P.
        C = self.num_channels(mean.shape[-1])
        first, second = mean[..., :C], mean[..., C:]
        if self.covariance == "spherical":
            variance = (second - first.square().sum(-1, keepdim=True)) / C
            return torch.cat([first, _log_scale(variance + self.floor)], -1)
        if self.covariance == "diagonal":
            return torch.cat([first, _log_scale(second - first.square() + self.floor)], -1)
        rows, columns = torch.tril_indices(C, C, device=mean.device)
        entries = second - first[..., rows] * first[..., columns]
        if self.covariance == "tied":
            share = weight / weight.sum(-1, keepdim=True)
            entries = (share.unsqueeze(-1) * entries).sum(-2, keepdim=True).expand_as(entries)
        matrix = entries.new_zeros(*entries.shape[:-1], C, C)
        matrix[..., rows, columns] = entries
        matrix = matrix.tril(-1).transpose(-1, -2) + matrix.tril()
        return self.psi(first, matrix + self.floor * torch.eye(C, dtype=mean.dtype, device=mean.device))

    def origin(self, x: Tensor) -> Tensor:
        """The median, which one far item cannot move."""
        return x.median(-2, keepdim=True).values

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
