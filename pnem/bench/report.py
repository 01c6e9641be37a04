"""What a benchmark found: rows of one table, and as JSON."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pnem.bench.clock import Spread

__all__ = ["Report", "Row"]

FORMAT = 1
COLUMNS = ("", "median (quartiles)", "speed", "images/s", "of the peak", "memory", "first")
# How many of them are folded where they do not all fit, the last being short; and the spaces between them.
FOLDED, GAP = 3, 2
SHORT = {"products": "prod.", "bandwidth": "mem."}


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        section, name: what was measured.
        value: the number itself; None where it could not be measured, which `note` explains.
        unit: its unit: ``"ms"``, ``"GFLOP/s"``, ``"GB/s"``, ``"%"`` (of time on top of another's) or ``"exponent"``.
        speeds: the time of others, timed alternately with it, over its own, round by round: above 1 it is faster.
        images_per_second: images, or frames of sequences.
        share: of the measured peak that binds: the time that the step's matrix products would take at it, over the
            time of the step.
        binds: ``"products"`` or ``"bandwidth"``.
        gflops, megabytes: what the share was counted from: the floating-point operations of a step's matrix products
            (10⁹), and their operands and results (10⁶), each read or written once.
        memory: bytes at the step's peak on top of what was held before it.
        first_seconds: of the first call, compilation included.
        note: what else there is to know.
    """

    section: str
    name: str
    value: Spread | None
    unit: str = "ms"
    speeds: dict[str, Spread] = field(default_factory=dict)
    images_per_second: float | None = None
    share: float | None = None
    binds: str | None = None
    gflops: float | None = None
    megabytes: float | None = None
    memory: int | None = None
    first_seconds: float | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """As the table shows it, by its `COLUMNS`."""
        return (
            self.name,
            "–" if self.value is None else f"{_with_spread(self.value)} {self.unit}",
            "\n".join(f"{_with_spread(speed)} × {other}" for other, speed in self.speeds.items()),
            "" if self.images_per_second is None else f"{self.images_per_second:,.0f}",
            "" if self.share is None or self.binds is None else f"{100 * self.share:.0f} % {SHORT[self.binds]}",
            "" if self.memory is None else f"{self.memory / 2**20:,.0f} MiB",
            "" if self.first_seconds is None else f"{self.first_seconds:.0f} s",
        )

    def jsonable(self) -> dict[str, Any]:
        """Every field, the spreads as objects."""
        value = None if self.value is None else self.value._asdict()
        return asdict(self) | {
            "value": value,
            "speeds": {other: speed._asdict() for other, speed in self.speeds.items()},
        }


def _with_spread(spread: Spread) -> str:
    median, low, high = (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in spread[:3])
    return median if spread.repetitions == 1 else f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Report:
    """All rows of a benchmark, and where it ran.

    Attributes:
        suite, device, small, repetitions, seed: as it was asked for.
        hardware, torch, threads: the processor or GPU, torch's version, and the CPU threads that it used.
        rows: the measurements.
    """

    suite: str
    device: str
    small: bool
    repetitions: int
    seed: int
    hardware: str
    torch: str
    threads: int
    rows: list[Row] = field(default_factory=list)

    def to_json(self) -> str:
        """All numbers."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rows"}
        rows = [row.jsonable() for row in self.rows]
        return json.dumps({"format": FORMAT, **values, "rows": rows}, indent=2, ensure_ascii=False) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table: sections with the same columns, and below each what else there is to know of its rows."""
        yield Text(f"pnem bench, {self.suite} suite{', small' * self.small}", style="italic")
        columns = zip(COLUMNS, *(row.cells() for row in self.rows), strict=True)
        widths = [max(cell_len(line) for cell in column for line in cell.split("\n")) for column in columns]
        while sum(widths) + GAP * (len(widths) - 1) > options.max_width and max(widths[:FOLDED]) > 10:
            widths[widths.index(max(widths[:FOLDED]))] -= 1
        for number, section in enumerate(dict.fromkeys(row.section for row in self.rows)):
            table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), show_header=number == 0)
            for i, (title, width) in enumerate(zip(COLUMNS, widths, strict=True)):
                table.add_column(title, width=width, justify="left" if i < FOLDED else "right", overflow="fold")
            for row in self.rows:
                if row.section == section:
                    table.add_row(*(Text(cell) for cell in row.cells()))
            notes = [f"{row.name}: {row.note}" for row in self.rows if row.section == section and row.note]
            yield Text("\n" + section.replace("\n", ": "), style="bold")
            yield table
            yield from (Padding(Text(note, style="dim"), (0, 0, 0, 2)) for note in notes)
        yield Text(
            f"\n{self.hardware}, torch {self.torch}, {self.threads} CPU thread{'s' * (self.threads > 1)}, device "
            f"{self.device}, seed {self.seed}; {self.repetitions} repetitions, in each of which all that is compared "
            "is timed once. Speed: the other's time over this one's; above 1 this is faster. Of the peak: the time "
            "that the matrix products alone would take at the measured peak of products (prod.) or of bandwidth "
            "(mem.), whichever is longer, over the step's time. Memory: a step's peak on top of parameters and "
            "optimiser. First: the first step, with compiling."
        )
