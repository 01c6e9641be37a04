"""Distributions of θ, with one batch axis for images and event shape (K, M)."""

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference.errors import StrategyError

__all__ = ["AsOneSite", "Concatenated", "Draws", "OfAllComponents", "by_component", "concatenated"]


class Concatenated(dist.TorchDistribution):
    """The distributions of several batches of images, one after the other.

    >>> parts = [dist.Delta(torch.zeros(n, 4, 2), event_dim=2) for n in (2, 3)]
    >>> Concatenated(parts).sample((7,)).shape
    torch.Size([7, 5, 4, 2])
    """

    arg_constraints: dict[str, object] = {}  # noqa: RUF012
    support = dist.constraints.independent(dist.constraints.real, 2)

    def __init__(self, parts: Sequence[dist.TorchDistribution]):
        self.parts: list[dist.TorchDistribution] = [
            part for given in parts for part in (given.parts if isinstance(given, Concatenated) else [given])
        ]
        self.has_rsample = all(part.has_rsample for part in self.parts)
        batch = sum(part.batch_shape[0] for part in self.parts)
        super().__init__(torch.Size([batch]), self.parts[0].event_shape, validate_args=False)

    def __repr__(self) -> str:
        return f"Concatenated({self.parts})"

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        return torch.cat([part.sample(torch.Size(sample_shape)) for part in self.parts], -3)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        return torch.cat([part.rsample(torch.Size(sample_shape)) for part in self.parts], -3)

    def log_prob(self, value: Tensor) -> Tensor:  # noqa: D102
        pieces = value.split([part.batch_shape[0] for part in self.parts], -3)
        return torch.cat([part.log_prob(piece) for part, piece in zip(self.parts, pieces, strict=True)], -1)

    @property
    def mean(self) -> Tensor:  # noqa: D102
        return torch.cat([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:  # noqa: D102
        return torch.cat([part.variance for part in self.parts])


def concatenated(parts: Sequence[dist.TorchDistribution]) -> dist.TorchDistribution:
    """The distributions of several batches of images: a Delta of Deltas, a normal of normals, else `Concatenated`.

    >>> concatenated([dist.Delta(torch.zeros(n, 4, 2), event_dim=2) for n in (2, 3)]).v.shape
    torch.Size([5, 4, 2])
    """
    if all(isinstance(part, dist.Delta) for part in parts):
        return dist.Delta(torch.cat([part.v for part in parts], -3), event_dim=2)
    if all(isinstance(part, dist.Independent) and isinstance(part.base_dist, dist.Normal) for part in parts):
        means, deviations = (torch.cat([getattr(part, name) for part in parts], -3) for name in ("mean", "stddev"))
        return dist.Normal(means, deviations, validate_args=False).to_event(2)
    return Concatenated(parts)


class AsOneSite(dist.TorchDistribution):
    """A distribution of θ as a Pyro site of all components: the images at dim -2, batch shape (B, 1)."""

    arg_constraints: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, q: dist.TorchDistribution):
        self.q = q
        self.has_rsample = q.has_rsample
        super().__init__(torch.Size([*q.batch_shape, 1]), q.event_shape, validate_args=False)

    @property
    def support(self) -> dist.constraints.Constraint:  # noqa: D102
        return self.q.support

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        return self.q.sample(torch.Size(sample_shape)).unsqueeze(-3)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        return self.q.rsample(torch.Size(sample_shape)).unsqueeze(-3)

    def log_prob(self, value: Tensor) -> Tensor:  # noqa: D102
        return self.q.log_prob(value.squeeze(-3)).unsqueeze(-1)


class OfAllComponents(dist.TorchDistribution):
    """A distribution of θ as one vector, batch shape (B,) and event shape (K·M,), with event shape (K, M).

    >>> q = OfAllComponents(dist.MultivariateNormal(torch.zeros(5, 8), torch.eye(8)), 4)
    >>> q.batch_shape, q.event_shape, q.log_prob(q.sample((7,))).shape
    (torch.Size([5]), torch.Size([4, 2]), torch.Size([7, 5]))
    """

    arg_constraints: dict[str, object] = {}  # noqa: RUF012
    support = dist.constraints.independent(dist.constraints.real, 2)

    def __init__(self, flat: dist.TorchDistribution, num_components: int):
        self.flat = flat
        self.shape_of_theta = (num_components, flat.event_shape[0] // num_components)
        self.has_rsample = flat.has_rsample
        super().__init__(flat.batch_shape, torch.Size(self.shape_of_theta), validate_args=False)

    def __repr__(self) -> str:
        return f"OfAllComponents({self.flat}, num_components={self.shape_of_theta[0]})"

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        return self.flat.sample(torch.Size(sample_shape)).unflatten(-1, self.shape_of_theta)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        return self.flat.rsample(torch.Size(sample_shape)).unflatten(-1, self.shape_of_theta)

    def log_prob(self, value: Tensor) -> Tensor:  # noqa: D102
        return self.flat.log_prob(value.flatten(-2))

    @property
    def mean(self) -> Tensor:  # noqa: D102
        return self.flat.mean.unflatten(-1, self.shape_of_theta)

    @property
    def variance(self) -> Tensor:  # noqa: D102
        return self.flat.variance.unflatten(-1, self.shape_of_theta)


class Draws(dist.TorchDistribution):
    """Draws of θ (chains, draws, B, K, M), as a distribution with batch shape (B,) and event shape (K, M).

    It samples any of the draws, for every image by itself, and has no density: `moment_matched` has.

    Args:
        draws: (chains, draws, B, K, M).
        diverging: (chains, draws), which of them end a transition that the integrator failed in; None if unknown.

    >>> q = Draws(torch.randn(4, 100, 5, 3, 2))
    >>> q.sample((7,)).shape, q.moment_matched().log_prob(q.mean).shape
    (torch.Size([7, 5, 3, 2]), torch.Size([5]))
    """

    arg_constraints: dict[str, object] = {}  # noqa: RUF012
    support = dist.constraints.independent(dist.constraints.real, 2)
    has_rsample = False

    def __init__(self, draws: Tensor, diverging: Tensor | None = None):
        self.draws = draws
        self.diverging = diverging
        super().__init__(draws.shape[2:3], draws.shape[3:], validate_args=False)

    def __repr__(self) -> str:
        return f"Draws(draws: {tuple(self.draws.shape)})"

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:  # noqa: D102
        every, (B,) = self.draws.flatten(0, 1), self.batch_shape
        chosen = torch.randint(len(every), (*sample_shape, B), device=every.device)
        return every[chosen, torch.arange(B, device=every.device)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises `StrategyError`: draws have no density."""
        raise StrategyError(
            "draws of θ have no density: use q.moment_matched(), the normal with their mean and covariance"
        )

    @property
    def mean(self) -> Tensor:  # noqa: D102
        return self.draws.mean((0, 1))

    @property
    def variance(self) -> Tensor:  # noqa: D102
        return self.draws.flatten(0, 1).var(0)

    def moment_matched(self) -> OfAllComponents:
        """The normal over K·M with the draws' mean and covariance.

        Raises:
            StrategyError: too few different draws for a covariance of full rank.
        """
        _, K, _ = self.draws.shape[2:]
        every = self.draws.flatten(0, 1).flatten(-2)
        centred = (every - every.mean(0)).transpose(0, 1)
        covariance = centred.mT @ centred / (len(every) - 1)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        # Without full rank, rounding can leave a pivot above zero.
        if len(every) <= every.shape[-1] or bool(failed.any()):
            raise StrategyError(
                f"{len(every)} draws of θ with K·M = {every.shape[-1]} have no covariance of full rank: take more draws"
            )
        normal = dist.MultivariateNormal(every.mean(0), scale_tril=factor, validate_args=False)
        return OfAllComponents(normal, K)


def by_component(q: dist.TorchDistribution) -> dist.TorchDistribution | None:
    """q(θ) as a product over components, with batch shape (B, K) and event shape (M,); None where it is not one."""
    if isinstance(q, dist.Delta):
        return dist.Delta(q.v, event_dim=1)
    if isinstance(q, dist.Independent) and len(q.base_dist.batch_shape) > 1:
        return q.base_dist.to_event(1 - len(q.base_dist.event_shape))
    return None
