"""Pixel likelihoods: each written once, for the Pyro program and for the tensor methods alike."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnem.models.closed_forms import bernoulli_terms
from pnem.models.config import Configured
from pnem.models.errors import ModelError

__all__ = ["Bernoulli", "ExponentialFamily", "Likelihood", "Normal", "extremes", "finite_logit", "present_channels"]


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

    def mean_and_log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> tuple[Tensor, list[Tensor]]:
        """`mean` and `log_probs`, where a likelihood can share more between them."""
        return self.mean(psi), self.log_probs(xs, psi)

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

    def log_marginal(self, x: Tensor, psi: Tensor) -> Tensor:
        """`log_prob` of the channels that are there: those that are NaN are summed or integrated out exactly.

        Raises:
            ModelError: this likelihood has no marginals in closed form.
        """
        raise ModelError(f"{type(self).__name__} cannot leave channels out: x must hold no NaN")

    def check(self, x: Tensor) -> None:
        """Raises `ModelError` where `x` is outside the likelihood's support; NaN, for a missing value, is inside."""


class ExponentialFamily(Likelihood):
    r"""A likelihood of the form p(x_i | ψ) = h(x_i) exp(⟨η(ψ), T(x_i)⟩ − A(ψ)).

    The log-likelihood of weighted items depends on them only through their weight and their weighted mean of T, and
    is largest where E[T] equals that mean (Dempster, Laird & Rubin 1977, section 2).
    """

    @property
    def independent_channels(self) -> bool:
        """Whether channels are independent given ψ, so that one that is missing just drops out of the sums."""
        return True

    @abstractmethod
    def statistics(self, x: Tensor) -> Tensor:
        """T(x): (..., D, C) -> (..., D, S)."""

    @abstractmethod
    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:
        """η(ψ) and A(ψ), in nats: (..., P) -> (..., S) and (..., C), or (..., 1) where channels are dependent.

        A is the sum of its last axis.
        """

    def spread(self, channels: Tensor) -> Tensor:
        """For every entry of T the value of its channel: (..., C) -> (..., S)."""
        return channels

    def log_base_measure(self, x: Tensor) -> Tensor:
        """log h(x) in nats: (..., D, C) -> (..., D)."""
        return x.new_zeros(x.shape[:-1])

    @abstractmethod
    def match(self, mean: Tensor, weight: Tensor) -> Tensor:
        """The most likely ψ of K components.

        Args:
            mean: the weighted mean of T over each component's items, (..., K, S).
            weight: the sum of those weights, (..., K, 1), or (..., K, C) where items with missing channels differ.

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
        log_partition = log_partition.sum(-1)
        return [(self.statistics(x) * eta).sum(-1) - log_partition + self.log_base_measure(x) for x in xs]

    def log_marginal(self, x: Tensor, psi: Tensor) -> Tensor:  # noqa: D102
        eta, log_partition = self.natural(psi)
        present, x = present_channels(x)
        statistics = self.statistics(x) * self.spread(present)
        return (statistics * eta).sum(-1) - (present * log_partition).sum(-1) + self.log_base_measure(x)


class Bernoulli(ExponentialFamily):
    """Binary pixels; ψ are logits, P = C. Grey values in [0, 1] count as expected bits.

    >>> Bernoulli().log_prob(torch.ones(1, 1), torch.zeros(1, 1))
    tensor([-0.6931])
    """

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        return dist.Bernoulli(logits=psi, validate_args=False).to_event(1)

    def log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> list[Tensor]:  # noqa: D102
        return _of_bits(xs, psi, -F.softplus(psi))

    def mean_and_log_probs(self, xs: Sequence[Tensor], psi: Tensor) -> tuple[Tensor, list[Tensor]]:  # noqa: D102
        mean, log_p0 = bernoulli_terms(psi)
        return mean, _of_bits(xs, psi, log_p0)

    def statistics(self, x: Tensor) -> Tensor:  # noqa: D102
        return x

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return psi, F.softplus(psi)

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return finite_logit(mean)

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return psi.sigmoid()

    def score(self, x: Tensor, mean: Tensor) -> Tensor:  # noqa: D102
        return x - mean

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        return (torch.xlogy(x, x) + torch.xlogy(1 - x, 1 - x)).sum(-1)

    def check(self, x: Tensor) -> None:  # noqa: D102
        if bool(((x < 0) | (x > 1)).any()):
            low, high = extremes(x)
            raise ModelError(
                f"Bernoulli pixels must lie in [0, 1], but x goes from {low:.4g} to {high:.4g}: "
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

    def log_marginal(self, x: Tensor, psi: Tensor) -> Tensor:  # noqa: D102
        log_normaliser = self.log_sigma + 0.5 * math.log(2 * math.pi)
        present, x = present_channels(x)
        return (present * (-0.5 * ((x - psi) / self.sigma).square() - log_normaliser)).sum(-1)

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return psi

    def score(self, x: Tensor, mean: Tensor) -> Tensor:  # noqa: D102
        return (x - mean) / self.sigma.square()

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.log_prob(x, x)


def _of_bits(xs: Sequence[Tensor], logits: Tensor, log_p0: Tensor) -> list[Tensor]:
    return [_sum_channels(torch.addcmul(log_p0, x, logits)) for x in xs]


def _sum_channels(values: Tensor) -> Tensor:
    # A sum over one channel would be a copy.
    return values.squeeze(-1) if values.shape[-1] == 1 else values.sum(-1)


def present_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """1 where x is there and 0 where it is NaN, and x with zeros for NaN."""
    missing = x.isnan()
    return (~missing).to(x.dtype), x.masked_fill(missing, 0)


def extremes(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest value that is not NaN."""
    return x.nan_to_num(math.inf, math.inf, -math.inf).min().item(), x.nan_to_num(-math.inf).max().item()


def finite_logit(p: Tensor) -> Tensor:
    """log p − log(1 − p), finite also at 0 and 1."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log() - (1 - p).clamp_min(torch.finfo(p.dtype).eps).log()
