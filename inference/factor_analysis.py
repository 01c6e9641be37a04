"""Factor analysis and probabilistic principal components by EM with the exact posterior."""

import math

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.inference.m_steps import Count, EStep, MStep, Parameters, register_m_step
from pnem.models import Normal, SpatialMixture, decoders
from pnem.models.likelihoods import present_channels

__all__ = ["FactorAnalysis", "posterior_of_factors"]

LOG_2PI = math.log(2 * math.pi)
# No feature's noise falls below this share of its variance (a Heywood case).
FLOOR = 1e-6


@register_m_step(decoders.Linear, Normal, "standard_normal")
class FactorAnalysis(MStep):
    r"""x_b = W θ_b + b + noise, with θ_b ~ N(0, I) integrated out: W, b and σ are parameters of the model.

    The posterior of θ_b is normal, of covariance (I + Wᵀ Σ⁻¹ W)⁻¹ over the features that are there; the M-step is the
    least-squares regression of every feature on its moments (Rubin & Thayer 1982; probabilistic PCA, where all
    features share σ: Tipping & Bishop 1999). Letting the mean and covariance of θ_b be fitted too, and taking them
    back into W and b, makes EM faster and keeps it monotone (Liu, Rubin & Wu 1998).
    """

    local = False

    def __init__(self, model: SpatialMixture, x: Tensor, *, missing: bool):
        super().__init__(model, x, missing=missing)
        assert isinstance(model.decoder, decoders.Linear)
        assert isinstance(model.likelihood, Normal)
        self.linear, self.likelihood = model.decoder.linear, model.likelihood
        present, filled = present_channels(x)
        count = present.sum(1).clamp_min(1)
        self.mean = filled.sum(1) / count if self.linear.bias is not None else torch.zeros_like(filled[:, 0])
        self.variance = (present * (filled - self.mean.unsqueeze(1)).square()).sum(1) / count

    @classmethod
    def choose(cls, model: SpatialMixture, *, missing: bool) -> type[MStep]:  # noqa: D102
        assert isinstance(model.decoder, decoders.Linear)
        if model.num_components != 1 or not isinstance(model.decoder.activation, torch.nn.Identity):
            raise StrategyError(
                "a linear decoder with a normal prior has a closed-form M-step only for one component and the identity "
                f"as input activation, not {model.num_components} and {model.decoder.activation}: use GradientEM, NEM "
                "or RNNEM"
            )
        return cls

    @property
    def num_factors(self) -> int:
        """M."""
        return self.linear.in_features

    def start(self, restarts: int) -> Parameters:
        """Random loadings, the mean, and noise as large as the variance."""
        p, M = self.variance.shape[-1], self.num_factors
        scale = (self.variance / M).sqrt()
        W = torch.randn(restarts, p, M, dtype=scale.dtype, device=scale.device) * scale.unsqueeze(-1)
        noise = self._noise(self.variance, torch.ones_like(self.variance))
        return self._pack(W, torch.zeros_like(self.mean), noise)

    def current(self) -> Parameters:
        """The model's own."""
        W = self.linear.weight.detach().double().unsqueeze(0)
        b = torch.zeros_like(self.mean) if self.linear.bias is None else self.linear.bias.detach().double()
        return self._pack(W, b - self.mean, self._spread(self.likelihood.sigma.detach().double().square()))

    def _spread(self, variance: Tensor) -> Tensor:
        """One per channel, or one for all, as one per feature: (..., p)."""
        channels = self.model.num_channels
        return variance.expand(channels).repeat(self.mean.shape[-1] // channels).unsqueeze(0)

    def write(self, parameters: Parameters) -> None:
        """Makes a single start's parameters the model's own."""
        W, b, variance = self._unpack(parameters)
        with torch.no_grad():
            self.linear.weight.copy_(W[0])
            if self.linear.bias is not None:
                self.linear.bias.copy_((b + self.mean)[0])
            log_sigma = 0.5 * variance[0].log().unflatten(0, (-1, self.model.num_channels))[0]
            self.likelihood.log_sigma.copy_(log_sigma if self.likelihood.log_sigma.dim() else log_sigma[0])

    def _pack(self, W: Tensor, b: Tensor, variance: Tensor) -> Parameters:
        theta = torch.cat([W.flatten(1), b.expand(len(W), -1), variance.expand(len(W), -1)], 1)
        return Parameters(theta[:, None, None], theta.new_zeros(len(W), 1, 1))

    def _unpack(self, parameters: Parameters) -> tuple[Tensor, Tensor, Tensor]:
        """W (R, p, M), b relative to the mean, and the variances of the noise (R, p)."""
        theta, p = parameters.theta[:, 0, 0], self.mean.shape[-1]
        W, b, variance = theta.split([p * self.num_factors, p, p], -1)
        return W.unflatten(-1, (p, -1)), b, variance

    def log_prior(self, parameters: Parameters) -> Tensor:
        """Zero: that of θ_b is integrated out."""
        return parameters.log_mixing.sum(-1)

    def prepare(self, x: Tensor) -> Tensor:
        """[x, which features are there]: (1, N, 2 p)."""
        present, x = present_channels(x - self.mean)
        return torch.cat([x, present], -1)

    def posterior(self, parameters: Parameters, prepared: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E[θ] (R, n, M) and its covariance (R, n or 1, M, M) given the items, and their log p(x) (R, n)."""
        W, b, variance = self._unpack(parameters)
        x, present = prepared[0].chunk(2, -1)
        scaled = W / variance.unsqueeze(-1)
        eye = torch.eye(self.num_factors, dtype=x.dtype, device=x.device)
        # One for all items where all have all features.
        there = present if self.missing else present[:1]
        outer = (scaled.unsqueeze(-1) * W.unsqueeze(-2)).flatten(-2)
        lower = torch.linalg.cholesky((there @ outer).unflatten(-1, eye.shape) + eye)
        difference = (x - b.unsqueeze(1)) * present
        covariance = torch.cholesky_inverse(lower)
        projected = difference @ scaled
        mean = (covariance @ projected.unsqueeze(-1)).squeeze(-1)
        log_det = present @ (variance.log() + LOG_2PI).unsqueeze(-1)
        half = lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        # The sum of two squares, where their difference would cancel.
        left = (difference - mean @ W.transpose(-1, -2)) * present
        distance = (left.square() / variance.unsqueeze(1)).sum(-1) + mean.square().sum(-1)
        return mean, covariance, -0.5 * (distance + log_det.squeeze(-1)) - half

    def begin(self, prepared: Tensor) -> Count:  # noqa: D102
        raise StrategyError("factor analysis does not start from responsibilities: leave gamma out")

    def at(self, parameters: Parameters) -> EStep:  # noqa: D102
        def e_step(prepared: Tensor) -> tuple[Tensor, Count]:
            mean, covariance, log_evidence = self.posterior(parameters, prepared)
            x, present = prepared[0].chunk(2, -1)

            def count(gamma: Tensor) -> Tensor:
                weight = gamma[0, :, :, 0].T.unsqueeze(-1)
                moments = torch.cat([mean, torch.ones_like(mean[..., :1])], -1)
                second = moments.unsqueeze(-1) * moments.unsqueeze(-2)
                second[..., :-1, :-1] += covariance
                second = second.flatten(-2) * weight
                overall = second.sum(1)
                features = [
                    # The same for every feature where all items have all of them.
                    present.T @ second if self.missing else overall.unsqueeze(1).expand(-1, x.shape[-1], -1),
                    x.T @ (moments * weight),
                    (weight * x.square()).sum(1).unsqueeze(-1),
                    (weight * present).sum(1).unsqueeze(-1),
                ]
                everything = torch.cat([torch.cat(features, -1).flatten(1), overall], -1)
                return everything[:, None, None]

            return log_evidence.T[None, :, :, None], count

        return e_step

    def maximise(self, statistics: Tensor) -> Parameters:  # noqa: D102
        statistics, M, p = statistics[:, 0, 0], self.num_factors, self.mean.shape[-1]
        size = (M + 1) ** 2
        by_feature, overall = statistics[:, :-size].unflatten(-1, (p, -1)), statistics[:, -size:]
        second = by_feature[..., :size].unflatten(-1, (M + 1, M + 1))
        cross, squares, count = by_feature[..., size : size + M + 1], by_feature[..., -2], by_feature[..., -1]
        overall = overall.unflatten(-1, (M + 1, M + 1))
        n = overall[:, -1:, -1:]
        fitted = M + 1 if self.linear.bias is not None else M
        coefficients = torch.linalg.solve(second[..., :fitted, :fitted], cross[..., :fitted])
        residual = squares - (coefficients * cross[..., :fitted]).sum(-1)
        W, b = coefficients[..., :M], coefficients[..., M:].sum(-1)
        mean = overall[:, :M, -1:] / n if fitted > M else torch.zeros_like(overall[:, :M, -1:])
        factor = torch.linalg.cholesky(overall[:, :M, :M] / n - mean @ mean.transpose(-1, -2))
        return self._pack(W @ factor, b + (W @ mean).squeeze(-1), self._noise(residual, count))

    def _noise(self, residual: Tensor, count: Tensor) -> Tensor:
        """The variance of the noise of every feature, (R, p)."""
        if not self.likelihood.log_sigma.requires_grad:
            return self._spread(self.likelihood.sigma.detach().double().square()).expand_as(residual)
        channels = (-1, self.model.num_channels)
        residual, count = residual.unflatten(-1, channels).sum(1), count.unflatten(-1, channels).sum(1)
        variance = self.variance[0].unflatten(-1, channels).mean(0)
        # A constant feature has no variance of its own.
        smallest = FLOOR * torch.where(variance > 0, variance, variance.mean().clamp_min(FLOOR))
        if not self.likelihood.log_sigma.dim():
            residual, count = residual.sum(-1, keepdim=True), count.sum(-1, keepdim=True)
            smallest = smallest.mean(-1, keepdim=True)
        noise = torch.maximum(residual / count, smallest)
        return noise.repeat(1, self.mean.shape[-1] // noise.shape[-1])


def posterior_of_factors(model: SpatialMixture, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[θ] (B, M), its covariance (B or 1, M, M) and log p(x) (B,) of images (B, D, C) under a linear decoder."""
    model.check(x, missing=True)
    flat = x.double().flatten(1).unsqueeze(0)
    rule = FactorAnalysis(model, flat, missing=bool(flat.isnan().any()))
    mean, covariance, log_evidence = rule.posterior(rule.current(), rule.prepare(flat))
    dtype = model.mixing_logits.dtype
    return mean[0].to(dtype), covariance[0].to(dtype), log_evidence[0].to(dtype)
