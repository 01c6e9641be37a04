"""M-steps by conditional moments: Student's t, and the normal distribution where values are missing."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.inference.m_steps import Count, EStep, MStep, Parameters, register_m_step
from pnem.inference.match_moments import MatchMoments
from pnem.models import MultivariateNormal, NormalInverseWishart, SpatialMixture, StudentT, decoders
from pnem.models.likelihoods import present_channels
from pnem.models.linear_algebra import half_log_det, symmetric
from pnem.models.multivariate_normal import LOG_2PI

__all__ = ["NormalScaleMixture"]

# Beyond this many degrees of freedom a t is a normal to all digits that matter.
LARGEST_DF, SMALLEST_DF, FIRST_DF = 1e6, 1e-2, 10.0


class Group(NamedTuple):
    """Items of one image that have the same channels: their image, their places, and which channels."""

    image: int
    rows: Tensor
    present: Tensor


class Conditionals(NamedTuple):
    """Of groups, (R, G, K, ...): Σ_oo⁻¹ with zeros for absent channels; E[x | x_o] = a + A x_o, and Cov[x | x_o]."""

    precision: Tensor
    half_log_det: Tensor
    slope: Tensor
    offset: Tensor
    covariance: Tensor


@register_m_step(decoders.Constant, MultivariateNormal)
@register_m_step(decoders.Constant, MultivariateNormal, NormalInverseWishart)
@register_m_step(decoders.Constant, StudentT)
@register_m_step(decoders.Constant, StudentT, NormalInverseWishart)
class NormalScaleMixture(MStep):
    r"""x_i | z_i = k ~ N(μ_k, Σ_k / u_i), with u_i ~ Gamma(ν_k/2, ν_k/2) for a t and u_i = 1 for a normal.

    The E-step takes the expectations E[u | x] = (ν + C)/(ν + δ) and E[log u | x] of the latent scales, and of absent
    channels their conditional moments given those that are there (Little & Rubin 2019, chapter 11). With the scale
    matrix divided by Σ γ u in place of Σ γ, where components do not share it, EM climbs faster and still monotonely
    (parameter-expanded EM: Liu, Rubin & Wu 1998, section 4). ν solves

        log(ν/2) − digamma(ν/2) = log(mean u) − mean E[log u]
    """

    def __init__(self, model: SpatialMixture, x: Tensor, *, missing: bool):
        super().__init__(model, x, missing=missing)
        assert isinstance(model.likelihood, MultivariateNormal | StudentT)
        self.likelihood = model.likelihood
        self.student = model.likelihood if isinstance(model.likelihood, StudentT) else None
        self.normal = model.likelihood.normal if isinstance(model.likelihood, StudentT) else model.likelihood
        self.origin = x.nanmedian(-2, keepdim=True).values
        present, centred = present_channels(x - self.origin)
        count = present.sum(1, keepdim=True).clamp_min(1)
        self.mean = centred.sum(1, keepdim=True) / count
        self.variance = (present * (centred - self.mean).square()).sum(1, keepdim=True) / count

    def order(self, x: Tensor) -> Tensor | None:
        """By which channels are there, for every such pattern has matrices of its own in every piece it occurs in."""
        if not self.missing or len(x) > 1:
            return None
        return _patterns(~x[0].isnan())[0].argsort()

    @classmethod
    def choose(cls, model: SpatialMixture, *, missing: bool) -> type[MStep]:
        """Normals are an exponential family, unless what is missing depends on what is there."""
        normal = isinstance(model.likelihood, MultivariateNormal)
        return MatchMoments if normal and (not missing or model.likelihood.independent_channels) else cls

    def prepare(self, x: Tensor) -> Tensor:
        """[x, products, 1, which channels are there]: (B, D, F)."""
        present, x = present_channels(x - self.origin)
        products = [x[..., : c + 1] * x[..., c : c + 1] for c in range(x.shape[-1])]
        return torch.cat([x, *products, torch.ones_like(x[..., :1]), present], -1)

    def _split(self, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """[x, products, 1] and which channels are there."""
        C = self.model.num_channels
        return prepared[..., :-C], prepared[..., -C:]

    def begin(self, prepared: Tensor) -> Count:
        """As if a normal with the mean and variance of all items had filled in what is missing."""
        C = self.model.num_channels
        features, present = self._split(prepared)
        absent = 1 - present
        filled = features[..., :C] + absent * self.mean
        matrix = filled.unsqueeze(-1) * filled.unsqueeze(-2) + torch.diag_embed(absent * self.variance)
        one = torch.ones_like(filled[..., :1])
        log_u = _log_minus_digamma(one * FIRST_DF).neg()
        complete = torch.cat([filled, matrix.flatten(-2), one, log_u, one], -1)

        def count(gamma: Tensor) -> Tensor:
            statistics = gamma.flatten(-2).transpose(-1, -2) @ complete
            return statistics.unflatten(1, gamma.shape[-2:]).transpose(0, 1)

        return count

    def at(self, parameters: Parameters) -> EStep:  # noqa: D102
        theta, log_mixing = parameters
        mean, lower = self.likelihood.moments(theta)
        mean = mean - self.origin
        covariance = lower @ lower.transpose(-1, -2)
        df = None if self.student is None else self.student.degrees_of_freedom(theta).transpose(0, 1).unsqueeze(1)
        log_mixing = log_mixing.transpose(0, 1).unsqueeze(1)

        def e_step(prepared: Tensor) -> tuple[Tensor, Count]:
            features, present = self._split(prepared)
            groups = _groups(present) if self.missing else _whole(present)
            conditionals = _condition(mean, covariance, groups)
            distance, log_det = self._distances(features, groups, conditionals, mean)
            C = present.sum(-1)[..., None, None]
            if df is None:
                log_density = -0.5 * (distance + C * LOG_2PI) - log_det
                u = log_u = None
            else:
                assert self.student is not None
                log_density = self.student.log_density(
                    distance, log_det, C if self.missing else self.model.num_channels, df.log().unsqueeze(-1)
                )
                u = (df + C) / (df + distance)
                log_u = torch.digamma(0.5 * (df + C)) - (0.5 * (df + distance)).log()

            def count(gamma: Tensor) -> Tensor:
                return self._count(gamma, u, log_u, features, groups, conditionals)

            return log_mixing + log_density, count

        return e_step

    def _distances(
        self, features: Tensor, groups: list[Group], conditionals: Conditionals, mean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """δ and ½ log|Σ_oo| of every item under every component: (B, D, R, K)."""
        (B, D, _), (R, _, K, C) = features.shape, mean.shape
        rows, columns = torch.tril_indices(C, C, device=mean.device)
        images = torch.tensor([group.image for group in groups], device=mean.device)
        centre, precision = mean[:, images], conditionals.precision
        linear = (precision @ centre.unsqueeze(-1)).squeeze(-1)
        products = precision[..., rows, columns] * torch.where(rows == columns, 1.0, 2.0).to(mean)
        constant = (linear * centre).sum(-1, keepdim=True)
        # (R, G, K, F) -> (G, F, R K)
        coefficients = torch.cat([-2 * linear, products, constant], -1).permute(1, 3, 0, 2).flatten(2)
        if not self.missing:
            log_det = conditionals.half_log_det.transpose(0, 1).unsqueeze(1)
            return (features @ coefficients).clamp_min(0).unflatten(-1, (R, K)), log_det
        distance, log_det = mean.new_empty(B, D, R * K), mean.new_empty(B, D, R * K)
        for g, group in enumerate(groups):
            distance[group.image, group.rows] = features[group.image, group.rows] @ coefficients[g]
            log_det[group.image, group.rows] = conditionals.half_log_det[:, g].flatten()
        # What is left of a distance of zero may be below it by rounding.
        return distance.clamp_min(0).unflatten(-1, (R, K)), log_det.unflatten(-1, (R, K))

    def _count(
        self,
        gamma: Tensor,
        u: Tensor | None,
        log_u: Tensor | None,
        features: Tensor,
        groups: list[Group],
        conditionals: Conditionals,
    ) -> Tensor:
        (B, _, R, K), C = gamma.shape, self.model.num_channels
        scaled = (gamma if u is None else gamma * u).flatten(-2)
        if self.missing:
            sums = torch.stack([scaled[g.image, g.rows].T @ features[g.image, g.rows] for g in groups])
            owned = torch.stack([gamma[g.image, g.rows].sum(0) for g in groups])
        else:
            sums, owned = scaled.transpose(-1, -2) @ features, gamma.sum(1)
        # (G, R K, F) -> (R, G, K, F)
        sums = sums.unflatten(1, (R, K)).transpose(0, 1)
        first, second, total = sums[..., :C], symmetric(sums[..., C:-1], C), sums[..., -1:]
        slope, offset = conditionals.slope, conditionals.offset
        moved = (slope @ first.unsqueeze(-1)).squeeze(-1)
        cross = offset.unsqueeze(-1) * moved.unsqueeze(-2)
        second = (
            slope @ second @ slope.transpose(-1, -2)
            + cross
            + cross.transpose(-1, -2)
            + total.unsqueeze(-1) * offset.unsqueeze(-1) * offset.unsqueeze(-2)
            + owned.transpose(0, 1)[..., None, None] * conditionals.covariance
        )
        complete = torch.cat([moved + total * offset, second.flatten(-2), total], -1)
        images = torch.tensor([group.image for group in groups], device=gamma.device)
        summed = complete.new_zeros(R, B, K, complete.shape[-1]).index_add(1, images, complete)
        logs = gamma.new_zeros(gamma.shape).sum(1) if log_u is None else (gamma * log_u).sum(1)
        return torch.cat([summed, logs.transpose(0, 1).unsqueeze(-1), gamma.sum(1).transpose(0, 1).unsqueeze(-1)], -1)

    def maximise(self, statistics: Tensor) -> Parameters:  # noqa: D102
        C, eps = self.model.num_channels, torch.finfo(statistics.dtype).eps
        weight = statistics[..., -1:]
        whole = statistics.sum(-2, keepdim=True)
        statistics = torch.where(weight <= eps * whole[..., -1:], whole, statistics)
        first, second = statistics[..., :C], statistics[..., C : C + C * C].unflatten(-1, (C, C))
        total, log_u, count = statistics[..., -3:].split(1, -1)
        if self.normal.independent_channels:
            second = second.diagonal(dim1=-2, dim2=-1)
        expanded = self.student is not None and self.normal.covariance != "tied" and self.model.prior == "flat"
        if isinstance(self.model.prior, NormalInverseWishart):
            mean, covariance, share = self.model.prior.match(first, second, total, count, self.origin)
        else:
            mean, share = first / total, total if expanded else count
            outer = mean.square() if second.dim() == mean.dim() else mean.unsqueeze(-1) * mean.unsqueeze(-2)
            ratio, mass = (share, total) if outer.dim() == mean.dim() else (share.unsqueeze(-1), total.unsqueeze(-1))
            covariance = (second - mass * outer) / ratio
        theta = self.normal.fit(mean + self.origin, covariance, share)
        if self.student is not None:
            theta = torch.cat([theta, self._log_df(total, log_u, count, expanded)], -1)
        return Parameters(theta, self.log_mixing(weight.squeeze(-1)))

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


def _whole(present: Tensor) -> list[Group]:
    every = torch.arange(present.shape[1], device=present.device)
    return [Group(b, every, channels) for b, channels in enumerate(present[:, 0])]


def _groups(present: Tensor) -> list[Group]:
    """The items of each image by which of their channels are there: (B, D, C)."""
    groups = []
    for b, channels in enumerate(present):
        pattern, counts = _patterns(channels > 0)
        places = pattern.argsort().split(counts.tolist())
        groups += [Group(b, rows, channels[rows[0]]) for rows in places]
    return groups


def _patterns(there: Tensor) -> tuple[Tensor, Tensor]:
    """A number for every item's pattern of channels, (D, C) -> (D,), and how many items each has."""
    C = there.shape[-1]
    if C > 62:
        return there.unique(dim=0, return_inverse=True, return_counts=True)[1:]
    # As the bits of a whole number, which is far quicker to sort.
    code = (there * 2 ** torch.arange(C, device=there.device)).sum(-1)
    return code.unique(return_inverse=True, return_counts=True)[1:]


def _condition(mean: Tensor, covariance: Tensor, groups: list[Group]) -> Conditionals:
    """From means (R, B, K, C) and scale matrices (R, B, K, C, C)."""
    images = torch.tensor([group.image for group in groups], device=mean.device)
    there = torch.stack([group.present for group in groups]).unsqueeze(1)
    mean, covariance = mean[:, images], covariance[:, images]
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    both = there.unsqueeze(-1) * there.unsqueeze(-2)
    # Absent channels as independent ones of unit variance leave the others' inverse and determinant as they are.
    lower, info = torch.linalg.cholesky_ex(covariance * both + eye * (1 - both))
    lower = lower.masked_fill((info != 0)[..., None, None], math.nan)
    precision = torch.cholesky_inverse(lower) * both
    absent = (1 - there).unsqueeze(-1)
    regression = absent * (covariance @ precision)
    slope = regression + eye * there.unsqueeze(-1)
    offset = mean * (1 - there) - (regression @ mean.unsqueeze(-1)).squeeze(-1)
    conditional = absent * (covariance - covariance @ precision @ covariance) * absent.transpose(-1, -2)
    return Conditionals(precision, half_log_det(lower), slope, offset, conditional)
