"""``pnem em``: a classical mixture of the rows of a table, fitted, printed, written and drawn."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pnem.em_fit import FittedMixture

__all__ = ["em"]

# Widths in characters, by which it is decided how many of the data's columns the table of components has room for.
FIRST_COLUMNS, CELL = 24, 20
# Iterations listed at the start and at the end of the table of the bound.
LISTED = 4


def em(
    data: Annotated[Path, typer.Argument(help="A CSV file, or an HDF5 file with a dataset (N, C).", metavar="DATA")],
    components: Annotated[int, typer.Option(help="K.")],
    likelihood: Annotated[
        str, typer.Option(help="gaussian, student-t, poisson, bernoulli, binomial or categorical.")
    ] = "gaussian",
    covariance: Annotated[
        str | None, typer.Option(help="Of gaussian and student-t: full (the default), diagonal, spherical or tied.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Of binomial: n, the largest count there can be.")] = None,
    categories: Annotated[int | None, typer.Option(help="Of categorical: how many, coded from 0.")] = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Of gaussian and student-t: added to variances, so that no component collapses."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="The columns to fit, as a,b,c; x0,x1,... where the file names none.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Which dataset of an HDF5 file.")] = None,
    weights: Annotated[str | None, typer.Option(help="The column that says how often each row counts.")] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Leave the rows of an HDF5 file there, and read them in chunks; by default if they are above 1 GiB.",
        ),
    ] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Stepwise online EM: an M-step after every few thousand rows.")
    ] = False,
    restarts: Annotated[int, typer.Option(help="Starts; the one with the best evidence is kept.")] = 10,
    iterations: Annotated[int, typer.Option(help="At most this many; of online EM, passes over the data.")] = 1000,
    tol: Annotated[float, typer.Option(help="Stop when the bound rises by less, in nats per item.")] = 1e-6,
    initial: Annotated[str, typer.Option(help="Where to start: k-means++, random or points.")] = "k-means++",
    seed: Annotated[int, typer.Option(help="Seed of the starts.", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    out: Annotated[Path, typer.Option(help="The directory to write; it must not exist.")] = Path("em-results"),
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw data of one or two columns.")] = True,
) -> None:
    """Fit a classical mixture to the rows of a table by EM: components, labels, the bound.

    Empty cells, NA and nan are missing values, which are marginalised. Components are numbered by weight, the
    heaviest 0. Writes labels.csv, parameters.json, bound.csv and, of one or two columns, mixture.png. Memory does not
    grow with the rows of an HDF5 file that is streamed, of which the picture shows a sample.

    Example: `pnem em data.csv --likelihood gaussian --components 3 --out em-results`
    """
    from pnem.components import make_likelihood
    from pnem.data import Rows, open_items
    from pnem.devices import resolve_device
    from pnem.em_fit import fit_mixture
    from pnem.em_results import new_directory, write_results

    where = resolve_device(device)
    parts = {"covariance": covariance, "trials": trials, "categories": categories, "floor": floor}
    family = make_likelihood(likelihood, **parts)
    chosen = None if columns is None else [name.strip() for name in columns.split(",")]
    options = {"restarts": restarts, "iterations": iterations, "tol": tol, "initial": initial, "seed": seed}
    options |= {"online": online}
    status = Console(stderr=True)
    # Made first: that it cannot be written had better be known before a long fit.
    with new_directory(out) as directory:
        items = open_items(data, columns=chosen, dataset=dataset, weight=weights, stream=stream, shuffle=online)
        drawn = plot and len(items.names) <= 2
        how = {"device": where, "progress": status.is_terminal}
        fitted = fit_mixture(items, family, components, **how, **options)  # type: ignore[arg-type]
        settings = {"data": str(data), "dataset": dataset, "weights": weights, "stream": isinstance(items, Rows)}
        with status.status(f"writing {items.num_items:,} labels"):
            write_results(fitted, directory, settings | options | {"device": str(where)}, plot=drawn)
    console = Console()
    console.print(_components(fitted, likelihood, console.width))
    console.print(_bound(fitted.bound.tolist(), online=online))
    for warning in fitted.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    files = ["labels.csv", "parameters.json", "bound.csv", *(["mixture.png"] if drawn else [])]
    why = (
        "" if drawn or not plot else f"; no picture: the data have {len(items.names)} columns, and it needs one or two"
    )
    console.print(f"wrote {', '.join(files)} to {out}{why}", markup=False, highlight=False, soft_wrap=True)


def _components(fitted: "FittedMixture", likelihood: str, width: int) -> Table:
    from pnem.components import LIKELIHOODS, describe_component

    names = fitted.data.names
    shown = names[: max(1, (width - FIRST_COLUMNS) // CELL)]
    table = Table(title=f"{likelihood} components of {fitted.data.num_items:,} items: {LIKELIHOODS[likelihood].cell}")
    psi = fitted.model.decode(fitted.theta)[0, :, 0]
    described = [describe_component(fitted.model.likelihood, own, names) for own in psi]
    # As text, because names with units in brackets would read as markup.
    for name in map(Text, ("component", "weight", *described[0].others, *shown)):
        table.add_column(name, justify="right")
    for k, (weight, own) in enumerate(zip(fitted.log_mixing[0].exp().tolist(), described, strict=True)):
        table.add_row(str(k), f"{weight:.4f}", *own.others.values(), *own.cells[: len(shown)])
    more = len(names) - len(shown)
    table.caption = f"{more} more columns are in parameters.json" if more else None
    return table


def _bound(bound: list[float], *, online: bool) -> Table:
    # After an E-step the bound touches what it bounds; online EM moves θ before a pass is over.
    what = "log p(x | θ) as θ was before each piece of x" if online else "bound = log p(x | θ)"
    table = Table(title=f"{what}, {len(bound)} {'passes' if online else 'iterations'}")
    for name in ("iteration", "nats per item", "rise"):
        table.add_column(name, justify="right")
    for t, value in enumerate(bound):
        if t == LISTED and len(bound) > 2 * LISTED + 1:
            table.add_row("…", "…", "…")
        if t < LISTED or t >= len(bound) - LISTED or len(bound) <= 2 * LISTED + 1:
            table.add_row(str(t + 1), f"{value:.6f}", f"{value - bound[t - 1]:.2g}" if t else "")
    return table
