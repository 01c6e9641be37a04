"""M-steps by conditional moments: Student's t, and the normal distribution where values are missing."""

import functools
import math

import torch
from torch import Tensor

from pnem.inference.conditionals import Conditionals, Group, condition, group_by_channels, one_group, patterns
from pnem.inference.m_steps import Count, EStep, MStep, Parameters, register_m_step
from pnem.models import MultivariateNormal, NormalInverseWishart, SpatialMixture, StudentT, decoders
from pnem.models.likelihoods import present_channels
from pnem.models.multivariate_normal import LOG_2PI

__all__ = ["NormalScaleMixture"]

# Beyond this many degrees of freedom a t is a normal to all digits that matter.
LARGEST_DF, SMALLEST_DF, FIRST_DF = 1e6, 1e-2, 10.0
# What a component that owns nothing is taken to own of what it was.
TRACE = 1e-200


@register_m_step(decoders.Constant, StudentT)
@register_m_step(decoders.Constant, StudentT, NormalInverseWishart)
class NormalScaleMixture(MStep):
    r"""x_i | z_i = k ~ N(μ_k, Σ_k / u_i), with u_i ~ Gamma(ν_k/2, ν_k/2) for a t and u_i = 1 for a normal.

    The E-step takes the expectations E[u | x] = (ν + C)/(ν + δ) and E[log u | x] of the latent scales, and of absent
    channels their conditional moments given those that are there (Little & Rubin 2019, chapter 11). With the scale
    matrix divided by Σ γ u in place of Σ γ, where components do not share it, EM climbs faster and still monotonely
    (parameter-expanded EM: Liu, Rubin & Wu 1998, section 4). ν solves

        log(ν/2) − digamma(ν/2) = log(mean u) − mean E[log u]

    Statistics are taken about the present means, so that far items cost no digits; but where `about_origin`, for their
    sums to outlive the means.
    """

    def __init__(self, model: SpatialMixture, x: Tensor, *, missing: bool):
        super().__init__(model, x, missing=missing)
        assert isinstance(model.likelihood, MultivariateNormal | StudentT)
        self.likelihood = model.likelihood
        self.student = model.likelihood if isinstance(model.likelihood, StudentT) else None
        self.normal = model.likelihood.normal if isinstance(model.likelihood, StudentT) else model.likelihood
        self.origin = self.normal.origin(x)
        self.x = x
        self.centre = torch.zeros_like(self.origin)
        self.previous: Tensor | None = None

    @functools.cached_property
    def whole(self) -> tuple[Tensor, Tensor]:
        """The mean of all items from the origin, and their variance, channel by channel: (B, 1, C)."""
        present, centred = present_channels(self.x - self.origin)
        count = present.sum(1, keepdim=True).clamp_min(1)
        mean = centred.sum(1, keepdim=True) / count
        return mean, (present * (centred - mean).square()).sum(1, keepdim=True) / count

    def order(self, x: Tensor) -> Tensor | None:
        """By which channels are there, for every such pattern has matrices of its own in every piece it occurs in."""
        if not self.missing or len(x) > 1:
            return None
        return patterns(~x[0].isnan())[0].argsort()

    def prepare(self, x: Tensor) -> Tensor:
        """[x, which channels are there]: (B, D, 2 C)."""
        present, x = present_channels(x - self.origin)
        return torch.cat([x, present], -1)

    def begin(self, prepared: Tensor) -> Count:
        """As if a normal with the mean and variance of all items had filled in what is missing."""
        x, present = prepared.chunk(2, -1)
        mean, variance = self.whole
        filled = x + (1 - present) * mean
        log_u = -_log_minus_digamma(torch.full_like(x[:1, :1, 0], FIRST_DF))

        def count(gamma: Tensor) -> Tensor:
            weight = gamma.permute(2, 0, 3, 1)
            owned = weight.sum(-1, keepdim=True)
            difference = filled.unsqueeze(1) - self.centre.unsqueeze(-2)
            first = (weight.unsqueeze(-2) @ difference).squeeze(-2)
            second = (difference * weight.unsqueeze(-1)).transpose(-1, -2) @ difference
            second = second + torch.diag_embed((weight @ (1 - present)) * variance)
            return torch.cat([first, second.flatten(-2), owned, owned * log_u, owned], -1)

        return count

    def centre_on(self, statistics: Tensor | None) -> bool:  # noqa: D102
        if statistics is None:
            self.previous, self.centre = None, torch.zeros_like(self.origin)
            return False
        if not self.about_origin:
            first, owned = statistics[..., : self.model.num_channels], statistics[..., -1:]
            self.centre = torch.where(owned > 0, first / owned, self.whole[0])
        return not self.about_origin

    def at(self, parameters: Parameters) -> EStep:  # noqa: D102
        theta, log_mixing = parameters
        mean, lower = self.likelihood.moments(theta)
        mean = mean - self.origin
        self.previous = theta
        self.centre = torch.zeros_like(mean) if self.about_origin else mean
        df = None if self.student is None else self.student.degrees_of_freedom(theta).unsqueeze(-1)

        def e_step(prepared: Tensor) -> tuple[Tensor, Count]:
            x, present = prepared.chunk(2, -1)
            groups = group_by_channels(present) if self.missing else one_group(present)
            conditionals = condition(lower, groups)
            differences, distance, log_det = self._differences(x, mean, groups, conditionals)
            C = present.sum(-1).unsqueeze(1) if self.missing else torch.full_like(distance[:1, :1, :1, :1], x.shape[-1])
            u = log_u = None
            if df is None:
                log_density = -0.5 * (distance + C * LOG_2PI) - log_det
            else:
                assert self.student is not None
                log_density = self.student.log_density(distance, log_det, C, df.log().unsqueeze(-1))
                u = (df + C) / (df + distance)
                log_u = torch.digamma(0.5 * (df + C)) - (0.5 * (df + distance)).log()

            def count(gamma: Tensor) -> Tensor:
                gamma = gamma.permute(2, 0, 3, 1)
                sums = self._sums(gamma if u is None else gamma * u, gamma, differences, groups, conditionals)
                return self._statistics(*sums, gamma, log_u, mean - self.centre)

            # (R, B, K, D) -> (B, D, R, K)
            return (log_mixing.unsqueeze(-1) + log_density).permute(1, 3, 0, 2), count

        return e_step

    def _differences(
        self, x: Tensor, mean: Tensor, groups: list[Group], conditionals: Conditionals
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """x − μ of each group (R, K, n, C), absent channels at zero; δ and ½ log|Σ_oo| of every item, (R, B, K, D)."""
        R, B, K, _ = mean.shape
        if not self.missing:
            difference = x.unsqueeze(1) - mean.unsqueeze(-2)
            distance = (difference @ conditionals.whitening.transpose(-1, -2)).square().sum(-1)
            return [difference], distance, conditionals.half_log_det.unsqueeze(-1)
        distance, log_det = mean.new_empty(R, B, K, x.shape[1]), mean.new_empty(R, B, K, x.shape[1])
        differences = []
        for g, (image, rows, present) in enumerate(groups):
            difference = (x[image, rows] - mean[:, image].unsqueeze(-2)) * present
            white = difference @ conditionals.whitening[:, g].transpose(-1, -2)
            distance[:, image, :, rows] = white.square().sum(-1)
            log_det[:, image, :, rows] = conditionals.half_log_det[:, g].unsqueeze(-1)
            differences.append(difference)
        return differences, distance, log_det

    def _sums(
        self,
        weight: Tensor,
        gamma: Tensor,
        differences: list[Tensor],
        groups: list[Group],
        conditionals: Conditionals,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ w (x − μ), Σ w (x − μ)(x − μ)ᵀ of the items as they would be in expectation, and Σ w: (R, B, K, ...)."""
        if not self.missing:
            (difference,) = differences
            second = (difference * weight.unsqueeze(-1)).transpose(-1, -2) @ difference
            return (weight.unsqueeze(-2) @ difference).squeeze(-2), second, weight.sum(-1, keepdim=True)
        firsts: list[Tensor] = []
        seconds: list[Tensor] = []
        owned: list[Tensor] = []
        for (image, rows, _), difference in zip(groups, differences, strict=True):
            part = weight[:, image, :, rows].unsqueeze(-1)
            firsts.append((part * difference).sum(-2))
            seconds.append((part * difference).transpose(-1, -2) @ difference)
            owned.append(gamma[:, image, :, rows].sum(-1))
        slope = conditionals.slope
        moved = (slope @ torch.stack(firsts, 1).unsqueeze(-1)).squeeze(-1)
        spread = torch.stack(owned, 1)[..., None, None] * conditionals.covariance
        scatter = slope @ torch.stack(seconds, 1) @ slope.transpose(-1, -2) + spread
        images = torch.tensor([group.image for group in groups], device=gamma.device)
        shape = gamma.shape[:3]
        return (
            moved.new_zeros(*shape, *moved.shape[3:]).index_add(1, images, moved),
            scatter.new_zeros(*shape, *scatter.shape[3:]).index_add(1, images, scatter),
            weight.sum(-1, keepdim=True),
        )

    def _statistics(
        self, first: Tensor, second: Tensor, total: Tensor, gamma: Tensor, log_u: Tensor | None, shift: Tensor
    ) -> Tensor:
        """[Σ w (x − c), Σ w (x − c)(x − c)ᵀ, Σ w, Σ γ E[log u], Σ γ] with c = μ − shift the centre."""
        if self.about_origin:
            cross = first.unsqueeze(-1) * shift.unsqueeze(-2)
            outer = total.unsqueeze(-1) * shift.unsqueeze(-1) * shift.unsqueeze(-2)
            first, second = first + total * shift, second + cross + cross.transpose(-1, -2) + outer
        owned = gamma.sum(-1, keepdim=True)
        logs = torch.zeros_like(owned) if log_u is None else (gamma * log_u).sum(-1, keepdim=True)
        return torch.cat([first, second.flatten(-2), total, logs, owned], -1)

    def maximise(self, statistics: Tensor) -> Parameters:  # noqa: D102
        C = self.model.num_channels
        weight = statistics[..., -1:]
        empty = weight <= torch.finfo(weight.dtype).eps * weight.sum(-2, keepdim=True)
        kept = torch.where(empty, self._unchanged(statistics), statistics)
        flat = self.model.prior == "flat"
        first, second, total, _, count = (kept if flat else statistics).split([C, C * C, 1, 1, 1], -1)
        second = second.unflatten(-1, (C, C))
        if self.normal.independent_channels:
            second = second.diagonal(dim1=-2, dim2=-1)
        expanded = self.student is not None and self.normal.covariance != "tied" and flat
        origin = self.origin + self.centre
        if isinstance(self.model.prior, NormalInverseWishart):
            mean, covariance, share = self.model.prior.match(first, second, total, count, origin)
        else:
            mean, share = first / total, total if expanded else count
            matrices = second.dim() > mean.dim()
            outer = mean.unsqueeze(-1) * mean.unsqueeze(-2) if matrices else mean.square()
            ratio, mass = (share.unsqueeze(-1), total.unsqueeze(-1)) if matrices else (share, total)
            covariance = second / ratio - mass / ratio * outer
        theta = self.normal.fit(mean + origin, covariance, share)
        if self.student is not None:
            total, log_u, count = kept[..., -3:].split(1, -1)
            theta = torch.cat([theta, self._log_df(total, log_u, count, expanded)], -1)
        return Parameters(theta, self.log_mixing(weight.squeeze(-1)))

    def _unchanged(self, statistics: Tensor) -> Tensor:
        """Statistics that leave components as they were; before there are any, those of all items."""
        if self.previous is None:
            whole, variance = self.whole
            shift = whole - self.centre
            second = torch.diag_embed(variance.expand_as(shift)) + shift.unsqueeze(-1) * shift.unsqueeze(-2)
            one = torch.ones_like(shift[..., :1])
            return TRACE * torch.cat([shift, second.flatten(-2), one, -_log_minus_digamma(FIRST_DF * one), one], -1)
        mean, lower = self.likelihood.moments(self.previous)
        shift = mean - self.origin - self.centre
        second = lower @ lower.transpose(-1, -2) + shift.unsqueeze(-1) * shift.unsqueeze(-2)
        one = torch.ones_like(shift[..., :1])
        df = one if self.student is None else self.student.degrees_of_freedom(self.previous).unsqueeze(-1)
        return TRACE * torch.cat([shift, second.flatten(-2), one, -_log_minus_digamma(df), one], -1)

    def _log_df(self, total: Tensor, log_u: Tensor, count: Tensor, expanded: bool) -> Tensor:
        """log ν from Σ γ u, Σ γ E[log u] and Σ γ: (R, B, K, 1)."""
        assert self.student is not None
        if self.student.fixed is not None:
            return torch.full_like(total, math.log(self.student.fixed))
        mean_u = total / count
        target = (mean_u.log() if expanded else mean_u - 1) - log_u / count
        if self.student.shared:
            target = ((count * target).sum(-2, keepdim=True) / count.sum(-2, keepdim=True)).expand_as(target)
        low, high = torch.full_like(target, math.log(SMALLEST_DF)), torch.full_like(target, math.log(LARGEST_DF))
        for _ in range(50):
            middle = 0.5 * (low + high)
            above = _log_minus_digamma(middle.exp()) > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (0.5 * (low + high)).masked_fill(target.isnan(), math.nan)


def _log_minus_digamma(df: Tensor) -> Tensor:
    """log(ν/2) − digamma(ν/2), which falls from ∞ to 0."""
    return (0.5 * df).log() - torch.digamma(0.5 * df)
