"""The panels of an animation: where they are, and how they change from step to step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from pnem.plots.steps import Steps
from pnem.plots.style import FAINT, INK, STYLE, NotebookFigure

__all__ = ["UNKNOWN", "panels"]

# Lengths in pixels at the figure's resolution: whole pixels keep the drawn images crisp.
CELL, LEAST, GAP, FRAME, LINE = 140, 132, 20, 5, 22
# Components side by side.
ACROSS = 5
UNKNOWN = (0.94, 0.94, 0.94)


class Layout(NamedTuple):
    """Where panels are, in pixels: the size of each, the middle and the top of those above and of the components."""

    cell: tuple[float, float]
    size: tuple[float, float]
    above: list[tuple[float, float]]
    components: list[tuple[float, float]]

    @classmethod
    def of(cls, H: int, W: int, K: int) -> "Layout":
        """The layout for so many components of H × W pixels, in lines of about equal length."""
        scale = CELL / max(H, W)
        scale = round(scale) if scale >= 1 else scale
        width, height = scale * W, scale * H
        pitch = max(width, LEAST) + GAP
        lines = -(-K // ACROSS)
        across = -(-K // lines)
        total = max(4, across) * pitch + GAP
        top: float = GAP + 3 * LINE + GAP

        def row(count: int, y: float) -> list[tuple[float, float]]:
            left = (total - count * pitch) / 2
            return [(round(left + (i + 0.5) * pitch - width / 2) + width / 2, y) for i in range(count)]

        above, components = row(4, top), []
        for line in range(lines):
            top += height + GAP + LINE + (GAP / 2 if line == 0 else 0)
            components += row(min(across, K - line * across), top)
        # Even numbers of pixels, which MP4 needs.
        size = 2 * math.ceil(total / 2), 2 * math.ceil((top + height + GAP) / 2)
        return cls((width, height), size, above, components)


def panels(steps: Steps) -> tuple[Figure, Callable[[int], None]]:
    """The figure of an animation, and what draws a step into it: above what it saw and expected, below the components.

    It shows the first step.
    """
    H, W = steps.grid
    layout = Layout.of(H, W, len(steps.colours))
    (width, height), (total, bottom) = layout.cell, layout.size
    figure = NotebookFigure(figsize=(total / STYLE["figure.dpi"], bottom / STYLE["figure.dpi"]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()

    def panel(label: str, x: float, y: float) -> AxesImage:
        return axes.imshow(
            np.ones((H, W, 3)),
            extent=(x - width / 2, x + width / 2, y + height, y),
            interpolation="nearest",
            aspect="auto",
            label=label,
        )

    def line(x: float, y: float, colour: str = INK) -> Text:
        return axes.text(x, y, "", ha="center", va="baseline", color=colour, size=7)

    title = line(total / 2, GAP + LINE / 2)
    images, names, numbers = {}, {}, {}
    for name, (x, y) in zip(("seen", "prediction", "truth", "γ"), layout.above, strict=True):
        images[name] = panel(name, x, y)
        names[name], numbers[name] = line(x, y - LINE - 6), line(x, y - 6, FAINT)
    for k, (x, y) in enumerate(layout.components):
        images[f"component {k}"] = panel(f"component {k}", x, y)
        line(x, y - FRAME - 6).set_text(f"component {k}")
        corner = x - width / 2 - FRAME, y - FRAME
        axes.add_patch(
            Rectangle(
                corner, width + 2 * FRAME, height + 2 * FRAME, facecolor=steps.colours[k], edgecolor="none", zorder=-1
            )
        )
    axes.set(xlim=(0, total), ylim=(bottom, 0))

    def draw(s: int) -> None:
        step = steps[s]
        title.set_text(steps.title(s))
        shown = {"seen": step.seen, "prediction": step.prediction, "γ": step.gamma}
        shown["truth"] = np.full((H, W, 3), UNKNOWN) if step.truth is None else step.truth
        shown |= {f"component {k}": picture for k, picture in enumerate(step.components)}
        for name, picture in shown.items():
            images[name].set_data(picture)
        texts = {
            "seen": ("predicted" if step.fed_back else "input", f"frame {step.seen_frame}"),
            "prediction": ("prediction", f"of frame {step.frame}"),
            "truth": ("truth" if step.truth is not None else "not known", f"frame {step.frame}"),
            "γ": ("γ", "of the prediction" if steps.is_rollout(s) else f"of frame {step.frame}"),
        }
        for name, (what, number) in texts.items():
            names[name].set_text(what)
            numbers[name].set_text(number)

    draw(0)
    return figure, draw
