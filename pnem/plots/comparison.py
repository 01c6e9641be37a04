"""Runs side by side: log p(x) and what the ELBO loses of it, paired differences, grouping and cost."""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from pnem.diagnostics.comparison_result import mean_over_images
from pnem.plots.palette import component_colours
from pnem.plots.style import FAINT, INK, STYLE, NotebookFigure, wrapped

if TYPE_CHECKING:
    from pnem.diagnostics import Comparison

__all__ = ["comparison"]

DOT: Any = {"marker": "o", "mfc": INK}
PLUG_IN: Any = {"marker": "D", "mfc": "white"}
GROUPING: Any = {"ami": {"marker": "s", "mfc": INK}, "ari": {"marker": "s", "mfc": "white"}}
GAPS = dict(zip(("approximation_gap", "amortisation_gap"), component_colours(2), strict=True))
WIDTH, ROW = 7.2, 0.26
# Between tick labels, in pixels.
GAP = 4


class Panel(NamedTuple):
    """A panel: how wide it is, how it is drawn, and the label of its axis."""

    width: float
    draw: Callable[[Axes, "Comparison"], dict[str, Artist]]
    label: str


@matplotlib.rc_context(STYLE)
def comparison(result: "Comparison") -> Figure:
    """Runs in rows, and in panels what `pnem.diagnostics.compare` measured of them, with standard errors over images.

    The first panel has a bar from the ELBO up to the estimate of log p(x), of the gaps that are between them, on the
    images that have all of these. Plug-in values of point estimates, which are no bound, have a panel of their own.
    Then follow the paired differences to the first run, AMI and ARI, and the milliseconds that inference takes.

    Args:
        result: a comparison.
    """
    kinds, compared = set(result.table["q"]), _compared(result)
    panels = []
    if "log_marginal" in result.counts or ("elbo" in result.counts and kinds != {"point"}):
        panels.append(Panel(1.5, _draw_bounds, "nats per image"))
    if "elbo" in result.counts and "point" in kinds:
        panels.append(Panel(1.0, _draw_plug_ins, "plug-in log p(x, θ),\nno bound\n[nats per image]"))
    if compared is not None:
        title = "log p(x)" if compared == "log_marginal" else "log p(x, θ)" if kinds == {"point"} else "ELBO"
        panels.append(Panel(1.0, _draw_differences, f"{title} minus\nthe first run's\n[nats per image]"))
    if "ami" in result.counts:
        panels.append(Panel(1.0, _draw_grouping, "AMI and ARI"))
    panels.append(Panel(0.8, _draw_cost, "inference\n[ms per image]"))
    names = [*result.scores]
    figure = NotebookFigure(figsize=(WIDTH, 0.95 + ROW * len(names)), layout="constrained")
    widths = [panel.width for panel in panels]
    handles: dict[str, Artist] = {}
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, width_ratios=widths, squeeze=False)[0], panels, strict=True
    ):
        handles |= panel.draw(axes, result)
        axes.set_xlabel(panel.label)
        axes.tick_params(axis="y", length=0)
        for row in range(len(names)):
            axes.axhline(row, color=FAINT, linewidth=0.3, zorder=0)
    figure.axes[0].set(yticks=range(len(names)), yticklabels=wrapped(names), ylim=(len(names) - 0.5, -0.5))
    if handles:
        figure.legend([*handles.values()], [*handles], loc="outside upper center", ncols=len(handles), handlelength=1.2)
    # Ticks are made when first drawn, with the settings of that moment: draw while those are STYLE's.
    figure.draw_without_rendering()
    thinned = [_thinned(axes) for axes in figure.axes]
    if any(thinned):
        figure.draw_without_rendering()
    return figure


def _thinned(axes: Axes) -> bool:
    """Whether the tick labels of a narrow panel ran into one another, and every other tick was taken away."""
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    if all(left.x1 + GAP < right.x0 for left, right in itertools.pairwise(boxes)):
        return False
    axes.set_xticks([tick.get_loc() for tick in ticks[::2]])
    return True


def _compared(result: "Comparison") -> str | None:
    """The nats of which the differences to the first run are drawn."""
    measured = set(result.differences["measure"][result.differences["reference"] == result.table.index[0]])
    return next((name for name in ("log_marginal", "elbo") if name in measured), None)


def _draw_bounds(axes: Axes, result: "Comparison") -> dict[str, Artist]:
    handles: dict[str, Artist] = {}
    for row, (own, q) in enumerate(zip(result.scores.values(), result.table["q"], strict=True)):
        # The plug-in value of a point is drawn elsewhere.
        bounds = [name for name in ("elbo", "log_marginal", *GAPS) if name in own and (q, name) != ("point", "elbo")]
        count = min((len(own[name]) for name in bounds), default=0)
        means = {name: own[name][:count].mean().item() for name in bounds}
        if "log_marginal" in means:
            right = means["log_marginal"]
            for name in [name for name in GAPS if name in means]:
                axes.barh(row, -means[name], 0.5, left=right, color=GAPS[name])
                right -= means[name]
                handles[name.replace("_", " ")] = Patch(color=GAPS[name])
            handles["log p(x)"] = _draw_estimate(axes, row, "log_marginal", own["log_marginal"][:count], DOT)
        if "elbo" in means:
            (handles["ELBO"],) = axes.plot(means["elbo"], row, "|", color=INK, ms=9, mew=1.4)
    return handles


def _draw_plug_ins(axes: Axes, result: "Comparison") -> dict[str, Artist]:
    for row, (own, q) in enumerate(zip(result.scores.values(), result.table["q"], strict=True)):
        if q == "point":
            _draw_estimate(axes, row, "elbo", own["elbo"], PLUG_IN)
    return {}


def _draw_differences(axes: Axes, result: "Comparison") -> dict[str, Artist]:
    names, table = [*result.scores], result.differences
    axes.axvline(0, color=INK, linewidth=0.6)
    chosen = table[(table["reference"] == names[0]) & (table["measure"] == _compared(result))]
    for name, mean, error in zip(chosen["run"], chosen["difference"], chosen["standard_error"], strict=True):
        axes.errorbar(mean, names.index(name), xerr=error, color=INK, lw=0, elinewidth=1, **DOT)
    return {}


def _draw_grouping(axes: Axes, result: "Comparison") -> dict[str, Artist]:
    handles: dict[str, Artist] = {}
    for row, own in enumerate(result.scores.values()):
        for (name, how), shift in zip(GROUPING.items(), (-0.13, 0.13), strict=True):
            handles[name.upper()] = _draw_estimate(axes, row + shift, name, own[name], how)
    return handles


def _draw_cost(axes: Axes, result: "Comparison") -> dict[str, Artist]:
    milliseconds = result.table["ms_per_image"].to_numpy()
    axes.set_xscale("log")
    axes.plot(milliseconds, range(len(milliseconds)), color=INK, ls="", **DOT)
    # Whole decades, so that two ticks at least have a number.
    low, high = np.floor(np.log10(milliseconds.min() / 1.3)), np.ceil(np.log10(milliseconds.max() * 1.3))
    axes.set_xlim(10**low, 10**high)
    axes.xaxis.set_minor_formatter(NullFormatter())
    return {}


def _draw_estimate(axes: Axes, row: float, name: str, values: NDArray[np.float64], how: Any) -> Line2D:
    mean, error, _ = mean_over_images(name, values)
    bar = axes.errorbar(mean, row, xerr=error, color=INK, lw=0, elinewidth=1, **how)
    assert isinstance(bar[0], Line2D)
    return bar[0]
