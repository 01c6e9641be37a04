"""How inference went: what it reached, how sure it was and what it found, against the iteration."""

import math
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from pnem.errors import DataError
from pnem.plots.palette import component_colours
from pnem.plots.style import STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.diagnostics import Trace

__all__ = ["trace"]

Array = NDArray[Any]

BLUE, RED = component_colours(2)


@matplotlib.rc_context(STYLE)
def trace(trace: "Trace") -> Figure:
    r"""Small multiples of a trace against the iteration: means over images, in bands of the middle half of them.

    A panel each for the ELBO, where iterations are marked in which a monotone method lowered it for some image; the
    confidence; the components used; how far θ moved; AMI and ARI. What is known of the last iteration alone is a
    point, and panels of what is not known at all are left out.

    Args:
        trace: as `pnem.diagnostics.trace` returns it.

    Raises:
        DataError: it holds no image.

    >>> from pnem.diagnostics import trace as trace_of
    >>> from pnem.inference import RNNEM
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3)
    >>> figure = trace(trace_of(RNNEM(model, iterations=4), torch.ones(2, 16, 1)))
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['plug-in log p(x, θ)\n[nats per image]', 'confidence', 'components used', 'RMS change of θ']
    """
    if not trace.elbo.numel():
        raise DataError(f"the trace has shape {tuple(trace.elbo.shape)}, but this needs (T, B), neither 0")
    panels = {
        f"{trace.title}\n[nats per image]": [("", trace.elbo)],
        "confidence": [("", trace.confidence)],
        "components used": [("", trace.components_used)],
        "RMS change of θ": [("", trace.change)],
    }
    if trace.ami is not None and trace.ari is not None:
        panels["AMI and ARI"] = [("AMI", trace.ami), ("ARI", trace.ari)]
    panels = {
        title: curves for title, curves in panels.items() if any(not bool(values.isnan().all()) for _, values in curves)
    }
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = NotebookFigure(figsize=(2.3 * columns, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    T = len(trace.elbo)
    space = 0.6 if T == 1 else 0.04 * T
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for (name, values), colour in zip(curves, component_colours(2), strict=False):
            _draw(axes, values, colour, name)
        axes.set(xlabel="iteration", ylabel=title, xlim=(1 - min(space, 0.6), T + space))
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
        _scale(axes, title)
        if len(curves) > 1:
            axes.legend(loc="lower right")
    for axes in grid[len(panels) :]:
        axes.remove()
    if trace.findings:
        _mark_falls(figure.axes[0], trace)
    figure.draw_without_rendering()
    return figure


def _draw(axes: Axes, values: torch.Tensor, colour: Array, name: str) -> None:
    array = values.detach().cpu().double().numpy()
    number = np.arange(1, len(array) + 1)
    seen = ~np.isnan(array).all(1)
    number, array = number[seen], array[seen]
    if not len(number):
        return
    low, high = np.nanquantile(array, (0.25, 0.75), axis=1)
    mean = np.nanmean(array, 1)
    axes.plot(number, mean, color=colour, label=name, marker="o" if len(number) == 1 else None, clip_on=False)
    if len(number) == 1:
        axes.vlines(number, low, high, color=colour)
    else:
        axes.fill_between(number, low, high, color=colour, alpha=0.2, linewidth=0)


def _scale(axes: Axes, title: str) -> None:
    """The whole range of what has one, and a logarithmic scale for what converges."""
    low, high = axes.get_ylim()
    if title == "confidence":
        axes.set_ylim(0.0, 1.0)
    elif title == "components used":
        highest = max(np.max(np.asarray(line.get_ydata(), float)) for line in axes.lines)
        axes.set_ylim(1.0, max(2.0, math.ceil(highest - 1e-3)))
    elif title == "AMI and ARI":
        axes.set_ylim(min(0.0, low), 1.0)
    elif title == "RMS change of θ" and any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high < 100 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_falls(axes: Axes, trace: "Trace") -> None:
    fallen = trace.decreased.any(1).cpu().numpy()
    mean = trace.elbo.detach().mean(1).cpu().numpy()
    number = np.arange(1, len(mean) + 1)
    axes.plot(number[fallen], mean[fallen], "v", color=RED, markersize=5, zorder=3)
    handle = Line2D([], [], color=RED, marker="v", ls="", label="fell in some image")
    axes.legend(handles=[handle], loc="best")
