"""The M-step of normal components: fast by matching moments, and exact where that would lose digits."""

import torch
from torch import Tensor

from pnem.inference.collectives import largest
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

    family: MultivariateNormal

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
        most = prepared[..., : self.model.num_channels].abs().amax(1)
        self.largest = most if self.largest is None else torch.maximum(self.largest, most)
        return prepared

    def begin(self, prepared: Tensor) -> Count:  # noqa: D102
        return self.exact.begin(self._split(prepared)) if self.by_exact else super().begin(prepared)

    def centre_on(self, statistics: Tensor | None) -> bool:  # noqa: D102
        self.by_exact = False
        if statistics is None:
            return self.exact.centre_on(None)
        count = statistics[..., -1:]
        S = self.family.statistics(statistics[..., : self.model.num_channels]).shape[-1]
        first, second = self.family.split(statistics[..., :S] / count)
        second = second if self.family.independent_channels else second.diagonal(dim1=-2, dim2=-1)
        lost = torch.finfo(second.dtype).eps * second > ROUNDING * (second - first.square()).abs()
        self.by_exact = not self.about_origin and bool(lost.any())
        return self.by_exact and self.exact.centre_on(torch.cat([first * count, count], -1))

    def _split(self, prepared: Tensor) -> Tensor:
        """[x, which channels are there], as the exact rule has items."""
        C = self.model.num_channels
        x = prepared[..., :C]
        present = prepared[..., -2 - C : -2] if self.missing else torch.ones_like(x)
        return torch.cat([x, present], -1)

    def agree(self) -> None:  # noqa: D102
        assert self.largest is not None
        self.largest = largest(self.largest)

    def at(self, parameters: Parameters) -> EStep:  # noqa: D102
        eta, _ = self.family.natural(self.family.translate(parameters.theta, -self.origin))
        assert self.largest is not None
        # The products in T are at most those of the largest values.
        size = (eta.abs() * self.family.statistics(self.largest).unsqueeze(1)).sum(-1)
        lost = bool((torch.finfo(size.dtype).eps * size > ROUNDING).any())
        self.by_exact = lost and not self.about_origin
        if not lost:
            return super().at(parameters)
        e_step = self.exact.at(parameters)

        def exactly(prepared: Tensor) -> tuple[Tensor, Count]:
            log_joint, count = e_step(self._split(prepared))
            return log_joint, count if self.by_exact else super(NormalMoments, self).begin(prepared)

        return exactly

    def maximise(self, statistics: Tensor) -> Parameters:  # noqa: D102
        return self.exact.maximise(statistics) if self.by_exact else super().maximise(statistics)
