"""A split that is not kept in memory: how much of its file to read at a time, and reading ahead in a thread."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pnem.data.hdf5 import Batch, ImageDataset

__all__ = ["Streaming", "read_ahead", "streaming"]

# Smaller reads cost more in calls than in bytes; reading ahead needs no more for images in order.
BLOCK_BYTES = 2**18
READ_BYTES = 2**24
# However large they are, so that images of several places in the file mix.
LEAST_BLOCKS = 4

Arrays = tuple[NDArray[Any], ...]


class Streaming(NamedTuple):
    """How many images to read at a time.

    Attributes:
        block: of whole chunks, which is one read.
        buffer: of blocks, within which images are shuffled.
        in_order: that are read together where they are not shuffled.
    """

    block: int
    buffer: int
    in_order: int


def streaming(chunk: int, image_bytes: int, memory_limit: int) -> Streaming:
    """Sizes such that streaming takes about `memory_limit` bytes.

    The one buffer that training draws from and the next one, which is read meanwhile, each with what is read too early
    of the one after, come to four buffers at most: a buffer is a quarter of the limit, and at least 16 MiB or four
    blocks. A block is of whole chunks, and at least 256 KiB.

    Args:
        chunk: images in a chunk of the file.
        image_bytes: that an image takes in the file, with its groups.
        memory_limit: bytes.

    >>> streaming(chunk=20, image_bytes=1568, memory_limit=2**30)
    Streaming(block=180, buffer=171180, in_order=10699)
    """
    block = chunk * -(-BLOCK_BYTES // (chunk * image_bytes))
    blocks = max(memory_limit // 4, READ_BYTES) // (block * image_bytes)
    return Streaming(block, block * max(LEAST_BLOCKS, blocks), max(block, READ_BYTES // image_bytes))


def read_ahead(dataset: "ImageDataset", batches: Iterable[Sequence[int]], portion: int) -> "Iterator[Batch]":
    """The batches of the images at the indices in `batches`, of which so many, a portion, are read together.

    While one portion is used, a thread reads the next; it ends with the iterator. A block that only two portions in a
    row need is read once.

    Raises:
        DataError: the next portion cannot be read, or images of the next batch are refused.
    """
    remaining, stopped = iter(batches), Event()
    block = dataset.streaming.block if dataset.streaming else 1
    with ThreadPoolExecutor(1, thread_name_prefix="pnem-read-ahead") as executor:
        read = _Portion([], np.empty(0, np.intp), ())

        def begin() -> "Future[_Portion]":
            return executor.submit(_read, dataset, list(islice(remaining, portion)), block, read, stopped)

        try:
            reading = begin()
            while (read := reading.result()).batches:
                reading = begin()
                for indices in read.batches:
                    index = np.array(indices, np.intp)
                    features, *groups = read.take(index)
                    yield dataset.batch_of(index, features, groups[0] if groups else None)
        finally:
            stopped.set()


class _Portion:
    """Batches of indices and, from the file, at least their images: those of `index`, as in the arrays (T, n, ...)."""

    def __init__(self, batches: list[Sequence[int]], index: NDArray[np.intp], arrays: Arrays) -> None:
        self.batches = batches
        self.index = index
        self.arrays = arrays
        self._order = np.argsort(index)

    def take(self, index: NDArray[np.intp]) -> Arrays:
        rows = self._order[np.searchsorted(self.index, index, sorter=self._order)]
        return tuple(array[:, rows] for array in self.arrays)


def _read(
    dataset: "ImageDataset", batches: list[Sequence[int]], block: int, before: _Portion, stopped: Event
) -> _Portion:
    """The next portion: what the one before it holds already from there, and for the rest whole blocks."""
    images = np.unique(np.fromiter(chain.from_iterable(batches), np.intp))
    held = np.isin(images, before.index)
    starts = (np.unique(images[~held] // block) * block).tolist()
    stops = [min(start + block, len(dataset)) for start in starts]
    index = np.concatenate([images[held], *map(np.arange, starts, stops)]).astype(np.intp)

    def parts() -> Iterator[Arrays]:
        if held.any():
            yield before.take(images[held])
        for start, stop in zip(starts, stops, strict=True):
            if stopped.is_set():
                return
            features, groups = dataset.read(start, stop)
            yield (features,) if groups is None else (features, groups)

    arrays: Arrays = ()
    filled = 0
    for part in parts():
        arrays = arrays or tuple(np.empty((len(a), len(index), *a.shape[2:]), a.dtype) for a in part)
        for array, piece in zip(arrays, part, strict=True):
            array[:, filled : filled + piece.shape[1]] = piece
        filled += part[0].shape[1]
    return _Portion(batches, index, arrays)
