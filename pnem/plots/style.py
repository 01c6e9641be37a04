"""How every figure looks, whatever the user's settings, and how a notebook shows it."""

import textwrap
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["FAINT", "INK", "STYLE", "NotebookFigure", "wrapped"]

INK, FAINT = "#333333", "#999999"

# Any, because which keys a type checker admits differs between releases of Matplotlib.
STYLE: Any = {
    "figure.dpi": 180,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "text.color": INK,
    "axes.facecolor": "white",
    "axes.edgecolor": INK,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "savefig.facecolor": "auto",
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    **{f"{axis}tick.color": INK for axis in "xy"},
    **{f"{axis}tick.labelsize": 7 for axis in "xy"},
    **{f"{axis}tick.major.size": 2.5 for axis in "xy"},
    **{f"{axis}tick.major.width": 0.6 for axis in "xy"},
}


def wrapped(names: Iterable[str]) -> list[str]:
    """Names of rows in lines that leave room for what is drawn beside them.

    >>> wrapped(["vae", "a normal with a full covariance"])
    ['vae', 'a normal with a full\\ncovariance']
    """
    return ["\n".join(textwrap.wrap(name, 22)) for name in names]


class NotebookFigure(Figure):
    """A figure that a notebook shows even where pyplot, which would teach it to, was never imported."""

    @matplotlib.rc_context(STYLE)
    def savefig(self, *args: Any, **kwargs: Any) -> None:
        """`Figure.savefig`, in `STYLE`."""
        super().savefig(*args, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi="figure")
        return buffer.getvalue()
