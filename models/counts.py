"""Exponential families of counts and categories."""

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

from pnem.models.errors import ModelError
from pnem.models.likelihoods import ExponentialFamily, extremes, finite_logit

__all__ = ["Binomial", "Categorical", "Poisson"]


class Poisson(ExponentialFamily):
    """Counts 0, 1, 2, ...; ψ are log rates, P = C.

    >>> Poisson().log_prob(torch.ones(1, 1), torch.zeros(1, 1))
    tensor([-1.])
    """

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        return dist.Poisson(psi.exp(), validate_args=False).to_event(1)

    def statistics(self, x: Tensor) -> Tensor:  # noqa: D102
        return x

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return psi, psi.exp()

    def log_base_measure(self, x: Tensor) -> Tensor:  # noqa: D102
        return -torch.lgamma(x + 1).sum(-1)

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return psi.exp()

    def score(self, x: Tensor, mean: Tensor) -> Tensor:  # noqa: D102
        return x - mean

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        return (torch.xlogy(x, x) - x).sum(-1) + self.log_base_measure(x)

    def check(self, x: Tensor) -> None:  # noqa: D102
        _require_counts(x, "Poisson")


class Binomial(ExponentialFamily):
    """Counts of successes among `trials`; ψ are logits, P = C.

    Raises:
        ModelError: trials < 1.

    >>> Binomial(3).log_prob(torch.ones(1, 1), torch.zeros(1, 1)).exp()
    tensor([0.3750])
    """

    def __init__(self, trials: int):
        super().__init__()
        if trials < 1:
            raise ModelError(f"trials must be at least 1, but is {trials}")
        self.trials = trials

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        return dist.Binomial(self.trials, logits=psi, validate_args=False).to_event(1)

    def statistics(self, x: Tensor) -> Tensor:  # noqa: D102
        return x

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return psi, self.trials * F.softplus(psi)

    def log_base_measure(self, x: Tensor) -> Tensor:  # noqa: D102
        n = torch.as_tensor(float(self.trials), dtype=x.dtype, device=x.device)
        return (torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(n - x + 1)).sum(-1)

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return finite_logit(mean / self.trials)

    def mean(self, psi: Tensor) -> Tensor:  # noqa: D102
        return self.trials * psi.sigmoid()

    def score(self, x: Tensor, mean: Tensor) -> Tensor:  # noqa: D102
        return x - mean

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        p = x / self.trials
        return (torch.xlogy(x, p) + torch.xlogy(self.trials - x, 1 - p)).sum(-1) + self.log_base_measure(x)

    def check(self, x: Tensor) -> None:  # noqa: D102
        _require_counts(x, "binomial", self.trials)


class Categorical(ExponentialFamily):
    """Categories 0, ..., S − 1 in every channel; ψ are unnormalised log-probabilities, P = C · S, channel by channel.

    Raises:
        ModelError: fewer than two categories.

    >>> Categorical(4).log_prob(torch.ones(1, 1), torch.zeros(1, 4)).exp()
    tensor([0.2500])
    """

    def __init__(self, categories: int):
        super().__init__()
        if categories < 2:
            raise ModelError(f"categories must be at least 2, but is {categories}")
        self.categories = categories

    def num_parameters(self, channels: int) -> int:  # noqa: D102
        return channels * self.categories

    def num_channels(self, parameters: int) -> int:  # noqa: D102
        channels, rest = divmod(parameters, self.categories)
        if rest:
            raise ModelError(
                f"a Categorical over {self.categories} categories needs a multiple of {self.categories} parameters "
                f"a pixel, but the decoder gives {parameters}"
            )
        return channels

    def distribution(self, psi: Tensor) -> dist.TorchDistribution:  # noqa: D102
        return dist.Categorical(logits=psi.unflatten(-1, (-1, self.categories)), validate_args=False).to_event(1)

    def statistics(self, x: Tensor) -> Tensor:  # noqa: D102
        codes = torch.arange(self.categories, device=x.device, dtype=x.dtype)
        return (x.unsqueeze(-1) == codes).to(x.dtype).flatten(-2)

    def natural(self, psi: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        eta = psi.unflatten(-1, (-1, self.categories)).log_softmax(-1).flatten(-2)
        return eta, psi.new_zeros(*psi.shape[:-1], psi.shape[-1] // self.categories)

    def spread(self, channels: Tensor) -> Tensor:  # noqa: D102
        return channels.repeat_interleave(self.categories, -1)

    def match(self, mean: Tensor, weight: Tensor) -> Tensor:  # noqa: D102
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def mean(self, psi: Tensor) -> Tensor:
        """The most probable category: (..., D, P) -> (..., D, C)."""
        return psi.unflatten(-1, (-1, self.categories)).argmax(-1).to(psi.dtype)

    def saturated_log_prob(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.new_zeros(x.shape[:-1])

    def check(self, x: Tensor) -> None:  # noqa: D102
        _require_counts(x, "categorical", self.categories - 1)


def _require_counts(x: Tensor, name: str, largest: int | None = None) -> None:
    whole = not bool(((x < 0) | (x != x.round()) & ~x.isnan()).any())
    if not whole or (largest is not None and bool((x > largest).any())):
        upper = "" if largest is None else f" up to {largest}"
        low, high = extremes(x)
        raise ModelError(
            f"{name} pixels must be whole numbers from 0{upper}, but x goes from {low:.4g} to {high:.4g}"
            + ("" if whole else ", not all of them whole and non-negative")
        )
