"""Where inference is unsure which component a pixel belongs to."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pnem.errors import DataError
from pnem.plots.blocks import drawable
from pnem.plots.images import black_and_white, indices, numpy_of
from pnem.plots.palette import component_colours
from pnem.plots.style import STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.inference.posterior import Posterior

__all__ = ["entropy_maps"]

# Inches of a picture's longer side.
CELL = 0.95


@matplotlib.rc_context(STYLE)
def entropy_maps(
    x: Tensor,
    posterior: "Posterior",
    image_shape: tuple[int, int, int],
    *,
    images: Sequence[int] | None = None,
) -> Figure:
    r"""The entropy of the responsibilities at every pixel, −Σ_k γ_k log γ_k, below the image and its segmentation.

    A column for each image. Entropies run from 0, where one component is sure to have made the pixel, to log K, where
    all are as likely; below stands their sum, H[q(z)] of the ELBO. The segmentation is argmax_k γ_k in the
    components' colours. Images are drawn as `overview` draws them.

    Args:
        x: the images, (B, D, C) or (B, H, W, C).
        posterior: what was inferred for them.
        image_shape: (H, W, C), with H · W = D.
        images: indices into x; the first five when None.

    Raises:
        DataError: x, posterior and image_shape do not fit together, or an index is out of range or not an integer.

    >>> import torch
    >>> from pnem.inference import RNNEM
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model, x = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3), torch.ones(2, 16, 1)
    >>> figure = entropy_maps(x, RNNEM(model, iterations=4).infer(x), (4, 4, 1))
    >>> figure.axes[-1].get_ylabel()
    'entropy of γ\n[nats per pixel]'
    """
    if x.dim() == 4 and tuple(x.shape[1:]) == tuple(image_shape):
        x = x.flatten(1, 2)
    H, W, C = _check(x, posterior, image_shape)
    chosen = indices(range(min(5, len(x))) if images is None else images, 0, len(x) - 1, "images")
    inputs, gamma = numpy_of(x[chosen]), numpy_of(posterior.gamma[chosen])
    low, high = black_and_white(inputs)
    rgb = inputs if C == 3 else inputs[..., [0, 0, 0]]
    K = gamma.shape[1]
    logs = np.log(gamma, where=gamma > 0, out=np.zeros_like(gamma))
    entropy = -(gamma * logs).sum(1)
    rows = {
        "input" if C in (1, 3) else "input\nchannel 0": drawable((rgb - low) / (high - low), H, W),
        "segmentation": component_colours(K)[gamma.argmax(1)].reshape(-1, H, W, 3),
        "entropy": entropy.reshape(-1, H, W),
    }
    width, height = CELL * W / max(H, W), CELL * H / max(H, W)
    figure = NotebookFigure(figsize=((width + 0.06) * len(chosen) + 1.3, 3 * (height + 0.06) + 0.45))
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)
    grid = figure.subplots(3, len(chosen), squeeze=False)
    for line, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            shown = axes.imshow(picture, cmap="magma", vmin=0, vmax=math.log(max(2, K)), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for axes, image, total in zip(grid.T, chosen, entropy.sum(1), strict=True):
        axes[0].set_title(f"image {image}", fontsize=8)
        axes[2].set_xlabel(f"Σ {total:.1f} nats", fontsize=7)
    bar = figure.colorbar(shown, ax=grid[2].tolist(), label="entropy of γ\n[nats per pixel]", pad=0.02)
    bar.outline.set_visible(False)
    bar.set_ticks([0, math.log(max(2, K))], labels=["0", f"log {max(2, K)}"])
    figure.draw_without_rendering()
    return figure


def _check(x: Tensor, posterior: "Posterior", image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    H, W, C = image_shape
    expected = len(x), H * W, C
    if tuple(x.shape) != expected or (len(posterior.gamma), posterior.gamma.shape[-1]) != expected[:2]:
        raise DataError(
            f"x has shape {tuple(x.shape)} and γ {tuple(posterior.gamma.shape)}, but image_shape (H, W, C) = "
            f"{tuple(image_shape)} needs (B, D, C) = {expected} and (B, K, D): give x and its own posterior"
        )
    return H, W, C
