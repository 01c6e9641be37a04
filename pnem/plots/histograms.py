"""One column of data as a histogram, and over it what a mixture expects there."""

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from pnem.models import Bernoulli, Likelihood
from pnem.plots.ellipses import centre_and_spread
from pnem.plots.style import INK

__all__ = ["draw_counts", "draw_densities"]

Array = NDArray[Any]

BARS = "#DDDDDD"
# Dashes, through which the components are seen where they are all there is.
SUM: Any = {"lw": 1, "ls": (0, (3, 1.5))}
# Up to so many values, counts are drawn one by one; up to so many items, each is marked below a histogram.
MOST_STEMS, MOST_MARKS = 30, 300


def draw_densities(
    axes: Axes, x: Array, weight: Array, likelihood: Likelihood, psi: Tensor, log_mixing: Tensor, colours: Array
) -> Line2D:
    """Densities: x (D,) with its shares `weight` of all items, psi (K, 1, P), log π (K,), colours (K, 3).

    Returns the legend's line for their sum.
    """
    edges = _edges(x)
    axes.hist(x, edges.tolist(), weights=weight / (edges[1] - edges[0]), color=BARS)
    if len(x) <= MOST_MARKS:
        # In the axes' own height, at its foot.
        axes.vlines(x, 0, 0.03, color=INK, lw=0.4, alpha=0.5, transform=axes.get_xaxis_transform())
    low, high = axes.get_xlim()
    centre, spread = centre_and_spread(likelihood, psi)
    # Finer where a component is narrow against the whole.
    peaks = centre + spread[..., 0] * torch.linspace(-5, 5, 201, dtype=psi.dtype)
    grid = np.unique(np.concatenate([np.linspace(low, high, 1001), peaks.numpy().ravel()]))
    grid = grid[(grid >= low) & (grid <= high)]
    density = _weighted(grid, likelihood, psi, log_mixing)
    for colour, values in zip(colours, density, strict=True):
        axes.fill_between(grid, values, color=colour, alpha=0.25, linewidth=0)
        axes.plot(grid, values, color=colour)
    axes.plot(grid, density.sum(0), color=INK, **SUM)
    axes.set_xlim(low, high)
    return Line2D([], [], color=INK, label="mixture", **SUM)


def draw_counts(
    axes: Axes, x: Array, weight: Array, likelihood: Likelihood, psi: Tensor, log_mixing: Tensor, colours: Array
) -> Line2D:
    """Probabilities of whole numbers, as `draw_densities`: stems side by side, or lines where there are many."""
    if isinstance(likelihood, Bernoulli):
        # A grey value is an expected bit.
        found, share = np.arange(2.0), np.array([np.average(1 - x, weights=weight), np.average(x, weights=weight)])
    else:
        found, inverse = np.unique(x, return_inverse=True)
        share = np.bincount(inverse, weight) / weight.sum()
    axes.bar(found, share, 0.9 if len(found) <= MOST_STEMS else 1.0, color=BARS)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    largest = getattr(likelihood.distribution(psi).support.base_constraint, "upper_bound", None)
    low, high = found.min(), found.max()
    if largest is not None and torch.as_tensor(largest).max() <= MOST_STEMS:
        low, high = 0.0, float(torch.as_tensor(largest).max())
    support = np.unique(np.linspace(low, high, 2001).round())
    mass = _weighted(support, likelihood, psi, log_mixing)
    if len(support) > MOST_STEMS:
        for colour, values in zip(colours, mass, strict=True):
            axes.plot(support, values, color=colour)
        axes.plot(support, mass.sum(0), color=INK, **SUM)
        return Line2D([], [], color=INK, label="mixture", **SUM)
    offsets = (np.arange(len(mass)) - (len(mass) - 1) / 2) * 0.7 / len(mass)
    for colour, values, offset in zip(colours, mass, offsets, strict=True):
        axes.vlines(support + offset, 0, values, color=colour, lw=1.6)
        axes.plot(support + offset, values, "o", color=colour, ms=3)
    axes.hlines(mass.sum(0), support - 0.45, support + 0.45, color=INK, lw=1)
    return Line2D([], [], color=INK, label="mixture", lw=1)


def _weighted(x: Array, likelihood: Likelihood, psi: Tensor, log_mixing: Tensor) -> Array:
    """π_k p(x | ψ_k): (D,) -> (K, D)."""
    log_p = likelihood.log_prob(torch.from_numpy(x).to(psi.dtype).unsqueeze(-1), psi)
    return (log_p + log_mixing.unsqueeze(-1)).exp().numpy()


def _edges(x: Array) -> Array:
    """Edges of 10 to 80 bins, by Freedman and Diaconis's rule where it gives as many."""
    low, high = x.min(), x.max()
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    quartiles = np.quantile(x, (0.25, 0.75))
    width = max(2 * (quartiles[1] - quartiles[0]) * len(x) ** (-1 / 3), (high - low) / 80)
    return np.linspace(low, high, max(10, round((high - low) / width)) + 1)
