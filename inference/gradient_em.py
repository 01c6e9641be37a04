"""Gradient EM: generalised EM for any decoder, by line searches along the gradient of Q."""

import math

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.inference.line_search import Ascent
from pnem.inference.posterior import State
from pnem.inference.starts import nearest, seeds
from pnem.inference.strategy import Strategy
from pnem.models import MultivariateNormal, SpatialMixture, StudentT

__all__ = ["GradientEM"]

# M-steps at the first γ where the decoder is constant.
FIRST = 10


class GradientEM(Strategy):
    r"""Generalised EM (Dempster, Laird & Rubin 1977, section 3; Neal & Hinton 1998) for any differentiable model.

    The E-step is that of the model, γ_{k,i} = p(z_i = k | x_i, θ), ownership included; the M-step raises

        Q(θ) = Σ_i Σ_k γ_{k,i} log p(x_i, z_i = k | θ) + log p(θ),      γ held fixed

    by gradient ascent, so that log p(x, θ) never falls, to rounding. Given γ, Q is a sum over components, so every
    component of every image has a line search of its own. It tries θ_k + t ∂Q/∂θ_k: where Q rises enough (Armijo 1966)
    the step is taken and the next t is the shorter one of Barzilai & Borwein (1988); elsewhere θ_k stays and the next t
    is where a parabola through what was seen is highest. Value and gradient of all trials are one pass through the
    decoder.

    Nothing is amortised and the strategy has no parameters: it works at once on an untrained decoder, and where the
    decoder or the mixing weights are trained (``pnem.fit``, ``SVI``), θ counts as constant, which by Fisher's identity
    is EM's own gradient for them. It starts at θ = 0 from random γ; with a constant decoder, whose items have no
    places, at the end of several M-steps from the items nearest to seeds far from one another (k-means++). As with any
    gradient, items should then have a mean near 0 and a variance near 1, where the likelihood leaves that open.

    Args:
        model: the generative model; mixing weights are the model's and stay as they are.
        iterations: T.
        steps: trials in each M-step.
        step_size: the first t of every M-step, times the number of pixels that the component accounts for.

    Raises:
        StrategyError: fewer than two steps, a step size that is not positive and finite, mixing weights per image or
            a covariance or degrees of freedom that are not a component's own to fit, or as `Strategy`.

    >>> from pnem.models import Normal, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.MLP(5, (4, 4, 1), hidden=(16,)), Normal(0.3), num_components=2)
    >>> posterior = GradientEM(model).infer(torch.rand(3, 16, 1), restarts=4)
    >>> bool((posterior.elbo_trace.diff(dim=0) > -1e-3).all())
    True
    """

    monotone = True

    def __init__(self, model: SpatialMixture, *, iterations: int = 20, steps: int = 5, step_size: float = 1.0):
        super().__init__(model, iterations=iterations, gamma_gradient=False)
        if steps < 2:
            raise StrategyError(
                f"steps must be at least 2, one to see how far to go and one to go there, but is {steps}"
            )
        if not 0 < step_size < math.inf:
            raise StrategyError(f"step_size must be positive and finite, but is {step_size}")
        if model.mixing_kind == "per_image":
            raise StrategyError(
                'GradientEM leaves mixing weights as they are, but mixing="per_image" needs them fitted: use '
                '"uniform", "learned", or ClassicalEM'
            )
        likelihood = model.likelihood
        normal = likelihood.normal if isinstance(likelihood, StudentT) else likelihood
        tied = isinstance(normal, MultivariateNormal) and normal.covariance == "tied"
        if tied or (isinstance(likelihood, StudentT) and (likelihood.shared or likelihood.fixed is not None)):
            raise StrategyError(
                "GradientEM moves all of every component by itself, but a tied covariance or shared degrees of freedom "
                "are one for all, and given ones do not move: use ClassicalEM, or components with their own"
            )
        self.steps = steps
        self.step_size = step_size

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:  # noqa: D102
        if self.model.num_pixels is not None:
            return super().init(x, gamma)
        if not x.shape[0] * x.shape[1]:
            raise StrategyError(f"x has shape {tuple(x.shape)}: give at least one item")
        if gamma is None:
            gamma = nearest(x, seeds(x, x.new_ones(x.shape[:-1]), self.model.num_components, far=True))
        state = super().init(x, gamma)
        # θ = 0 can be far from all items, and an E-step from there would forget γ.
        for _ in range(FIRST):
            state = state._replace(theta=self.m_step(state, x))
        return state

    def step(self, state: State, x_in: Tensor, x: Tensor) -> State:  # noqa: D102
        state = super().step(state, x_in, x)
        # A constant decoder gives one pixel for all.
        mean, psi = (value.expand(-1, -1, x.shape[-2], -1) for value in (state.mean, state.psi))
        return state._replace(mean=mean, psi=psi)

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        with torch.no_grad():
            theta = state.theta
            ascent = Ascent(theta, *self._value_and_gradient(theta, state, x_in), self._first_size(state))
            for _ in range(self.steps):
                ascent = ascent.tried(lambda trial: self._value_and_gradient(trial, state, x_in))
        return ascent.point

    def expected_log_joint(self, theta: Tensor, state: State, x: Tensor) -> Tensor:
        """Each component's part of Q at θ (B, K, M), by the γ and π of a state, in nats: (B, K).

        Ownership makes a component answer for all pixels: Q_k = Σ_i γ_{k,i} (log π_k + log p(x_i | ψ_{k,i}))
        + w (1 − γ_{k,i}) E_{P₀}[log p(x₀ | ψ_{k,i})] + log p(θ_k).
        """
        model, gamma = self.model, state.gamma
        psi, x, log_mixing = model.decode(theta), x.unsqueeze(-3), state.log_mixing.unsqueeze(-1)
        if model.pixel_prior is None or not model.owned:
            q = gamma * (log_mixing + model.likelihood.log_prob(x, psi))
        else:
            log_p, unowned = model.likelihood.log_probs([x, model.pixel_prior], psi)
            q = gamma * (log_mixing + log_p) + model.ownership * (1 - gamma) * unowned
        return q.sum(-1) + model.log_prior(theta.unsqueeze(-2))

    def _value_and_gradient(self, theta: Tensor, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
        """Q_k and ∂Q/∂θ_k: (B, K) and (B, K, M)."""
        q, pull_back, *_ = torch.func.vjp(lambda theta: self.expected_log_joint(theta, state, x), theta)
        return q, pull_back(torch.ones_like(q))[0]

    def _first_size(self, state: State) -> Tensor:
        """The first t of an M-step: (B, K)."""
        pixels = state.gamma.sum(-1)
        if self.model.owned:
            pixels = pixels + self.model.ownership * (1 - state.gamma).sum(-1)
        # The one is the prior's curvature; without a prior it keeps components that own nothing in their place.
        return self.step_size / (1 + pixels)
