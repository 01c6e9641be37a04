"""One image's block of the overview: where its cells are, and how they are drawn."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pnem.plots.style import FAINT, INK

__all__ = ["Layout", "draw_block", "drawable"]

Array = NDArray[Any]

# Lengths in the overview, in pixels at the figure's resolution: whole pixels keep the drawn images crisp.
CELL, GAP, CAPTION, LABEL, BAR, HEADER, SPACE = 84, 6, 112, 190, 6, 32, 28
NOT_FINITE = (1.0, 0.0, 1.0)


class Layout(NamedTuple):
    """Where things are in a block of the overview, in pixels from its top left."""

    cell: tuple[float, float]
    left: float
    width: float
    height: float

    @classmethod
    def of(cls, H: int, W: int, *, rows: int, columns: int) -> "Layout":
        """The layout of a block whose cells hold H × W pixels."""
        scale = CELL / max(H, W)
        scale = round(scale) if scale >= 1 else scale
        cell = scale * W, scale * H
        left = CAPTION + cell[0] + LABEL
        return cls(cell, left, left + columns * (cell[0] + GAP) + SPACE, HEADER + rows * (cell[1] + GAP) + SPACE)


def draw_block(
    axes: Axes,
    layout: Layout,
    title: str,
    given: dict[str, Array],
    rows: dict[str, Array],
    numbers: list[int],
    colours: Array,
) -> None:
    """Draws into `axes` the pictures `given` at the left and, row by row, those of each iteration in `numbers`.

    The last rows are the components', and each of them stands beside a bar of its own colour.
    """
    (width, height), left = layout.cell, layout.left

    def draw(rgb: Array, label: str, x: float, row: int) -> None:
        y = HEADER + row * (height + GAP)
        axes.imshow(rgb, extent=(x, x + width, y + height, y), interpolation="nearest", aspect="auto", label=label)

    def write(text: str, x: float, row: int) -> None:
        axes.text(x, HEADER + row * (height + GAP) + height / 2, text, ha="right", va="center")

    def head(text: str, x: float, align: str = "center", colour: str = FAINT) -> None:
        axes.text(x, HEADER - GAP, text, ha=align, va="baseline", color=colour)

    head(title, CAPTION + width / 2, colour=INK)
    for row, (name, rgb) in enumerate(given.items()):
        write(name, CAPTION - GAP, row)
        draw(rgb, name, CAPTION, row)
    head("iteration", left - BAR - 2 * GAP, "right")
    for t, number in enumerate(numbers):
        head(str(number), left + t * (width + GAP) + width / 2)
    for row, (name, columns) in enumerate(rows.items()):
        write(name, left - BAR - 2 * GAP, row)
        for t, rgb in enumerate(columns):
            draw(rgb, f"{name}, iteration {numbers[t]}", left + t * (width + GAP), row)
    for k, colour in enumerate(colours):
        corner = left - BAR - GAP / 2, HEADER + (len(rows) - len(colours) + k) * (height + GAP)
        axes.add_patch(Rectangle(corner, BAR, height, facecolor=colour, edgecolor="none"))
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0))
    axes.set_axis_off()


def drawable(rgb: Array, H: int, W: int) -> Array:
    """Pictures (..., H, W, 3) of RGB values (..., D, 3), clipped to [0, 1]; values that are not finite are magenta."""
    finite = np.isfinite(rgb).all(-1, keepdims=True)
    return np.where(finite, np.clip(rgb, 0, 1), NOT_FINITE).reshape(*rgb.shape[:-2], H, W, 3)
