"""Figures of what inference can be relied on for: tails of importance weights, ranks of calibration."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from pnem.errors import DataError
from pnem.plots.palette import component_colours
from pnem.plots.style import FAINT, INK, STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.diagnostics import Calibration, Reliability

__all__ = ["calibration_ranks", "k_hat"]

# What is beyond is drawn in the outermost bins.
LOW, HIGH, WIDTH = -0.5, 2.0, 0.1
GOOD = 0.7
# Histograms over one another: of more nothing is seen through the others.
MOST_FILLED = 2
# Test quantities with a panel each; of more, those of the lowest p-values.
MOST_PANELS = 12
BARS, BAND = "#9DB8D2", "#E4E4E4"
# Of ranks that are uniform, a bar is outside its band with this probability.
OUTSIDE = 0.01


@matplotlib.rc_context(STYLE)
def k_hat(reliabilities: "Reliability | Mapping[str, Reliability]") -> Figure:
    """How many images have importance weights of which tail: a histogram of k̂ for each strategy, and the line at 0.7.

    To the right of it estimates are not to be trusted. The outermost bins hold all that is beyond: equal weights, for
    which k̂ is −∞, on the left.

    Args:
        reliabilities: a `Reliability`, or a mapping from names to them.

    Raises:
        DataError: an empty mapping, or one without k̂.

    >>> import torch
    >>> from pnem.diagnostics import Reliability
    >>> figure = k_hat({"vae": Reliability(k_hat=torch.tensor([0.1, 0.3, 0.9, 0.4]))})
    >>> [text.get_text() for text in figure.legends[0].get_texts()]
    ['vae: 25% above 0.7']
    """
    by_name = reliabilities if isinstance(reliabilities, Mapping) else {"": reliabilities}
    if not by_name:
        raise DataError("reliabilities is an empty mapping: give at least one to draw")
    for name, found in by_name.items():
        if found.k_hat is None:
            why = found.absent.get("k_hat", "it is absent")
            raise DataError(f"the reliability {name!r} has no k̂ to draw: {why}")
    figure = NotebookFigure(figsize=(3.6, 2.2 + 0.17 * len(by_name)), layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(LOW, HIGH, round((HIGH - LOW) / WIDTH) + 1)
    handles = []
    for (name, found), colour in zip(by_name.items(), component_colours(len(by_name)), strict=True):
        assert found.k_hat is not None
        values = found.k_hat.detach().cpu().double().numpy()
        # NaN, where a weight was, is no better than the largest.
        inside = np.clip(np.nan_to_num(values, nan=np.inf), LOW + WIDTH / 2, HIGH - WIDTH / 2)
        share = np.histogram(inside, edges)[0] / len(values)
        if len(by_name) <= MOST_FILLED:
            axes.stairs(share, edges, color=colour, fill=True, alpha=0.25, linewidth=0)
        axes.stairs(share, edges, color=colour, linewidth=1.4)
        above = 1 - (values <= GOOD).mean()
        handles.append(Line2D([], [], color=colour, label=f"{name}{': ' if name else ''}{above:.0%} above {GOOD}"))
    axes.axvline(GOOD, color=INK, lw=1, ls=(0, (3, 1.5)))
    ticks = np.arange(LOW, HIGH + 0.01, 0.5)
    labels = [f"{tick:g}".replace("-", "−") for tick in ticks]
    axes.set_xticks(ticks, [f"≤{labels[0]}", *labels[1:-1], f"≥{labels[-1]}"])
    axes.set(xlabel="k̂ of an image's importance weights", ylabel="share of images", xlim=(LOW, HIGH))
    figure.legend(handles=handles, loc="outside upper center")
    figure.draw_without_rendering()
    return figure


@matplotlib.rc_context(STYLE)
def calibration_ranks(calibration: "Calibration") -> Figure:
    """Where the θ that made an image stands among draws from q(θ | x): a histogram of ranks for each test quantity.

    Bars of uniform ranks, which those of the exact posterior are, stay in the grey band with a probability of 99 %
    each. Bars above it at both ends are of a q(θ) that is too narrow, and in the middle of one too wide. With more than
    12 test quantities, those with the 12 lowest p-values are drawn.

    Args:
        calibration: what `pnem.diagnostics.calibration` found.

    >>> import torch
    >>> from pnem.diagnostics import Calibration
    >>> figure = calibration_ranks(Calibration(torch.arange(200).unsqueeze(1) % 100, ("θ[0]",), 99))
    >>> figure.axes[0].get_title()
    'θ[0],  p = 1'
    """
    from scipy.stats import binom

    from pnem.diagnostics.calibration import as_p_value

    names = list(calibration.names)
    if len(names) > MOST_PANELS:
        lowest = set(sorted(names, key=calibration.p_values.__getitem__)[:MOST_PANELS])
        names = [name for name in names if name in lowest]
    simulations, values = len(calibration.ranks), calibration.draws + 1
    # About 20 simulations a bin, and as many ranks in each bin as in any other where that can be.
    most = max(2, min(20, simulations // 20, values))
    bins = max((count for count in range(2, most + 1) if values % count == 0), default=most)
    if bins < most / 2:
        bins = most
    edges = np.round(np.linspace(0, values, bins + 1))
    expected = simulations * np.diff(edges) / values
    low, high = (binom.ppf(tail, simulations, np.diff(edges) / values) for tail in (OUTSIDE / 2, 1 - OUTSIDE / 2))

    columns = min(len(names), 4)
    rows = math.ceil(len(names) / columns)
    figure = NotebookFigure(figsize=(max(1.7 * columns, 2.6), 1.5 * rows + 0.35), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, names, strict=False):
        ranks = calibration.ranks[:, calibration.names.index(name)].numpy()
        counts = np.histogram(ranks + 0.5, edges)[0]
        axes.stairs(high, edges, baseline=low, fill=True, color=BAND, linewidth=0)
        axes.stairs(counts, edges, fill=True, color=BARS, alpha=0.8, linewidth=0)
        axes.stairs(expected, edges, baseline=None, color=FAINT, linewidth=0.8)
        axes.stairs(counts, edges, color=INK, linewidth=0.8)
        p_value = as_p_value(calibration.p_values[name])
        axes.set_title(f"{name},  p {'' if p_value.startswith('<') else '= '}{p_value}", fontsize=7.5)
        axes.set(xlim=(0, values), xticks=[0, values // 2, values - 1])
    for axes in panels.flat[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel(f"rank of the true value among {calibration.draws} draws", fontsize=8)
    figure.supylabel("simulated images", fontsize=8)
    handles = [Patch(color=BARS, label="ranks"), Patch(color=BAND, label="99 % of uniform ranks")]
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    figure.draw_without_rendering()
    return figure
