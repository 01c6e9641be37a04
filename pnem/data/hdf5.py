"""Images with their groups, from arrays or from HDF5 files in the layout of the N-EM authors.

A file has one HDF5 group per split (``training``, ``validation``, ``test``) with two arrays of shape (T, N, H, W, C):
``features``, the images, and ``groups``, the object that each pixel belongs to: 1, 2, ..., and 0 where it is not scored
(background, overlaps); files may come without it. T = 1 for static images. The last axis of ``groups`` may be 1
whatever C is. All boolean, integer and floating dtypes, chunkings and compressions read the same.
"""

import operator
import os
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pnem.data.arrays import array_of, check_arrays, check_finite, check_whole, whole_labels
from pnem.data.stored import StoredArray, damage_reported, open_file
from pnem.data.streaming import Streaming, streaming
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
    a split is read at once only if it takes at most `memory_limit` bytes; `pnem.loading.batches` streams a larger one,
    reading whole chunks ahead of time. The dataset pickles without its contents.
    Minibatches come whole, so a ``DataLoader`` needs no collation: ``DataLoader(data, 64, collate_fn=identity)``.

    Args:
        features: images, (T, N, H, W, C): a NumPy array, a tensor or an ``h5py.Dataset``.
        groups: the object of each pixel, (T, N, H, W, 1) or (T, N, H, W, C), whole numbers from 0 (not scored).
        limit: use only the first `limit` images.
        memory_limit: bytes up to which a split stored in a file is kept in memory; a larger one is read in pieces that
            take about as much in all while it is streamed.

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
        self._where = self._features.where if isinstance(self._features, StoredArray) else "arrays"
        check_arrays(self._features, self._groups, self._where)
        T, N, H, W, C = self._features.shape
        self._len = N if limit is None else min(N, check_whole(limit, "limit"))
        self.num_frames: int = T
        self.image_shape: tuple[int, int, int] = (H, W, C)
        self._streaming = None
        stored = [source for source in (self._features, self._groups) if isinstance(source, StoredArray)]
        image_bytes = sum(source.image_bytes for source in stored)
        if self._len * image_bytes > memory_limit:
            self._streaming = streaming(max(source.chunk for source in stored), image_bytes, memory_limit)
        else:
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
        with open_file(path) as file, damage_reported(path):
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
    def streaming(self) -> Streaming | None:
        """How many images to read at a time; None for arrays, and for a split that is kept in memory."""
        return self._streaming

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the images where they are stored; batches are float32."""
        return self._features.dtype

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
        features = _take(self._features, index)
        return self.batch_of(index, features, None if self._groups is None else _take(self._groups, index))

    def read(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Features and groups (T, n, H, W, C) of neighbouring images, in the dtype that they are stored in."""
        features = _read(self._features, start, stop)
        return features, None if self._groups is None else _read(self._groups, start, stop)

    def batch_of(self, index: NDArray[np.intp], features: NDArray[Any], groups: NDArray[Any] | None) -> Batch:
        """The batch of what was read of the images `index`."""
        H, W, C = self.image_shape
        shape = (len(index), H * W) if self.num_frames == 1 else (self.num_frames, len(index), H * W)
        with np.errstate(over="ignore", invalid="ignore"):
            x = features.astype(np.float32)
        if features.dtype.kind == "f":
            check_finite(x, index, self._where)
        labels = None
        if groups is not None:
            labels = torch.from_numpy(whole_labels(groups, index, self._where).reshape(shape))
        return Batch(torch.from_numpy(x.reshape(*shape, C)), labels)

    def __repr__(self) -> str:
        size = "x".join(map(str, self.image_shape))
        frames = "1 frame" if self.num_frames == 1 else f"{self.num_frames} frames"
        return f"ImageDataset({len(self)} images of {size}, {frames}, {'with' if self.has_groups else 'no'} groups)"


def _source(value: ArrayLike | Tensor | h5py.Dataset, name: str) -> NDArray[Any] | StoredArray:
    return StoredArray(value) if isinstance(value, h5py.Dataset) else array_of(value, name)


def _take(source: NDArray[Any] | StoredArray, index: NDArray[np.intp]) -> NDArray[Any]:
    return source.take(index) if isinstance(source, StoredArray) else source[:, index]


def _read(source: NDArray[Any] | StoredArray, start: int, stop: int) -> NDArray[Any]:
    return source.read(start, stop) if isinstance(source, StoredArray) else source[:, start:stop]
