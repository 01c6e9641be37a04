"""Priors on what a component knows, θ_k."""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pnem.models.config import Configured
from pnem.models.decoders import Decoder
from pnem.models.errors import ModelError
from pnem.models.likelihoods import Likelihood

__all__ = ["DiagonalNormal", "LatentPrior", "MixtureOfNormals", "Prior", "normal_divergence"]


class Prior(Configured, nn.Module, ABC):
    """p(θ_k): a `LatentPrior`, or one on the parameters of a likelihood, for a constant decoder."""

    @abstractmethod
    def distribution(self, likelihood: Likelihood, features: int) -> dist.TorchDistribution:
        """p(θ_k) as a distribution with event shape (M,)."""

    @abstractmethod
    def check(self, decoder: Decoder, likelihood: Likelihood) -> None:
        """Raises `ModelError` unless this is a prior for such a model."""


class LatentPrior(Prior):
    """p(θ_k) that every decoder and likelihood may have, trained with the model.

    Args:
        features: M.

    Raises:
        ModelError: M < 1, or another M than the decoder's.
    """

    def __init__(self, features: int):
        super().__init__()
        if not isinstance(features, int) or features < 1:
            raise ModelError(f"features must be at least 1, and whole, but is {features!r}")
        self.features = features

    def check(self, decoder: Decoder, likelihood: Likelihood) -> None:  # noqa: D102
        if decoder.latent_features != self.features:
            raise ModelError(
                f"the prior is for θ_k of {self.features} features, but the decoder takes {decoder.latent_features}"
            )


class DiagonalNormal(LatentPrior):
    """p(θ_k) = N(m, diag(s²)), m and s learned; N(0, I) at first.

    With a decoder whose first layer is free to scale and shift θ it is no larger a family than N(0, I); it earns its
    place with decoders that cannot, and where θ is to keep a scale of its own.

    >>> DiagonalNormal(5).distribution().log_prob(torch.zeros(2, 5)).shape
    torch.Size([2])
    """

    def __init__(self, features: int):
        super().__init__(features)
        self.location = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def distribution(self, likelihood: Likelihood | None = None, features: int | None = None) -> dist.TorchDistribution:  # noqa: D102
        return dist.Normal(self.location, self.log_scale.exp(), validate_args=False).to_event(1)


class MixtureOfNormals(LatentPrior):
    """p(θ_k) = Σ_j w_j N(m_j, diag(s_j²)), all learned; for what comes in kinds, as digits and shapes do.

    The components start at random means near the origin. KL(q ‖ p) is then estimated from draws of q (Tomczak & Welling
    2018 take the means from learned pseudo-inputs; these are free).

    Args:
        features: M.
        num_components: how many normals.

    Raises:
        ModelError: fewer than one, or as `LatentPrior`.

    >>> MixtureOfNormals(5, num_components=3).distribution().sample((2,)).shape
    torch.Size([2, 5])
    """

    def __init__(self, features: int, num_components: int = 10):
        super().__init__(features)
        if not isinstance(num_components, int) or num_components < 1:
            raise ModelError(f"num_components must be at least 1, and whole, but is {num_components!r}")
        self.location = nn.Parameter(torch.randn(num_components, features))
        self.log_scale = nn.Parameter(torch.zeros(num_components, features))
        self.logits = nn.Parameter(torch.zeros(num_components))

    def distribution(self, likelihood: Likelihood | None = None, features: int | None = None) -> dist.TorchDistribution:  # noqa: D102
        return dist.MixtureSameFamily(
            dist.Categorical(logits=self.logits, validate_args=False),
            dist.Normal(self.location, self.log_scale.exp(), validate_args=False).to_event(1),
            validate_args=False,
        )


def normal_divergence(location: Tensor, scale: Tensor, prior: dist.TorchDistribution) -> Tensor | None:
    """KL(N(location, scale²) ‖ p) in nats, summed over M: (..., M) -> (...); None where p is not a diagonal normal."""
    if not isinstance(prior, dist.Independent) or not isinstance(prior.base_dist, dist.Normal):
        return None
    mean, deviation = prior.base_dist.loc, prior.base_dist.scale
    ratio = scale / deviation
    # ratio² − 1 − log ratio², without the cancellation near one.
    squares = (ratio - 1) * (ratio + 1) + ((location - mean) / deviation).square()
    return 0.5 * (squares - 2 * ratio.log()).sum(-1)


def expected_log_density(location: Tensor, scale: Tensor, prior: dist.TorchDistribution) -> Tensor | None:
    """E[log p(θ)] of θ ~ N(location, scale²) in nats, summed over M: (..., M) -> (...); None as `normal_divergence`."""
    if not isinstance(prior, dist.Independent) or not isinstance(prior.base_dist, dist.Normal):
        return None
    return prior.log_prob(location) - 0.5 * (scale / prior.base_dist.scale).square().sum(-1)
