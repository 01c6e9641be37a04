"""The M-step of every exponential family: match the γ-weighted mean of T(x)."""

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.inference.m_steps import Count, EStep, MStep, Parameters, register_m_step
from pnem.models import MultivariateNormal, NormalInverseWishart, SpatialMixture, decoders
from pnem.models.likelihoods import ExponentialFamily, present_channels

__all__ = ["MatchMoments"]


@register_m_step(decoders.Constant, ExponentialFamily)  # type: ignore[type-abstract]
class MatchMoments(MStep):
    """Exponential families: the parameters whose E[T] is the γ-weighted mean of T(x).

    Both steps are one matrix product against [T(x), 1], of items taken relative to an origin among them. Where values
    are missing and channels independent, a channel's mean is over the items that have it.
    """

    def __init__(self, model: SpatialMixture, x: Tensor, *, missing: bool):
        super().__init__(model, x, missing=missing)
        assert isinstance(model.likelihood, ExponentialFamily)
        self.family = model.likelihood
        self.origin = self.family.origin(x)

    @classmethod
    def choose(cls, model: SpatialMixture, *, missing: bool) -> type[MStep]:  # noqa: D102
        assert isinstance(model.likelihood, ExponentialFamily)
        if missing and not model.likelihood.independent_channels:
            raise StrategyError(
                f"no closed-form M-step for {type(model.likelihood).__name__} with missing values: x must hold no NaN"
            )
        return cls

    def prepare(self, x: Tensor) -> Tensor:
        """[T, which channels are there (only with missing values), 1, log h]."""
        present, x = present_channels(x - self.origin) if self.missing else (None, x - self.origin)
        base = self.family.log_base_measure(x).unsqueeze(-1)
        statistics = self.family.statistics(x)
        if present is None:
            return torch.cat([statistics, torch.ones_like(base), base], -1)
        return torch.cat([statistics * self.family.spread(present), present, torch.ones_like(base), base], -1)

    def begin(self, prepared: Tensor) -> Count:  # noqa: D102
        def count(gamma: Tensor) -> Tensor:
            statistics = gamma.flatten(-2).transpose(-1, -2) @ prepared[..., :-1]
            return statistics.unflatten(1, gamma.shape[-2:]).transpose(0, 1)

        return count

    def at(self, parameters: Parameters) -> EStep:  # noqa: D102
        R, _, K, _ = parameters.theta.shape
        eta, log_partition = self.family.natural(self.family.translate(parameters.theta, -self.origin))
        log_mixing = parameters.log_mixing.unsqueeze(-1)
        whole = log_partition.sum(-1, keepdim=True)
        constants = [-log_partition, log_mixing] if self.missing else [log_mixing - whole]
        coefficients = torch.cat([eta, *constants, torch.ones_like(log_mixing)], -1)
        coefficients = coefficients.transpose(0, 1).flatten(1, 2).transpose(-1, -2).contiguous()
        return lambda prepared: ((prepared @ coefficients).unflatten(-1, (R, K)), self.begin(prepared))

    def maximise(self, statistics: Tensor) -> Parameters:  # noqa: D102
        weight = statistics[..., -1:]
        if self.missing:
            C = self.model.num_channels
            total, owned = statistics[..., : -1 - C], statistics[..., -1 - C : -1]
            divisor = self.family.spread(owned)
        else:
            total, owned = statistics[..., :-1], weight
            divisor = owned
        if isinstance(self.model.prior, NormalInverseWishart):
            assert isinstance(self.family, MultivariateNormal)
            theta = self.family.fit(*self.model.prior.match(*self.family.split(total), owned, owned, self.origin))
        else:
            # A component that owns nothing gets the parameters of the whole, at a weight of zero.
            whole = divisor.sum(-2, keepdim=True)
            empty = divisor <= torch.finfo(whole.dtype).eps * whole
            mean = torch.where(empty, total.sum(-2, keepdim=True) / whole, total / divisor)
            theta = self.family.match(mean, owned)
        return Parameters(self.family.translate(theta, self.origin), self.log_mixing(weight.squeeze(-1)))
