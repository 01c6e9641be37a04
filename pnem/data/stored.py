"""Arrays that stay in their HDF5 file until they are used."""

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pnem.errors import DataError

__all__ = ["StoredArray", "damage_reported", "open_file"]


class StoredArray:
    """An array (T, N, ...) in a file, named by file and path, so that it pickles; every process opens it for itself.

    Its first `keep` images are kept in memory once they are used.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.path = os.path.abspath(dataset.file.filename)
        self.name: str = dataset.name
        self.where = f"{self.path}, split {posixpath.dirname(self.name).lstrip('/')!r}"
        self.shape: tuple[int, ...] = dataset.shape or ()
        self.dtype: np.dtype[Any] = dataset.dtype
        self.chunk: int = dataset.chunks[1] if dataset.chunks and len(self.shape) > 1 else 1
        self.keep = 0
        self._kept: NDArray[Any] | None = None
        self._dataset, self._process = dataset, os.getpid()

    @property
    def image_bytes(self) -> int:
        """Bytes that each of the N images takes."""
        return self.dtype.itemsize * int(np.prod(self.shape)) // self.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None, "_kept": None}

    def _opened(self) -> h5py.Dataset:
        # A handle that was open at a fork shares its file descriptor with the parent process.
        if not self._dataset or self._process != os.getpid():
            dataset = open_file(self.path).get(self.name)
            if getattr(dataset, "shape", None) != self.shape or dataset.dtype != self.dtype:
                raise DataError(f"{self.path}, {self.name} has changed since it was opened: make the dataset again")
            self._dataset, self._process = dataset, os.getpid()
        return self._dataset

    def take(self, index: NDArray[np.intp]) -> NDArray[Any]:
        """The images at `index`, in that order."""
        with damage_reported(self.where):
            if self.keep and self._kept is None:
                self._kept = self._opened()[:, : self.keep]
            if self._kept is not None:
                return self._kept[:, index]
            # HDF5 selects a list of images slowly (a second for 64 sequences), so each run of neighbours is one slice.
            unique, inverse = np.unique(index, return_inverse=True)
            images = np.empty((self.shape[0], len(unique), *self.shape[2:]), self.dtype)
            bounds = [0, *(np.flatnonzero(np.diff(unique) > 1) + 1).tolist(), len(unique)]
            dataset = self._opened()
            for start, stop in pairwise(bounds):
                images[:, start:stop] = dataset[:, unique[start] : unique[stop - 1] + 1]
            return images[:, inverse]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Neighbouring images, from the file."""
        with damage_reported(self.where):
            images: NDArray[Any] = self._opened()[:, start:stop]
            return images


def open_file(path: str | os.PathLike[str]) -> h5py.File:
    """The file, to read; raises `DataError` where there is none or it cannot be opened."""
    try:
        return h5py.File(path, "r")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: give an HDF5 file, or write one with pnem data") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: give an HDF5 file in it") from error
    except OSError as error:
        if os.path.isfile(path) and os.access(path, os.R_OK) and not h5py.is_hdf5(path):
            raise DataError(f"{path} is not an HDF5 file: give one in the N-EM layout, see write_hdf5") from error
        raise DataError(f"{path} cannot be opened ({error}): if it is truncated or damaged, get it again") from error


@contextmanager
def damage_reported(source: object) -> Iterator[None]:
    """What h5py raises while it reads is raised as a `DataError` that names the source."""
    try:
        yield
    except DataError:
        raise
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{source} cannot be read ({error}): the file is damaged, get it again") from error
