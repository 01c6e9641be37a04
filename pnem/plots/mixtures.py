"""Classical mixtures of one or two columns: the data, each component's share of the density, and who owns what."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from pnem.errors import DataError
from pnem.plots.ellipses import draw_ellipses, window
from pnem.plots.histograms import draw_counts, draw_densities
from pnem.plots.palette import component_colours
from pnem.plots.style import FAINT, STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.models import SpatialMixture

__all__ = ["mixture_1d", "mixture_2d"]

Array = NDArray[Any]

# More items than these are drawn by a sample of as many.
MOST_POINTS = 20_000
# More components than these the legend does not name.
MOST_NAMED = 11


class Fitted(Protocol):
    """A fit, as `ClassicalEM` returns it: θ (B, K, M) and log π (B, K)."""

    @property
    def theta(self) -> Tensor: ...
    @property
    def log_mixing(self) -> Tensor: ...


@matplotlib.rc_context(STYLE)
@torch.no_grad()
def mixture_1d(
    x: Tensor | Array,
    model: "SpatialMixture",
    fit: Fitted,
    *,
    image: int = 0,
    names: Sequence[str] = ("x",),
    weight: Tensor | Array | None = None,
) -> Figure:
    """A mixture of one channel: the data as a histogram, π_k p(x | ψ_k) of every component, and their sum.

    Of likelihoods of counts and categories it shows probabilities in place of densities. Missing values (NaN) and
    outliers, more than 8 σ from every component, are left out, which the figure then says.

    Args:
        x: the items, (D, 1), or (B, D, 1) of which one image is drawn.
        model: the mixture, its decoder `Constant`.
        fit: what was fitted: a posterior or anything else with theta (B, K, M) and log_mixing (B, K).
        image: which of the B fits.
        names: what the one channel is called, with its unit in brackets: ``["eruption [min]"]``.
        weight: how often each item counts, (D,) or (B, D).

    Raises:
        DataError: x, model, fit and names do not fit together, or nothing is to be drawn.

    >>> from pnem.inference import ClassicalEM
    >>> from pnem.models import Poisson, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Constant(1), Poisson(), 2, mixing="learned")
    >>> x = torch.tensor([0.0, 1.0, 0.0, 9.0, 11.0, 10.0]).view(1, 6, 1)
    >>> mixture_1d(x, model, ClassicalEM(model).infer(x), names=["calls per hour"]).axes[0].get_xlabel()
    'calls per hour'
    """
    drawing = _Drawing.of(x, model, fit, image, names, weight, channels=1)
    figure = NotebookFigure(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    values = drawing.x[:, 0].numpy()
    draw = draw_counts if drawing.counts else draw_densities
    mixture = draw(axes, values, drawing.weight, model.likelihood, drawing.psi, drawing.log_mixing, drawing.colours)
    # A dollar in a name is not mathematics.
    axes.set_xlabel(names[0], parse_math=False)
    axes.set_ylabel("probability" if drawing.counts else _density(names[0]), parse_math=False)
    axes.set_ylim(0, None)
    return _finished(figure, axes, [*drawing.handles(), mixture], drawing.notes)


@matplotlib.rc_context(STYLE)
@torch.no_grad()
def mixture_2d(
    x: Tensor | Array,
    model: "SpatialMixture",
    fit: Fitted,
    *,
    image: int = 0,
    names: Sequence[str] = ("x0", "x1"),
    weight: Tensor | Array | None = None,
) -> Figure:
    """A mixture of two channels: the items, mixed from the colours of the components that own them; means and ellipses.

    The ellipses hold the points at one and at two standard deviations (of Student-t components: at that Mahalanobis
    distance by the scale matrix); the numbers stand at the means. Items at the same place, as counts often are, are one
    disc of an area in proportion to their number. Items with a missing value (NaN), outliers more than 8 σ from
    every component, and of many items all but a sample are left out, which the figure then says.

    Args:
        x: the items, (D, 2), or (B, D, 2) of which one image is drawn.
        model: the mixture, its decoder `Constant`.
        fit: what was fitted: a posterior or anything else with theta (B, K, M) and log_mixing (B, K).
        image: which of the B fits.
        names: what the two channels are called, with their units.
        weight: how often each item counts, (D,) or (B, D): the area of its disc.

    Raises:
        DataError: x, model, fit and names do not fit together, or nothing is to be drawn.
    """
    drawing = _Drawing.of(x, model, fit, image, names, weight, channels=2)
    figure = NotebookFigure(figsize=(4.2, 3.8), layout="constrained")
    axes = figure.add_subplot()
    points, area, notes = drawing.points()
    gamma = model.log_joint_at(points, drawing.psi, drawing.log_mixing).softmax(-2).numpy()
    colours = np.clip(np.einsum("kd,kc->dc", gamma, drawing.colours), 0, 1)
    across, up = points.numpy().T
    axes.scatter(across, up, s=area, c=colours, alpha=0.6, linewidths=0, rasterized=len(points) > 2000)
    ellipses = draw_ellipses(axes, model.likelihood, drawing.psi, drawing.log_mixing, drawing.colours)
    axes.set_xlabel(names[0], parse_math=False)
    axes.set_ylabel(names[1], parse_math=False)
    if drawing.counts:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator("auto", integer=True))
    handles = drawing.handles()
    if ellipses:
        handles.append(Line2D([], [], color=FAINT, marker="o", ls="", fillstyle="none", label="1σ and 2σ"))
    return _finished(figure, axes, handles, notes)


class _Drawing(NamedTuple):
    """What is drawn: items x (D, C), complete and near some component, with their shares of the whole weight (D,).

    And K components ψ (K, 1, P), log π (K,).
    """

    x: Tensor
    weight: Array
    psi: Tensor
    log_mixing: Tensor
    colours: Array
    counts: bool
    notes: list[str]

    @classmethod
    def of(
        cls,
        x: Tensor | Array,
        model: "SpatialMixture",
        fit: Fitted,
        image: int,
        names: Sequence[str],
        weight: Tensor | Array | None,
        *,
        channels: int,
    ) -> "_Drawing":
        x = torch.as_tensor(x).detach().cpu().double()
        if model.num_pixels is not None:
            raise DataError("this model's components differ from pixel to pixel: draw mixtures with a Constant decoder")
        if fit.theta.dim() != 3 or not 0 <= image < len(fit.theta):
            raise DataError(
                f"image={image}, but theta (B, K, M) has shape {tuple(fit.theta.shape)}: choose one of the B"
            )
        if x.dim() == 3 and len(x) == len(fit.theta):
            x = x[image]
        if x.dim() != 2 or x.shape[1] != channels or model.num_channels != channels or len(names) != channels:
            raise DataError(
                f"x has shape {tuple(x.shape)}, the model {model.num_channels} channels, and names are {list(names)}, "
                f"but this draws (D, {channels}), or (B, D, {channels}) with as many fits as images"
            )
        counted = np.ones(len(x)) if weight is None else torch.as_tensor(weight).detach().cpu().double().numpy()
        counted = counted[image] if counted.ndim == 2 else counted
        if counted.shape != (len(x),):
            raise DataError(f"weight has shape {counted.shape}, but these {len(x)} items need ({len(x)},)")
        complete = x.isfinite().all(-1)
        chosen = complete & torch.from_numpy(counted > 0)
        if not bool(chosen.any()):
            raise DataError(f"none of these {len(x)} items has all its values and a positive weight: nothing to draw")
        psi = model.decode(fit.theta[image].detach().cpu().double())
        missing = int((~complete).sum())
        notes = [f"{missing:,} of {len(x):,} items have a missing value and are not drawn"] if missing else []
        discrete = model.likelihood.distribution(psi).support.is_discrete
        log_mixing = fit.log_mixing[image].detach().cpu().double()
        x, counted = x[chosen], counted[chosen.numpy()] / counted[chosen.numpy()].sum()
        if not discrete:
            low, high = window(x, model.likelihood, psi, log_mixing)
            inside = ((x >= low) & (x <= high)).all(-1)
            if bool(inside.any()) and not bool(inside.all()):
                notes.append(f"{int((~inside).sum()):,} items far from every component lie outside the picture")
                x, counted = x[inside], counted[inside.numpy()]
        return cls(x, counted, psi, log_mixing, component_colours(len(psi)), discrete, notes)

    def points(self) -> tuple[Tensor, Array, list[str]]:
        """Where the discs of a scatter plot are, their areas in square points, and notes on what they leave out."""
        x, weight, notes = self.x, self.weight, self.notes
        if self.counts:
            x, inverse = x.unique(dim=0, return_inverse=True)
            weight = np.bincount(inverse.numpy(), weight)
        if len(x) > MOST_POINTS:
            notes = [*notes, f"{MOST_POINTS:,} of {len(x):,} items are drawn"]
            index = np.sort(np.random.default_rng(0).choice(len(x), MOST_POINTS, replace=False))
            x, weight = x[index], weight[index]
        if self.counts:
            return x, np.clip(4000 / len(x), 40, 250) * weight / weight.max(), notes
        return x, np.clip(4000 / len(x), 1.5, 12) * weight / weight.mean(), notes

    def handles(self) -> list[Line2D]:
        """The legend's lines of the components, of many only the first."""
        lines = [
            Line2D([], [], color=colour, lw=2.5, label=f"component {k}, π = {weight:.3f}")
            for k, (colour, weight) in enumerate(zip(self.colours, self.log_mixing.exp().tolist(), strict=True))
        ]
        if len(lines) > MOST_NAMED:
            lines[MOST_NAMED:] = [Line2D([], [], ls="", label=f"and {len(lines) - MOST_NAMED} more")]
        return lines


def _density(name: str) -> str:
    unit = re.search(r"\[(.+)\]", name)
    if unit is None:
        return "density"
    return f"density  [1/{unit[1]}]" if unit[1].isalpha() else f"density  [1/({unit[1]})]"


def _finished(figure: Figure, axes: Axes, handles: list[Line2D], notes: list[str]) -> Figure:
    figure.legend(handles=handles, loc="outside upper center", ncols=2)
    if notes:
        axes.set_title("\n".join(notes), fontsize=7, color=FAINT, loc="right")
    figure.draw_without_rendering()
    return figure
