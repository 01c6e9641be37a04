"""What the ELBO is made of, iteration by iteration, in both of its forms."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from pnem.errors import DataError
from pnem.plots.palette import component_colours
from pnem.plots.style import FAINT, INK, STYLE, NotebookFigure

if TYPE_CHECKING:
    from pnem.diagnostics import Terms

__all__ = ["elbo_terms"]

Array = NDArray[Any]

BLUE, RED, SKY, YELLOW, ORANGE, GREEN, PINK = map(to_hex, component_colours(7))
# A term smaller than this, relative to the ELBO, is left out: it is zero to rounding.
NOTHING = 1e-6
SUM = "sum of what is added"


class _Form(NamedTuple):
    """One form of the ELBO: the fit, and what is added to it; names to means over images (T,)."""

    title: str
    fit: str
    style: str
    values: Array
    added: Mapping[str, Array]


@matplotlib.rc_context(STYLE)
def elbo_terms(terms: "Terms") -> Figure:
    r"""The terms of the ELBO after each iteration, means over images; a column for each of its two forms,

        ELBO = Q + H[q(z)] + E_q[log p(θ)] + H[q(θ)] = E_q[log p(x | θ)] − KL(q(θ) ‖ p(θ)) − KL(q(z) ‖ p(z | x, θ)).

    At the top the fit, Q or E_q[log p(x | θ)], and the ELBO as lines. The fit is hundreds of nats below zero where the
    other terms are tens, so that these have the panel below, with a scale of its own: bars from zero, stacked, and
    their sum, which is the distance between the two lines above. Terms that are zero throughout are left out, and the
    second form where it has none, as for a Delta with a flat prior. A single iteration is drawn as steps from the fit
    to the ELBO, each with its size.

    Args:
        terms: as `pnem.diagnostics.elbo_terms` returns them: (T, B), or (B,) of one iteration. With a Delta the ELBO is
            called what it is, the plug-in log p(x, θ).

    Raises:
        DataError: no iteration or no image.

    >>> from pnem.diagnostics import elbo_terms as terms_of
    >>> from pnem.inference import RNNEM
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> import torch
    >>> model = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3, prior="standard_normal")
    >>> figure = elbo_terms(terms_of(model, RNNEM(model, iterations=4), torch.ones(2, 16, 1)))
    >>> [axes.get_ylabel() for axes in figure.axes[::2]]
    ['nats per image', 'added to the fit\n[nats per image]']
    """
    if terms.elbo.dim() not in (1, 2) or not terms.elbo.numel():
        raise DataError(f"the terms have shape {tuple(terms.elbo.shape)}, but this needs (T, B) or (B,), neither 0")
    elbo, forms = _forms(terms)
    if len(elbo) == 1:
        return _steps(terms.title, elbo, forms)
    figure = NotebookFigure(figsize=(3.5 * len(forms), 3.7), layout="constrained")
    rows = 2 if any(form.added for form in forms) else 1
    columns = figure.subplots(rows, len(forms), sharex=True, squeeze=False).T
    handles: dict[str, Line2D | Patch] = {}
    for column, form in zip(columns, forms, strict=True):
        handles |= _draw_form(column, form, terms.title, elbo)
    figure.align_ylabels()
    figure.legend(handles=handles.values(), loc="outside lower center", ncols=2 * len(forms))
    figure.draw_without_rendering()
    return figure


def _forms(terms: "Terms") -> tuple[Array, list[_Form]]:
    """The ELBO (T,), and its forms with the terms that are not zero."""

    def mean(values: Any) -> Array:
        return np.atleast_1d(values.detach().cpu().double().mean(-1).numpy())

    elbo = mean(terms.elbo)
    prior, price = ("E[log p(θ)]", "−KL(q(θ) ‖ p(θ))") if terms.is_bound else ("log p(θ)", "log p(θ)")
    shared = {"log p(π)": mean(terms.log_mixing_prior)}
    likelihood = "E[log p(x | θ)]" if terms.is_bound else "log p(x | θ)"
    forms = [
        _Form(
            "free energy",
            "Q",
            "--",
            mean(terms.expected_log_joint),
            {
                "H[q(z)]": mean(terms.assignment_entropy),
                prior: mean(terms.log_prior),
                "H[q(θ)]": mean(terms.theta_entropy),
                **shared,
            },
        ),
        _Form(
            "penalised fit",
            likelihood,
            "-.",
            mean(terms.reconstruction),
            {
                price: -mean(terms.divergence),
                "−KL(q(z) ‖ p(z | x, θ))": -mean(terms.assignment_divergence),
                **shared,
            },
        ),
    ]
    size = NOTHING * np.nanmax(np.abs(elbo), initial=0)
    forms = [
        form._replace(added={name: values for name, values in form.added.items() if not (abs(values) <= size).all()})
        for form in forms
    ]
    return elbo, [forms[0], *(form for form in forms[1:] if form.added)]


def _colour(name: str) -> str:
    first = {"H[q(z)]": SKY, "H[q(θ)]": GREEN, "log p(π)": PINK, "−KL(q(θ) ‖ p(θ))": ORANGE}
    return first.get(name, YELLOW if name.startswith("−KL") else RED)


def _draw_form(column: Array, form: _Form, title: str, elbo: Array) -> dict[str, Line2D | Patch]:
    """Draws a form into its axes, from the top; returns what the legend is to explain, by name."""
    number = np.arange(1, len(elbo) + 1)
    marker, width = ("o", 0.8) if len(elbo) <= 30 else (None, 1.0)
    column[0].plot(number, form.values, color=BLUE, ls=form.style, marker=marker, label=form.fit)
    column[0].plot(number, elbo, color=INK, marker=marker, label=title)
    column[0].set(ylabel="nats per image")
    column[0].set_title(form.title, fontsize=8)
    column[-1].set(xlabel="iteration", xlim=(0.4, len(elbo) + 0.6))
    column[-1].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    handles: dict[str, Line2D | Patch] = {
        form.fit: Line2D([], [], color=BLUE, ls=form.style, label=form.fit),
        title: Line2D([], [], color=INK, label=title),
    }
    if not form.added:
        return handles
    above, below = np.zeros(len(elbo)), np.zeros(len(elbo))
    for name, values in form.added.items():
        bottom = np.where(values >= 0, above, below)
        column[1].bar(number, values, width, bottom=bottom, color=_colour(name), linewidth=0, label=name)
        above, below = above + values.clip(min=0), below + values.clip(max=0)
        handles[name] = Patch(color=_colour(name), label=name)
    column[1].axhline(0, color=INK, linewidth=0.6)
    column[1].plot(number, sum(form.added.values()), color=INK, ls=":", marker=marker, label=SUM)
    column[1].set(ylabel="added to the fit\n[nats per image]")
    return handles | {SUM: Line2D([], [], color=INK, ls=":", label=SUM)}


def _steps(title: str, elbo: Array, forms: list[_Form]) -> Figure:
    """From the fit to the ELBO of a single iteration, term by term."""
    figure = NotebookFigure(figsize=(3.5 * len(forms), 2.6), layout="constrained")
    panels = figure.subplots(1, len(forms), squeeze=False)[0]
    for axes, form in zip(panels, forms, strict=True):
        _draw_steps(axes, form, title, elbo.item())
    figure.draw_without_rendering()
    return figure


def _draw_steps(axes: Axes, form: _Form, title: str, elbo: float) -> None:
    names = [form.fit, *form.added, title]
    sizes = np.array([0.0, *(values.item() for values in form.added.values()), 0.0])
    ends = form.values.item() + sizes.cumsum()
    for row, (name, size, end) in enumerate(zip(names, sizes, ends, strict=True)):
        inner = 0 < row < len(names) - 1
        if inner:
            axes.barh(row, size, 0.6, left=end - size, color=_colour(name), linewidth=0)
        else:
            axes.plot([end, end], [row - 0.35, row + 0.35], color=INK if row else BLUE, linewidth=2.5)
        if row < len(names) - 1:
            axes.plot([end, end], [row - 0.3, row + 1.3], color=FAINT, linewidth=0.6, zorder=0)
        text = (f"{size:+.1f}" if inner else f"{end:.1f}").replace("-", "−")
        axes.annotate(
            text, (max(end, end - size), row), (4, 0), textcoords="offset points", ha="left", va="center", fontsize=7
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params("y", length=0)
    low, high = np.nanmin(ends), np.nanmax(ends)
    space = max(high - low, 1e-3 * abs(high), 1e-6)
    # On the right there is room for a number.
    axes.set(xlabel="nats per image", xlim=(low - 0.06 * space, high + 0.3 * space))
    axes.set_title(form.title, fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(5))
