"""Iterative amortised inference: q(θ) refined by a learned network (Marino, Yue & Mandt 2018; Greff et al. 2019)."""

import torch
from torch import Tensor, nn

from pnem.inference.checks import require_proper_prior
from pnem.inference.encoders import Encoder
from pnem.inference.errors import StrategyError
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.recurrent import RecurrentStrategy
from pnem.inference.variational import Normals, drawn_from
from pnem.models import SpatialMixture

__all__ = ["IterativeVI"]

# |log scale| stays below this.
LOG_SCALE_LIMIT = 10.0


class IterativeVI(RecurrentStrategy):
    r"""Variational inference by T learned refinements, with one network for all components.

    From N(0, I), q(θ_k) = N(μ_k, diag(s_k²)) is refined by

        h_k ← cell([encoder(γ_k (x − E[x | ψ_k])), μ_k, log s_k, ε_k, g_k], h_k)
        (μ_k, log s_k) ← W h_k + b,      then a draw θ_k = μ_k + s_k ε_k,  ε_k ~ N(0, I),  and the E-step there

    where g_k = asinh of (s_k ∂L/∂μ_k, ∂L/∂log s_k): the gradient of the image's ELBO at the draw, in units of q's own
    width, and on a logarithmic scale where it is large. Together with ε it says where a Newton step would go. No
    gradient of training flows through g (as in IODINE, Greff et al. 2019). That the memory is read afresh in every
    iteration, where IODINE adds to the last μ and log s, trains faster. (log s is kept within ±10 by a tanh.)

    With ``posterior="delta"`` the memory is θ_k itself: h_k = θ_k, q is a Delta at it, and g_k = asinh(∂L/∂θ_k).
    Without `gradients` that is `RNNEM`.

    Args:
        model: the generative model; with a proper prior for a normal q.
        posterior: ``"normal"`` or ``"delta"``.
        gradients: whether the cell sees the ELBO's gradients, which cost one pass through the decoder and back.
        hidden: H, the size of a normal posterior's memory h_k; 256 when None.
        encoder: the network between the error and the cell; None for the pixels themselves.
        recurrence: ``"sigmoid"`` or ``"gated"``.
        layer_norm: whether the cell is layer-normalised.
        iterations, noise, e_step, gamma_gradient, task, initial: see `FilteringStrategy`.

    Raises:
        StrategyError: an unknown posterior or recurrence, a flat prior with a normal posterior, `hidden` below 1 or
            with a Delta, an encoder for other images, or as `FilteringStrategy`.

    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.MLP(8, (6, 6, 1)), Bernoulli(), 3, prior="standard_normal", pixel_prior=0.0)
    >>> posterior = IterativeVI(model, hidden=16, iterations=5).infer(torch.zeros(2, 36, 1), restarts=4)
    >>> posterior.q.stddev.shape, posterior.elbo_trace.shape
    (torch.Size([2, 3, 8]), torch.Size([5, 2]))
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        posterior: str = "normal",
        gradients: bool = True,
        hidden: int | None = None,
        encoder: Encoder | None = None,
        recurrence: str = "sigmoid",
        layer_norm: bool = False,
        iterations: int = 10,
        noise: Noise | None = None,
        e_step: str = "consistent",
        gamma_gradient: bool = True,
        task: str = "static",
        initial: str = "random",
    ):
        if posterior not in ("normal", "delta"):
            raise StrategyError(f'posterior must be "normal" or "delta", but is {posterior!r}')
        M = model.latent_features
        if posterior == "delta":
            if hidden is not None:
                raise StrategyError(f'with posterior="delta" the memory is θ, of {M} features: leave `hidden` out')
            features, vector_features = M, M if gradients else 0
        else:
            features, vector_features = 256 if hidden is None else hidden, 5 * M if gradients else 3 * M
            if not isinstance(features, int) or features < 1:
                raise StrategyError(f"hidden must be at least 1, and whole, but is {features}")
        super().__init__(
            model,
            features=features,
            vector_features=vector_features,
            encoder=encoder,
            recurrence=recurrence,
            layer_norm=layer_norm,
            iterations=iterations,
            noise=noise,
            e_step=e_step,
            gamma_gradient=gamma_gradient,
            task=task,
            initial=initial,
        )
        self.gradients = gradients
        self.features = features
        self.head: nn.Linear | None = None
        if posterior == "normal":
            require_proper_prior(model, type(self).__name__)
            self.head = nn.Linear(features, 2 * M)

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:  # noqa: D102
        state = super().init(x, gamma)
        if self.head is None:
            return state
        memory = x.new_zeros(len(x), self.model.num_components, self.features)
        location, scale = torch.zeros_like(state.theta), torch.ones_like(state.theta)
        return state._replace(location=location, scale=scale, memory=memory)

    def check_state(self, state: State, x: Tensor) -> None:  # noqa: D102
        super().check_state(state, x)
        held = None if state.memory is None else state.memory.shape[-1]
        if self.head is not None and held != self.features:
            raise StrategyError(
                f"the state to go on from has {'no' if held is None else held} features of memory, but this strategy "
                f"has {self.features}: give the last state that a strategy like this one reached"
            )

    def improve(self, state: State, x_in: Tensor) -> State:  # noqa: D102
        gradients = self.elbo_gradients(state, x_in) if self.gradients else ()
        if self.head is None:
            theta = self.recur(state, x_in, state.theta, *(g.asinh() for g in gradients))
            return state._replace(theta=theta)
        location, scale, memory = state.location, state.scale, state.memory
        assert location is not None
        assert scale is not None
        assert memory is not None
        if gradients:
            gradients = (scale.detach() * gradients[0]).asinh(), gradients[1].asinh()
        epsilon = (state.theta - location) / scale
        memory = self.recur(state, x_in, memory, location, scale.log(), epsilon, *gradients).to(location.dtype)
        found, log_scale = self.head(memory).to(location.dtype).chunk(2, -1)
        log_scale = LOG_SCALE_LIMIT * torch.tanh(log_scale / LOG_SCALE_LIMIT)
        return drawn_from(self, state, Normals(found, log_scale.exp(), memory))

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.improve(state, x_in).theta

    def elbo_gradients(self, state: State, x_in: Tensor) -> tuple[Tensor, ...]:
        """∂L/∂μ and ∂L/∂log s at the state's draw θ = μ + s ε, or ∂L/∂θ for a Delta: each (B, K, M), without a graph.

        γ is held at the state's, where the ELBO's own gradient is (Fisher's identity), so that already the first γ,
        which follows from no θ, tells components apart.
        """

        def at(theta: Tensor, state: State) -> Tensor:
            log_joint = self.model.log_joint_at(x_in, self.model.decode(theta), state.log_mixing)
            return (state.gamma * log_joint).sum() - self.divergence(state._replace(theta=theta)).sum()

        with torch.no_grad():
            if state.location is None or state.scale is None:
                return (torch.func.grad(lambda theta: at(theta, state))(state.theta),)
            epsilon = (state.theta - state.location) / state.scale

            def elbo(location: Tensor, log_scale: Tensor) -> Tensor:
                scale = log_scale.exp()
                return at(location + scale * epsilon, state._replace(location=location, scale=scale))

            return torch.func.grad(elbo, argnums=(0, 1))(state.location, state.scale.log())
