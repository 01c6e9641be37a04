"""The M-step of normal components: fast by matching moments, and exact where that would lose digits."""

import torch
from torch import Tensor

from pnem.inference.m_steps import Count, EStep, MStep, Parameters, register_m_step
from pnem.inference.match_moments import MatchMoments
from pnem.inference.normal_scale_mixtures import NormalScaleMixture
from pnem.models import MultivariateNormal, NormalInverseWishart, SpatialMixture, decoders

__all__ = ["NormalMoments"]

# The most that rounding may change log p(x_i, z_i = k), in nats.
ROUNDING = 1e-6


@register_m_step(decoders.Constant, MultivariateNormal)
@register_m_step(decoders.Constant, MultivariateNormal, NormalInverseWishart)
class NormalMoments(MatchMoments):
    """`MatchMoments`, but `NormalScaleMixture` with u = 1 while some items are far away in units of a component's σ.

    ⟨η, T(x)⟩ is of the order of (x/σ)², which rounds off what matters at some 10⁴ σ.
    """

    def __init__(self, model: SpatialMixture, x: Tensor, *, missing: bool):
        super().__init__(model, x, missing=missing)
        self.exact = NormalScaleMixture(model, x, missing=missing)
        self.by_exact = False
        self.largest: Tensor | None = None

    @classmethod
    def choose(cls, model: SpatialMixture, *, missing: bool) -> type[MStep]:
        """Moments are matched unless what is missing depends on what is there."""
        assert isinstance(model.likelihood, MultivariateNormal)
        return NormalScaleMixture if missing and not model.likelihood.independent_channels else cls

    def prepare(self, x: Tensor) -> Tensor:  # noqa: D102
        prepared = super().prepare(x)
        largest = prepared[..., : self.model.num_channels].abs().amax(1)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        return prepared

    def begin(self, prepared: Tensor) -> Count:  # noqa: D102
        self.by_exact = False
        return super().begin(prepared)

    def at(self, parameters: Parameters) -> EStep:  # noqa: D102
        eta, _ = self.family.natural(self.family.translate(parameters.theta, -self.origin))
        assert self.largest is not None
        # The products in T are at most those of the largest values.
        size = (eta.abs() * self.family.statistics(self.largest).unsqueeze(1)).sum(-1)
        self.by_exact = not self.about_origin and bool((torch.finfo(size.dtype).eps * size > ROUNDING).any())
        if not self.by_exact:
            return super().at(parameters)
        e_step = self.exact.at(parameters)
        S, C = eta.shape[-1], self.model.num_channels

        def exactly(prepared: Tensor) -> tuple[Tensor, Count]:
            x = prepared[..., :C]
            present = prepared[..., S : S + C] if self.missing else torch.ones_like(x)
            return e_step(torch.cat([x, present], -1))

        return exactly

    def maximise(self, statistics: Tensor) -> Parameters:  # noqa: D102
        return self.exact.maximise(statistics) if self.by_exact else super().maximise(statistics)
