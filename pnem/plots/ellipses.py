"""Where components lie: their centres, and how far they spread."""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from torch import Tensor

from pnem.models import Categorical, Likelihood
from pnem.plots.style import INK

__all__ = ["centre_and_spread", "draw_ellipses", "window"]

Array = NDArray[Any]

# Standard deviations from every component beyond which items would make the picture too small to see.
REACH = 8


def centre_and_spread(likelihood: Likelihood, psi: Tensor) -> tuple[Tensor, Tensor]:
    """Means (K, C), and L (K, C, C) with the covariance L Lᵀ, of K components: psi (K, 1, P).

    Of likelihoods without `moments` the channels are independent within a component.
    """
    moments = getattr(likelihood, "moments", None)
    if moments is not None:
        centre, spread = moments(psi)
        return centre.squeeze(1), spread.squeeze(1)
    centre = likelihood.mean(psi).squeeze(1)
    return centre, torch.diag_embed(likelihood.distribution(psi).variance.squeeze(1).sqrt())


def window(x: Tensor, likelihood: Likelihood, psi: Tensor, log_mixing: Tensor) -> Tensor:
    """Least and greatest values to draw, (2, C): those of x (D, C), but for those beyond REACH σ of all components."""
    present = log_mixing > -torch.inf
    centre, spread = (value[present] for value in centre_and_spread(likelihood, psi))
    reach = REACH * spread.square().sum(-1).sqrt()
    low = torch.maximum(x.amin(0), (centre - reach).amin(0))
    high = torch.minimum(x.amax(0), (centre + reach).amax(0))
    return torch.stack([low, high])


def draw_ellipses(axes: Axes, likelihood: Likelihood, psi: Tensor, log_mixing: Tensor, colours: Array) -> bool:
    """The numbers of components at their means, and ellipses at 1σ and 2σ; returns whether there are any.

    Categories have neither.
    """
    if isinstance(likelihood, Categorical):
        return False
    centre, spread = centre_and_spread(likelihood, psi)
    angle = torch.linspace(0, 2 * torch.pi, 181, dtype=psi.dtype)
    circle = torch.stack([angle.cos(), angle.sin()])
    for k, (c, L, colour) in enumerate(zip(centre, spread, colours, strict=True)):
        if not bool(log_mixing[k] > -torch.inf):
            continue
        for radius, width in ((1, 1.4), (2, 0.9)):
            x, y = (c.unsqueeze(-1) + radius * L @ circle).numpy()
            # The outline keeps light colours visible on white.
            outline = [withStroke(linewidth=width + 0.7, foreground=INK)]
            axes.plot(x, y, color=colour, lw=width, path_effects=outline, label=f"component {k}, {radius}σ")
        box = {"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": colour, "linewidth": 1.2}
        axes.text(c[0].item(), c[1].item(), str(k), ha="center", va="center", fontsize=7, fontweight="bold", bbox=box)
    return True
