"""How inference went: what it reached, how sure it was and what it found, against the iteration."""

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
    """Small multiples of a trace against the iteration: means over images, and bands that hold the middle half of them.

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
    ['plug-in log p(x, θ)  [nats per image]', 'confidence', 'components used', 'RMS change of θ']
    """
    if not trace.elbo.numel():
        raise DataError(f"the trace has shape {tuple(trace.elbo.shape)}, but this needs (T, B), neither 0")
    panels = {
        f"{trace.title}  [nats per image]": [("", trace.elbo)],
        "confidence": [("", trace.confidence)],
        "components used": [("", trace.components_used)],
        "RMS change of θ": [("", trace.change)],
    }
    if trace.ami is not None and trace.ari is not None:
        panels["AMI and ARI"] = [("AMI", trace.ami), ("ARI", trace.ari)]
    panels = {
        title: curves for title, curves in panels.items() if any(not bool(values.isnan().all()) for _, values in curves)
    }
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = NotebookFigure(figsize=(2.3 * columns, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, curves) in zip(grid, panels.items(), strict=False):
        for (name, values), colour in zip(curves, component_colours(2), strict=False):
            _draw(axes, values, colour, name)
        axes.set(xlabel="iteration", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        if len(trace.elbo) > 1:
            axes.set_xlim(1 - 0.04 * len(trace.elbo), 1.04 * len(trace.elbo))
        if title == "RMS change of θ" and bool((trace.change > 0).any()):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if title == "confidence":
            axes.set_ylim(0.0, 1.0)
        if title == "components used":
            axes.set_ylim(1.0, max(2.0, axes.get_ylim()[1]))
        if len(curves) > 1:
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.0)
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


def _mark_falls(axes: Axes, trace: "Trace") -> None:
    fallen = trace.decreased.any(1).cpu().numpy()
    mean = trace.elbo.detach().mean(1).cpu().numpy()
    number = np.arange(1, len(mean) + 1)
    axes.plot(number[fallen], mean[fallen], "v", color=RED, markersize=5, zorder=3)
    handle = Line2D([], [], color=RED, marker="v", ls="", label="fell in some image")
    axes.legend(handles=[handle], loc="best")
