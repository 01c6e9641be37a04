"""What collapse looks like, per image: how components share the pixels, which are alike, what θ says of the image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference import Posterior, State
from pnem.models import SpatialMixture
from pnem.models.likelihoods import Likelihood
from pnem.models.priors import normal_divergence

__all__ = ["Symptoms", "confidently_wrong", "duplicates", "foreground", "shares", "symptoms"]

# An object of three per image has a third of the foreground; stray pixels and soft edges stay below a twentieth.
OWNED = 0.05
# Equal responsibilities overlap entirely. Where one component has twice what the other has, they overlap by 2/3.
OVERLAP = 0.9
# Predictions that differ by a tenth of the contrast between objects and background look the same.
DIFFERENCE = 0.1
# In nats: a Bernoulli logit of 10 on the wrong side, a Normal mean 4.5 standard deviations away.
WRONG = 10.0
# An image in which γ divides fewer of its weighted pixels is not divided at all.
UNDIVIDED = 0.01


@dataclass(frozen=True)
class Symptoms:
    """What `symptoms` sees in each of B images.

    Attributes:
        shares: (B, K), what each component has of the image's divided pixels; NaN for an image without foreground.
        duplicated: (B,) bool, whether two components explain the same pixels alike.
        wrong: (B,), the share of pixels on which the responsible components are confidently wrong.
        location: (B, K, M), the means of q(θ); None for a Delta.
        divergence: (B, K, M), KL(q(θ) ‖ p(θ)) per latent dimension in nats, where both are diagonal normals, or None.
    """

    shares: Tensor
    duplicated: Tensor
    wrong: Tensor
    location: Tensor | None = None
    divergence: Tensor | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.wrong)

    @classmethod
    def concatenate(cls, parts: Sequence["Symptoms"]) -> "Symptoms":
        """The symptoms of the images of several."""
        columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(cls)}
        return cls(**{name: torch.cat(values) for name, values in columns.items() if values[0] is not None})


@torch.no_grad()
def symptoms(model: SpatialMixture, at: State | Posterior, x: Tensor) -> Symptoms:
    """What there is to see of collapse in the images `x` (B, D, C), whose state or posterior is given.

    >>> from pnem.inference import RNNEM
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3, pixel_prior=0.0)
    >>> x = (torch.rand(2, 16, 1) < 0.5).float()
    >>> symptoms(model, RNNEM(model).infer(x), x).shares.sum(-1)
    tensor([1., 1.], dtype=torch.float64)
    """
    gamma, mean = at.gamma.double(), at.mean.double()
    contrast = foreground(x.double(), model.pixel_prior)
    location, scale = _normal(at)
    return Symptoms(
        shares(gamma, contrast),
        duplicates(gamma, mean, contrast),
        confidently_wrong(model.likelihood, x, at.psi, at.gamma),
        location,
        None if location is None or scale is None else _divergences(model, location, scale),
    )


def foreground(x: Tensor, background: Tensor | None = None) -> Tensor:
    """How far each pixel is from the background, squared and summed over channels: (B, D, C) -> (B, D).

    The background is the mean of the model's pixel prior (C,), or without one the median of each image, which for
    binary pixels is their mode. For binary images with a background of 0 it is 1 on the objects and 0 elsewhere.
    """
    if background is None:
        background = x.median(-2, keepdim=True).values
    return (x - background).square().sum(-1)


def shares(gamma: Tensor, contrast: Tensor) -> Tensor:
    """What each component has of an image: γ (B, K, D) and its foreground (B, D) -> (B, K), NaN where that is none.

    Pixels are weighted such that the foreground and the rest count the same, however few pixels the objects have, and
    by 1 − H[γ_i] / log K: on pixels that γ leaves undivided, such as a background that all components predict, nobody
    is at work. In an image that is undivided throughout, all have 1/K.
    """
    K = gamma.shape[-2]
    if K == 1:
        return gamma.mean(-1)
    rest = 1 - contrast / contrast.amax(-1, keepdim=True)
    balanced = contrast / contrast.sum(-1, keepdim=True)
    balanced = balanced + rest / rest.sum(-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
    divided = 1 - torch.special.entr(gamma).sum(-2) / math.log(K)
    weights = (balanced * divided).unsqueeze(-2)
    total = weights.sum(-1)
    owned = (weights * gamma).sum(-1) / total
    return torch.where(total < UNDIVIDED, 1 / K, owned)


def duplicates(gamma: Tensor, mean: Tensor, contrast: Tensor) -> Tensor:
    """Whether two components explain the same foreground alike: γ (B, K, D), E[x | ψ] (B, K, D, C) -> (B,) bool.

    Of the pixels that two components own between them, weighted by the foreground `contrast` (B, D): they are a
    twentieth of it at least, Σ 2 min(γ_j, γ_k) / Σ (γ_j + γ_k) > 0.9, and the predictions differ by less than a tenth
    of the contrast, root mean square. Spare components, which all predict the background, own no foreground.
    """
    weights = contrast / contrast.sum(-1, keepdim=True).clamp_min(torch.finfo(contrast.dtype).tiny)
    found = torch.zeros(len(gamma), dtype=torch.bool, device=gamma.device)
    for k in range(1, gamma.shape[-2]):
        first, second = gamma[:, k:], gamma[:, :-k]
        own = weights.unsqueeze(-2) * (first + second)
        owned = own.sum(-1)
        overlap = 2 * (weights.unsqueeze(-2) * torch.minimum(first, second)).sum(-1)
        apart = (own * (mean[:, k:] - mean[:, :-k]).square().sum(-1)).sum(-1)
        scale = (own * contrast.unsqueeze(-2)).sum(-1)
        alike = (overlap > OVERLAP * owned) & (apart < DIFFERENCE**2 * scale)
        found |= ((owned > OWNED) & alike).any(-1)
    return found


def confidently_wrong(likelihood: Likelihood, x: Tensor, psi: Tensor, gamma: Tensor) -> Tensor:
    """The share of pixels that are predicted confidently and wrongly, in [0, 1]: x (B, D, C), ψ, γ (B, K, D) -> (B,).

    Such a pixel costs more than 10 nats over the best that the likelihood has for it: for Bernoulli pixels it has a
    logit beyond ±10 on the wrong side, for Normal ones a mean 4.5 σ away. Every further channel may cost another nat,
    for its noise costs a right prediction half of one on average. Each component counts for what it is
    responsible. A confident prediction that is right is none of them. NaN for likelihoods that have no best, because
    they may be infinitely sharp.
    """
    x = x.to(psi.dtype)
    best = likelihood.saturated_log_prob(x)
    wrong = best.unsqueeze(-2) - likelihood.log_prob(x.unsqueeze(-3), psi) > WRONG + x.shape[-1] - 1
    share = (gamma * wrong).double().sum(-2).mean(-1)
    return share.masked_fill(best.isinf().any(-1), math.nan)


def _normal(at: State | Posterior) -> tuple[Tensor | None, Tensor | None]:
    """The mean of q(θ), None for a Delta or where it is not known; and its standard deviation where it is normal."""
    if isinstance(at, State):
        return at.location, at.scale
    if isinstance(at.q, dist.Delta):
        return None, None
    normal = isinstance(at.q, dist.Independent) and isinstance(at.q.base_dist, dist.Normal)
    return at.theta, at.q.stddev if normal else None


def _divergences(model: SpatialMixture, location: Tensor, scale: Tensor) -> Tensor | None:
    """KL(q(θ_km) ‖ p(θ_m)): (B, K, M), or None where the prior is not a diagonal normal."""
    prior = model.prior_distribution()
    if not isinstance(prior, dist.Independent) or not isinstance(prior.base_dist, dist.Normal):
        return None
    # One dimension at a time: each is a vector of one entry.
    entries = dist.Normal(prior.base_dist.loc.unsqueeze(-1), prior.base_dist.scale.unsqueeze(-1), validate_args=False)
    return normal_divergence(location.unsqueeze(-1), scale.unsqueeze(-1), entries.to_event(1))
