"""Tables in HDF5 files: two-dimensional datasets of numbers, found without reading them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from pnem.errors import DataError

__all__ = ["StoredTable", "find_table", "open_table"]


class StoredTable(NamedTuple):
    """A table in an HDF5 file: `name` is that of its dataset, `shape` its (N, C)."""

    path: Path
    name: str
    shape: tuple[int, int]
    dtype: np.dtype[np.generic]

    @property
    def columns(self) -> list[str]:
        """What its columns, which HDF5 does not name, are called: x0, x1, ..."""
        return [f"x{c}" for c in range(self.shape[1])]

    def read(self) -> NDArray[np.float64]:
        """All of it, (N, C)."""
        with open_table(self) as dataset:
            return dataset.astype(np.float64)[:]


def find_table(path: str | os.PathLike[str], dataset: str | None = None) -> StoredTable:
    """The table of this name in an HDF5 file, or its only one; just its shape is read.

    Args:
        path: the file.
        dataset: the dataset's name with its groups, as ``"group/table"``; None where there is just one table.

    Raises:
        DataError: no such file or dataset, not HDF5 or damaged, or the dataset is not a table of numbers, is empty, or
            is not the only one.
    """
    path = Path(path)
    with _opened(path) as file:
        found: dict[str, h5py.Dataset] = {}
        file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
        tables = [name for name, item in found.items() if _is_table(item)]
        listed = ", ".join(f"{name} {item.shape}" for name, item in found.items()) or "none"
        if dataset is None:
            if len(tables) != 1:
                many = "has several tables" if tables else "has no two-dimensional dataset of numbers"
                advice = f"choose one of {', '.join(tables)} with --dataset" if tables else "give one of shape (N, C)"
                raise DataError(f"{path} {many}: {advice} (its datasets: {listed})")
            name = tables[0]
        else:
            name = dataset.strip("/")
            if name not in found:
                raise DataError(f"{path} has no dataset {dataset!r}: choose one of its datasets, {listed}")
        item = found[name]
        if item.dtype.kind not in "biuf":
            raise DataError(f"{path}, {name} has dtype {item.dtype}: give booleans, integers or floats")
        if item.ndim != 2:
            raise DataError(f"{path}, {name} has shape {item.shape}: give two axes, items and columns (N, C)")
        if 0 in item.shape:
            raise DataError(f"{path}, {name} is empty, its shape (N, C) is {item.shape}: give at least one item")
        return StoredTable(path, name, item.shape, item.dtype)


@contextmanager
def open_table(table: StoredTable) -> Iterator[h5py.Dataset]:
    """The dataset of a table, open for reading.

    Raises:
        DataError: the file is gone, damaged, or has changed; also for damage that reading the dataset meets.
    """
    with _opened(table.path) as file:
        item = file.get(table.name)
        if getattr(item, "shape", None) != table.shape or item.dtype != table.dtype:
            raise DataError(f"{table.path}, {table.name} has changed since it was looked at: start again")
        yield item


def _is_table(item: h5py.Dataset) -> bool:
    return item.ndim == 2 and item.dtype.kind in "biuf"


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    if not path.exists():
        raise DataError(f"{path} does not exist: give a CSV or an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except DataError:
        raise
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        if path.is_file() and os.access(path, os.R_OK) and not h5py.is_hdf5(path):
            raise DataError(f"{path} is not an HDF5 file: give one with a dataset of shape (N, C)") from error
        raise DataError(f"{path} cannot be read ({error}): if it is truncated or damaged, get it again") from error
