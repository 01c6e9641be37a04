"""The filmstrip: a sequence on paper, as a strategy predicts and divides it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

from pnem.plots.blocks import CELL, GAP
from pnem.plots.images import indices
from pnem.plots.steps import Steps
from pnem.plots.style import FAINT, INK, STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.inference.posterior import Posterior, State
    from pnem.models import SpatialMixture

__all__ = ["sequence_frames"]

# How many frames are drawn at most unless told.
COLUMNS = 12
# Lengths in pixels at the figure's resolution.
LABEL, LINE, BREAK = 130, 28, 18


@matplotlib.rc_context(STYLE)
def sequence_frames(
    x: Tensor,
    posterior: "Posterior",
    image_shape: tuple[int, int, int],
    model: "SpatialMixture",
    *,
    image: int = 0,
    frames: Sequence[int] | None = None,
    rolled: "State | None" = None,
    future: Tensor | None = None,
) -> Figure:
    """A sequence as a strip of film: a column for each frame, with all that is of this frame.

    From the top: the frame; what the components predict of it together, `model.prediction`, before it was seen (where
    the task is denoising, without γ); and its γ, as a blend of the components' colours. The first frame is predicted
    by nothing. Where a rollout goes on after the sequence, γ is of the prediction, and frames are drawn as far as they
    are known.

    Grey levels and channels are those of `overview`.

    Args:
        x: the sequences, (T, B, D, C) or (T, B, H, W, C).
        posterior: what `Strategy.infer` found for them: of T - 1 steps for prediction, of T for denoising.
        image_shape: (H, W, C), with H · W = D.
        model: the model it was inferred with.
        image: which of the B sequences.
        frames: which frames to draw, counted from 1; when None all or, of more than twelve, every
            second, third or so.
        rolled: what `Strategy.rollout` predicts after the last frame of x.
        future: the frames that in truth follow, (n, B, D, C) or (n, B, H, W, C), as many as are known.

    Raises:
        DataError: these do not fit together, or there is no such sequence or frame.
    """
    steps = Steps(x, posterior, image_shape, model, image=image, rolled=rolled, future=future)
    last = len(steps) + steps.ahead
    chosen = sorted(indices(range(1, last + 1, -(-last // COLUMNS)) if frames is None else frames, 1, last, "frames"))
    H, W = steps.grid
    scale = CELL / max(H, W)
    scale = round(scale) if scale >= 1 else scale
    width, height = scale * W, scale * H
    in_rollout = [steps.is_rollout(frame - 1 - steps.ahead) for frame in chosen]
    lefts = [LABEL + i * (width + GAP) + BREAK * (seen and not all(in_rollout)) for i, seen in enumerate(in_rollout)]
    header = LINE * (2 if any(in_rollout) else 1) + GAP
    total, bottom = lefts[-1] + width + GAP, header + 3 * (height + GAP)
    figure = NotebookFigure(figsize=(total / STYLE["figure.dpi"], bottom / STYLE["figure.dpi"]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    rows = ["frame", "prediction", "γ"]
    for row, name in enumerate(rows):
        axes.text(LABEL - GAP, header + row * (height + GAP) + height / 2, name, ha="right", va="center")
    for frame, left in zip(chosen, lefts, strict=True):
        axes.text(left + width / 2, header - GAP, str(frame), ha="center", va="baseline", color=FAINT)
        s = frame - 1 - steps.ahead
        step = steps[max(s, 0)]
        pictures = (step.seen, None, None) if s < 0 else (step.truth, step.prediction, step.gamma)
        for row, (name, picture) in enumerate(zip(rows, pictures, strict=True)):
            top = header + row * (height + GAP)
            if picture is not None:
                extent = (left, left + width, top + height, top)
                label = f"{name} {frame}"
                axes.imshow(picture, extent=extent, interpolation="nearest", aspect="auto", label=label)
    if any(in_rollout):
        start = lefts[in_rollout.index(True)]
        axes.text(start, header - GAP - LINE, "rollout", ha="left", va="baseline", color=INK)
        axes.plot([start, lefts[-1] + width], [header - LINE] * 2, color=FAINT, linewidth=0.6)
    axes.set(xlim=(0, total), ylim=(bottom, 0))
    return figure
