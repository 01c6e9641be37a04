"""Writing HDF5 files in the layout of the N-EM authors (`pnem.data.hdf5` reads them)."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast
from uuid import uuid4

import h5py
import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pnem.data.arrays import array_of, check_arrays, check_finite, whole_labels
from pnem.errors import DataError

__all__ = ["SafeFile", "write_hdf5"]

# Small, so that reading one image reads little else. Compression would make random batches 2 to 4 times slower.
CHUNK_BYTES = 2**14

Chunk: TypeAlias = (
    tuple[ArrayLike | Tensor, ArrayLike | Tensor | None]
    | tuple[ArrayLike | Tensor, ArrayLike | Tensor | None, Mapping[str, ArrayLike | Tensor]]
)
RESERVED = ("features", "groups", "labels")


def write_hdf5(
    path: str | os.PathLike[str],
    splits: Mapping[str, Chunk | Iterable[Chunk]],
    *,
    labels: Mapping[str, ArrayLike] | None = None,
    overwrite: bool = False,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write images and groups in the N-EM layout: all of them, or no file at all.

    The file is written under another name in the same folder and renamed when it is complete.

    Args:
        path: the file to write.
        splits: for each split the pair (features, groups), (T, N, H, W, C) each, with None for no groups; or an
            iterable of such pairs, written one after the other, for splits that do not fit in memory. A third element
            maps names to further arrays of what is known of each image, (T, N, ...) or (1, N, ...), such as positions.
        labels: for some splits an array of what is in each image, such as its class, (N, ...): stored as ``labels``.
        overwrite: replace an existing file.
        attrs: HDF5 attributes of the file, to say where the images come from.

    Raises:
        DataError: if the file exists and `overwrite` is False, if there is nothing to write, if `ImageDataset` would
            refuse the arrays or their values, if the pairs of a split or their further arrays do not fit together, if
            there is not one label for each image, or if the folder is missing, read-only or full.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> features, groups = np.ones((2, 1, 10, 4, 5, 1), dtype=np.uint8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_hdf5(f"{folder}/ones.h5", {"training": (features, groups)}, attrs={"value": 1})
        ...     ImageDataset.from_hdf5(f"{folder}/ones.h5")
        ImageDataset(10 images of 4x5x1, 1 frame, with groups)
    """
    path = Path(path)
    if not splits:
        raise DataError(f"no splits to write to {path}: give a mapping such as {{'training': (features, groups)}}")
    _refuse_existing(path, overwrite)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with SafeFile(partial, "x+") as sink:
            with h5py.File(sink, "w") as file:
                file.attrs.update(attrs or {})
                for split, chunks in splits.items():
                    _write_split(file.create_group(split), _pairs(chunks), sink)
                for split, values in (labels or {}).items():
                    _write_labels(file, split, np.asarray(values))
            sink.check()
        _refuse_existing(path, overwrite)
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {path} ({reason}): check that its folder exists and has space left") from error
    finally:
        # Where the folder is a file, there is nothing to take away.
        with contextlib.suppress(NotADirectoryError):
            partial.unlink(missing_ok=True)


class SafeFile(io.FileIO):
    """A file that keeps its first error for `check`: after a failed write HDF5 cannot close, and crashes at exit."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Writes all of `data`, or notes why not."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:]) or 0
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Truncates the file, or notes why not."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell()

    def check(self) -> None:
        """Raises the first error."""
        if self.error is not None:
            raise self.error


def _pairs(chunks: Chunk | Iterable[Chunk]) -> Iterator[Chunk]:
    if isinstance(chunks, tuple) and not any(isinstance(chunk, tuple) for chunk in chunks):
        yield cast(Chunk, chunks)
    else:
        yield from cast(Iterable[Chunk], chunks)


def _write_split(parent: h5py.Group, chunks: Iterable[Chunk], sink: SafeFile) -> None:
    where = f"split {parent.name[1:]!r}"
    written = 0
    layout: dict[str, tuple[Any, ...]] = {}
    for chunk in chunks:
        if not (
            isinstance(chunk, tuple)
            and len(chunk) in (2, 3)
            and chunk[0] is not None
            and all(isinstance(further, Mapping) for further in chunk[2:])
        ):
            raise DataError(
                f"{where}: expected pairs (features, groups), or with a mapping of further arrays as the third, got "
                f"one of {type(chunk).__name__}"
            )
        pair = zip(("features", "groups"), chunk[:2], strict=True)
        arrays = {name: array_of(value, f"{where}: {name}") for name, value in pair if value is not None}
        check_arrays(arrays["features"], arrays.get("groups"), where)
        for name, value in chunk[2].items() if len(chunk) == 3 else ():
            arrays[name] = _further(name, value, arrays["features"].shape, where)
        stop = written + arrays["features"].shape[1]
        index = np.arange(written, stop)
        check_finite(arrays["features"], index, where)
        if "groups" in arrays:
            whole_labels(arrays["groups"], index, where)

        found = {name: (array.dtype.name, array.shape[0], *array.shape[2:]) for name, array in arrays.items()}
        if not layout:
            layout = found
            for name, array in arrays.items():
                frames, _, *image = array.shape
                block = max(1, CHUNK_BYTES * array.shape[1] // array.nbytes)
                limits = {"maxshape": (frames, None, *image), "chunks": (frames, block, *image)}
                parent.create_dataset(name, shape=(frames, 0, *image), dtype=array.dtype, **limits)
        if found != layout:
            raise DataError(f"{where}: all pairs need the same arrays, (dtype, T, ...): {layout}, then {found}")
        for name, array in arrays.items():
            parent[name].resize(stop, axis=1)
            parent[name][:, written:] = array
        sink.check()
        written = stop
    if not written:
        raise DataError(f"{where} has no images to write: give at least one")


def _further(name: str, value: ArrayLike | Tensor, images: tuple[int, ...], where: str) -> NDArray[Any]:
    """An array of what is known of each image."""
    if not (isinstance(name, str) and name.isidentifier()) or name in RESERVED:
        raise DataError(f"{where}: a further array cannot be called {name!r}: give it a name of its own, such as speed")
    array = array_of(value, f"{where}: {name}")
    T, N = images[:2]
    if array.dtype.kind not in "biuf" or 0 in array.shape or array.shape[:2] not in ((T, N), (1, N)):
        raise DataError(
            f"{where}: {name} has shape {array.shape} and dtype {array.dtype}, but features has T = {T} frames of "
            f"N = {N} images: give numbers of shape (T, N, ...), or (1, N, ...) for what does not change"
        )
    if not np.isfinite(array).all():
        raise DataError(f"{where}: {name} has NaN or infinity: repair it or leave it out")
    return array


def _write_labels(file: h5py.File, split: str, labels: NDArray[Any]) -> None:
    if split not in file:
        raise DataError(f"there are labels of split {split!r}, but it has no images: the splits are {sorted(file)}")
    images = file[split]["features"].shape[1]
    if labels.shape[:1] != (images,) or labels.dtype.kind not in "biuf":
        raise DataError(
            f"split {split!r}: labels has shape {labels.shape} and dtype {labels.dtype}, but there are {images} "
            "images: give one number, or row of numbers, for each"
        )
    file[split]["labels"] = labels


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists: choose another path, or remove it (in Python, overwrite=True replaces it)")
