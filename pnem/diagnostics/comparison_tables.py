"""A comparison as tables that fit the terminal."""

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

from pnem.diagnostics.comparison_notes import GAPS, LAPLACE, MOMENTS, POINT

if TYPE_CHECKING:
    from pnem.diagnostics.comparison_result import Comparison

__all__ = ["ComparisonTables"]

# Of the names of runs, which are folded beyond it, and of the space that a table leaves beside a cell.
WIDEST_NAME, PADDING = 24, 2
GROUPING = ("ami", "ari")
TITLES = {"log_marginal": "log p(x)", "ami": "AMI", "ari": "ARI"} | {name: name.removesuffix("_gap") for name in GAPS}


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
        unit = "" if result.measures == "grouping" else ", nats per image"
        yield Text(f"{len(names)} runs on {of} {result.split} images: mean ± standard error{unit}")
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
    """The columns that are side by side: all, or those of a group, or as many of them as fit, evenly divided."""
    width -= _name_width(names)
    every = [column for group in groups for column in group]
    if sum(column.width for column in every) <= width:
        groups = [every]
    for group in filter(None, groups):
        fitting = [_packed(group, least) for least in range(width, 0, -1)]
        yield from [parts for parts in fitting if len(parts) == len(fitting[0])][-1]


def _packed(columns: list[Column], width: int) -> list[list[Column]]:
    parts = [columns[:1]]
    for column in columns[1:]:
        if sum(each.width for each in parts[-1]) + column.width > width:
            parts.append([])
        parts[-1].append(column)
    return parts


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
    return "" if name in GROUPING else "gap, nats" if name in GAPS else "nats"


def _estimates(means: "pd.Series[Any]", errors: "pd.Series[Any]", name: str, sign: str = "") -> list[str]:
    """Means and their errors, with as many digits as the smallest error needs."""
    least = errors[errors > 0].min()
    needed = 0 if math.isnan(least) else 1 - math.floor(math.log10(least))
    digits = min(max(needed, 3 if name in GROUPING else 2), 3)
    return [f"{mean:{sign}z.{digits}f} ± {error:.{digits}f}" for mean, error in zip(means, errors, strict=True)]


def _rounded(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
