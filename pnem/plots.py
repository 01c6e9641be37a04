"""Figures of fits: what was inferred, iteration by iteration, and how training went.

Every function returns a `matplotlib.figure.Figure` that pyplot knows nothing of: as the last expression of a notebook
cell it is shown once, ``figure.savefig(path)`` writes it, and nothing is left to close. Matplotlib's settings are
those of `STYLE` while a figure is made, and afterwards what they were.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from pnem.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from pnem.inference.posterior import Posterior

__all__ = ["STYLE", "component_colours", "elbo_by_iteration", "overview", "training_curves"]

Array = NDArray[Any]
V = TypeVar("V")

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

# Okabe & Ito's palette, in an order that keeps the first few far apart for every reader.
OKABE_ITO = ("0072B2", "D55E00", "56B4E9", "F0E442", "E69F00", "009E73", "CC79A7", "000000")
# What normal, protan and deutan readers see of a linear RGB colour (Machado, Oliveira & Fernandes 2009, severity 1).
VISION = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
)
# Oklab (Ottosson 2020): Euclidean distances in it are about as large as the differences that people see.
RGB_TO_LMS = ((0.412221, 0.536333, 0.051446), (0.211903, 0.680700, 0.107397), (0.088302, 0.281719, 0.629979))
LMS_TO_OKLAB = ((0.210454, 0.793618, -0.004072), (1.977998, -2.428592, 0.450594), (0.025904, 0.782772, -0.808676))

UNSCORED, NOT_FINITE = (0.9, 0.9, 0.9), (1.0, 0.0, 1.0)

# Lengths in the overview, in pixels at the figure's resolution: whole pixels keep the drawn images crisp.
CELL, GAP, CAPTION, LABEL, BAR, HEADER, SPACE, LINE = 84, 6, 112, 190, 6, 32, 28, 1520
COLUMNS = 10


class _NotebookFigure(Figure):
    """A figure that a notebook shows even where pyplot, which would teach it to, was never imported."""

    @matplotlib.rc_context(STYLE)
    def savefig(self, *args: Any, **kwargs: Any) -> None:
        super().savefig(*args, **kwargs)

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png", dpi="figure")
        return buffer.getvalue()


@matplotlib.rc_context(STYLE)
def overview(
    x: Tensor,
    posterior: "Posterior",
    image_shape: tuple[int, int, int],
    *,
    images: Sequence[int] | None = None,
    iterations: Sequence[int] | None = None,
    groups: Tensor | Array | None = None,
) -> Figure:
    """The overview of a fit as the N-EM and RNN-EM papers draw it (Greff et al. 2017, van Steenkiste et al. 2018).

    A block for each image: at its left the input and, if given, the true groups; then a column for each iteration with
    the reconstruction Σ_k γ_k E[x | ψ_k], the responsibilities γ as a blend of the components' colours, and each
    component's prediction E[x | ψ_k] beside a bar in its colour.

    One channel is drawn in grey, three as RGB, and of any other number the first, which the figure then says. Black
    and white are 0 and 1 when all chosen inputs lie between them, and otherwise the smallest and largest chosen
    input; predictions beyond are clipped. Values that are not finite are magenta.

    Args:
        x: the images (B, D, C).
        posterior: what was inferred for them. Without a trace only its last iteration is drawn.
        image_shape: (H, W, C), with H · W = D.
        images: indices into x; the first three when None.
        iterations: which iterations to draw, counted from 1; when None all or, of more than ten, ten that include the
            first and the last and are denser early on.
        groups: the true group of each pixel, (B, D) or (B, H, W), 0 where it is not scored (drawn light grey). Each
            takes the colour of the component that has most of it at the last iteration drawn, no two the same.

    Returns:
        A figure with one axes per image, in the order of `images`.

    Raises:
        DataError: x, posterior, image_shape and groups do not fit together, an index is out of range or not an
            integer, or iterations are asked of a posterior without a trace.
    """
    if posterior.trace is None and iterations is not None:
        raise DataError("this posterior kept no trace: leave iterations out, or infer with keep_trace=True")
    gammas = posterior.gamma.unsqueeze(0) if posterior.trace is None else posterior.trace.gamma
    means = posterior.mean.unsqueeze(0) if posterior.trace is None else posterior.trace.mean
    last = len(posterior.elbo_trace)
    first = last - len(gammas) + 1
    expected = len(x), math.prod(image_shape[:2]), *image_shape[2:]
    if x.shape != expected or (means.shape[1], *means.shape[3:]) != expected:
        raise DataError(
            f"x has shape {tuple(x.shape)} and the predictions {tuple(means.shape[1:])}, but image_shape (H, W, C) "
            f"= {tuple(image_shape)} needs (B, D, C) = {expected} and (B, K, D, C): give x and its own posterior"
        )
    H, W, C = image_shape
    chosen = _indices(range(min(3, len(x))) if images is None else images, 0, len(x) - 1, "images")
    numbers = _indices(_subset(first, last) if iterations is None else iterations, first, last, "iterations")
    steps = torch.tensor(numbers)[:, None] - first
    gamma, mean = (_numpy(values[steps, torch.tensor(chosen)]) for values in (gammas, means))
    inputs = _numpy(x[chosen])
    truth = None if groups is None else _true_groups(groups, len(x), H * W)[chosen]

    colours = component_colours(gamma.shape[2])
    finite = inputs[np.isfinite(inputs)]
    unit = not finite.size or finite.min() == finite.max() or (finite.min() >= 0 and finite.max() <= 1)
    low, high = (0.0, 1.0) if unit else (finite.min(), finite.max())

    def picture(values: Array) -> Array:
        rgb = values if C == 3 else values[..., [0, 0, 0]]
        return _drawable((rgb - low) / (high - low), H, W)

    layout = _Layout.of(H, W, rows=len(colours) + 2, columns=len(numbers))
    per_line = min(len(chosen), max(1, LINE // layout.width))
    lines = -(-len(chosen) // per_line)
    inches = per_line * layout.width / STYLE["figure.dpi"], lines * layout.height / STYLE["figure.dpi"]
    figure = _NotebookFigure(figsize=inches)
    for i, image in enumerate(chosen):
        line, place = divmod(i, per_line)
        axes = figure.add_axes((place / per_line, 1 - (line + 1) / lines, 1 / per_line, 1 / lines))
        given = {"input" if C in (1, 3) else "input\nchannel 0": picture(inputs[i])}
        if truth is not None:
            given["groups"] = _drawable(_group_colours(truth[i], gamma[-1, i], colours), H, W)
        rows = {
            "reconstruction": picture(np.einsum("tkd,tkdc->tdc", gamma[:, i], mean[:, i])),
            "γ": _drawable(np.einsum("tkd,kc->tdc", gamma[:, i], colours), H, W),
        }
        rows |= {f"component {k}": picture(mean[:, i, k]) for k in range(len(colours))}
        _draw_block(axes, layout, f"image {image}", given, rows, numbers, colours)
    return figure


class _Layout(NamedTuple):
    """Where things are in a block of the overview, in pixels from its top left."""

    cell: tuple[float, float]
    left: float
    width: float
    height: float

    @classmethod
    def of(cls, H: int, W: int, *, rows: int, columns: int) -> "_Layout":
        scale = CELL / max(H, W)
        scale = round(scale) if scale >= 1 else scale
        cell = scale * W, scale * H
        left = CAPTION + cell[0] + LABEL
        return cls(cell, left, left + columns * (cell[0] + GAP) + SPACE, HEADER + rows * (cell[1] + GAP) + SPACE)


def _draw_block(
    axes: Axes,
    layout: _Layout,
    title: str,
    given: dict[str, Array],
    rows: dict[str, Array],
    numbers: list[int],
    colours: Array,
) -> None:
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

    figure = _NotebookFigure(figsize=(3.3 * len(panels), 2.4), layout="constrained")
    colours = dict(zip(runs, component_colours(len(runs)), strict=True))
    for axes, (title, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for (column, name), (epochs, values) in curves.items():
            if column in columns:
                marker = "o" if len(epochs) == 1 else None
                axes.plot(epochs, values, kinds[column][1], color=colours[name], marker=marker)
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
    figure = _NotebookFigure(figsize=(3.6, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for (name, posterior), colour in zip(by_name.items(), component_colours(len(by_name)), strict=True):
        if posterior.elbo_trace.ndim != 2 or not posterior.elbo_trace.numel():
            shape = tuple(posterior.elbo_trace.shape)
            raise DataError(f"the elbo_trace of posterior {name!r} has shape {shape}, but this needs (T, B), neither 0")
        elbo = _numpy(posterior.elbo_trace)
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


def component_colours(K: int) -> Array:
    """A colour for each of K components, as RGB in [0, 1]: (K, 3).

    The first eight are Okabe and Ito's. Each one after is the colour, of those not too dark, farthest from white and
    from all before it, in Oklab and for whichever of normal, protan and deutan readers tells them apart the least.

    Raises:
        DataError: K < 1.

    >>> component_colours(3).shape
    (3, 3)
    """
    if K < 1:
        raise DataError(f"K must be at least 1, but is {K}")
    return _palette(max(K, len(OKABE_ITO)))[:K].copy()


@cache
def _palette(K: int) -> Array:
    levels = np.linspace(0, 1, 16)
    used = np.array([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in ("FFFFFF", *OKABE_ITO)])
    others = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    # Oklab overrates differences between colours that are nearly black.
    colours = np.concatenate([used, others[_seen(others)[0, :, 0] > 0.4]])
    seen = _seen(colours)
    order = list(range(len(used)))
    distance = np.full(len(colours), np.inf)
    for i in range(K):
        distance = np.minimum(distance, np.linalg.norm(seen - seen[:, order[i], None], axis=-1).min(0))
        if i >= len(OKABE_ITO):
            order.append(int(distance.argmax()))
    return colours[order[1:]]


def _seen(rgb: Array) -> Array:
    """Oklab coordinates of N colours for each of V kinds of readers: (V, N, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    simulated = np.clip(np.einsum("vij,nj->vni", np.array(VISION), linear), 0, 1)
    return np.cbrt(simulated @ np.array(RGB_TO_LMS).T) @ np.array(LMS_TO_OKLAB).T


def _group_colours(groups: Array, gamma: Array, colours: Array) -> Array:
    """The picture (D, 3) of true groups (D,) in the colours of the components (K, D) that have most of them."""
    labels = np.unique(groups[groups > 0])
    K, G = len(colours), len(labels)
    picture = np.full((len(groups), 3), UNSCORED)
    overlap = (groups == labels[:, None]).astype(float) @ np.nan_to_num(gamma).T
    assigned = dict(zip(range(G), range(K, K + G), strict=True))
    for _ in range(min(G, K)):
        g, k = np.unravel_index(overlap.argmax(), overlap.shape)
        assigned[int(g)] = int(k)
        overlap[g], overlap[:, k] = -1, -1
    palette = component_colours(K + G)
    for g, label in enumerate(labels):
        picture[groups == label] = palette[assigned[g]]
    return picture


def _true_groups(groups: Tensor | Array, batch: int, D: int) -> Array:
    array = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if array.shape[:1] != (batch,) or array.size != batch * D:
        raise DataError(f"groups has shape {array.shape}, but x needs (B, D) = {(batch, D)}: one group for each pixel")
    return array.reshape(batch, D)


def _drawable(rgb: Array, H: int, W: int) -> Array:
    finite = np.isfinite(rgb).all(-1, keepdims=True)
    return np.where(finite, np.clip(rgb, 0, 1), NOT_FINITE).reshape(*rgb.shape[:-2], H, W, 3)


def _subset(first: int, last: int) -> list[int]:
    count = last - first + 1
    steps = np.arange(min(count, COLUMNS))
    if count > COLUMNS:
        steps = np.maximum(steps, np.rint(np.geomspace(1, count, COLUMNS) - 1))
    return (first + steps).astype(int).tolist()


def _indices(values: Sequence[int], first: int, last: int, name: str) -> list[int]:
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < first or array.max() > last:
        raise DataError(f"{name} must be integers from {first} to {last}, at least one, but are {values}")
    return array.tolist()


def _by_name(values: V | Mapping[str, V], name: str) -> Mapping[str, V]:
    if not isinstance(values, Mapping):
        return {"": values}
    if not values:
        raise DataError(f"{name} is an empty mapping: give at least one to draw")
    return values


def _numpy(values: Tensor) -> Array:
    return values.detach().cpu().double().numpy()


def _finished(figure: Figure, handles: list[Line2D]) -> Figure:
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=3 * len(figure.axes))
    # Ticks are made when first drawn, with the settings of that moment: draw while those are STYLE's.
    figure.draw_without_rendering()
    return figure
