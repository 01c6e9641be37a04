"""Images with their groups, from arrays or from HDF5 files in the layout of the N-EM authors.

A file has one HDF5 group per split (``training``, ``validation``, ``test``) with two arrays of shape (T, N, H, W, C):
``features``, the images, and ``groups``, the object that each pixel belongs to: 1, 2, ..., and 0 where it is not scored
(background, overlaps); files may come without it. T = 1 for static images. The last axis of ``groups`` may be 1
whatever C is. All boolean, integer and floating dtypes, chunkings and compressions read the same.
"""

import operator
import os
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pnem.data.arrays import array_of, check_arrays, check_finite, check_whole, whole_labels
from pnem.errors import DataError

__all__ = ["MEMORY_LIMIT", "Batch", "ImageDataset"]

MEMORY_LIMIT = 2**30
"""Bytes, as arrays in the dtype of the file, up to which a split is kept in memory once it is used."""


class Batch(NamedTuple):
    """Images with their groups: x (B, D, C) float32 and groups (B, D) int64, or None; sequences add a leading T."""

    x: Tensor
    groups: Tensor | None


class ImageDataset(Dataset[Batch]):
    """Images with the true grouping of their pixels, one minibatch at a time.

    Arrays and files behave alike. A file is opened at first use, again in every worker process of a ``DataLoader``, and
    a split is read at once only if it takes at most `memory_limit` bytes; the dataset pickles without its contents.
    Minibatches come whole, so a ``DataLoader`` needs no collation: ``DataLoader(data, 64, collate_fn=identity)``.

    Args:
        features: images, (T, N, H, W, C): a NumPy array, a tensor or an ``h5py.Dataset``.
        groups: the object of each pixel, (T, N, H, W, 1) or (T, N, H, W, C), whole numbers from 0 (not scored).
        limit: use only the first `limit` images.
        memory_limit: bytes up to which a split stored in a file is kept in memory.

    Raises:
        DataError: at once for arrays of wrong rank, shape or dtype, for no images and for a limit below 1; when read,
            for images with NaN or infinity and for groups that are not whole numbers from 0.

    Example:
        >>> features = np.zeros((1, 10, 4, 5, 3), dtype=np.uint8)
        >>> data = ImageDataset(features, features[..., :1], limit=8)
        >>> data
        ImageDataset(8 images of 4x5x3, 1 frame, with groups)
        >>> batch = data[2:5]
        >>> batch.x.shape, batch.groups.shape
        (torch.Size([3, 20, 3]), torch.Size([3, 20]))
        >>> data[-1].x.shape
        torch.Size([20, 3])
    """

    def __init__(
        self,
        features: ArrayLike | Tensor | h5py.Dataset,
        groups: ArrayLike | Tensor | h5py.Dataset | None = None,
        *,
        limit: int | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self._features = _source(features, "features")
        self._groups = None if groups is None else _source(groups, "groups")
        self._where = self._features.where if isinstance(self._features, _Stored) else "arrays"
        check_arrays(self._features, self._groups, self._where)
        T, N, H, W, C = self._features.shape
        self._len = N if limit is None else min(N, check_whole(limit, "limit"))
        self.num_frames: int = T
        self.image_shape: tuple[int, int, int] = (H, W, C)
        stored = [source for source in (self._features, self._groups) if isinstance(source, _Stored)]
        if sum(self._len * source.image_bytes for source in stored) <= memory_limit:
            for source in stored:
                source.keep = self._len

    @classmethod
    def from_hdf5(
        cls,
        path: str | os.PathLike[str],
        split: str = "training",
        *,
        limit: int | None = None,
        with_groups: bool | None = True,
        memory_limit: int = MEMORY_LIMIT,
    ) -> Self:
        """Open one split of a file in the N-EM layout; only its shapes are read now.

        Args:
            path: an HDF5 file.
            split: the HDF5 group to read: ``training``, ``validation`` or ``test`` in the authors' files.
            limit: use only the first `limit` images.
            with_groups: False to read the images alone, also from files that have no ``groups``; None to read
                ``groups`` where there are some.
            memory_limit: bytes up to which the split is kept in memory at first use.

        Raises:
            DataError: if the file is missing, not HDF5 or truncated, if the split or one of its arrays is missing, and
                as the constructor does.
        """
        with _open(path) as file, _damage_reported(path):
            parent = file.get(split)
            if not isinstance(parent, h5py.Group):
                found = sorted(map(str, file))
                raise DataError(f"{path} has no split {split!r}, only {found}: choose one of them")
            if with_groups is None:
                with_groups = "groups" in parent
            arrays = []
            for name in ("features", "groups") if with_groups else ("features",):
                array = parent.get(name)
                if not isinstance(array, h5py.Dataset):
                    found, where = sorted(map(str, parent)), f"{path}, split {split!r}"
                    hint = "; with_groups=False reads images alone" if name == "groups" else ""
                    raise DataError(f"{where} has no array {name!r}, only {found}: see write_hdf5 for the layout{hint}")
                arrays.append(array)
            return cls(*arrays, limit=limit, memory_limit=memory_limit)

    def limited(self, limit: int) -> Self:
        """The first `limit` images, as a dataset that shares its memory with this one.

        Raises:
            DataError: if `limit` is below 1.
        """
        first = copy(self)
        first._len = min(len(self), check_whole(limit, "limit"))
        return first

    @property
    def has_groups(self) -> bool:
        """Whether batches come with groups."""
        return self._groups is not None

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int | slice) -> Batch:
        """One image: x (D, C) and groups (D,); or, for a slice, a batch of them; sequences add a leading T."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        x, groups = self.__getitems__([operator.index(index)])
        axis = x.ndim - 3
        return Batch(x.squeeze(axis), None if groups is None else groups.squeeze(axis))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images at `indices`, in that order, as one batch."""
        index = np.array([operator.index(i) for i in indices], dtype=np.intp)
        if ((index < -len(self)) | (index >= len(self))).any():
            raise IndexError(f"indices {index.min()} to {index.max()} asked of a dataset of {len(self)} images")
        index %= len(self)
        H, W, C = self.image_shape
        shape = (len(index), H * W) if self.num_frames == 1 else (self.num_frames, len(index), H * W)

        features = _take(self._features, index)
        with np.errstate(over="ignore", invalid="ignore"):
            x = features.astype(np.float32)
        if features.dtype.kind == "f":
            check_finite(x, index, self._where)
        groups = None
        if self._groups is not None:
            labels = whole_labels(_take(self._groups, index), index, self._where)
            groups = torch.from_numpy(labels.reshape(shape))
        return Batch(torch.from_numpy(x.reshape(*shape, C)), groups)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_shape))
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames"
        return f"ImageDataset({len(self)} images of {size}, {frames}, {'with' if self.has_groups else 'no'} groups)"


