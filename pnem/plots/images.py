"""The overview: images, how they were taken apart, and what each component predicts."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from pnem.errors import DataError
from pnem.plots.blocks import Layout, draw_block, drawable
from pnem.plots.palette import component_colours
from pnem.plots.style import STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.inference.posterior import Posterior

__all__ = ["black_and_white", "indices", "numpy_of", "overview"]

Array = NDArray[Any]

UNSCORED = (0.9, 0.9, 0.9)
# How many iterations are drawn unless told, and how wide a line of blocks is in pixels at the figure's resolution.
COLUMNS, LINE = 10, 1520


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
        x: the images, (B, D, C) or (B, H, W, C).
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
    if x.dim() == 4 and tuple(x.shape[1:]) == tuple(image_shape):
        x = x.flatten(1, 2)
    trace = _Trace.of(posterior)
    trace.check(x, image_shape)
    H, W, C = image_shape
    if posterior.trace is None and iterations is not None:
        raise DataError("this posterior kept no trace: leave iterations out, or infer with keep_trace=True")
    chosen = indices(range(min(3, len(x))) if images is None else images, 0, len(x) - 1, "images")
    numbers = indices(
        _subset(trace.first, trace.last) if iterations is None else iterations, trace.first, trace.last, "iterations"
    )
    gamma, mean = trace.at(numbers, chosen)
    inputs = numpy_of(x[chosen])
    truth = None if groups is None else _true_groups(groups, len(x), H * W)[chosen]
    colours = component_colours(gamma.shape[2])
    low, high = black_and_white(inputs)

    def picture(values: Array) -> Array:
        rgb = values if C == 3 else values[..., [0, 0, 0]]
        return drawable((rgb - low) / (high - low), H, W)

    layout = Layout.of(H, W, rows=len(colours) + 2, columns=len(numbers))
    figure, blocks = _figure(layout, len(chosen))
    for i, (image, axes) in enumerate(zip(chosen, blocks, strict=True)):
        given = {"input" if C in (1, 3) else "input\nchannel 0": picture(inputs[i])}
        if truth is not None:
            given["groups"] = drawable(_group_colours(truth[i], gamma[-1, i], colours), H, W)
        rows = {
            "reconstruction": picture(np.einsum("tkd,tkdc->tdc", gamma[:, i], mean[:, i])),
            "γ": drawable(np.einsum("tkd,kc->tdc", gamma[:, i], colours), H, W),
        }
        rows |= {f"component {k}": picture(mean[:, i, k]) for k in range(len(colours))}
        draw_block(axes, layout, f"image {image}", given, rows, numbers, colours)
    return figure


class _Trace(NamedTuple):
    """What there is to draw: γ (t, B, K, D) and the predictions (t, B, K, D, C) of iterations `first` to `last`."""

    gamma: Tensor
    mean: Tensor
    first: int
    last: int

    @classmethod
    def of(cls, posterior: "Posterior") -> "_Trace":
        last = len(posterior.elbo_trace)
        if posterior.trace is None:
            return cls(posterior.gamma.unsqueeze(0), posterior.mean.unsqueeze(0), last, last)
        return cls(posterior.trace.gamma, posterior.trace.mean, 1, last)

    def check(self, x: Tensor, image_shape: tuple[int, int, int]) -> None:
        expected = len(x), math.prod(image_shape[:2]), *image_shape[2:]
        if x.shape != expected or (self.mean.shape[1], *self.mean.shape[3:]) != expected:
            raise DataError(
                f"x has shape {tuple(x.shape)} and the predictions {tuple(self.mean.shape[1:])}, but image_shape "
                f"(H, W, C) = {tuple(image_shape)} needs (B, D, C) = {expected} and (B, K, D, C): "
                "give x and its own posterior"
            )

    def at(self, iterations: list[int], images: list[int]) -> tuple[Array, Array]:
        steps = torch.tensor(iterations)[:, None] - self.first
        return numpy_of(self.gamma[steps, torch.tensor(images)]), numpy_of(self.mean[steps, torch.tensor(images)])


def black_and_white(inputs: Array) -> tuple[float, float]:
    """The values drawn black and white."""
    finite = inputs[np.isfinite(inputs)]
    unit = not finite.size or finite.min() == finite.max() or (finite.min() >= 0 and finite.max() <= 1)
    return (0.0, 1.0) if unit else (finite.min(), finite.max())


def _figure(layout: Layout, blocks: int) -> tuple[Figure, list[Axes]]:
    """A figure with an axes for each block, in lines from the top."""
    per_line = min(blocks, max(1, LINE // layout.width))
    lines = -(-blocks // per_line)
    inches = per_line * layout.width / STYLE["figure.dpi"], lines * layout.height / STYLE["figure.dpi"]
    figure = NotebookFigure(figsize=inches)
    places = (divmod(block, per_line) for block in range(blocks))
    return figure, [
        figure.add_axes((place / per_line, 1 - (line + 1) / lines, 1 / per_line, 1 / lines)) for line, place in places
    ]


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


def _subset(first: int, last: int) -> list[int]:
    count = last - first + 1
    steps = np.arange(min(count, COLUMNS))
    if count > COLUMNS:
        steps = np.maximum(steps, np.rint(np.geomspace(1, count, COLUMNS) - 1))
    return (first + steps).astype(int).tolist()


def indices(values: Sequence[int], first: int, last: int, name: str) -> list[int]:
    """The values as a list; raises `DataError` unless they are integers in range, at least one."""
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu" or array.min() < first or array.max() > last:
        raise DataError(f"{name} must be integers from {first} to {last}, at least one, but are {values}")
    return array.tolist()


def numpy_of(values: Tensor) -> Array:
    """The values in double precision, on the CPU."""
    return values.detach().cpu().double().numpy()
