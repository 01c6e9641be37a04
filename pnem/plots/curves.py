"""Curves: training against the epoch, inference against the iteration."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pnem.errors import DataError
from pnem.plots.palette import component_colours
from pnem.plots.style import FAINT, STYLE, NotebookFigure

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from pnem.inference.posterior import Posterior

__all__ = ["bound", "elbo_by_iteration", "training_curves"]

V = TypeVar("V")


@matplotlib.rc_context(STYLE)
def training_curves(
    history: "pd.DataFrame | Mapping[str, pd.DataFrame]", *, label: str = "ELBO  [nats per image]"
) -> Figure:
    """How training went: the ELBO of training and validation images, and the validation ARI, against the epoch.

    Args:
        history: one row per epoch, with the column ``epoch`` and any of ``train_elbo``, ``valid_elbo`` (nats per
            image) and ``valid_ari``; or a mapping from names to such histories, to compare runs. NaN, as in epochs
            that were not validated, is passed over. A panel that no run has values for is left out.
        label: what the ELBO is called. With a Delta guide it is the plug-in log p(x, θ), no bound on log p(x).

    Raises:
        DataError: a history is empty, has no column ``epoch``, or no run has anything to draw.

    >>> import pandas as pd
    >>> from pnem.plots import training_curves
    >>> history = pd.DataFrame({"epoch": [1, 2], "train_elbo": [-300.0, -250.0], "valid_ari": [0.5, 0.8]})
    >>> [axes.get_ylabel() for axes in training_curves(history).axes]
    ['ELBO  [nats per image]', 'validation ARI']
    """
    runs = _by_name(history, "history")
    for name, frame in runs.items():
        if len(frame) == 0 or "epoch" not in frame:
            what = "is empty" if len(frame) == 0 else f'has the columns {list(frame.columns)} but no column "epoch"'
            raise DataError(f"the history {name!r} {what}: give one row per epoch, as fit returns it")
    kinds = {"train_elbo": ("training", "--"), "valid_elbo": ("validation", "-"), "valid_ari": ("validation", "-")}
    curves = {
        (column, name): frame[["epoch", column]].dropna().to_numpy(float).T
        for column in kinds
        for name, frame in runs.items()
        if column in frame and frame[column].notna().any()
    }
    panels = {label: ("train_elbo", "valid_elbo"), "validation ARI": ("valid_ari",)}
    panels = {title: columns for title, columns in panels.items() if any(column in columns for column, _ in curves)}
    if not panels:
        raise DataError(f"there is nothing to draw: no history has values in any of the columns {list(kinds)}")

    figure = NotebookFigure(figsize=(3.3 * len(panels), 2.4), layout="constrained")
    colours = dict(zip(runs, component_colours(len(runs)), strict=True))
    for axes, (title, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for (column, name), (epochs, values) in curves.items():
            if column in columns:
                marker = "o" if len(epochs) == 1 else None
                # Not clipped, so that an ARI of 1 is drawn as thick as any other.
                axes.plot(epochs, values, kinds[column][1], color=colours[name], marker=marker, clip_on=False)
        axes.set(xlabel="epoch", ylabel=title)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        if "valid_ari" in columns:
            axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.0)
    handles = [Line2D([], [], color=colours[name], label=name) for name in runs if name]
    styles = dict(kinds[column] for column, _ in curves)
    if len(styles) == 2:
        colour = FAINT if handles else colours[""]
        handles += [Line2D([], [], color=colour, ls=style, label=kind) for kind, style in styles.items()]
    return _finished(figure, handles)


@matplotlib.rc_context(STYLE)
def elbo_by_iteration(
    posteriors: "Posterior | Mapping[str, Posterior]", *, label: str = "log evidence at θ  [nats per image]"
) -> Figure:
    """What each iteration of inference gains: the mean over images, and the band that holds the middle half of them.

    Args:
        posteriors: a posterior, or a mapping from names to posteriors; drawn is each one's `elbo_trace` (T, B).
        label: what that is. The default is right for Delta guides, whose "ELBO" is no bound on log p(x).

    Raises:
        DataError: an empty mapping, or an `elbo_trace` that is empty or not (T, B).
    """
    by_name = _by_name(posteriors, "posteriors")
    figure = NotebookFigure(figsize=(3.6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, posterior), colour in zip(by_name.items(), component_colours(len(by_name)), strict=True):
        if posterior.elbo_trace.ndim != 2 or not posterior.elbo_trace.numel():
            shape = tuple(posterior.elbo_trace.shape)
            raise DataError(f"the elbo_trace of posterior {name!r} has shape {shape}, but this needs (T, B), neither 0")
        elbo = posterior.elbo_trace.detach().cpu().double().numpy()
        number = np.arange(1, len(elbo) + 1)
        low, high = np.quantile(elbo, (0.25, 0.75), axis=1)
        axes.plot(number, elbo.mean(1), color=colour, label=name, marker="o" if len(elbo) == 1 else None)
        if len(elbo) == 1:
            axes.vlines(number, low, high, color=colour)
        else:
            axes.fill_between(number, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="iteration", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return _finished(figure, [line for line, name in zip(axes.lines, by_name, strict=True) if name])


@matplotlib.rc_context(STYLE)
def bound(elbo_trace: "Tensor", num_items: float = 1.0, *, label: str = "bound  [nats per item]") -> Figure:
    """How EM's bound rises: a line for each fit, against the iteration.

    Args:
        elbo_trace: what each E-step saw, in nats: (T,), or (T, B) of B fits.
        num_items: how many items these nats are of, or the sum of their weights; 1 if they are of one item already.
        label: what the bound is called.

    Raises:
        DataError: an `elbo_trace` that is empty or of another shape, or num_items is not positive.

    >>> import torch
    >>> bound(torch.tensor([-900.0, -500.0, -480.0]), 100).axes[0].lines[0].get_ydata().tolist()
    [-9.0, -5.0, -4.8]
    """
    if elbo_trace.ndim not in (1, 2) or not elbo_trace.numel():
        raise DataError(f"elbo_trace has shape {tuple(elbo_trace.shape)}, but this needs (T,) or (T, B), neither 0")
    if not num_items > 0:
        raise DataError(f"num_items must be positive, but is {num_items}")
    values = elbo_trace.detach().cpu().double().numpy().reshape(len(elbo_trace), -1) / num_items
    figure = NotebookFigure(figsize=(3.6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    number = np.arange(1, len(values) + 1)
    lines = values.shape[1]
    for fit in values.T:
        marker = "o" if len(values) == 1 else None
        axes.plot(number, fit, color=component_colours(1)[0], alpha=max(0.15, lines**-0.5), marker=marker)
    axes.set(xlabel="iteration", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    return _finished(figure, [])


def _by_name(values: V | Mapping[str, V], name: str) -> Mapping[str, V]:
    if not isinstance(values, Mapping):
        return {"": values}
    if not values:
        raise DataError(f"{name} is an empty mapping: give at least one to draw")
    return values


def _finished(figure: Figure, handles: list[Line2D]) -> Figure:
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=3 * len(figure.axes))
    # Ticks are made when first drawn, with the settings of that moment: draw while those are STYLE's.
    figure.draw_without_rendering()
    return figure
