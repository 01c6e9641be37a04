"""Strategies whose q(θ_k) is a normal distribution, reparameterised."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.inference.checks import require_pixels, require_proper_prior
from pnem.inference.errors import StrategyError
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.strategy import Strategy
from pnem.models import SpatialMixture

__all__ = ["NormalStrategy", "Normals"]


class Normals(NamedTuple):
    """The parameters of q(θ_k) = N(location_k, scale_k²): (B, K, M) both; and a strategy's memory (B, K, H) or None."""

    location: Tensor
    scale: Tensor
    memory: Tensor | None = None


class NormalStrategy(Strategy):
    """Base of strategies with q(θ) = Π_k N(location_k, scale_k²), whose gradients go through draws of θ.

    Every iteration finds a q, draws θ = location + scale ε, ε ~ N(0, I) (Kingma & Welling 2014; Rezende et al. 2014),
    decodes it, and takes the E-step there. What `infer` returns is at the mean of q, but for the ELBO.

    Raises:
        StrategyError: the model's prior is flat, its decoder is constant, or as `Strategy`.
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        iterations: int,
        noise: Noise | None = None,
        gamma_gradient: bool = True,
    ):
        super().__init__(model, iterations=iterations, noise=noise, gamma_gradient=gamma_gradient)
        require_pixels(model, type(self).__name__)
        require_proper_prior(model, type(self).__name__)

    @abstractmethod
    def find_q(self, state: State, x_in: Tensor) -> Normals:
        """The next q(θ). A function of tensors alone.

        Raises:
            StrategyError: it is not finite.
        """

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:  # noqa: D102
        state = super().init(x, gamma)
        return state._replace(location=state.theta, scale=torch.ones_like(state.theta))

    def improve(self, state: State, x_in: Tensor) -> State:  # noqa: D102
        return drawn_from(self, state, self.find_q(state, x_in))

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.improve(state, x_in).theta


def drawn_from(strategy: Strategy, state: State, q: Normals) -> State:
    """The state with this q(θ), in single precision at least, and θ drawn from it, reparameterised.

    Raises:
        StrategyError: q(θ) is not finite, or without width.
    """
    # Under autocast networks compute in half precision.
    precision = torch.promote_types(q.location.dtype, torch.float32)
    location, scale = q.location.to(precision), q.scale.to(precision)
    _require_finite(strategy, location, scale)
    theta = location + scale * torch.randn_like(location)
    return state._replace(theta=theta, location=location, scale=scale, memory=q.memory)


def _require_finite(strategy: Strategy, location: Tensor, scale: Tensor) -> None:
    # Looking at values would cut a compiled graph in two, and make a GPU wait in every step of a training.
    if torch.compiler.is_compiling() or (strategy.training and location.is_cuda):
        return
    if not bool((location.isfinite() & scale.isfinite() & (scale > 0)).all()):
        raise StrategyError(
            f"{type(strategy).__name__} found a q(θ) that is not finite, or without width: lower the learning rate, "
            "give fit a gradient_clip, or check that the images are on the scale of the training images"
        )
