"""Curves of measures on sequences: against the step, the number of objects, and how far ahead is predicted."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from pnem.errors import DataError
from pnem.plots.palette import component_colours
from pnem.plots.style import STYLE, NotebookFigure

__all__ = ["curves_by_horizon", "curves_by_objects", "curves_by_step"]

Curves = Mapping[str, Sequence[float]]

# Curves of so few points show them.
FEW = 8
# A line of the legend, and what stands before a name in it, in letters.
LINE, HANDLE = 60, 8


def curves_by_step(values: Curves, standard_errors: Curves | None = None, *, label: str = "AMI") -> Figure:
    """How a measure changes as a strategy goes through sequences: a line for each run, in a band of ± 1 standard error.

    Args:
        values: the measure at each step, the first included, by the name of the run; NaN is left out.
        standard_errors: the same of its standard errors; bands are drawn where they are known.
        label: what is measured, with its unit. AMI and ARI have axes up to 1.

    Raises:
        DataError: there is nothing to draw, or values and standard errors do not fit together.

    >>> figure = curves_by_step({"RNN-EM": [0.1, 0.7, 0.9]}, {"RNN-EM": [0.02, 0.01, 0.01]})
    >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
    ('step', 'AMI')
    """
    return _curves(values, standard_errors, None, "step", label)


def curves_by_objects(
    values: Curves,
    standard_errors: Curves | None = None,
    *,
    objects: Sequence[int],
    label: str = "BCE of the next frame\n[nats per frame]",
) -> Figure:
    """How well runs predict sequences of other numbers of objects, as in figure 5 of Greff et al. (2017).

    Args:
        values: the measure for each number of objects, by the name of the run.
        standard_errors: as for `curves_by_step`.
        objects: those numbers, as many as each run has values.
        label: what is measured, with its unit.

    Raises:
        DataError: as for `curves_by_step`.

    >>> runs = {"K = 1": [95.0, 121.0, 148.0], "K = 3": [50.0, 71.0, 93.0]}
    >>> curves_by_objects(runs, objects=[3, 4, 5]).axes[0].get_xlabel()
    'objects in a sequence'
    """
    return _curves(values, standard_errors, objects, "objects in a sequence", label)


def curves_by_horizon(
    values: Curves, standard_errors: Curves | None = None, *, label: str = "BCE  [nats per frame]"
) -> Figure:
    """How the error of a rollout grows, against how many frames before the last one was seen.

    Args:
        values: the error of the first, second, ... frame predicted without input, by the name of the run.
        standard_errors: as for `curves_by_step`.
        label: what is measured, with its unit.

    Raises:
        DataError: as for `curves_by_step`.

    >>> curves_by_horizon({"RNN-EM": [50.0, 64.0], "R-NEM": [49.0, 58.0]}).axes[0].get_xlabel()
    'frames ahead'
    """
    return _curves(values, standard_errors, None, "frames ahead", label)


@matplotlib.rc_context(STYLE)
def _curves(
    values: Curves, standard_errors: Curves | None, at: Sequence[int] | None, xlabel: str, ylabel: str
) -> Figure:
    standard_errors = standard_errors or {}
    unknown = sorted(set(standard_errors) - set(values))
    if not values or unknown:
        raise DataError(
            f"standard errors are given of {unknown}, but values of {sorted(values)}: give both by the same names"
            if unknown
            else "there is nothing to draw: give the values of at least one run by its name"
        )
    # As many names side by side as the figure has room for.
    columns = max(1, LINE // (max(map(len, values)) + HANDLE))
    height = 2.3 + 0.16 * -(-len(values) // columns)
    figure = NotebookFigure(figsize=(3.6, height), layout="constrained")
    axes = figure.add_subplot()
    for (name, given), colour in zip(values.items(), component_colours(len(values)), strict=True):
        mean = np.asarray(given, dtype=float)
        error = np.asarray(standard_errors.get(name, np.full(mean.shape, np.nan)), dtype=float)
        where = np.arange(1, len(given) + 1) if at is None else np.asarray(at)
        if mean.ndim != 1 or error.shape != mean.shape or where.shape != mean.shape or np.isnan(mean).all():
            raise DataError(
                f"{name!r} has values of shape {mean.shape} and standard errors of shape {error.shape} at "
                f"{len(where)} places: give one number each, at least one of them not NaN"
            )
        marker = "o" if len(mean) <= FEW else None
        axes.plot(where, mean, color=colour, label=name, marker=marker, clip_on=False)
        axes.fill_between(where, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    places = MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1) if at is None else FixedLocator(at)
    axes.xaxis.set_major_locator(places)
    if ylabel in ("AMI", "ARI"):
        axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.0)
    figure.legend(loc="outside upper center", ncols=columns)
    # Ticks are made when first drawn, with the settings of that moment: draw while those are STYLE's.
    figure.draw_without_rendering()
    return figure
