"""Pixel likelihoods: each written once, for the Pyro program and for the tensor methods alike."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnem.models.config import Configured
from pnem.models.errors import ModelError

__all__ = ["Bernoulli", "ExponentialFamily", "Likelihood", "Normal", "finite_logit"]


class Likelihood(Configured, nn.Module, ABC):
    """p(x_i | ψ_{k,i}): how a pixel with C channels follows from its P unconstrained parameters.

    One z per pixel: all its channels come from the same component.
    """

    def num_parameters(self, channels: int) -> int:
        """P, for pixels of C channels."""
        return channels

    def num_channels(self, parameters: int) -> int:
        """C, for pixels of P parameters.

        Raises:
            ModelError: no number of channels has that many.
        """
        return parameters

    @abstractmethod
    def distribution(self, psi: Tensor) -> dist.TorchDistribution:
        """The distribution with batch shape (..., D) and event shape (C,) for `psi` (..., D, P)."""

    def log_prob(self, x: Tensor, psi: Tensor) -> Tensor:
        """log p(x_i | ψ_i) in nats, summed over channels: x (..., D, C), psi (..., D, P) -> (..., D)."""
        return self.log_probs([x], psi)[0]

    @abstractmethod
    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:
        """`log_prob` of several images under the same ψ, so that what they share is computed once."""

    @abstractmethod
    def mean(self, psi: Tensor) -> Tensor:
        """E[x_i | ψ_i]: (..., D, P) -> (..., D, C)."""

    def score(self, x: Tensor, mean: Tensor) -> Tensor:
        """∂ log p(x_i | ψ_i) / ∂ψ_i at the ψ whose mean is given: x, mean (..., D, C) -> (..., D, P).

        Raises:
            ModelError: this likelihood's ψ is not a function of its mean.
        """
        raise ModelError(
            f"{type(self).__name__} has no score at a mean: N-EM needs Bernoulli, Normal or Poisson pixels"
        )

    @abstractmethod
    def saturated_log_prob(self, x: Tensor) -> Tensor:
        """max over ψ of log p(x_i | ψ), as in the deviance of a generalised linear model: (..., D, C) -> (..., D)."""

    def check(self, x: Tensor) -> None:
        """Raises `ModelError` where `x` is outside the likelihood's support."""


class ExponentialFamily(Likelihood):
    r"""A likelihood of the form p(x_i | ψ) = h(x_i) exp(⟨η(ψ), T(x_i)⟩ − A(ψ)).

    The log-likelihood of weighted items depends on them only through their weight and their weighted mean of T, and
    is largest where E[T] equals that mean (Dempster, Laird & Rubin 1977, section 2).
    """

    @abstractmethod
    def statistics(self, x: Tensor) -> Tensor:
        """T(x): (..., D, C) -> (..., D, S)."""

    @abstractmethod
    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """η(ψ) and A(ψ), in nats: (..., P) -> (..., S) and (...)."""

    def log_base_measure(self, x: Tensor) -> Tensor:
        """log h(x) in nats: (..., D, C) -> (..., D)."""
        return x.new_zeros(x.shape[:-1])

    @abstractmethod
    def match(self, mean: Tensor, weight: Tensor) -> Tensor:
        """The most likely ψ of K components.

        Args:
            mean: the weighted mean of T over each component's items, (..., K, S).
            weight: the sum of those weights, (..., K).

        Returns:
            ψ, (..., K, P); NaN for components that have none, as a normal on a single point.
        """

    def origin(self, x: Tensor) -> Tensor:
        """Where to put the origin so that T(x) loses no digits: (B, D, C) -> (B, 1, C); 0 unless x may be moved."""
        return x.new_zeros(len(x), 1, x.shape[-1])

    def translate(self, psi: Tensor, shift: Tensor) -> Tensor:
        """ψ of x + shift, from ψ of x: psi (..., P), shift (..., C) -> (..., P)."""
        return psi

    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:  # noqa: D102
        eta, log_partition = self.natural(psi)
        return [(self.statistics(x) * eta).sum(-1) - log_partition + self.log_base_measure(x) for x in xs]


class Bernoulli(ExponentialFamily):
    """Binary pixels; ψ are logits, P = C. Grey values in [0, 1] count as expected bits.

    >>> Bernoulli().log_prob(torch.ones(1, 1), torch.zeros(1, 1))
    tensor([-0.6931])
    """

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        return dist.Bernoulli(logits=psi, validate_args=False).to_event(1)

    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:  # noqa: D102
        log_p0 = -F.softplus(psi)
        return [_sum_channels(torch.addcmul(log_p0, x, psi)) for x in xs]

    def statistics(self, x: Tensor) -> Tensor:  # noqa: D102
        return x

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return psi, F.softplus(psi).sum(-1)

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return finite_logit(mean)

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return psi.sigmoid()

    def score(self, x: Tensor, mean: Tensor) -> Tensor:  # noqa: D102
        return x - mean

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        return (torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(-1)

    def check(self, x: Tensor) -> None:  # noqa: D102
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise ModelError(
                f"Bernoulli pixels must lie in [0, 1], but x goes from {x.min():.4g} to {x.max():.4g}: "
                "rescale the images or use the Normal likelihood"
            )


class Normal(Likelihood):
    """Real-valued pixels; ψ are means, P = C.

    Args:
        sigma: standard deviation: one number, or one per channel.
        learn_sigma: whether σ is a parameter of the model, starting from `sigma`.

    Raises:
        ModelError: σ is not positive and finite.

    >>> Normal(sigma=0.25).log_prob(torch.ones(1, 1), torch.ones(1, 1))
    tensor([0.4674])
    """

    log_sigma: Tensor

    def __init__(self, sigma: float | tuple[float, ...] = 1.0, *, learn_sigma: bool = False):
        super().__init__()
        value = torch.as_tensor(sigma, dtype=torch.get_default_dtype())
        if value.dim() > 1 or not bool(((value > 0) & value.isfinite()).all()):
            raise ModelError(f"sigma must be one positive number, or one per channel, but is {sigma}")
        if learn_sigma:
            self.log_sigma = nn.Parameter(value.log())
        else:
            self.register_buffer("log_sigma", value.log())

    @property
    def sigma(self) -> Tensor:
        """The standard deviation: () or (C,)."""
        return self.log_sigma.exp()

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        return dist.Normal(psi, self.sigma.expand_as(psi), validate_args=False).to_event(1)

    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:  # noqa: D102
        log_normaliser = self.log_sigma + 0.5 * math.log(2 * math.pi)
        return [_sum_channels(-0.5 * ((x - psi) / self.sigma).square() - log_normaliser) for x in xs]

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return psi

    def score(self, x: Tensor, mean: Tensor) -> Tensor:  # noqa: D102
        return (x - mean) / self.sigma.square()

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.log_prob(x, x)


def _sum_channels(values: Tensor) -> Tensor:
    # A sum over one channel would be a copy.
    return values.squeeze(-1) if values.shape[-1] == 1 else values.sum(-1)


def finite_logit(p: Tensor) -> Tensor:
    """log p − log(1 − p), finite also at 0 and 1."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log() - (1 - p).clamp_min(torch.finfo(p.dtype).eps).log()
