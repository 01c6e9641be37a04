"""Tables of numbers, from CSV and HDF5 files: the items of classical mixtures."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnem.data.csv_tables import read_csv, to_numbers
from pnem.data.hdf5 import MEMORY_LIMIT
from pnem.data.hdf5_tables import find_table
from pnem.data.rows import Rows
from pnem.errors import DataError

__all__ = ["Table", "open_items", "read_table"]

# Rows of a table that are worked on at once.
CHUNK = 2**17


class Table(NamedTuple):
    """N items with C values each.

    Attributes:
        values: (N, C), NaN where a value is missing.
        names: those of the C columns.
        weight: how often each item counts, (N,); None where all count once.
    """

    values: NDArray[np.float64]
    names: tuple[str, ...]
    weight: NDArray[np.float64] | None = None

    @property
    def num_items(self) -> int:
        """N."""
        return len(self.values)

    def in_order(self) -> Iterator[Tensor]:
        """The items in chunks (n, C), as those of `Rows`."""
        return iter(torch.from_numpy(self.values).split(CHUNK))


def open_items(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    dataset: str | None = None,
    weight: str | None = None,
    stream: bool | None = None,
    shuffle: bool = False,
) -> Table | Rows:
    """The items of a file: in memory, or as a stream of those of an HDF5 dataset.

    Args:
        path, columns, dataset, weight: see `read_table`, whose errors are those of this.
        stream: whether to leave the items in the file; None to do so where they would take more than `MEMORY_LIMIT`
            bytes.
        shuffle: whether a stream comes in random order.

    Raises:
        DataError: a stream is asked for of a CSV file or with weights, or a table has weights and is too large.
    """
    path = Path(path)
    if not _is_hdf5(path):
        if stream:
            raise DataError(f"{path} is not an HDF5 file, and only those are streamed: convert it, or give --no-stream")
        return read_table(path, columns=columns, dataset=dataset, weight=weight)
    stored = find_table(path, dataset)
    size = 8 * stored.shape[0] * stored.shape[1]
    if not (size > MEMORY_LIMIT if stream is None else stream):
        return read_table(path, columns=columns, dataset=dataset, weight=weight)
    if weight is not None:
        raise DataError(
            f"{path}: items that are streamed have no weights: leave --weights out, or read all of the table, "
            f"{size / 2**30:.2g} GiB, into memory by --no-stream"
        )
    chosen = _chosen(path, stored.columns, columns, None, named=False)
    places = None if columns is None else [stored.columns.index(name) for name in chosen]
    return Rows(path, dataset, columns=places, shuffle=shuffle)


def _is_hdf5(path: Path) -> bool:
    """Raises `DataError` unless this is a file that can be read."""
    if path.is_dir():
        raise DataError(f"{path} is a directory: give a CSV or an HDF5 file")
    if not path.exists():
        raise DataError(f"{path} does not exist: give a CSV or an HDF5 file")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file, but a pipe or a device: save the data to a file first")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: you have no permission to")
    return bool(h5py.is_hdf5(path))


def read_table(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    dataset: str | None = None,
    weight: str | None = None,
) -> Table:
    """Reads a CSV file or a two-dimensional dataset of an HDF5 file.

    In CSV files cells are separated by commas, or by semicolons or tabs where the first line has more of those. The
    first line names the columns where none of its cells is a number, or where a cell that is none stands above one;
    otherwise, and in HDF5 files, the columns are called x0, x1, ... Missing values are empty cells, NA, nan, null and
    the like (`pnem.data.csv_tables.MISSING`), in HDF5 files NaN. Blank lines are passed over.

    Args:
        path: the file; it is HDF5 if its contents say so, whatever its name.
        columns: the names of those to read, in this order; all when None.
        dataset: which dataset of an HDF5 file; None where only one is two-dimensional.
        weight: the name of a column that says how often each item counts; it is not among the values then.

    Raises:
        DataError: no such file, column or dataset; neither CSV nor HDF5, or damaged; no items; rows of different
            lengths; columns without a name or of the same name; text or infinities in a column that is read; a row
            without any value; weights that are missing, negative or all zero.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "iris.csv"
    ...     _ = path.write_text("length,width,kind\\n5.1,3.5,setosa\\n4.9,,setosa\\n")
    ...     read_table(path, columns=["length", "width"])
    Table(values=array([[5.1, 3.5],
           [4.9, nan]]), names=('length', 'width'), weight=None)
    """
    path = Path(path)
    if _is_hdf5(path):
        stored = find_table(path, dataset)
        numbers = stored.read()
        chosen = _chosen(path, stored.columns, columns, weight, named=False)
        cells = {name: numbers[:, stored.columns.index(name)] for name in [*chosen, *_some(weight)]}
    else:
        if dataset is not None:
            raise DataError(f"{path} is not an HDF5 file, so that it has no dataset {dataset!r}: leave --dataset out")
        frame, named = read_csv(path)
        chosen = _chosen(path, list(frame.columns), columns, weight, named=named)
        cells = {name: to_numbers(frame[name], path) for name in [*chosen, *_some(weight)]}
    for name, column in cells.items():
        if np.isinf(column).any():
            row = int(np.isinf(column).argmax())
            raise DataError(
                f"{path}: column {name!r} is infinite in row {row} (counted from 0): repair the row, leave it out, or "
                "leave the cell empty if its value is missing"
            )
    values = np.stack([cells[name] for name in chosen], 1)
    missing = np.asarray(np.isnan(values).all(1))
    if missing.any():
        raise DataError(
            f"{path}: row {int(missing.argmax())} (counted from 0) has no value in {_listed(chosen)}: leave such rows "
            f"out ({int(missing.sum())} of {len(missing)})"
        )
    if weight is not None:
        _check_weight(cells[weight], weight, path)
    return Table(values, tuple(chosen), None if weight is None else cells[weight])


def _chosen(
    path: Path, found: list[str], columns: Sequence[str] | None, weight: str | None, *, named: bool
) -> list[str]:
    """The names of the columns that hold values."""
    for name in [*(columns or []), *_some(weight)]:
        if name not in found or not name:
            why = "" if named else " (its first line is not a header)" if not h5py.is_hdf5(path) else ""
            raise DataError(f"{path} has no column {name!r}: its columns are {_listed(list(filter(None, found)))}{why}")
    if columns is None:
        columns = [name for name in found if name != weight]
        if "" in columns:
            rest = ",".join(filter(None, columns))
            raise DataError(
                f"{path}: column {found.index('')} has no name in the header; if it holds row numbers, leave it out by "
                f"--columns {rest}"
            )
    if not columns:
        raise DataError(f"{path}: no column of values is left: choose at least one that is not the weights'")
    if weight in columns:
        raise DataError(
            f"{path}: column {weight!r} cannot hold weights and values at once: leave it out of the columns"
        )
    if len(set(columns)) < len(columns):
        raise DataError(f"the columns {_listed(list(columns))} are not all different: name each of them once")
    return list(columns)


def _check_weight(weight: NDArray[np.float64], name: str, path: Path) -> None:
    bad = ~(weight >= 0)
    if bad.any():
        row = int(bad.argmax())
        what = "has no value" if np.isnan(weight[row]) else f"is {weight[row]:g}"
        raise DataError(f"{path}: column {name!r} {what} in row {row} (counted from 0): weights must be at least 0")
    if not weight.any():
        raise DataError(f"{path}: column {name!r} is 0 in every row: weights must not all be 0")


def _some(name: str | None) -> list[str]:
    return [] if name is None else [name]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)} of them)" if len(names) > 10 else "")
