"""Student's t distribution of several channels: a normal whose scale varies from item to item."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.models.errors import ModelError
from pnem.models.likelihoods import Likelihood
from pnem.models.linear_algebra import half_log_det, marginals, squared_distance
from pnem.models.multivariate_normal import MultivariateNormal

__all__ = ["StudentT"]


class StudentT(Likelihood):
    r"""Multivariate Student t: outliers pull its location less the farther away they are.

        log p(x | ψ) = log Γ((ν + C)/2) − log Γ(ν/2) − C/2 log(νπ) − ½ log|Σ| − (ν + C)/2 log(1 + δ/ν)

    with δ = (x − μ)ᵀ Σ⁻¹ (x − μ): a mixture over u ~ Gamma(ν/2, ν/2) of normals N(μ, Σ/u). ψ holds what
    `MultivariateNormal` of the same covariance holds for the location μ and the scale matrix Σ, and then log ν.

    Args:
        covariance: the form of Σ: ``"spherical"``, ``"diagonal"``, ``"full"``, or ``"tied"``: one for all components.
        degrees_of_freedom: ν, where it is known; None to have every component's fitted.
        shared: whether components share the fitted ν.
        floor: added to the variances in Σ that a fit finds.

    Raises:
        ModelError: ν is not positive, both given and shared, or as `MultivariateNormal`.

    >>> StudentT(degrees_of_freedom=1.0).log_prob(torch.zeros(1, 1), torch.zeros(1, 3)).exp()  # Cauchy: 1/π
    tensor([0.3183])
    """

    def __init__(
        self,
        covariance: str = "full",
        *,
        degrees_of_freedom: float | None = None,
        shared: bool = False,
        floor: float = 1e-6,
    ):
        super().__init__()
        if degrees_of_freedom is not None and (shared or not 0 < degrees_of_freedom < math.inf):
            raise ModelError(
                "degrees_of_freedom must be one positive number, or None to be fitted per component or shared, "
                f"but is {degrees_of_freedom} with shared={shared}"
            )
        self.normal = MultivariateNormal(covariance, floor=floor)
        self.fixed = degrees_of_freedom
        self.shared = shared

    def num_parameters(self, channels: int) -> int:  # noqa: D102
        return self.normal.num_parameters(channels) + 1

    def num_channels(self, parameters: int) -> int:  # noqa: D102
        return self.normal.num_channels(parameters - 1)

    def moments(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """The location (..., C), and L (..., C, C) of the scale matrix Σ = L Lᵀ."""
        return self.normal.moments(psi[..., :-1])

    def degrees_of_freedom(self, psi: Tensor) -> Tensor:
        """ν: (..., P) -> (...)."""
        return psi[..., -1].exp()

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        location, lower = self.moments(psi)
        return dist.MultivariateStudentT(self.degrees_of_freedom(psi), location, lower, validate_args=False)

    def log_density(self, distance: Tensor, half_log_det: Tensor, channels: Tensor | int, psi: Tensor) -> Tensor:
        """The formula above in nats, for δ (..., D), ½ log|Σ| and C of the channels that are there."""
        df = self.degrees_of_freedom(psi)
        half = 0.5 * (df + channels)
        constant = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * channels * (df * math.pi).log() - half_log_det
        return constant - half * (distance / df).log1p()

    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:  # noqa: D102
        location, lower = self.moments(psi)
        return [
            self.log_density(squared_distance(x - location, lower), half_log_det(lower), x.shape[-1], psi) for x in xs
        ]

    def log_marginal(self, x: Tensor, psi: Tensor) -> Tensor:  # noqa: D102
        location, lower = self.moments(psi)
        return marginals(
            x, location, lower, lambda distance, half_log_det, C: self.log_density(distance, half_log_det, C, psi)
        )

    def mean(self, psi: Tensor) -> Tensor:
        """The location, which is the mean where ν > 1: (..., D, P) -> (..., D, C)."""
        return self.normal.mean(psi[..., :-1])

    def saturated_log_prob(self, x: Tensor) -> Tensor:
        """Infinite: a t of free scale at x has unbounded density there."""
        return x.new_full(x.shape[:-1], math.inf)
