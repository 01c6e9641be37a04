"""What inference loses: the gap between log p(x) and the ELBO as bars, one strategy beside another."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from pnem.errors import DataError
from pnem.plots.palette import component_colours
from pnem.plots.style import FAINT, INK, STYLE, NotebookFigure, wrapped

if TYPE_CHECKING:
    from pnem.diagnostics import InferenceGap
    from pnem.metrics import Estimate

__all__ = ["inference_gap"]

COLOURS = dict(
    zip(("approximation gap", "amortisation gap", "optimisation gap"), component_colours(3), strict=True),
    **{"optimality gap": FAINT},
)
BOUND = "log p(x) − ELBO  [nats per image]"
NO_BOUND = "optimality gap of a Delta  [nats per image]"


@matplotlib.rc_context(STYLE)
def inference_gap(gaps: "InferenceGap | Mapping[str, InferenceGap]") -> Figure:
    """What each strategy loses: its gap to log p(x) and what it is made of, as bars with their standard errors.

    A bar is as long as the gap between the estimate of log p(x) and the ELBO; the upper error bar is that of the whole,
    the lower one that of the approximation gap. Strategies whose q(θ) is a Delta have a panel and a scale of their own:
    how much log p(x, θ) rises to the maximum θ* next to θ says nothing of log p(x).

    Args:
        gaps: what `pnem.diagnostics.inference_gap` found, or a mapping from names to that.

    Raises:
        DataError: an empty mapping.
    """
    by_name = gaps if isinstance(gaps, Mapping) else {"": gaps}
    if not by_name:
        raise DataError("gaps is an empty mapping: give at least one to draw")
    panels = [
        (title, chosen)
        for title, is_bound in ((BOUND, True), (NO_BOUND, False))
        if (chosen := {name: gap for name, gap in by_name.items() if gap.is_bound == is_bound})
    ]
    heights = [len(chosen) + 0.5 for _, chosen in panels]
    figure = NotebookFigure(figsize=(4.2, 0.45 + 0.5 * len(panels) + 0.3 * sum(heights)), layout="constrained")
    rows = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    shown = set()
    for axes, (title, chosen) in zip(rows, panels, strict=True):
        for row, gap in enumerate(chosen.values()):
            shown.update(_bar(axes, row, gap))
        axes.axvline(0, color=INK, linewidth=STYLE["axes.linewidth"])
        axes.set(xlabel=title, yticks=range(len(chosen)), yticklabels=wrapped(chosen), ylim=(len(chosen) - 0.45, -0.55))
        axes.tick_params(axis="y", length=0)
        low, high = axes.get_xlim()
        # Room for the numbers.
        axes.set_xlim(low, high + 0.26 * (high - low))
    # The label of the axis says what the bars of Deltas are.
    handles = [
        Patch(color=colour, label=part) for part, colour in COLOURS.items() if part in shown - {"optimality gap"}
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), handlelength=1.2)
    # Ticks are made when first drawn, with the settings of that moment: draw while those are STYLE's.
    figure.draw_without_rendering()
    return figure


def _bar(axes: Axes, row: int, gap: "InferenceGap") -> list[str]:
    """One strategy's bar: the names of its parts."""
    parts: dict[str, Estimate | None]
    if gap.is_bound:
        parts = {"approximation gap": gap.approximation}
        parts |= {gap.second_title: gap.amortisation} if gap.refined else {}
        whole = gap.total
    else:
        parts = {"optimality gap": gap.optimality}
        whole = gap.optimality
    left = end = 0.0
    for name, part in parts.items():
        assert part is not None
        axes.barh(row, part.mean, 0.62, left, color=COLOURS[name])
        left += part.mean
        end = max(end, left)
    first, *others = parts.values()
    _error(axes, row + (0.15 if others else 0.0), first)
    if others:
        _error(axes, row - 0.15, whole)
    assert whole is not None
    error = 0.0 if math.isnan(whole.standard_error) else whole.standard_error
    digits = 3 if 0 < error < 0.01 else 2
    label = f"{whole.mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")
    axes.annotate(label, (end + error, row), (4, 0), textcoords="offset points", va="center", fontsize=7)
    return list(parts)


def _error(axes: Axes, y: float, estimate: "Estimate | None") -> None:
    assert estimate is not None
    axes.errorbar(estimate.mean, y, xerr=estimate.standard_error, color=INK, linewidth=0.9, capsize=1.8)
