"""What inference returns: the state of a strategy along its iterations, and the posterior at the last one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference.distributions import concatenated
from pnem.inference.errors import StrategyError

__all__ = ["Posterior", "State", "extended"]


class State(NamedTuple):
    """What a strategy knows after an iteration.

    Attributes:
        theta: (B, K, M), what each component knows: all that follows is at this θ. A draw from q(θ) where that is a
            distribution.
        mean: (B, K, D, C), E[x_i | ψ_{k,i}], what each component predicts.
        psi: (B, K, D, P), the parameters of that prediction.
        gamma: (B, K, D), the responsibilities of the strategy's E-step.
        log_joint: (B, K, D), log p(x_i, z_i = k | θ) of the declared model, in nats.
        log_evidence: (B,), log p(x | θ), in nats per image.
        log_mixing: (B, K), log π: the model's, unless the strategy fits it.
        location, scale: (B, K, M), mean and standard deviation of a normal q(θ_k); None where q(θ) is a Delta.
        memory: (B, K, H), what else a strategy carries from one iteration to the next; None for most.
        distribution: q(θ) where it is neither a Delta nor such a normal; `map` and `combine` leave it out.
    """

    theta: Tensor
    mean: Tensor
    psi: Tensor
    gamma: Tensor
    log_joint: Tensor
    log_evidence: Tensor
    log_mixing: Tensor
    location: Tensor | None = None
    scale: Tensor | None = None
    memory: Tensor | None = None
    distribution: dist.TorchDistribution | None = None

    @property
    def q(self) -> dist.TorchDistribution:
        """q(θ), with batch shape (B,) and event shape (K, M)."""
        if self.distribution is not None:
            return self.distribution
        if self.location is None:
            return dist.Delta(self.theta, event_dim=2)
        return dist.Normal(self.location, self.scale, validate_args=False).to_event(2)

    def map(self, function: Callable[[Tensor], Tensor]) -> "State":
        """The state with `function` applied to all of its tensors."""
        return State._make(function(value) if isinstance(value, Tensor) else None for value in self)

    @classmethod
    def combine(cls, function: Callable[[tuple[Tensor, ...]], Tensor], states: Sequence["State"]) -> "State":
        """One state from several, such as ``torch.stack`` or ``torch.cat`` of each of their tensors."""
        return cls._make(
            function(values) if isinstance(values[0], Tensor) else None for values in zip(*states, strict=True)
        )


class Posterior(NamedTuple):
    """The result of inference on B images; on B sequences all that is (B, ...) has a leading axis of S steps.

    Attributes:
        theta: (B, K, M), the mean of q(θ); psi, mean, gamma and log_evidence are at this θ.
        psi: (B, K, D, P).
        mean: (B, K, D, C), each component's prediction.
        gamma: (B, K, D), responsibilities.
        log_evidence: (B,), log p(x | θ) in nats per image.
        log_mixing: (B, K), log π.
        elbo_trace: (T, B), the strategy's ELBO after each iteration, in nats per image. For a strategy whose guide is
            a Delta it is the plug-in log p(x, θ), which is no bound on log p(x). Where q(θ) is a distribution, it is an
            unbiased estimate from one draw of θ.
        trace: the states after each iteration, every field with a leading axis T; None if it was not kept.
        q: q(θ), a distribution with batch shape (B,) and event shape (K, M).
        state: of sequences, the last state, from which to go on: all of it (B, ...).
    """

    theta: Tensor
    psi: Tensor
    mean: Tensor
    gamma: Tensor
    log_evidence: Tensor
    log_mixing: Tensor
    elbo_trace: Tensor
    trace: State | None
    q: dist.TorchDistribution
    state: State | None = None

    @property
    def labels(self) -> Tensor:
        """The component most responsible for each pixel: (B, D)."""
        return self.gamma.argmax(-2)

    @property
    def reconstruction(self) -> Tensor:
        """Σ_k γ_k E[x | ψ_k]: (B, D, C)."""
        return (self.gamma.unsqueeze(-1) * self.mean).sum(-3)

    @classmethod
    def from_states(cls, states: Sequence[State], elbo_trace: Tensor, *, keep_trace: bool) -> "Posterior":
        """The posterior at the last of these states."""
        last = states[-1]
        trace = State.combine(torch.stack, states) if keep_trace else None
        return cls(
            last.theta, last.psi, last.mean, last.gamma, last.log_evidence, last.log_mixing, elbo_trace, trace, last.q
        )

    @classmethod
    def concatenate(cls, posteriors: Sequence["Posterior"]) -> "Posterior":
        """One posterior over the images, or the sequences, of several, in their order.

        Of those that took fewer iterations the last one is repeated. The trace is kept where all have one.

        Raises:
            StrategyError: posteriors of images and of sequences, or of sequences of different numbers of steps.
        """
        steps = {tuple(p.log_evidence.shape[:-1]) for p in posteriors}
        if len(steps) > 1:
            raise StrategyError(
                f"posteriors of images, or of sequences of equally many steps, go together, but these have "
                f"log_evidence of shapes {', '.join(str(tuple(p.log_evidence.shape)) for p in posteriors)}: infer with "
                "the same iterations"
            )
        T = max(len(p.elbo_trace) for p in posteriors)

        def joined(values: Sequence[Tensor]) -> Tensor:
            return torch.cat([extended(value, T) for value in values], 1)

        traces = [p.trace for p in posteriors if p.trace is not None]
        trace = State.combine(joined, traces) if len(traces) == len(posteriors) else None
        theta, psi, mean, gamma, log_evidence, log_mixing = (
            torch.cat(values, posteriors[0].log_evidence.dim() - 1)
            for values in zip(*(p[:6] for p in posteriors), strict=True)
        )
        elbo_trace = joined([p.elbo_trace for p in posteriors])
        q = concatenated([p.q for p in posteriors])
        last = [p.state for p in posteriors if p.state is not None]
        state = State.combine(torch.cat, last) if len(last) == len(posteriors) else None
        return cls(theta, psi, mean, gamma, log_evidence, log_mixing, elbo_trace, trace, q, state)


def extended(values: Tensor, length: int) -> Tensor:
    """Values (T, ...) to more iterations, repeating the last."""
    return torch.cat([values, values[-1:].expand(length - len(values), *values.shape[1:])])
