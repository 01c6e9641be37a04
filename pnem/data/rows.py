"""Rows of an HDF5 table, read in chunks: data that need not fit into memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pnem.data.arrays import check_whole
from pnem.data.hdf5_tables import find_table, open_table
from pnem.errors import DataError

__all__ = ["Rows"]

# Rows of a chunk, and of wide tables the numbers.
CHUNK, CHUNK_SIZE = 2**17, 2**24


class Rows:
    """The rows of a two-dimensional HDF5 dataset, in chunks (n, C), as `ClassicalEM.fit` takes them.

    The file is opened anew for every pass and never held in memory as a whole.

    Args:
        path: the file.
        dataset: the name of the dataset, (N, C), of numbers; None where the file has just one.
        columns: which columns, counted from 0, in this order; all when None.
        chunk: rows that are read at once; 131,072, or fewer of wide tables, when None.
        shuffle: whether chunks, and the rows in each, come in an order that torch's generator decides.

    Attributes:
        names: what its columns, which HDF5 does not name, are called: x0, x1, ...
        weight: None: every row counts once.

    Raises:
        DataError: no such file, dataset or column, it is not a table of numbers, or `chunk` is below 1.
    """

    weight: None = None

    def __init__(
        self,
        path: str | Path,
        dataset: str | None = None,
        *,
        columns: Sequence[int] | None = None,
        chunk: int | None = None,
        shuffle: bool = False,
    ):
        self.table = find_table(path, dataset)
        C = self.table.shape[1]
        self.columns = None if columns is None else [check_whole(c, "columns", 0) for c in columns]
        if self.columns is not None and (not self.columns or max(self.columns) >= C):
            raise DataError(f"columns={self.columns}: give at least one, of {C} columns from 0 to {C - 1}")
        self.names = tuple(self.table.columns[c] for c in (range(C) if self.columns is None else self.columns))
        self.chunk = min(CHUNK, max(1, CHUNK_SIZE // C)) if chunk is None else check_whole(chunk, "chunk")
        self.shuffle = shuffle

    def __len__(self) -> int:
        return self.table.shape[0]

    @property
    def num_items(self) -> int:
        """N."""
        return len(self)

    def __iter__(self) -> Iterator[Tensor]:
        starts = np.arange(0, len(self), self.chunk)
        if self.shuffle:
            starts = starts[torch.randperm(len(starts)).numpy()]
        for rows in self._read(starts):
            yield rows[torch.randperm(len(rows))] if self.shuffle else rows

    def in_order(self) -> Iterator[Tensor]:
        """Chunks (n, C) in the order of the file, whether or not they are to be shuffled."""
        return self._read(np.arange(0, len(self), self.chunk))

    def sample(self, items: int) -> Tensor:
        """So many rows, all if there are no more, without replacement and always the same: (n, C)."""
        chosen = np.sort(np.random.default_rng(0).choice(len(self), min(items, len(self)), replace=False))
        groups = np.split(chosen, np.searchsorted(chosen, np.arange(self.chunk, len(self), self.chunk)))
        return torch.cat([rows[own % self.chunk] for rows, own in zip(self.in_order(), groups, strict=True)])

    def _read(self, starts: NDArray[np.int64]) -> Iterator[Tensor]:
        with open_table(self.table) as dataset:
            for start in starts:
                rows = dataset[start : start + self.chunk]
                rows = rows if self.columns is None else rows[:, self.columns]
                yield torch.from_numpy(rows.astype(np.float64, copy=False))
