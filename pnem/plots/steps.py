"""What a strategy saw, found and predicted at each step through a sequence, as pictures."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pnem.errors import DataError
from pnem.plots.blocks import drawable
from pnem.plots.images import black_and_white, indices, numpy_of
from pnem.plots.palette import component_colours

if TYPE_CHECKING:
    from pnem.inference.posterior import Posterior, State
    from pnem.models import SpatialMixture

__all__ = ["Step", "Steps"]

Array = NDArray[Any]


class Step(NamedTuple):
    """One step: pictures (H, W, 3), and the numbers, from 1, of the frames that they are of.

    Attributes:
        seen: what the step saw of frame `seen_frame`: the frame, or where `fed_back` what the step before predicted.
        frame: the frame that all that follows is of: the next one for prediction, the same one for denoising.
        gamma: γ as a blend of the components' colours. In a rollout it is of the prediction, as nothing else is known.
        components: each component's prediction E[x | ψ_k], (K, H, W, 3).
        prediction: what the components predict together, without seeing the frame.
        truth: the frame; None where it is not known.
    """

    seen: Array
    seen_frame: int
    fed_back: bool
    frame: int
    gamma: Array
    components: Array
    prediction: Array
    truth: Array | None


class Steps:
    """The steps through sequence `image` of a batch, and those of a rollout that goes on after it, in order.

    Black and white are 0 and 1 when all true frames lie between them, and otherwise the smallest and largest value.

    Args:
        x: the sequences, (T, B, D, C) or (T, B, H, W, C).
        posterior: what was inferred for all of them, its fields with a leading axis: of S = T - 1 steps for prediction,
            of S = T for denoising.
        image_shape: (H, W, C), with H · W = D.
        model: the model it was inferred with.
        image: which of the B sequences.
        rolled: the states of the rollout, with a leading axis of n frames.
        future: the frames that in truth follow, as x: as many as are known.

    Raises:
        DataError: these do not fit together, or there is no such sequence.
    """

    def __init__(
        self,
        x: Tensor,
        posterior: "Posterior",
        image_shape: tuple[int, int, int],
        model: "SpatialMixture",
        *,
        image: int,
        rolled: "State | None",
        future: Tensor | None,
    ):
        frames = _frames(x, image_shape, "x")
        H, W, self.channels = image_shape
        self.grid = H, W
        T, B = frames.shape[:2]
        _check_steps(posterior.mean, frames, "posterior.mean", (T - 1, T), "T - 1 or T")
        (index,) = indices([image], 0, B - 1, "image")
        self.given = len(posterior.mean)
        self.ahead = T - self.given
        states: list[Posterior | State] = [posterior]
        if rolled is not None:
            if not self.ahead:
                raise DataError(
                    f"{T} steps on {T} frames denoise them, and only predictions roll out: leave rolled out"
                )
            _check_steps(rolled.mean, frames, "rolled.mean", (len(rolled.mean),), "n")
            states.append(rolled)
        known = [frames]
        if future is not None:
            if rolled is None:
                raise DataError("future is drawn beside a rollout, but there is none: give rolled, or leave future out")
            known.append(_frames(future, image_shape, "future")[: len(rolled.mean)])
            if known[1].shape[1] != B:
                raise DataError(f"future has {known[1].shape[1]} sequences, but x has {B}: give the same ones")
        self.truth = np.concatenate([numpy_of(part[:, index]) for part in known])
        self.gamma = np.concatenate([numpy_of(s.gamma[:, index]) for s in states])
        self.means = np.concatenate([numpy_of(s.mean[:, index]) for s in states])
        self.predictions = np.concatenate(
            [numpy_of(model.prediction(s.psi[:, index], s.log_mixing[:, index])) for s in states]
        )
        self.colours = component_colours(self.gamma.shape[1])
        self.range = black_and_white(self.truth)

    def __len__(self) -> int:
        return len(self.gamma)

    def __getitem__(self, s: int) -> Step:
        """Step s, from 0: it saw frame s + 1, counted from 1."""
        if not 0 <= s < len(self):
            raise IndexError(f"step {s} asked of {len(self)}")
        # The first step of a rollout still sees the last true frame.
        fed_back = s > self.given
        frame = s + self.ahead
        return Step(
            seen=self._picture(self.predictions[s - 1] if fed_back else self.truth[s]),
            seen_frame=s + 1,
            fed_back=fed_back,
            frame=frame + 1,
            gamma=drawable(self.gamma[s].T @ self.colours, *self.grid),
            components=self._picture(self.means[s]),
            prediction=self._picture(self.predictions[s]),
            truth=self._picture(self.truth[frame]) if frame < len(self.truth) else None,
        )

    def is_rollout(self, s: int) -> bool:
        """Whether step s is of the rollout."""
        return s >= self.given

    def title(self, s: int) -> str:
        """What step s is, in words."""
        if self.is_rollout(s):
            number, count = s - self.given + 1, len(self) - self.given
            return f"rollout, step {number} of {count}: nothing seen after frame {self.given + 1}"
        return f"{'next-frame prediction' if self.ahead else 'denoising'}, step {s + 1} of {self.given}"

    def describe(self) -> str:
        """All of it, in words."""
        what = "next-frame prediction" if self.ahead else "denoising"
        rollout = f", then a rollout of {len(self) - self.given} frames" if len(self) > self.given else ""
        return (
            f"{what} through {self.given} steps{rollout}: input, prediction, truth, responsibilities, and the "
            f"predictions of {len(self.colours)} component{'s' if len(self.colours) > 1 else ''}"
        )

    def _picture(self, values: Array) -> Array:
        low, high = self.range
        rgb = values if self.channels == 3 else values[..., [0, 0, 0]]
        return drawable((rgb - low) / (high - low), *self.grid)


def _frames(x: Tensor, image_shape: tuple[int, int, int], name: str) -> Tensor:
    """Sequences (T, B, D, C)."""
    if x.dim() == 5 and tuple(x.shape[2:]) == tuple(image_shape):
        x = x.flatten(2, 3)
    if x.dim() != 4 or 0 in x.shape or tuple(x.shape[2:]) != (math.prod(image_shape[:2]), *image_shape[2:]):
        raise DataError(
            f"{name} has shape {tuple(x.shape)}, but image_shape (H, W, C) = {tuple(image_shape)} needs sequences "
            "(T, B, D, C) or (T, B, H, W, C) with H · W = D"
        )
    return x


def _check_steps(mean: Tensor, x: Tensor, name: str, counts: tuple[int, ...], expected: str) -> None:
    if mean.dim() != 5 or not len(mean) or len(mean) not in counts or (mean.shape[1], *mean.shape[3:]) != x.shape[1:]:
        raise DataError(
            f"{name} has shape {tuple(mean.shape)}, but sequences (T, B, D, C) = {tuple(x.shape)} need "
            f"(S, B, K, D, C) with S = {expected}: give sequences and what was inferred for them"
        )
