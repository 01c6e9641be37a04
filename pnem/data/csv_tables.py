"""Reading CSV files: where the columns are, whether they have names, and what is wrong with the file."""

import csv
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.errors import EmptyDataError, ParserError, ParserWarning

from pnem.errors import DataError

__all__ = ["MISSING", "read_csv", "to_numbers"]

MISSING = ("", "NA", "N/A", "n/a", "na", "NaN", "nan", "NAN", "null", "NULL", "None", "<NA>", "#N/A")
"""Cells that stand for a missing value."""
DELIMITERS = ",;\t"


class Layout(NamedTuple):
    """How a CSV file is laid out; its columns are called x0, x1, ... where it does not name them."""

    delimiter: str
    names: list[str]
    header: bool


def read_csv(path: Path) -> tuple[pd.DataFrame, bool]:
    """The cells of a CSV file as pandas reads them, and whether the first line named the columns.

    Columns are separated by commas, or by semicolons or tabs where the first line has more of those. The first line is
    a header where none of its cells is a number, or where a cell that is none stands above one. Blank lines are passed
    over.

    Raises:
        DataError: not UTF-8 text, nothing in it, two columns of the same name, or rows of different lengths.
    """
    layout = _layout(path)
    repeated = sorted({name for name in layout.names if name and layout.names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} has two columns called {repeated[0]!r}: give every column a name of its own")
    # pandas would number columns without a name too, but not say so.
    columns = [name or f"column {i} (no name)" for i, name in enumerate(layout.names)]
    try:
        with warnings.catch_warnings(), _text(path):
            warnings.simplefilter("error", ParserWarning)
            frame = pd.read_csv(
                path,
                sep=layout.delimiter,
                header=0 if layout.header else None,
                names=columns,
                index_col=False,
                na_values=list(MISSING),
                keep_default_na=False,
                skipinitialspace=True,
                low_memory=False,
                compression=None,
            )
    except EmptyDataError:
        frame = pd.DataFrame()
    except (ParserError, ParserWarning) as error:
        _refuse_ragged(path, layout)
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
    if not len(frame):
        raise DataError(f"{path} has no rows" + (" below its header" if layout.header else "") + ": give at least one")
    # A row that ends early reads as one whose last cells are missing.
    if len(columns) > 1 and frame.iloc[:, -1].isna().any():
        _refuse_ragged(path, layout)
    frame.columns = pd.Index(layout.names)
    return frame, layout.header


def to_numbers(column: pd.Series, path: Path) -> NDArray[np.float64]:
    """A column as numbers, NaN where cells are missing; true and false are 1 and 0.

    Raises:
        DataError: a cell holds text.
    """
    if not pd.api.types.is_numeric_dtype(column):
        text = column
        column = pd.to_numeric(text.replace({"True": 1, "False": 0}), errors="coerce")
        bad = np.flatnonzero(column.isna() & text.notna())
        if len(bad):
            raise DataError(
                f"{path}: column {str(text.name)!r} holds text, {str(text.iloc[bad[0]])!r} in row {bad[0]} (counted "
                "from 0): choose the columns of numbers with --columns, or columns= in Python"
            )
    # A copy, because that of pandas may not be written to, of which torch warns.
    return column.to_numpy(np.float64, na_value=np.nan, copy=True)


def _layout(path: Path) -> Layout:
    with _text(path), path.open(encoding="utf-8-sig", newline="") as file:
        line = next((line for line in file if line.strip()), "")
        if "\0" in line:
            raise DataError(f"{path} is neither CSV nor HDF5: give one of these")
        delimiter = max(DELIMITERS, key=line.count)
        file.seek(0)
        rows = (row for _, row in _rows(file, delimiter))
        first, second = itertools.islice(itertools.chain(rows, [[], []]), 2)
    if not first:
        raise DataError(f"{path} is empty: give a file with at least one row")
    header = not any(_is_number(cell) or cell in MISSING[1:] for cell in first) or any(
        not _is_number(above) and _is_number(below)
        for above, below in zip(first, second, strict=False)
        if above not in MISSING
    )
    return Layout(delimiter, first if header else [f"x{i}" for i in range(len(first))], header)


def _rows(file: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its line, counted from 1."""
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
    for row in reader:
        if len(row) > 1 or any(cell.strip() for cell in row):
            yield reader.line_num, [cell.strip() for cell in row]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _refuse_ragged(path: Path, layout: Layout) -> None:
    with _text(path), path.open(encoding="utf-8-sig", newline="") as file:
        for line, row in _rows(file, layout.delimiter):
            if len(row) != len(layout.names):
                raise DataError(
                    f"{path}, line {line} has {len(row)} cells, but the first line has {len(layout.names)}: "
                    "give every row the same number of cells"
                )


@contextmanager
def _text(path: Path) -> Iterator[None]:
    """Reports what is not text as a `DataError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither CSV (as UTF-8 text) nor HDF5: give one of these") from error
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}") from error
