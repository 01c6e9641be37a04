"""Static shapes (Reichert & Serre, 2014): binary images of overlapping outlines, as the authors of N-EM draw them."""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnem.data.arrays import check_size, check_whole
from pnem.data.writing import write_hdf5

__all__ = ["OUTLINES", "LabelledImages", "draw_outlines", "shapes_size", "static_shapes", "write_static_shapes"]

_SQUARE = """
1111111
1111111
1100011
1100011
1100011
1111111
1111111
"""
_UP_TRIANGLE = """
000001100000
000011110000
000111111000
001110011100
011100001110
111111111111
111111111111
"""


def _drawing(text: str) -> NDArray[np.bool_]:
    outline = np.array([[pixel == "1" for pixel in row] for row in text.split()])
    outline.flags.writeable = False
    return outline


OUTLINES: dict[str, NDArray[np.bool_]] = {
    "square": _drawing(_SQUARE),
    "up_triangle": _drawing(_UP_TRIANGLE),
    "down_triangle": _drawing(_UP_TRIANGLE)[::-1],
}
"""The three outlines, two pixels thick: True where the shape covers a pixel."""

OUTLINE_SIZES = np.array([outline.shape for outline in OUTLINES.values()])
"""Height and width of each of the `OUTLINES`, (3, 2)."""

BLOCK = 4096


class LabelledImages(NamedTuple):
    """Images and the object of each pixel, (T, N, H, W, C) each; what `write_hdf5` writes and `ImageDataset` reads."""

    features: NDArray[np.uint8]
    groups: NDArray[np.unsignedinteger]


def static_shapes(
    num_images: int,
    *,
    num_objects: int = 3,
    size: int | tuple[int, int] = 28,
    seed: int = 0,
    rng: np.random.Generator | None = None,
) -> LabelledImages:
    """Draw images of `num_objects` outlines each.

    Every object is one of the three `OUTLINES`, drawn with replacement, at a place uniform among those where it fits
    entirely. A pixel is 1 where any object covers it. Its group is the object, 1 to `num_objects`, or 0 for background
    and where objects overlap.

    The first n images do not depend on `num_images`, and successive calls with one `rng` continue the sequence.

    Args:
        num_images: N, how many images.
        num_objects: objects in each image.
        size: height and width in pixels, or one number for both.
        seed: the same seed gives the same images.
        rng: draw from this generator instead of a new one made from `seed`.

    Returns:
        features and groups, (1, N, H, W, 1) each, unsigned integers (8 bits for up to 255 objects).

    Raises:
        DataError: if a count is below 1, the seed negative, or the size too small for an outline.

    Example:
        >>> features, groups = static_shapes(100, seed=1)
        >>> features.shape, features.dtype
        ((1, 100, 28, 28, 1), dtype('uint8'))
        >>> np.unique(groups)
        array([0, 1, 2, 3], dtype=uint8)
    """
    N, K = check_whole(num_images, "num_images"), check_whole(num_objects, "num_objects")
    H, W = shapes_size(size)
    rng = np.random.default_rng(check_whole(seed, "seed", 0)) if rng is None else rng
    # Three numbers an image and object, drawn image by image: what makes the images independent of how many are drawn.
    shape, row, column = np.moveaxis(rng.random((N, K, 3)), -1, 0)
    shape = np.floor(shape * len(OUTLINES)).astype(np.intp)
    heights, widths = OUTLINE_SIZES[shape].transpose(2, 0, 1)
    top = np.floor(row * (H - heights + 1)).astype(np.intp)
    left = np.floor(column * (W - widths + 1)).astype(np.intp)
    return draw_outlines(shape, top[None], left[None], (H, W))


def draw_outlines(
    shape: NDArray[np.integer], top: NDArray[np.intp], left: NDArray[np.intp], size: tuple[int, int]
) -> LabelledImages:
    """Draw objects at given places.

    Args:
        shape: which of the `OUTLINES` each object is, counted from 0, (N, K).
        top: row of its first pixels, (T, N, K).
        left: column of its first pixels, (T, N, K).
        size: height and width of the images.

    Returns:
        features and groups, (T, N, H, W, 1) each, as `static_shapes` says.

    Example:
        >>> corner = np.zeros((1, 1, 1), dtype=np.intp)
        >>> draw_outlines(np.array([[0]]), corner, corner, (7, 12)).features.sum()
        np.uint64(40)
    """
    (T, N, K), (H, W) = top.shape, size
    features = np.zeros(T * N * H * W, dtype=np.uint8)
    groups = np.zeros(T * N * H * W, dtype=np.min_scalar_type(K))
    image = np.arange(T * N).reshape(T, N)
    for k in range(K):
        for s, outline in enumerate(OUTLINES.values()):
            (n,) = np.nonzero(shape[:, k] == s)
            corner = (image[:, n] * H + top[:, n, k]) * W + left[:, n, k]
            r, c = np.nonzero(outline)
            pixels = corner[..., None] + r * W + c
            groups[pixels] = np.where(features[pixels], 0, k + 1)
            features[pixels] = 1
    return LabelledImages(features.reshape(T, N, H, W, 1), groups.reshape(T, N, H, W, 1))


def shapes_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width; raises `DataError` where an outline does not fit in them."""
    rows, columns = OUTLINE_SIZES.max(axis=0).tolist()
    return check_size(size, (rows, columns), "the outlines")


def write_static_shapes(
    path: str | os.PathLike[str],
    *,
    num_objects: int = 3,
    size: int | tuple[int, int] = 28,
    train: int = 50_000,
    valid: int = 10_000,
    test: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Generate the static shapes into an HDF5 file, for `ImageDataset.from_hdf5`.

    Every split has its own stream of random numbers, spawned from `seed`, so its images do not depend on the sizes of
    the others. The settings are kept as attributes of the file. Memory stays bounded whatever the sizes.

    Args:
        path: the file to write.
        num_objects: objects in each image.
        size: height and width in pixels, or one number for both.
        train: images in the split ``training``.
        valid: images in the split ``validation``.
        test: images in the split ``test``.
        seed: the same seed and settings give the same file.
        overwrite: replace an existing file.

    Raises:
        DataError: as `static_shapes` and `write_hdf5` do.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_static_shapes(f"{folder}/shapes.h5", train=100, valid=10, test=10)
        ...     ImageDataset.from_hdf5(f"{folder}/shapes.h5", "validation")
        ImageDataset(10 images of 28x28x1, 1 frame, with groups)
    """
    sizes = {
        "training": check_whole(train, "train"),
        "validation": check_whole(valid, "valid"),
        "test": check_whole(test, "test"),
    }
    num_objects, size = check_whole(num_objects, "num_objects"), shapes_size(size)
    streams = np.random.SeedSequence(check_whole(seed, "seed", 0)).spawn(len(sizes))

    def blocks(num_images: int, stream: np.random.SeedSequence) -> Iterator[LabelledImages]:
        rng = np.random.default_rng(stream)
        for start in range(0, num_images, BLOCK):
            yield static_shapes(min(BLOCK, num_images - start), num_objects=num_objects, size=size, rng=rng)

    splits = {split: blocks(N, stream) for (split, N), stream in zip(sizes.items(), streams, strict=True)}
    attrs = {"generator": "pnem.data.static_shapes", "num_objects": num_objects, "size": size, "seed": seed}
    write_hdf5(path, splits, overwrite=overwrite, attrs=attrs)