class _Stored:
    """An array in a file, named by file and path, so that it pickles; every process opens the file for itself."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self.path = os.path.abspath(dataset.file.filename)
        self.name: str = dataset.name
        self.where = f"{self.path}, split {posixpath.dirname(self.name).lstrip('/')!r}"
        self.shape: tuple[int, ...] = dataset.shape or ()
        self.dtype: np.dtype[Any] = dataset.dtype
        self.keep = 0
        self._kept: NDArray[Any] | None = None
        self._dataset, self._process = dataset, os.getpid()

    @property
    def image_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape)) // self.shape[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_dataset": None, "_kept": None}

    def _opened(self) -> h5py.Dataset:
        # A handle that was open at a fork shares its file descriptor with the parent process.
        if not self._dataset or self._process != os.getpid():
            dataset = _open(self.path).get(self.name)
            if getattr(dataset, "shape", None) != self.shape or dataset.dtype != self.dtype:
                raise DataError(f"{self.path}, {self.name} has changed since it was opened: make the dataset again")
            self._dataset, self._process = dataset, os.getpid()
        return self._dataset

    def take(self, index: NDArray[np.intp]) -> NDArray[Any]:
        with _damage_reported(self.where):
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


def _open(path: str | os.PathLike[str]) -> h5py.File:
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
def _damage_reported(source: object) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{source} cannot be read ({error}): the file is damaged, get it again") from error


def _source(value: ArrayLike | Tensor | h5py.Dataset, name: str) -> NDArray[Any] | _Stored:
    return _Stored(value) if isinstance(value, h5py.Dataset) else array_of(value, name)


def _take(source: NDArray[Any] | _Stored, index: NDArray[np.intp]) -> NDArray[Any]:
    return source.take(index) if isinstance(source, _Stored) else source[:, index]
