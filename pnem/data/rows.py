"""Rows of an HDF5 table, read in chunks: data that need not fit into memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pnem.data.arrays import check_whole
from pnem.data.hdf5_tables import find_table, open_table

__all__ = ["Rows"]


class Rows:
    """The rows of a two-dimensional HDF5 dataset, in chunks (n, C), as `ClassicalEM.fit` takes them.

    The file is opened anew for every pass and never held in memory as a whole.

    Args:
        path: the file.
        dataset: the name of the dataset, (N, C), of numbers; None where the file has just one.
        chunk: rows that are read at once.
        shuffle: whether chunks, and the rows in each, come in an order that torch's generator decides.

    Raises:
        DataError: no such file or dataset, it is not a table of numbers, or `chunk` is below 1.
    """

    def __init__(self, path: str | Path, dataset: str | None = None, *, chunk: int = 2**17, shuffle: bool = False):
        check_whole(chunk, "chunk")
        self.chunk = chunk
        self.shuffle = shuffle
        self.table = find_table(path, dataset)

    def __len__(self) -> int:
        return self.table.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        starts = np.arange(0, len(self), self.chunk)
        if self.shuffle:
            starts = starts[torch.randperm(len(starts)).numpy()]
        with open_table(self.table) as dataset:
            for start in starts:
                rows = torch.from_numpy(dataset[start : start + self.chunk].astype(np.float64, copy=False))
                yield rows[torch.randperm(len(rows))] if self.shuffle else rows
