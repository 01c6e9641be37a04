"""N-EM: neural expectation maximisation (Greff, van Steenkiste & Schmidhuber 2017), by gradient steps on Q."""

import math

import torch
from torch import Tensor, nn

from pnem.inference.checks import require_pixels
from pnem.inference.errors import StrategyError
from pnem.inference.filtering import FilteringStrategy
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.models import SpatialMixture

__all__ = ["NEM"]


class NEM(FilteringStrategy):
    r"""Generalised EM whose M-step is one gradient step on Q, unrolled and trained end to end.

        θ_k ← θ_k + η ∂Q/∂θ_k,      Q = Σ_i Σ_k γ_{k,i} log p(x_i, z_i = k | ψ_{k,i}) + log p(θ),      γ held fixed

    exact for any decoder: ∂Q/∂ψ follows from the likelihood, and `Decoder.pull_back` takes it back to θ. With the
    ``"greff2017"`` E-step, Q is that of the plain mixture too, as in the paper; then for a decoder
    ``Linear(..., bias=False, input_activation="sigmoid")`` and Bernoulli pixels it is the paper's
    θ ← θ + η σ(θ)(1 − σ(θ)) ⊙ Wᵀ(γ (x − ψ)). The step size η is learned.

    Args:
        model: the generative model.
        step_size: the initial η.
        iterations, noise, e_step, gamma_gradient, task, initial: see `FilteringStrategy`.

    Raises:
        StrategyError: the step size is not positive and finite, or as `FilteringStrategy`.
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        step_size: float = 1.0,
        iterations: int = 10,
        noise: Noise | None = None,
        e_step: str = "consistent",
        gamma_gradient: bool = True,
        task: str = "static",
        initial: str = "random",
    ):
        super().__init__(
            model,
            iterations=iterations,
            noise=noise,
            e_step=e_step,
            gamma_gradient=gamma_gradient,
            task=task,
            initial=initial,
        )
        require_pixels(model, "NEM")
        if not 0 < step_size < math.inf:
            raise StrategyError(f"step_size must be positive and finite, but is {step_size}")
        self.log_step_size = nn.Parameter(torch.tensor(float(step_size)).log())

    @property
    def step_size(self) -> Tensor:
        """η."""
        return self.log_step_size.exp()

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        gradient = self.model.decoder.pull_back(state.theta, self._gradient_at(state, x_in))
        if self.model.has_proper_prior:
            gradient = gradient + torch.func.grad(lambda theta: self.model.log_prior(theta).sum())(state.theta)
        return state.theta + self.step_size * gradient

    def _gradient_at(self, state: State, x_in: Tensor) -> Tensor:
        """∂Q/∂ψ: (B, K, D, P)."""
        model, likelihood, gamma = self.model, self.model.likelihood, state.gamma.unsqueeze(-1)
        owned = likelihood.score(x_in.unsqueeze(-3), state.mean)
        if self.e_step == "greff2017" or model.pixel_prior is None:
            return gamma * owned
        return torch.lerp(model.ownership * likelihood.score(model.pixel_prior, state.mean), owned, gamma)
