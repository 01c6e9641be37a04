"""Densities that θ can be drawn from: q(θ) of a strategy, or a normal around its θ where q(θ) is a Delta."""

import math
from typing import Protocol, runtime_checkable

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference.checks import require_images, require_proper_prior
from pnem.inference.distributions import Concatenated, OfAllComponents
from pnem.inference.errors import StrategyError
from pnem.inference.posterior import Posterior
from pnem.inference.strategy import Strategy
from pnem.inference.svi import curvature
from pnem.models import SpatialMixture

__all__ = ["MomentMatched", "laplace", "prior_of_images", "proposal"]

# Above so many dimensions K·M a Laplace width is that of each dimension by itself.
LARGEST_COVARIANCE = 512


@runtime_checkable
class MomentMatched(Protocol):
    """A q(θ) without a density, as draws of a sampler are, that can give one with its moments."""

    def moment_matched(self) -> dist.TorchDistribution:
        """A distribution with a density, batch shape (B,) and event shape (K, M)."""


def prior_of_images(model: SpatialMixture, count: int) -> dist.TorchDistribution:
    """p(θ) as a distribution with batch shape (B,) and event shape (K, M)."""
    return model.prior_distribution().expand([count, model.num_components]).to_event(1)


def proposal(
    model: SpatialMixture,
    strategy: Strategy,
    x: Tensor,
    *,
    width: float | str | None = None,
    posterior: Posterior | None = None,
) -> dist.TorchDistribution:
    """A distribution with a density, batch shape (B,) and event shape (K, M), to draw θ of the images `x` from.

    Args:
        model: the generative model, with a proper prior.
        strategy: a strategy of this model.
        x: the images (B, D, C).
        width: where q(θ) is a Delta: the standard deviation of a normal around its θ, or ``"laplace"``; see `laplace`.
        posterior: what ``strategy.infer(x)`` gave before, so as not to infer again.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: the prior is flat, the strategy is another model's, the posterior is of other images, q(θ) is a
            Delta and no width is given or has a density and one is given, or the width is not positive and finite.
    """
    require_proper_prior(model, "an estimate of log p(x)")
    if strategy.model is not model:
        raise StrategyError(
            f"this {type(strategy).__name__} is a strategy of another model than the one given: build it as "
            f"{type(strategy).__name__}(model, ...), or give strategy.model"
        )
    _check_width(width)
    model.check(x)
    require_images(model, x)
    q = (strategy.infer(x, keep_trace=False) if posterior is None else posterior).q
    shape = torch.Size([len(x), model.num_components, model.latent_features])
    if q.batch_shape + q.event_shape != shape:
        raise StrategyError(
            f"q(θ) has shape {tuple(q.batch_shape + q.event_shape)}, but these images and this model need (B, K, M) = "
            f"{tuple(shape)}: give the posterior of the same images"
        )
    return _with_density(model, q, x, width)


def _check_width(width: float | str | None) -> None:
    number = isinstance(width, int | float) and not isinstance(width, bool)
    if width is None or width == "laplace" or (number and 0 < float(width) < math.inf):
        return
    raise StrategyError(f'width must be a positive, finite standard deviation, or "laplace", but is {width!r}')


def _with_density(
    model: SpatialMixture, q: dist.TorchDistribution, x: Tensor, width: float | str | None
) -> dist.TorchDistribution:
    if isinstance(q, Concatenated):
        images = x.split([part.batch_shape[0] for part in q.parts])
        return Concatenated([_with_density(model, part, its, width) for part, its in zip(q.parts, images, strict=True)])
    if isinstance(q, dist.Delta):
        if width is None:
            raise StrategyError(
                "q(θ) is a Delta, which covers none of p(θ | x): give width, the standard deviation of a normal around "
                'its θ such as width=0.1, or width="laplace"'
            )
        if width == "laplace":
            return laplace(model, x, q.v)
        return dist.Normal(q.v, float(width), validate_args=False).to_event(2)
    if width is not None:
        raise StrategyError(
            f"width is for strategies whose q(θ) is a Delta, but this one is a {type(q).__name__} with a width of its "
            "own: leave width out"
        )
    return q.moment_matched() if isinstance(q, MomentMatched) else q


def laplace(model: SpatialMixture, x: Tensor, theta: Tensor) -> dist.TorchDistribution:
    """The normal around θ whose precision is −∂² log p(x, θ) / ∂θ², over all of an image's K·M dimensions.

    It is Laplace's approximation where θ is a mode, and p(θ | x) itself where that is normal. Above 512 dimensions only
    the diagonal of the Hessian is used. Where log p(x, θ) is not concave, the precision is made to be at least the
    prior's: in units of the prior's standard deviations no eigenvalue of it is below 1, which is where they all are
    when log p(x | θ) is concave. K·M products of the Hessian with a vector are computed.

    Args:
        model: the generative model, with a proper prior.
        x: the images (B, D, C).
        theta: (B, K, M).

    Raises:
        StrategyError: the Hessian is not finite.
    """
    flat, K = theta.detach().flatten(1), theta.shape[-2]
    deviation = model.prior_distribution().variance.detach().sqrt().repeat(K).double()
    full = flat.shape[1] <= LARGEST_COVARIANCE
    hessian = curvature(model, x, theta, diagonal=not full).double()
    if not bool(hessian.isfinite().all()):
        raise StrategyError(
            "the Hessian of log p(x, θ) is not finite at this q(θ), which has no Laplace width then: give a number as "
            "width, and check that θ is finite"
        )
    if not full:
        scale = deviation / (hessian * deviation.square()).clamp_min(1).sqrt()
        return dist.Normal(theta.detach(), scale.to(theta).view(theta.shape), validate_args=False).to_event(2)
    # In units of the prior's standard deviations.
    hessian = deviation.unsqueeze(-1) * (0.5 * (hessian + hessian.mT)) * deviation
    precision, axes = torch.linalg.eigh(hessian)
    root = deviation.unsqueeze(-1) * axes * precision.clamp_min(1).rsqrt().unsqueeze(-2)
    lower = torch.linalg.cholesky(root @ root.mT).to(flat)
    normal = dist.MultivariateNormal(flat, scale_tril=lower, validate_args=False)
    return OfAllComponents(normal, K)
