"""Rows of an HDF5 table, read in chunks: data that need not fit into memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pnem.data.arrays import check_whole
from pnem.data.hdf5_tables import find_table, open_table
from pnem.errors import DataError

__all__ = ["Rows"]

# Rows of a chunk, and of wide tables the numbers.
CHUNK, CHUNK_SIZE = 2**17, 2**24
# Places in the file that a shuffled chunk comes from: of a sorted file it is then like the whole.
PLACES = 128


class Rows:
    """The rows of a two-dimensional HDF5 dataset, in chunks (n, C), as `ClassicalEM.fit` takes them.

    The file is opened for every pass anew, or every shuffled chunk, and never held in memory as a whole.

    Args:
        path: the file.
        dataset: the name of the dataset, (N, C), of numbers; None where the file has just one.
        columns: which columns, counted from 0, in this order; all when None.
        chunk: rows that are read at once; 131,072, or fewer of wide tables, when None.
        shuffle: whether rows come in an order that torch's generator decides: each chunk from 128 places of the file.

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
        if not self.shuffle:
            yield from self.in_order()
            return
        size = max(1, self.chunk // PLACES)
        places = torch.randperm(-(-len(self) // size))
        for chosen in places.split(max(1, self.chunk // size)):
            # Read in the order of the file, which is faster.
            starts = (chosen.sort().values * size).tolist()
            rows = torch.cat(list(self._read(starts, size)))
            yield rows[torch.randperm(len(rows))]

    def in_order(self) -> Iterator[Tensor]:
        """Chunks (n, C) in the order of the file, whether or not they are to be shuffled."""
        return self._read(range(0, len(self), self.chunk), self.chunk)

    def sample(self, items: int) -> Tensor:
        """So many rows, all if there are no more, without replacement and always the same: (n, C)."""
        chosen = np.sort(np.random.default_rng(0).choice(len(self), min(items, len(self)), replace=False))
        groups = np.split(chosen, np.searchsorted(chosen, np.arange(self.chunk, len(self), self.chunk)))
        return torch.cat([rows[own % self.chunk] for rows, own in zip(self.in_order(), groups, strict=True)])

    def _read(self, starts: Iterable[int], size: int) -> Iterator[Tensor]:
        with open_table(self.table) as dataset:
            for start in starts:
                rows = dataset[start : start + size]
                rows = rows if self.columns is None else rows[:, self.columns]
                yield torch.from_numpy(rows.astype(np.float64, copy=False))
