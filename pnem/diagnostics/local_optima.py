"""The best that each image's own q(θ) can become: by local ascent, until it rises no more."""

import operator

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference import Posterior, SemiAmortised, State, Strategy

__all__ = ["delta_optimum", "is_normal", "refined_normals"]

# An ascent has converged when it rose by less than this, in nats, over so many trials.
RISE = 1e-3
TRIALS = 5


class Found(Strategy):
    """What was inferred before, for another strategy to start from."""

    def __init__(self, strategy: Strategy, state: State):
        super().__init__(strategy.model, iterations=1, e_step=strategy.e_step)
        self.state = state

    def m_step(self, state: State, x_in: Tensor) -> Tensor:
        """θ as it was."""
        return state.theta

    def unroll(self, x: Tensor, gamma: Tensor | None = None) -> list[State]:
        """What was found, whatever `gamma` is."""
        return [self.state]


def is_normal(q: dist.TorchDistribution) -> bool:
    """Whether q(θ) is a product of normals, over images, components and dimensions."""
    return isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal)


def refined_normals(
    strategy: Strategy, posterior: Posterior, x: Tensor, steps: int
) -> tuple[dist.TorchDistribution, Tensor]:
    """The best product of normals for each image, found from a posterior's, and whether it was still rising: (B,).

    It is the posterior's where the one found is no better on draws that the steps did not see.

    Args:
        strategy: whose posterior it is.
        posterior: of the images.
        x: the images (B, D, C).
        steps: of each image at most this many trials; one that has converged takes no more.
    """
    q = posterior.q
    start = _state(posterior)._replace(location=q.mean, scale=q.stddev)
    state, rising = _refined(strategy, start, x, steps)
    return state.q, rising


def delta_optimum(strategy: Strategy, posterior: Posterior, x: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x, θ) at a posterior's θ and at the maximum next to it, and whether it was still rising: (B,) each.

    Mixtures with a constant decoder, whose images may share π, take the strategy's own iterations: an image's own
    value can then fall where that of all rises.
    """
    state = _state(posterior)
    found = _plug_in(strategy, state, posterior.log_evidence)
    if strategy.model.num_pixels is None:
        return found, *_iterated(strategy, state, found, x, steps)
    state, rising = _refined(strategy, state, x, steps)
    log_joint = strategy.model.log_joint_at(x, strategy.model.decode(state.theta), state.log_mixing)
    return found, _plug_in(strategy, state, log_joint.logsumexp(-2).sum(-1)), rising


def _refined(strategy: Strategy, start: State, x: Tensor, steps: int) -> tuple[State, Tensor]:
    refinement = SemiAmortised(Found(strategy, start), steps=1).to(x.device, x.dtype)
    state = refinement.init(x)
    rising = torch.ones(len(x), dtype=torch.bool, device=x.device)
    values = [refinement.objective(state)]
    for _ in range(steps):
        # Images are problems of their own: those that have converged are left where they are.
        active = rising.nonzero().squeeze(-1)
        moved = refinement.climb(state.map(operator.itemgetter(active)), x[active])
        assert state.memory is not None
        assert moved.memory is not None
        state = state._replace(memory=state.memory.index_copy(0, active, moved.memory))
        values.append(values[-1].index_copy(0, active, refinement.objective(moved)))
        rising = rising & _rising(values, x.dtype)
        if not bool(rising.any()):
            break
    return refinement.choose(state, x, certain=0.0), rising


def _iterated(strategy: Strategy, state: State, value: Tensor, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    values = [value]
    for _ in range(steps):
        state = strategy.step(state, x, x)
        values.append(_plug_in(strategy, state, state.log_evidence))
        if not bool(_rising(values, x.dtype).any()):
            break
    return values[-1], _rising(values, x.dtype)


def _plug_in(strategy: Strategy, state: State, log_evidence: Tensor) -> Tensor:
    """log p(x, θ), and log p(π) where there is a prior on it, given log p(x | θ) at the θ of a state: (B,)."""
    log_p = log_evidence + strategy.model.log_prior(state.theta) + strategy.log_mixing_prior(state)
    return log_p.double()


def _state(posterior: Posterior) -> State:
    """As far as an ascent needs it."""
    theta, psi, mean, gamma, log_evidence, log_mixing = posterior[:6]
    return State(theta, mean, psi, gamma, torch.zeros_like(gamma), log_evidence, log_mixing)


def _rising(values: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Whether each image rose by more than `RISE` and rounding in its last trials, or there were no more than those."""
    if len(values) <= TRIALS:
        return torch.ones_like(values[-1], dtype=torch.bool)
    rounding = 4 * torch.finfo(dtype).eps * values[-1].abs()
    return ~(values[-1] - values[-1 - TRIALS] < RISE + rounding)
