"""An unroll and its loss, as training takes them: compiled, truncated in time, checkpointed."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pnem.compilation import compiled
from pnem.inference import Objective, State, Strategy
from pnem.settings import TrainingSettings

__all__ = ["Outcome", "Unroll"]

# To compile takes time in proportion: about a minute for so many.
COMPILED_AT_ONCE = 20


class Outcome(NamedTuple):
    """The loss, the mean ELBO after the last iteration, both in nats per image, and γ (B, K, D).

    Of sequences the ELBO is the mean over frames.
    """

    loss: Tensor
    elbo: Tensor
    gamma: Tensor


class Found(NamedTuple):
    """What some iterations lead to: the state after them, their weighted loss, and the mean ELBO after each, (T,)."""

    state: State
    loss: Tensor
    elbos: Tensor


class Unroll:
    """The outcome of an unrolled strategy under an objective.

    Args:
        strategy, objective, training: what is unrolled, and how.
        compile_on: the device to compile for; None for what `Strategy.unroll` does.
    """

    def __init__(
        self,
        strategy: Strategy,
        objective: Objective,
        training: TrainingSettings,
        *,
        compile_on: torch.device | None = None,
    ):
        self.strategy = strategy
        self.objective = objective
        self.truncation = training.truncation
        self.checkpointing = training.activation_checkpointing
        self.compiles = compile_on is not None
        self.stepwise = self.compiles or self.truncation is not None or self.checkpointing
        self.run: Callable[..., Found] = self.iterations
        if compile_on is not None:
            self.run = compiled(self.iterations, required=training.compile is True, device=compile_on)

    def __call__(self, x: Tensor) -> Outcome:
        """The losses of one unroll on images `x` (B, D, C) or sequences (T, B, D, C)."""
        if self.stepwise:
            return self.in_pieces(x)
        states = self.strategy.unroll(x)
        loss, elbo = self.objective(self.strategy, states, x)
        return Outcome(loss, elbo.mean(), states[-1].gamma)

    def in_pieces(self, x: Tensor) -> Outcome:
        """The same piece by piece, each of which is compiled, truncated in time or checkpointed.

        Truncated, it goes back through all windows of frames but the last, and the loss carries no gradient of theirs.
        """
        if x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        state, x_in = self.strategy.start(x)
        pairs = self.strategy.frames(x_in, x)
        weights = self.objective.step_weights(len(pairs))
        steps = [(weight, *pair) for weight, pair in zip(weights, pairs, strict=True)]
        total, elbos = x.new_zeros(()), []
        window = total
        for start, piece in _pieces(steps, self.truncation):
            # What is left may have no weight, and then no gradient for the caller to go back through.
            if start and any(weights[start:]):
                state = state.map(Tensor.detach)
                if window.requires_grad:
                    window.backward()
                window, total = x.new_zeros(()), total + window.detach()
            for _, segment in _pieces(piece, self._length(len(piece))):
                state, loss, found = (self._checkpointed if self.checkpointing else self._piece)(state, segment)
                window = window + loss
                elbos.append(found)
        elbo = torch.cat(elbos).mean() if self.strategy.is_sequential else elbos[-1][-1]
        return Outcome(total + window, elbo, state.gamma)

    def _length(self, iterations: int) -> int:
        """Of the pieces that so many iterations are run in."""
        if self.checkpointing:
            return math.ceil(math.sqrt(iterations))
        return math.ceil(iterations / math.ceil(iterations / COMPILED_AT_ONCE)) if self.compiles else iterations

    def iterations(
        self, state: State, seen: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, counted: Sequence[bool]
    ) -> Found:
        """Iterations and their weighted loss, of those that count: a pure function of tensors, the unit compiled."""
        loss, elbos = state.theta.new_zeros(()), []
        for t, counts in enumerate(counted):
            state = self.strategy.step(state, seen[t], targets[t])
            elbos.append(self.strategy.elbo(state).mean().detach())
            if counts:
                loss = loss + weights[t] * self.objective.loss_at(self.strategy, state, targets[t]).mean()
        return Found(state, loss, torch.stack(elbos))

    def _piece(self, state: State, steps: Sequence[tuple[float, Tensor, Tensor]]) -> Found:
        weights, seen, targets = zip(*steps, strict=True)
        scale = _on_device(weights, state.theta.dtype, state.theta.device)
        return self.run(state, seen, targets, scale, tuple(weight > 0 for weight in weights))

    def _checkpointed(self, state: State, steps: Sequence[tuple[float, Tensor, Tensor]]) -> Found:
        """Iterations of which nothing is kept but where they start from."""

        def run(_: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
            after, loss, found = self._piece(State(*values), steps)  # type: ignore[arg-type]
            return loss, found, *after[: len(values)]

        # Reentrant, for the other kind does without `torch.func.grad`, by which strategies differentiate. It goes back
        # to parameters only from an input that has a gradient.
        anchor = torch.zeros((), requires_grad=True)
        loss, found, *values = checkpoint(run, anchor, *state[:-1], use_reentrant=True)
        return Found(State(*values), loss, found)


@functools.cache
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied there once, for a copy in every step would have a GPU wait."""
    return torch.tensor(values, dtype=dtype, device=device)


Step = TypeVar("Step")


def _pieces(steps: Sequence[Step], length: int | None) -> Iterator[tuple[int, Sequence[Step]]]:
    """Runs of so many steps, or all of them; with the index of the first."""
    length = len(steps) if length is None else length
    for start in range(0, len(steps), length):
        yield start, steps[start : start + length]
