"""The one abstraction: a strategy is a Pyro guide that unrolls."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pnem.inference.checks import best_starts, check_starts, require_images
from pnem.inference.distributions import AsOneSite, by_component
from pnem.inference.errors import StrategyError
from pnem.inference.noise import Noise
from pnem.inference.posterior import Posterior, State
from pnem.models import Configured, SpatialMixture
from pnem.models.parameters import register_parameters

__all__ = ["Strategy"]

# The original code adds this to p(x_i | ψ) in its E-step.
GREFF_FLOOR = 1e-6


class Strategy(Configured, nn.Module, ABC):
    """How θ and γ are inferred: T iterations, each an E-step (γ from ψ) and an M-step (θ from γ).

    A strategy is a module with its own parameters and an ordinary Pyro guide for its model:
    ``SVI(model, strategy, optim, TraceEnum_ELBO(max_plate_nesting=2))`` trains the pair. It holds the model without
    owning it, so that ``strategy.parameters()`` are the strategy's alone.

    Args:
        model: the generative model.
        iterations: T.
        noise: input noise, applied once per unroll and only in training mode.
        e_step: ``"consistent"``: γ is the posterior of the declared model, ownership included. ``"greff2017"``: the
            E-step of the N-EM paper and code, which leaves ownership out: γ_k ∝ p(x | ψ_k) + 10⁻⁶.
        gamma_gradient: whether training differentiates through γ.

    Raises:
        StrategyError: iterations < 1 or an unknown E-step.
    """

    model: SpatialMixture
    # Of θ, by which the best of several starts is chosen.
    merit_draws = 10
    # Whether no iteration lowers the ELBO, where q(θ) is a Delta.
    monotone = False
    # What its iterations are of: see `FilteringStrategy`.
    task = "static"

    def __init__(
        self,
        model: SpatialMixture,
        *,
        iterations: int = 10,
        noise: Noise | None = None,
        e_step: str = "consistent",
        gamma_gradient: bool = True,
    ):
        super().__init__()
        if not isinstance(iterations, int) or iterations < 1:
            raise StrategyError(f"iterations must be at least 1, and whole, but is {iterations}")
        if e_step not in ("consistent", "greff2017"):
            raise StrategyError(f'e_step must be "consistent" or "greff2017", but is {e_step!r}')
        # Past nn.Module, which would register the model as a submodule.
        object.__setattr__(self, "model", model)
        self.iterations = iterations
        self.noise = noise
        self.e_step = e_step
        self.gamma_gradient = gamma_gradient

    @abstractmethod
    def m_step(self, state: State, x_in: Tensor) -> Tensor:
        """θ improved given γ: -> (B, K, M). A pure function of tensors."""

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:
        """The state before the first iteration: θ = 0, predictions of 0, γ given or random.

        Random γ are |N(0, 1)|, normalised over components; with one component γ is 1.

        Raises:
            StrategyError: `gamma` does not have shape (B, K, D).
        """
        batch, K, D = len(x), self.model.num_components, x.shape[-2]
        if gamma is None:
            # A draw can be 0, which with one component would be divided by itself.
            gamma = x.new_empty(batch, K, D).normal_().abs_().clamp_min_(torch.finfo(x.dtype).tiny)
            gamma = gamma / gamma.sum(-2, keepdim=True)
        elif gamma.shape != (batch, K, D):
            raise StrategyError(f"gamma has shape {tuple(gamma.shape)}, but this needs (B, K, D) = {(batch, K, D)}")
        gamma = gamma.to(x.dtype)
        theta = x.new_zeros(batch, K, self.model.latent_features)
        mean = x.new_zeros(batch, K, D, x.shape[-1])
        psi = x.new_zeros(batch, K, D, self.model.decoder.image_shape[2])
        nothing = torch.zeros_like(gamma)
        return State(theta, mean, psi, gamma, nothing, nothing[:, 0, 0], self.model.log_mixing.expand(batch, K))

    def improve(self, state: State, x_in: Tensor) -> State:
        """The state with a better q(θ), and θ drawn from it: by default a Delta at what `m_step` finds."""
        return state._replace(theta=self.m_step(state, x_in))

    def step(self, state: State, x_in: Tensor, x: Tensor) -> State:
        """One M-step that sees `x_in`, and the E-step on its target `x`: a function of tensors alone.

        Where q(θ) is a distribution, it draws θ with torch's global generator.
        """
        state = self.improve(state, x_in)
        return self.evaluate(state, state.theta, x)

    def evaluate(self, state: State, theta: Tensor, x: Tensor | Callable[[Tensor], Tensor]) -> State:
        """The state at another θ (B, K, M), after the E-step on `x`, or what `x` makes of ψ there; its q(θ) stays."""
        theta = _in_single(theta)
        psi = self.model.decode(theta)
        if not isinstance(x, Tensor):
            x = x(psi)
        mean, log_joint, gamma, log_evidence = self.model.predict_and_explain(x, psi, state.log_mixing)
        if self.e_step == "greff2017":
            gamma = self._greff2017(x, psi)
        if not self.gamma_gradient:
            gamma = gamma.detach()
        return state._replace(
            theta=theta, mean=mean, psi=psi, gamma=gamma, log_joint=log_joint, log_evidence=log_evidence
        )

    def _greff2017(self, x: Tensor, psi: Tensor) -> Tensor:
        likelihood = self.model.likelihood.log_prob(x.unsqueeze(-3), psi).exp() + GREFF_FLOOR
        return likelihood / likelihood.sum(-2, keepdim=True)

    @property
    def is_sequential(self) -> bool:
        """Whether it takes sequences (T, B, D, C) in place of images (B, D, C)."""
        return self.task != "static"

    @property
    def steps_ahead(self) -> int:
        """How many frames lie between what a step sees and what it is scored on."""
        return int(self.task == "prediction")

    def targets(self, x: Tensor, steps: int) -> Sequence[Tensor]:
        """What so many iterations on `x` are scored on: the images (B, D, C) each time, or frames of sequences."""
        return [x] * steps

    def frames(self, x_in: Tensor, x: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        """What each of the T iterations sees of `x_in`, and what of `x` it is scored on."""
        return [(x_in, x)] * self.iterations

    def iterate(self, state: State, x_in: Tensor, x: Tensor) -> list[State]:
        """The T states that follow `state`: a pure function of tensors."""
        states = []
        for seen, target in self.frames(x_in, x):
            state = self.step(state, seen, target)
            states.append(state)
        return states

    def start(self, x: Tensor, gamma: Tensor | None = None) -> tuple[State, Tensor]:
        """All that is random in an unroll: the initial state and the (in training mode, noisy) input."""
        x_in = self.noise(x) if self.noise is not None and self.training else x
        return self.init(x[0] if self.is_sequential else x, gamma), x_in

    def unroll(self, x: Tensor, gamma: Tensor | None = None) -> list[State]:
        """The states after each of the T iterations on images `x` (B, D, C), from given or random γ (B, K, D)."""
        return self.iterate(*self.start(x, gamma), x)

    def guide_at(self, state: State | Posterior) -> Callable[..., Tensor]:
        """The Pyro guide at a state or posterior: its q on ``"theta"``.

        Where components depend on one another, ``"theta"`` follows from an auxiliary site of all of them. Of states
        with a leading axis S, the frames are a plate ``"time"``.
        """
        q = state.q

        def guide(*_: object, **__: object) -> Tensor:
            components = by_component(q)
            with contextlib.ExitStack() as plates:
                if len(q.batch_shape) > 1:
                    plates.enter_context(pyro.plate("time", q.batch_shape[0], dim=-3))
                plates.enter_context(pyro.plate("images", q.batch_shape[-1], dim=-2))
                if components is None:
                    theta = pyro.sample("theta_of_all", AsOneSite(q), infer={"is_auxiliary": True})
                    components = dist.Delta(theta.squeeze(-3), event_dim=1)
                with pyro.plate("components", self.model.num_components, dim=-1):
                    return pyro.sample("theta", components)

        return guide

    def elbo(self, state: State) -> Tensor:
        """The ELBO of `guide_at(state)`, z summed out, in nats per image: (B,).

        log p(x | θ) − KL(q(θ) ‖ p(θ)) at the state's θ, which is to be a draw from q: an unbiased estimate. The
        divergence is in closed form where there is one, and else log q(θ) − log p(θ) at the same draw. For a Delta
        guide, log p(x | θ) + log p(θ): a plug-in value, not a bound on log p(x). A prior on π adds log p(π), which
        images that share π share.
        """
        return state.log_evidence - self.divergence(state) + self.log_mixing_prior(state)

    def divergence(self, state: State) -> Tensor:
        """KL(q(θ) ‖ p(θ)), or log q(θ) − log p(θ) at the state's θ; for a Delta −log p(θ): (B,) nats per image."""
        divergence = None
        if state.distribution is None:
            if state.location is None or state.scale is None:
                return -self.model.log_prior(state.theta)
            divergence = self.model.prior_divergence(state.location, state.scale)
        if divergence is None:
            divergence = state.q.log_prob(state.theta) - self.model.log_prior(state.theta)
        return divergence

    def log_mixing_prior(self, state: State) -> Tensor | float:
        """log p(π) in nats, zero where there is no prior on it; a π of all images is shared among them: (B,)."""
        if self.model.mixing_concentration == 1:
            return 0.0
        log_prior = self.model.log_mixing_prior(state.log_mixing)
        return log_prior / len(log_prior) if self.model.mixing_kind == "learned" else log_prior

    def merit(self, state: State, x: Tensor) -> Tensor:
        """By what the best of several starts is chosen, (B,): the ELBO.

        Where q(θ) is a distribution, its mean over draws of its own, so that the trace is not selected for.
        """
        if state.location is None and state.distribution is None:
            return self.elbo(state)
        elbos = [self.elbo(self.evaluate(state, state.q.sample(), x)) for _ in range(self.merit_draws)]
        return torch.stack(elbos).mean(0)

    def settle(self, state: State, x: Tensor) -> State:
        """The state as `infer` reports it: at the mean of q(θ)."""
        return state if state.location is None else self.evaluate(state, state.location, x)

    def forward(self, x: Tensor) -> Tensor:
        """The Pyro guide: unrolls on `x` (B, D, C) and samples θ from the last q(θ).

        The E-step there is left to the model, which sums out z.
        """
        register_parameters("strategy", self)
        state, x_in = self.start(x)
        *before, (last, _) = self.frames(x_in, x)
        for seen, target in before:
            state = self.step(state, seen, target)
        state = self.improve(state, last)
        return self.guide_at(state._replace(theta=_in_single(state.theta)))()

    def check_infer(self, restarts: int, iterations: int, gamma: Tensor | None) -> None:
        """Raises `StrategyError` unless `infer` can do with these."""
        check_starts(restarts, iterations, given=gamma is not None)

    def infer(
        self,
        x: Tensor,
        *,
        restarts: int = 1,
        iterations: int | None = None,
        gamma: Tensor | None = None,
        keep_trace: bool = True,
    ) -> Posterior:
        """The posterior for images `x` (B, D, C), without input noise or gradients.

        Where q(θ) is a distribution, what depends on θ is reported at its mean.

        Args:
            x: the images.
            restarts: R starts run as one batch; per image the one with the highest ELBO at the end is kept.
            iterations: T; as many as in training when None.
            gamma: initial responsibilities (B, K, D); random when None, which R > 1 requires.
            keep_trace: whether to keep every iteration's state, at T times the memory.

        Raises:
            ModelError: `x` does not fit the model.
            StrategyError: restarts or iterations < 1, or restarts > 1 from a given γ.
        """
        iterations = self.iterations if iterations is None else iterations
        self.model.check(x)
        require_images(self.model, x)
        self.check_infer(restarts, iterations, gamma)
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                repeated = x.repeat(restarts, 1, 1)
                state, x_in = self.start(repeated, gamma)
                states: list[State] = []
                elbos: list[Tensor] = []
                for _ in range(iterations):
                    state = self.step(state, x_in, repeated)
                    states = [*states, state] if keep_trace else [state]
                    elbos.append(self.elbo(state))
                merit = self.merit(state, repeated) if restarts > 1 else elbos[-1]
        finally:
            self.train(was_training)
        elbo = torch.stack(elbos)
        if restarts > 1:
            best = best_starts(merit, restarts)
            states = [state.map(lambda value: value[best]) for state in states]
            elbo = elbo[:, best]
        with torch.no_grad():
            states = [self.settle(state, x) for state in states]
        return Posterior.from_states(states, elbo, keep_trace=keep_trace)


def _in_single(theta: Tensor) -> Tensor:
    """In single precision at least."""
    return theta.to(torch.promote_types(theta.dtype, torch.float32))
