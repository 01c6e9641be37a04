"""A comparison as tables that fit the terminal, and the notes below them."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pnem.diagnostics.comparison_result import Comparison
    from pnem.run import Run

__all__ = ["ComparisonTables", "notes_on"]

POINT, LAPLACE, MOMENTS = "†", "‡", "§"
# Of the names of runs, which are folded beyond it, and of the space that a table leaves beside a cell.
WIDEST_NAME, PADDING = 24, 2
GAPS = ("approximation_gap", "amortisation_gap", "optimality_gap")
GROUPING = ("ami", "ari")
TITLES = {"log_marginal": "log p(x)", "ami": "AMI", "ari": "ARI"} | {name: name.replace("_", " ") for name in GAPS}


class Column(NamedTuple):
    """A column: its two lines of heading, a cell for each run, and how many images it rests on."""

    title: str
    unit: str
    cells: list[str]
    images: int | None

    @property
    def width(self) -> int:
        """In characters, with the space beside it."""
        return max(map(cell_len, (self.title, self.unit, *self.cells))) + PADDING


class ComparisonTables(NamedTuple):
    """What a comparison looks like in a terminal, of whatever width."""

    comparison: "Comparison"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table where there is room for it, and otherwise several of the same rows."""
        result, width = self.comparison, options.max_width
        names = [*result.scores]
        of = f"{result.images:,}" + ("" if result.images == result.available else f" of {result.available:,}")
        yield Text(f"{len(names)} runs on {of} {result.split} images: means ± standard errors over images")
        nats, others = _nats_columns(result), _other_columns(result)
        for part in _parts(names, [nats, others], width):
            yield _table(names, part)
            yield ""
        differences = _differences(result)
        if any(differences):
            yield Text(f"Differences to {names[0]}, paired over images")
            for part in _parts(names[1:], [differences], width):
                yield _table(names[1:], part)
                yield ""
        for note in result.notes:
            yield Text(note, "dim")


def _name_width(names: list[str]) -> int:
    return min(WIDEST_NAME, max(map(cell_len, [*names, "images"]))) + PADDING


def _parts(names: list[str], groups: list[list[Column]], width: int) -> Iterator[list[Column]]:
    """The columns that are side by side: all, or those of a group, or as many of them as fit."""
    width -= _name_width(names)
    every = [column for group in groups for column in group]
    if sum(column.width for column in every) <= width:
        groups = [every]
    for group in filter(None, groups):
        part: list[Column] = []
        for column in group:
            if part and sum(each.width for each in part) + column.width > width:
                yield part
                part = []
            part.append(column)
        yield part


def _table(names: list[str], columns: list[Column]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, PADDING - 1, 0, 0), pad_edge=False)
    table.add_column(Text("\n"), max_width=WIDEST_NAME, overflow="fold")
    for column in columns:
        table.add_column(Text(f"{column.title}\n{column.unit}"), justify="right", no_wrap=True)
    for name, *cells in zip(names, *(column.cells for column in columns), strict=True):
        table.add_row(Text(name), *map(Text, cells))
    if any(column.images is not None for column in columns):
        counts = ["" if column.images is None else f"{column.images:,}" for column in columns]
        table.add_row(*(Text(cell, "dim") for cell in ("images", *counts)))
    return table


def _nats_columns(result: "Comparison") -> list[Column]:
    columns = []
    if result.measures != "grouping":
        columns.append(_column(result, "log_marginal", {"point": LAPLACE, "draws": MOMENTS}))
    if "elbo" in result.counts:
        columns.append(_column(result, "elbo", {"point": POINT, "draws": MOMENTS}))
    columns += [_column(result, name) for name in GAPS if name in result.counts]
    if "k_hat" in result.counts:
        shares = [
            f"{100 * share:.0f} %" if "k_hat" in scores else "–"
            for share, scores in zip(result.table["k_hat"], result.scores.values(), strict=True)
        ]
        columns.append(Column("k̂ > 0.7", "of images", shares, result.counts["k_hat"]))
    return columns


def _other_columns(result: "Comparison") -> list[Column]:
    table = result.table
    batches = "/".join(f"{batch:.0f}" for batch in sorted(set(table["timed_batch"])))
    return [
        *(_column(result, name) for name in GROUPING if name in result.counts),
        Column("parameters", "", [f"{count:,}" for count in table["parameters"]], None),
        Column("training", "s", [_rounded(value) for value in table["train_seconds"]], None),
        Column("inference", f"ms, B={batches}", [_rounded(value) for value in table["ms_per_image"]], None),
    ]


def _column(result: "Comparison", name: str, marks: Mapping[str, str] = MappingProxyType({})) -> Column:
    """The column of a score, with marks that depend on the kind of q(θ); a dash where a run has no such score."""
    has = [name in scores for scores in result.scores.values()]
    cells = ["–"] * len(has)
    if any(has):
        estimates = _estimates(result.table[name], result.table[f"{name}_se"], name)
        cells = [
            estimate + marks.get(q, "") if own else "–"
            for estimate, q, own in zip(estimates, result.table["q"], has, strict=True)
        ]
    return Column(_title(result, name), _unit(name), cells, result.counts.get(name))


