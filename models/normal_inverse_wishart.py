"""The conjugate prior of normal components."""

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.models.decoders import Constant, Decoder
from pnem.models.errors import ModelError
from pnem.models.likelihoods import Likelihood
from pnem.models.linear_algebra import half_log_det
from pnem.models.multivariate_normal import LOG_2PI, MultivariateNormal
from pnem.models.priors import Prior
from pnem.models.student_t import StudentT

__all__ = ["NormalInverseWishart", "PriorDistribution"]


class PriorDistribution(dist.TorchDistribution):
    """A `NormalInverseWishart` as a Pyro distribution of θ, to be observed or replayed but not drawn from."""

    arg_constraints: dict[str, object] = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(
        self, prior: "NormalInverseWishart", likelihood: Likelihood, features: int, batch_shape: Sequence[int] = ()
    ):
        self.prior, self.likelihood = prior, likelihood
        super().__init__(torch.Size(batch_shape), torch.Size([features]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "PriorDistribution":  # noqa: D102
        return PriorDistribution(self.prior, self.likelihood, self.event_shape[0], batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:  # noqa: D102
        return self.prior.log_prob(value, self.likelihood)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        raise ModelError(f"{type(self.prior).__name__} cannot be drawn from: condition on theta, or fit it first")


class NormalInverseWishart(Prior):
    r"""The conjugate prior of a normal with free mean and covariance, μ | Σ ~ N(m, Σ/κ), Σ ~ InverseWishart(ν, Ψ).

    For spherical and diagonal covariances it is the product over channels of its form in one channel (normal-inverse
    gamma), for tied ones that over components at their common Σ. log p is the density of (μ, Σ), so that its
    mode is the usual maximum a posteriori, with

        Σ_k = (Ψ + Σ_i γ_{k,i} (x_i − μ_k)(x_i − μ_k)ᵀ + κ (μ_k − m)(μ_k − m)ᵀ) / (n_k + ν + C + 2)

    which stays positive definite however few items a component owns (Fraley & Raftery 2007).

    Args:
        mean: m, one number or one per channel.
        scale: Ψ, one number (times the identity), or its diagonal, or its rows; the mode of Σ alone is Ψ/(ν + C + 2).
        mean_precision: κ, how many items m counts as.
        degrees_of_freedom: ν, more than C − 1; C + 2 when None.

    Raises:
        ModelError: a scale that is not positive definite, κ or ν that are not positive and finite.

    >>> prior = NormalInverseWishart(mean=0.0, scale=1.0)
    >>> likelihood = MultivariateNormal("diagonal")
    >>> prior.log_prob(torch.zeros(4, 6), likelihood).shape
    torch.Size([4])
    """

    location: Tensor
    matrix: Tensor

    def __init__(
        self,
        mean: float | Sequence[float],
        scale: float | Sequence[float] | Sequence[Sequence[float]],
        *,
        mean_precision: float = 0.01,
        degrees_of_freedom: float | None = None,
    ):
        super().__init__()
        for name, value in (("mean_precision", mean_precision), ("degrees_of_freedom", degrees_of_freedom)):
            if value is not None and not 0 < value < math.inf:
                raise ModelError(f"{name} must be positive and finite, but is {value}")
        location, matrix = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, scale))
        if location.dim() > 1 or not bool(location.isfinite().all()):
            raise ModelError(f"the prior mean must be one finite number, or one per channel, but is {mean}")
        full = matrix if matrix.dim() == 2 else torch.diag(matrix.reshape(-1))
        square = matrix.dim() < 3 and full.shape[0] == full.shape[1]
        if not square or not bool(full.isfinite().all()) or not torch.equal(full, full.T):
            raise ModelError(f"the prior scale must be a number, a diagonal, or a symmetric matrix, but is {scale}")
        if int(torch.linalg.cholesky_ex(full).info):
            raise ModelError(f"the prior scale must be positive definite, but is {scale}")
        self.register_buffer("location", location, persistent=False)
        self.register_buffer("matrix", matrix, persistent=False)
        self.mean_precision = float(mean_precision)
        self.degrees_of_freedom = degrees_of_freedom

    def check(self, decoder: Decoder, likelihood: Likelihood) -> None:  # noqa: D102
        if not isinstance(decoder, Constant):
            raise ModelError(f"NormalInverseWishart is a prior for decoders.Constant, not {type(decoder).__name__}")
        channels = likelihood.num_channels(decoder.image_shape[2])
        if not isinstance(likelihood, MultivariateNormal | StudentT):
            raise ModelError(
                f"NormalInverseWishart is a prior for MultivariateNormal and StudentT, not {type(likelihood).__name__}"
            )
        for name, value in (("mean", self.location), ("scale", self.matrix)):
            if value.dim() and value.shape[0] != channels:
                raise ModelError(f"the prior {name} is of {value.shape[0]} channels, but the items have {channels}")
        if self.degrees_of_freedom is not None and not self.degrees_of_freedom > channels - 1:
            raise ModelError(
                f"degrees_of_freedom must be more than C - 1 = {channels - 1}, but is {self.degrees_of_freedom}"
            )

    def parameters_for(self, x: Tensor, independent: bool) -> tuple[Tensor, Tensor, float]:
        """m (C,), Ψ (C, C) and ν for channels as those of x (..., C), in its precision."""
        C = x.shape[-1]
        mean, matrix = self.location.to(x).expand(C), self.matrix.to(x)
        matrix = matrix if matrix.dim() == 2 else torch.diag(matrix.expand(C))
        default = (1 if independent else C) + 2
        return mean, matrix, float(default if self.degrees_of_freedom is None else self.degrees_of_freedom)

    def match(
        self, first: Tensor, second: Tensor, owned: Tensor, count: Tensor, origin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The most probable mean and covariance given items, and the weight these have where components share one.

        Args:
            first: Σ w (x − origin): (..., C).
            second: Σ w (x − origin)(x − origin)ᵀ: (..., C, C), or its diagonal (..., C) for independent channels.
            owned: Σ w of the items in these sums, (..., 1) or (..., C) by channel.
            count: how many items those are, which for a t is not the sum of their w: as `owned`.
            origin: (..., C).
        """
        independent = second.dim() == first.dim()
        m, matrix, df = self.parameters_for(first, independent)
        m, kappa = m - origin, self.mean_precision
        mean = (first + kappa * m) / (owned + kappa)
        if independent:
            scatter = second + matrix.diagonal() + kappa * m.square() - (owned + kappa) * mean.square()
            divisor = count + df + 3
            return mean, scatter / divisor, divisor
        outer = kappa * m.unsqueeze(-1) * m.unsqueeze(-2)
        scatter = second + matrix + outer - (owned + kappa).unsqueeze(-1) * mean.unsqueeze(-1) * mean.unsqueeze(-2)
        divisor = count + df + first.shape[-1] + 2
        return mean, scatter / divisor.unsqueeze(-1), divisor

    def distribution(self, likelihood: Likelihood, features: int) -> dist.TorchDistribution:  # noqa: D102
        return PriorDistribution(self, likelihood, features)

    def log_prob(self, theta: Tensor, likelihood: Likelihood) -> Tensor:
        """log p(θ_k) in nats: (..., M) -> (...)."""
        assert isinstance(likelihood, MultivariateNormal | StudentT)
        normal = likelihood.normal if isinstance(likelihood, StudentT) else likelihood
        mean, lower = likelihood.moments(theta)
        if normal.independent_channels:
            # Channel by channel, each a matrix of one entry.
            m, matrix, df = self.parameters_for(mean, independent=True)
            mean, m = mean.unsqueeze(-1), m.unsqueeze(-1)
            lower = lower.diagonal(dim1=-2, dim2=-1)[..., None, None]
            return self._log_prob(mean, lower, m, matrix.diagonal()[:, None, None], df).sum(-1)
        return self._log_prob(mean, lower, *self.parameters_for(mean, independent=False))

    def _log_prob(self, mean: Tensor, lower: Tensor, m: Tensor, matrix: Tensor, df: float) -> Tensor:
        C = mean.shape[-1]
        kappa, log_det = self.mean_precision, half_log_det(lower)
        solve = torch.linalg.solve_triangular
        distance = solve(lower, (mean - m).unsqueeze(-1), upper=False).square().sum((-2, -1))
        factor = torch.linalg.cholesky(matrix)
        trace = solve(lower, factor.expand_as(lower), upper=False).square().sum((-2, -1))
        half = torch.tensor(0.5 * df, dtype=mean.dtype, device=mean.device)
        normal = 0.5 * C * (math.log(kappa) - LOG_2PI) - log_det - 0.5 * kappa * distance
        constant = df * half_log_det(factor) - half * C * math.log(2) - torch.mvlgamma(half, C)
        return normal + constant - (df + C + 1) * log_det - 0.5 * trace
