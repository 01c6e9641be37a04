"""Strategies that go through a sequence frame by frame."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pnem.inference.checks import best_starts, check_starts, require_images
from pnem.inference.errors import StrategyError
from pnem.inference.noise import Noise
from pnem.inference.places import clustered_places
from pnem.inference.posterior import Posterior, State
from pnem.inference.rollouts import MEMORY_LIMIT, check_memory, fed_back
from pnem.inference.strategy import Strategy
from pnem.models import SpatialMixture
from pnem.models.parameters import register_parameters

__all__ = ["FilteringStrategy"]

TASKS = "static", "denoising", "prediction"
INITIAL = "random", "k-means"


class FilteringStrategy(Strategy):
    """Base of strategies whose iterations can be the frames of a sequence: what a step finds, the next one takes on.

    The task says what a step sees, and what its γ and its loss compare with the prediction:

        ==============  ====================  =======================
        task            step t sees           and is scored on
        ==============  ====================  =======================
        ``static``      the (noisy) image     the image
        ``denoising``   the (noisy) frame t   frame t
        ``prediction``  the (noisy) frame t   frame t + 1
        ==============  ====================  =======================

    Images are (B, D, C), sequences (T, B, D, C). A sequence of T frames takes S steps: T, or T − 1 for prediction.
    Training takes the first `iterations` of them; `infer` takes all.

    Args:
        model: the generative model.
        task: ``"static"``, ``"denoising"`` or ``"prediction"``.
        initial: the γ to start from: ``"random"``, as in the original; or ``"k-means"``: clusters of nearby pixels of
            the image or first frame, weighted by how much they differ from the pixel prior, so that the first M-step
            already sees something like objects. Like all γ, they are of the image without noise.
        iterations, noise, e_step, gamma_gradient: see `Strategy`.

    Raises:
        StrategyError: an unknown task or start, or as `Strategy`.
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        task: str = "static",
        initial: str = "random",
        iterations: int = 10,
        noise: Noise | None = None,
        e_step: str = "consistent",
        gamma_gradient: bool = True,
    ):
        super().__init__(model, iterations=iterations, noise=noise, e_step=e_step, gamma_gradient=gamma_gradient)
        if task not in TASKS:
            raise StrategyError(f"task must be one of {', '.join(TASKS)}, but is {task!r}")
        if initial not in INITIAL:
            raise StrategyError(f"initial must be one of {', '.join(INITIAL)}, but is {initial!r}")
        self.task = task
        self.initial = initial

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:  # noqa: D102
        if gamma is None and self.initial == "k-means":
            gamma = clustered_places(self.model, x)
        return super().init(x, gamma)

    def start(self, x: Tensor, gamma: Tensor | None = None) -> tuple[State, Tensor]:  # noqa: D102
        if self.is_sequential:
            self.check_sequence(x, self.iterations)
        return super().start(x, gamma)

    def frames(self, x_in: Tensor, x: Tensor) -> Sequence[tuple[Tensor, Tensor]]:  # noqa: D102
        if not self.is_sequential:
            return super().frames(x_in, x)
        return list(zip(x_in, self.targets(x, self.iterations), strict=False))

    def targets(self, x: Tensor, steps: int) -> Sequence[Tensor]:  # noqa: D102
        if not self.is_sequential:
            return super().targets(x, steps)
        first = self.steps_ahead
        return list(x[first : first + steps])

    def log_mixing_prior(self, state: State) -> Tensor | float:
        """As `Strategy.log_mixing_prior`; of sequences also shared among the frames of training, for π is theirs."""
        prior = super().log_mixing_prior(state)
        return prior / self.iterations if self.is_sequential else prior

    def check_sequence(self, x: Tensor, steps: int = 1) -> None:
        """Raises `StrategyError` unless `x` is (T, B, D, C) with frames enough for so many steps."""
        if not isinstance(x, Tensor):
            raise StrategyError(f"x must be a tensor (T, B, D, C), but is of type {type(x).__name__}: stack its frames")
        if x.dim() != 4:
            raise StrategyError(
                f'with task="{self.task}" this strategy takes sequences (T, B, D, C), but x has shape '
                f'{tuple(x.shape)}: give sequences, or build it with task="static" for images'
            )
        needed = steps + self.steps_ahead
        if len(x) < needed:
            raise StrategyError(
                f"{steps} step{'s' if steps > 1 else ''} of {self.task} take {needed} frames, but x has {len(x)}: give "
                "longer sequences, or ask for fewer iterations"
            )

    def filter(self, frames: Iterable[Tensor], state: State | None = None) -> Iterator[State]:
        """The states after each step through a sequence, one by one, without noise or gradients.

        Nothing but the last state is kept, so that memory does not grow with the length of the sequence.

        Args:
            frames: (B, D, C) each: a tensor (T, B, D, C), or whatever yields frames.
            state: where to go on from; a start of its own when None. For prediction the first frame is then the one
                that `state` was scored on.

        Raises:
            StrategyError: a task without sequences, frames of different shapes, too few of them, or a state of other
                sequences.
            ModelError: a frame does not fit the model.
        """
        if not self.is_sequential:
            raise StrategyError(
                'filter goes through sequences: build the strategy with task="prediction" or "denoising"'
            )
        checked = self._checked(frames)
        steps = pairwise(checked) if self.steps_ahead else ((frame, frame) for frame in checked)
        taken = 0
        for seen, target in steps:
            if state is not None and not taken:
                self.check_state(state, seen)
            with torch.no_grad():
                state = self.step(self.init(seen) if state is None else state, seen, target)
            taken += 1
            yield state
        if not taken:
            raise StrategyError(f"{self.task} takes at least {1 + self.steps_ahead} frames: give more")

    def _checked(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        shape = None
        for t, frame in enumerate(frames):
            self.model.check(frame)
            shape = frame.shape if shape is None else shape
            if frame.dim() != 3 or frame.shape != shape:
                raise StrategyError(
                    f"frame {t} has shape {tuple(frame.shape)}, the first {tuple(shape)}: all frames of a sequence "
                    "need the same shape (B, D, C)"
                )
            require_images(self.model, frame)
            yield frame

    def check_state(self, state: State, x: Tensor) -> None:
        """Raises `StrategyError` unless this strategy can go on from `state` with frames like `x` (B, D, C)."""
        expected = len(x), self.model.num_components, self.model.latent_features
        if state.theta.shape != expected:
            raise StrategyError(
                f"the state to go on from has theta of shape {tuple(state.theta.shape)}, but these frames and this "
                f"model need (B, K, M) = {expected}: give the last state of the same sequences"
            )

    def infer(
        self,
        x: Tensor,
        *,
        restarts: int = 1,
        iterations: int | None = None,
        gamma: Tensor | None = None,
        keep_trace: bool = True,
        state: State | None = None,
    ) -> Posterior:
        """The posterior for images `x` (B, D, C), or, where the task has sequences, along sequences `x` (T, B, D, C).

        For images see `Strategy.infer`. For sequences all that the posterior holds has a leading axis of S steps, and
        no further trace: theta (S, B, K, M), gamma (S, B, K, D), and so on, with γ from the frame that the step is
        scored on. Its ``state`` is the last, from which another call goes on.

        Args:
            x: the images or sequences.
            restarts: R starts run as one batch; per sequence the one with the highest mean ELBO is kept.
            iterations: S, the steps to take; all that there are frames for when None.
            gamma: initial responsibilities (B, K, D); random when None, which R > 1 requires.
            keep_trace: of images, whether to keep every iteration's state.
            state: where to go on from, in place of a start of its own; see `filter`.

        Raises:
            ModelError: `x` does not fit the model.
            StrategyError: images where sequences are needed, or the reverse; too few frames; restarts or iterations
                < 1; restarts > 1 from a given start; a state of other sequences.
        """
        if not self.is_sequential:
            if state is not None:
                raise StrategyError("a state to go on from is for sequences: leave it out")
            return super().infer(x, restarts=restarts, iterations=iterations, gamma=gamma, keep_trace=keep_trace)
        self.check_sequence(x, 1 if iterations is None else iterations)
        steps = len(x) - self.steps_ahead if iterations is None else iterations
        check_starts(restarts, steps, given=gamma is not None or state is not None)
        if gamma is not None:
            if state is not None:
                raise StrategyError("gamma and state are both where to start from: give one of them")
            state = self.init(x[0], gamma)
        x = x[: steps + self.steps_ahead]
        was_training = self.training
        self.eval()
        try:
            states = list(self.filter(x.repeat(1, restarts, 1, 1), state))
            with torch.no_grad():
                elbo = torch.stack([self.elbo(state) for state in states])
                if restarts > 1:
                    targets = self.targets(x.repeat(1, restarts, 1, 1), steps)
                    merit = sum(self.merit(state, target) for state, target in zip(states, targets, strict=True))
                    best = best_starts(torch.as_tensor(merit), restarts)
                    states = [state.map(lambda value: value[best]) for state in states]
                    elbo = elbo[:, best]
                reported = [self.settle(s, target) for s, target in zip(states, self.targets(x, steps), strict=True)]
        finally:
            self.train(was_training)
        stacked = State.combine(torch.stack, reported)
        return Posterior.from_states([stacked], elbo, keep_trace=False)._replace(state=states[-1])

    def rollout(
        self,
        state: State,
        x: Tensor,
        frames: int,
        *,
        feedback: str | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> State:
        """The states of frames that nobody sees: predictions are fed back as if they had been seen.

        What is predicted is `model.prediction(rolled.psi)` (frames, B, D, C). That, or what is most probable by it, is
        what γ compares with, and what the next step sees.

        Args:
            state: the last one of a sequence, such as ``posterior.state``.
            x: the frame that it was scored on: (B, D, C).
            frames: how many to predict.
            feedback: ``"mean"``: predictions as they are; ``"mode"``: Bernoulli pixels as the more probable of 0 and 1,
                for who has learned from binary frames knows no grey ones, and loses its way; None for ``"mode"`` if
                `x` has no other values than 0 and 1.
            memory_limit: bytes that the result may take.

        Returns:
            The states, every field with a leading axis of `frames`.

        Raises:
            StrategyError: another task than prediction, frames < 1, an unknown feedback, a rollout longer than fits the
                memory, or a state of other sequences than `x` is of.
        """
        if self.task != "prediction":
            raise StrategyError(
                f'a rollout needs predictions of the next frame, but the task is "{self.task}": build the strategy '
                'with task="prediction"'
            )
        if not isinstance(frames, int) or frames < 1:
            raise StrategyError(f"frames must be at least 1, and whole, but is {frames}")
        self.model.check(x)
        require_images(self.model, x)
        self.check_state(state, x)
        check_memory(state, frames, memory_limit=memory_limit)
        seen = fed_back(self.model, x, feedback, state.log_mixing)
        rolled = state.map(lambda value: value.new_empty(frames, *value.shape))
        with torch.no_grad():
            for n in range(frames):
                state = self.improve(state, x)
                state = self.evaluate(state, state.theta, seen)
                x = seen(state.psi)
                for kept, value in zip(rolled, state, strict=True):
                    if isinstance(kept, Tensor) and isinstance(value, Tensor):
                        kept[n] = value
        return rolled

    def forward(self, x: Tensor, given: int = 0) -> Tensor:
        """The Pyro guide: unrolls on `x` and samples θ at the last state; of sequences, at all of them.

        Args:
            x: images (B, D, C) or sequences (T, B, D, C).
            given: of sequences, the frames at the beginning that the model does not score: 1 for prediction.

        Raises:
            StrategyError: another `given` than the task's, or frames that are not as many as the steps take.
        """
        if given != self.steps_ahead:
            raise StrategyError(
                f'with task="{self.task}" the model scores all frames but the first {self.steps_ahead}: give '
                f"given={self.steps_ahead} to model and strategy, not {given}"
            )
        if not self.is_sequential:
            return super().forward(x)
        self.check_sequence(x, self.iterations)
        if len(x) > self.iterations + self.steps_ahead:
            raise StrategyError(
                f"{self.iterations} iterations go through {self.iterations + self.steps_ahead} frames, but x has "
                f"{len(x)}, which the model would score: give as many"
            )
        register_parameters("strategy", self)
        return self.guide_at(State.combine(torch.stack, self.unroll(x)))()
