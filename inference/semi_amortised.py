"""Semi-amortised inference: another strategy's q(θ), refined on every image's own ELBO."""

from collections.abc import Iterator

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference.checks import require_pixels
from pnem.inference.classical_em import ClassicalEM
from pnem.inference.errors import StrategyError
from pnem.inference.line_search import Ascent
from pnem.inference.nuts import NUTS
from pnem.inference.posterior import State
from pnem.inference.strategy import Strategy

__all__ = ["SemiAmortised"]

# Draws that the steps do not see.
HELD_OUT = 64
# Standard errors by which the ELBO must have risen on them.
CERTAIN = 3
# Predictions (draws, images, components and pixels) of one pass through the decoder.
PASS = 2**23
# Of the draws that are the same in every strategy.
SEED = 0


class SemiAmortised(Strategy):
    r"""Amortisation refined: starts at another strategy's q(θ) and takes steps on every image's own ELBO (Hjelm et al.
    2016; Kim et al. 2018). It closes the amortisation gap (Cremer et al. 2018), which is what one network for all
    images loses against the best q of its family for each.

    From a normal q, whose ELBO is an expectation, every iteration tries a step of its location μ and log scale log s,

        (μ, log s) ← (μ, log s) + t (s² ∂L/∂μ, ½ ∂L/∂log s),      L = 1/S Σ_j log p(x, μ + s ε_j) + Σ log s

    which is along the natural gradient (Amari 1998), with a line search for each image (see `GradientEM`) and the same
    S draws ε_j all the time, so that L is a function that can be climbed. They come in pairs ±ε and, as far as S
    allows, have the covariance I: L is exact where log p(x, θ) is quadratic and S ≥ 2 K M. From a Delta q it climbs
    log p(x, θ) in the same way.

    **It never lowers an image's ELBO.** At a Delta, log p(x, θ) never falls. A normal q is the refined one only for
    images where it is better than the start's by three standard errors of the difference on 64 other draws, which the
    steps do not see; the others keep the start's. (Where both are equally good it is taken in about 2 of 1,000 cases,
    and what is lost then is as little as such a difference.) The draws are the same for all images and at all times:
    given the start, refinement is deterministic.

    In training, gradients go to the start's q as if each step shifted it by a constant (first order: no differentiation
    through the steps), and from there to every parameter of the strategy.

    Args:
        strategy: whose last state is the start; trained along with this one, or before.
        steps: T, trials of a step; in `infer`, ``iterations``.
        draws: S, even; below 2 K M the steps begin to fit the draws, and more images keep their start.

    Raises:
        StrategyError: fewer than one step, draws that are odd or fewer than two, a constant decoder, classical EM; when
            used: a q(θ) that is neither normal nor a Delta; restarts or γ that the strategy does not take.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.MLP(5, (4, 4, 1), hidden=(16,)), Bernoulli(), 1, prior="standard_normal")
    >>> strategy = SemiAmortised(VAE(model), steps=10)
    >>> strategy.infer(torch.ones(2, 16, 1)).elbo_trace.shape
    torch.Size([10, 2])
    """

    draws: Tensor
    held_out: Tensor

    def __init__(self, strategy: Strategy, *, steps: int = 20, draws: int = 64):
        if not isinstance(strategy, Strategy):
            raise StrategyError(f"SemiAmortised refines a strategy's q(θ): give one, not a {type(strategy).__name__}")
        if isinstance(strategy, ClassicalEM | NUTS):
            raise StrategyError(
                f"SemiAmortised has nothing to refine: {type(strategy).__name__} treats every image by itself"
            )
        if strategy.is_sequential:
            raise StrategyError(
                f"SemiAmortised refines q(θ) of images, but this {type(strategy).__name__} takes sequences "
                f'(task={strategy.task!r}): build it with task="static"'
            )
        for name, value, least in (("steps", steps, 1), ("draws", draws, 2)):
            if not isinstance(value, int) or value < least:
                raise StrategyError(f"{name} must be at least {least}, and whole, but is {value}")
        if draws % 2:
            raise StrategyError(f"draws come in pairs, ε and −ε: give an even number, not {draws}")
        super().__init__(
            strategy.model, iterations=steps, e_step=strategy.e_step, gamma_gradient=strategy.gamma_gradient
        )
        require_pixels(self.model, "SemiAmortised")
        self.strategy = strategy
        # What is climbed is log p(x, θ), z summed out: with another E-step than the model's the ELBO is less.
        self.monotone = self.e_step == "consistent"
        shape = self.model.num_components, self.model.latent_features
        generator = torch.Generator().manual_seed(SEED)
        for name, pairs in (
            ("draws", _matched(draws // 2, shape, generator)),
            ("held_out", torch.randn(HELD_OUT // 2, *shape, generator=generator, dtype=torch.float64)),
        ):
            values = torch.stack([pairs, -pairs], 1).flatten(0, 1).to(torch.get_default_dtype())
            self.register_buffer(name, values, persistent=False)

    def check_infer(self, restarts: int, iterations: int, gamma: Tensor | None) -> None:  # noqa: D102
        super().check_infer(restarts, iterations, gamma)
        self.strategy.check_infer(restarts, self.strategy.iterations, gamma)

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:
        """The strategy's last state, after its own T iterations.

        Raises:
            StrategyError: its q(θ) is neither normal nor a Delta, or as the strategy.
        """
        state = self.strategy.unroll(x, gamma)[-1]
        q = state.q
        normal = isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal)
        if not (normal and state.location is not None) and not isinstance(q, dist.Delta):
            raise StrategyError(
                f"SemiAmortised refines a normal or a Delta q(θ), but {type(self.strategy).__name__}'s is of type "
                f"{type(q).__name__}: use that strategy by itself"
            )
        with torch.no_grad():
            start = _point(state)
            value, gradient = self._value_and_gradient(start, state, x)
            length = (_metric(start, state) * gradient.square()).sum(-1).sqrt()
            # The first trial moves θ by at most one standard deviation, in the mean over its entries.
            size = (start.shape[-1] ** 0.5 / length).clamp(max=1.0)
            kept = [] if state.location is None else [start, self._held_out_elbos(start, state, x)]
            return state._replace(memory=_pack([start, value, gradient, size, *kept], state))

    def improve(self, state: State, x_in: Tensor) -> State:  # noqa: D102
        return self.choose(self.climb(state, x_in), x_in)

    def climb(self, state: State, x: Tensor) -> State:
        """The state after one more trial of a step, which only its memory knows of until `choose`."""
        with torch.no_grad():
            ascent, kept = self._unpack(state)
            ascent = ascent.tried(lambda point: self._value_and_gradient(point, state, x), _metric(ascent.point, state))
            if kept:
                ascent = ascent._replace(size=torch.minimum(ascent.size, _longest(ascent, state)))
            return state._replace(memory=_pack([*ascent, *kept], state))

    def choose(self, state: State, x: Tensor, *, certain: float = CERTAIN) -> State:
        """The state at where the ascent stands; of a normal q, the start's where that is not better on other draws.

        Args:
            state: as `climb` returns it.
            x: the images (B, D, C).
            certain: by how many standard errors it has to be better.
        """
        with torch.no_grad():
            ascent, kept = self._unpack(state)
            point = ascent.point
            if kept:
                start, before = kept
                rise = self._held_out_elbos(point, state, x) - before
                better = _is_positive(rise, self._control(point, start), certain)
                point = torch.where(better.unsqueeze(-1), point, start)
        return _shifted(state, point)

    def objective(self, state: State) -> Tensor:
        """What is climbed, where the ascent stands: it never falls; (B,), in nats up to a constant."""
        return self._unpack(state)[0].value

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.improve(state, x_in).theta

    def merit(self, state: State, x: Tensor) -> Tensor:
        """The ELBO, of a normal q on draws that the steps do not see."""
        return self.elbo(state) if state.location is None else self._held_out_elbos(_point(state), state, x).mean(-1)

    def _unpack(self, state: State) -> tuple[Ascent, list[Tensor]]:
        """Where the ascent stands; and of a normal q the start, and its ELBO at pairs of held-out draws."""
        assert state.memory is not None
        P = _point(state).shape[-1] // state.theta.shape[-2]
        sizes = [P, 1, P, 1] + ([] if state.location is None else [P, HELD_OUT // 2])
        parts = state.memory.split(sizes, -1)
        point, gradient = parts[0].flatten(1), parts[2].flatten(1)
        ascent = Ascent(point, parts[1][:, 0, 0], gradient, parts[3][:, 0, 0])
        return ascent, [] if state.location is None else [parts[4].flatten(1), parts[5][:, 0]]

    def _value_and_gradient(self, point: Tensor, state: State, x: Tensor) -> tuple[Tensor, Tensor]:
        """L and its gradient: (B,) and (B, P)."""
        value, gradient = torch.zeros_like(point[:, 0]), torch.zeros_like(point)
        for draws in self._pieces(self.draws, state):
            mean, pull_back, *_ = torch.func.vjp(
                lambda point, draws=draws: self._log_weights(point, draws, state, x).sum(0), point
            )
            value, gradient = value + mean, gradient + pull_back(torch.ones_like(mean))[0]
        count = 1 if state.location is None else len(self.draws)
        return value / count, gradient / count

    def _held_out_elbos(self, point: Tensor, state: State, x: Tensor) -> Tensor:
        """The ELBO at every pair of held-out draws: (B, pairs)."""
        weights = [self._log_weights(point, draws, state, x) for draws in self._pieces(self.held_out, state)]
        return torch.cat(weights).unflatten(0, (-1, 2)).mean(1).T

    def _control(self, point: Tensor, start: Tensor) -> Tensor:
        """A control variate for the rise, of mean zero: (B, pairs).

        It is all that is random in the rise where log p(x, θ) is that of the q at `point`, up to a constant.
        """
        change = (start - point).unflatten(-1, (self.held_out.shape[1], -1)).chunk(2, -1)[1]
        squares = self.held_out[::2].square() - 1
        return -0.5 * torch.einsum("nkm,bkm->bn", squares, torch.expm1(2 * change))

    def _pieces(self, draws: Tensor, state: State) -> Iterator[Tensor]:
        return iter(
            draws.split(max(1, PASS // max(1, state.gamma.numel()))) if state.location is not None else draws[:1]
        )

    def _log_weights(self, point: Tensor, draws: Tensor, state: State, x: Tensor) -> Tensor:
        """log p(x, θ) − log q(θ) at draws of θ, but for the draws' own part of log q: (draws, B)."""
        point = point.unflatten(-1, (state.theta.shape[-2], -1))
        if state.location is None:
            theta, log_scale = point.unsqueeze(0), torch.zeros_like(point)
        else:
            location, log_scale = point.chunk(2, -1)
            theta = location + log_scale.exp() * draws.unsqueeze(1)
        log_joint = self.model.log_joint_at(x, self.model.decode(theta), state.log_mixing)
        return log_joint.logsumexp(-2).sum(-1) + self.model.log_prior(theta) + log_scale.sum((-2, -1))


def _matched(count: int, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Normal draws with the second moment one in every direction; where they are too few for it, in every entry."""
    draws = torch.randn(count, shape[0] * shape[1], generator=generator, dtype=torch.float64)
    if count >= draws.shape[1]:
        draws = torch.linalg.qr(draws).Q * count**0.5
    else:
        draws = draws / draws.square().mean(0).sqrt()
    return draws.unflatten(-1, shape)


def _is_positive(values: Tensor, control: Tensor, certain: float) -> Tensor:
    """Whether the mean of what `values` (B, n) are draws of is positive, and how certainly: (B,).

    It is estimated with a control variate, and has to be `certain` standard errors above zero.
    """
    centred = control - control.mean(-1, keepdim=True)
    spread = centred.square().sum(-1, keepdim=True)
    # Where q has not moved, nothing of it is random. A rise that is NaN stays so, and is not positive.
    slope = torch.where(spread > 0, (centred * values).sum(-1, keepdim=True) / spread, 0.0)
    values = values - slope * control
    return values.mean(-1) > certain * values.std(-1) / values.shape[-1] ** 0.5


def _point(state: State) -> Tensor:
    """What is climbed in, (B, P): each component's location and log scale, or its θ."""
    if state.location is None:
        return state.theta.detach().flatten(1)
    assert state.scale is not None
    return torch.cat([state.location, state.scale.log()], -1).detach().flatten(1)


def _metric(point: Tensor, state: State) -> Tensor:
    """The inverse of a normal's Fisher information, which is diagonal: (B, P)."""
    if state.location is None:
        return torch.ones_like(point)
    log_scale = point.unflatten(-1, (state.theta.shape[-2], -1)).chunk(2, -1)[1]
    return torch.cat([(2 * log_scale).exp(), torch.full_like(log_scale, 0.5)], -1).flatten(1)


def _longest(ascent: Ascent, state: State) -> Tensor:
    """The length t of a trial that changes no scale of a normal by more than a factor e: (B,).

    As long as q is much narrower than p(θ | x) the slope of the ELBO in log s is constant, and promises that no t is
    too long.
    """
    direction = (_metric(ascent.point, state) * ascent.gradient).unflatten(-1, (state.theta.shape[-2], -1))
    return 1 / direction.chunk(2, -1)[1].abs().amax((-2, -1))


def _shifted(state: State, point: Tensor) -> State:
    """The state with its q(θ) at a point, and θ drawn from it; to gradients, shifted by a constant."""
    point = point.unflatten(-1, (state.theta.shape[-2], -1))
    if state.location is None or state.scale is None:
        return state._replace(theta=state.theta + (point - state.theta).detach())
    location, log_scale = point.chunk(2, -1)
    location = state.location + (location - state.location).detach()
    scale = state.scale * (log_scale.exp() / state.scale).detach()
    return state._replace(theta=location + scale * torch.randn_like(location), location=location, scale=scale)


def _pack(parts: list[Tensor], state: State) -> Tensor:
    """Numbers of each image and of each of its components in one memory: (B, K, H)."""
    K = state.theta.shape[-2]
    by_component = [
        part.unflatten(-1, (K, -1)) if is_point else part.reshape(len(part), 1, -1).expand(-1, K, -1)
        for part, is_point in zip(parts, (True, False, True, False, True, False), strict=False)
    ]
    return torch.cat(by_component, -1)
