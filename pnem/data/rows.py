"""Rows of an HDF5 table, read in chunks: data that need not fit into memory."""

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from pnem.data.arrays import check_whole
from pnem.errors import DataError

__all__ = ["Rows"]


class Rows:
    """The rows of a two-dimensional HDF5 dataset, in chunks (n, C), as `ClassicalEM.fit` takes them.

    The file is opened anew for every pass and never held in memory as a whole.

    Args:
        path: the file.
        dataset: the name of the dataset, (N, C), of numbers.
        chunk: rows that are read at once.
        shuffle: whether chunks, and the rows in each, come in an order that torch's generator decides.

    Raises:
        DataError: no such file or dataset, or it is not a table of numbers.
    """

    def __init__(self, path: str | Path, dataset: str, *, chunk: int = 2**17, shuffle: bool = False):
        check_whole(chunk, "chunk")
        self.path = Path(path)
        self.dataset = dataset
        self.chunk = chunk
        self.shuffle = shuffle
        with self._open() as file:
            self.shape = self._table(file).shape

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Tensor]:
        starts = np.arange(0, len(self), self.chunk)
        if self.shuffle:
            starts = starts[torch.randperm(len(starts)).numpy()]
        with self._open() as file:
            table = self._table(file)
            for start in starts:
                rows = torch.from_numpy(table[start : start + self.chunk].astype(np.float64, copy=False))
                yield rows[torch.randperm(len(rows))] if self.shuffle else rows

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r")
        except FileNotFoundError as error:
            raise DataError(f"there is no file {self.path}") from error
        except OSError as error:
            raise DataError(f"{self.path} is not an HDF5 file, or is damaged: {error}") from error

    def _table(self, file: h5py.File) -> h5py.Dataset:
        found = file.get(self.dataset)
        if not isinstance(found, h5py.Dataset):
            raise DataError(f"{self.path} has no dataset {self.dataset!r}; it has {', '.join(file) or 'none'}")
        if found.ndim != 2 or found.dtype.kind not in "biuf" or min(found.shape) < 1:
            raise DataError(
                f"{self.dataset!r} in {self.path} has shape {found.shape} and dtype {found.dtype}, but rows are "
                "numbers of shape (N, C), of at least one row and column"
            )
        return found