def _differences(result: "Comparison") -> list[Column]:
    names = [*result.scores]
    first, others = names[0], names[1:]
    columns = []
    for name in ("log_marginal", "elbo", *GROUPING):
        chosen = (result.differences["measure"] == name) & (result.differences["reference"] == first)
        of = result.differences[chosen].set_index("run").reindex(others)
        if of["images"].notna().any():
            estimates = _estimates(of["difference"], of["standard_error"], name, sign="+")
            cells = [text if count > 0 else "–" for text, count in zip(estimates, of["images"], strict=True)]
            columns.append(Column(_title(result, name), _unit(name), cells, int(of["images"].max())))
    return columns


def _title(result: "Comparison", name: str) -> str:
    if name == "elbo":
        kinds = {q == "point" for q in result.table["q"]}
        return f"ELBO or {POINT}" if len(kinds) > 1 else "log p(x, θ)" if True in kinds else "ELBO"
    return TITLES[name]


def _unit(name: str) -> str:
    return "" if name in GROUPING else "nats per image"


def _estimates(means: "pd.Series[Any]", errors: "pd.Series[Any]", name: str, sign: str = "") -> list[str]:
    """Means and their errors, with as many digits as the smallest error needs."""
    least = errors[errors > 0].min()
    needed = 0 if math.isnan(least) else 1 - math.floor(math.log10(least))
    digits = min(max(needed, 3 if name in GROUPING else 2), 3)
    return [f"{mean:{sign}z.{digits}f} ± {error:.{digits}f}" for mean, error in zip(means, errors, strict=True)]


def _rounded(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def notes_on(
    runs: Mapping[str, "Run"],
    table: pd.DataFrame,
    counts: Mapping[str, int],
    images: int,
    available: int,
    measures: str,
    samples: int,
) -> tuple[str, ...]:
    """What is to be known about the numbers."""
    return tuple(_notes(runs, table, counts, images, available, measures, samples))


def _notes(
    runs: Mapping[str, "Run"],
    table: pd.DataFrame,
    counts: Mapping[str, int],
    images: int,
    available: int,
    measures: str,
    samples: int,
) -> Iterator[str]:
    kinds = set(table["q"])
    models = {id(run.model): run.model for run in runs.values()}
    estimated = "log_marginal" in counts
    if estimated:
        K = max(model.num_components for model in models.values())
        missed = f"; with K = {K} exchangeable components up to log K! = {math.lgamma(K + 1):.2f} nats too low"
        yield (
            f"log p(x): importance weighting with {samples} draws of θ for each image, on average a lower bound"
            + (missed if K > 1 else "")
            + "; not to be trusted for images with k̂ > 0.7."
        )
    if "elbo" in counts and "point" in kinds:
        yield f"{POINT} plug-in log p(x, θ) at a point, no bound on log p(x): it compares only with its own kind."
    if estimated and "point" in kinds:
        yield (
            f"{LAPLACE} q(θ) is a point: draws from a normal around it as wide as Laplace's approximation of p(θ | x). "
            "It estimates what the model gives x, and says little about the strategy."
        )
    if measures != "grouping" and "draws" in kinds:
        yield f"{MOMENTS} q(θ) is draws of a sampler: that of the normal with their mean and covariance."
    if measures != "grouping" and not all(model.has_proper_prior for model in models.values()):
        yield "A flat prior on θ has no log p(x)."
    if measures != "grouping":
        yield from _notes_on_models(runs)
    devices = ", ".join(sorted({str(run.device) for run in runs.values()}))
    yield f"Inference: per image, warm, the median over batches of B images, on {devices}."
    if "ami" not in counts:
        yield "The data have no groups, and so there is no AMI or ARI."
    expensive = min((counts[name] for name in ("log_marginal", *GAPS) if name in counts), default=images)
    if expensive < images or images < available:
        yield f"The budget allowed {images:,} of {available:,} images, and what is expensive for {expensive:,} of them."


def _notes_on_models(runs: Mapping[str, "Run"]) -> Iterator[str]:
    shared: dict[int, list[str]] = {}
    for name, run in runs.items():
        shared.setdefault(id(run.model), []).append(name)
    for names in shared.values():
        if len(names) > 1:
            which = f"{', '.join(names[:-1])} and {names[-1]}" if len(shared) > 1 else "All runs"
            yield (
                f"{which} infer in one model, whose log p(x) is one number: the highest estimate is on average the "
                "nearest to it. Training is that of the model."
            )
    if len(shared) > 1 and next(iter(runs.values())).model.owned:
        yield (
            "With ownership p is the declared joint density, which is not normalised over x: between models its nats "
            "say which fits what it declares better, not which gives images more probability."
        )
