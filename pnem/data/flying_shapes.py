"""Flying shapes (van Steenkiste, Greff & Schmidhuber 2017, N-EM): the outlines of the static shapes in motion."""

import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnem.data.arrays import check_whole
from pnem.data.flight import Flight, check_frames, fly
from pnem.data.shapes import OUTLINE_SIZES, OUTLINES, draw_outlines, shapes_size
from pnem.data.splits import write_splits

__all__ = ["LabelledSequences", "flying_shapes", "write_flying_shapes"]


class LabelledSequences(NamedTuple):
    """Sequences of images, the object of each pixel, and what is known of each of K objects.

    features and groups are (T, N, H, W, 1), positions and velocities (T, N, K, 2) rows and columns: of the object's top
    left corner in pixels, and in pixels per frame. shapes (1, N, K) is which of the `OUTLINES` an object is, from 0.
    """

    features: NDArray[np.uint8]
    groups: NDArray[np.unsignedinteger]
    positions: NDArray[np.float32]
    velocities: NDArray[np.float32]
    shapes: NDArray[np.uint8]


def flying_shapes(
    num_sequences: int,
    *,
    num_objects: int = 3,
    num_frames: int = 21,
    size: int | tuple[int, int] = 28,
    seed: int = 0,
    rng: np.random.Generator | None = None,
) -> LabelledSequences:
    """Draw sequences of `num_objects` outlines each, which fly straight and bounce off the borders.

    Every object is one of the three `OUTLINES`, drawn with replacement. It starts at a place uniform among those where
    it fits entirely, and moves in a uniform direction with a speed uniform from 1 to 3 pixels per frame; a border turns
    the velocity at a right angle to it. Objects pass through each other. They are drawn at ``np.rint(positions)``. A
    pixel is 1 where any object covers it; its group is the object, 1 to `num_objects`, or 0 for background and where
    objects overlap.

    The first n sequences do not depend on `num_sequences`, nor the first frames on `num_frames`, and successive calls
    with one `rng` continue the sequence. The distribution of speeds is pnem's; that of the authors is not published.

    Args:
        num_sequences: N, how many sequences.
        num_objects: K, objects in each of them.
        num_frames: T, frames in each of them.
        size: height and width in pixels, or one number for both.
        seed: the same seed gives the same sequences.
        rng: draw from this generator instead of a new one made from `seed`.

    Raises:
        DataError: if a count is below 1 (of frames: 2), the seed negative, or the size too small for an outline.

    Example:
        >>> sequences = flying_shapes(100, num_objects=4, seed=1)
        >>> sequences.features.shape, sequences.positions.shape
        ((21, 100, 28, 28, 1), (21, 100, 4, 2))
        >>> np.unique(sequences.groups)
        array([0, 1, 2, 3, 4], dtype=uint8)
    """
    N, K = check_whole(num_sequences, "num_sequences"), check_whole(num_objects, "num_objects")
    T, size = check_frames(num_frames), shapes_size(size)
    rng = np.random.default_rng(check_whole(seed, "seed", 0)) if rng is None else rng
    # Five numbers an object, drawn sequence by sequence: what makes them independent of how many are drawn.
    shapes, flight = place_shapes(rng.random((N, K, 5)), T, size)
    top, left = np.moveaxis(np.rint(flight.positions).astype(np.intp), -1, 0)
    return LabelledSequences(*draw_outlines(shapes, top, left, size), *flight, shapes[None])


def place_shapes(
    numbers: NDArray[np.float64], num_frames: int, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], Flight]:
    """Which outlines (N, K) fly where, from five uniform random numbers in [0, 1) for each, (N, K, 5)."""
    shapes = np.floor(numbers[..., 0] * len(OUTLINES)).astype(np.uint8)
    return shapes, fly(numbers[..., 1:], np.array(size) - OUTLINE_SIZES[shapes], num_frames)


def write_flying_shapes(
    path: str | os.PathLike[str],
    *,
    num_objects: int = 3,
    num_frames: int = 21,
    size: int | tuple[int, int] = 28,
    train: int = 50_000,
    valid: int = 10_000,
    test: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Generate flying shapes into an HDF5 file, for `ImageDataset.from_hdf5`.

    Every split has its own stream of random numbers, spawned from `seed`, so its sequences do not depend on the sizes
    of the others. ``positions``, ``velocities`` and ``shapes`` are written next to ``features`` and ``groups``, as
    `LabelledSequences` has them; the settings are attributes of the file. Memory stays bounded whatever the sizes.

    Args:
        path: the file to write.
        num_objects: objects in each sequence.
        num_frames: frames in each sequence.
        size: height and width in pixels, or one number for both.
        train: sequences in the split ``training``.
        valid: sequences in the split ``validation``.
        test: sequences in the split ``test``.
        seed: the same seed and settings give the same file.
        overwrite: replace an existing file.
        progress: whether to show a progress bar on standard error, if that is a terminal.

    Raises:
        DataError: as `flying_shapes` and `write_hdf5` do.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_flying_shapes(f"{folder}/flying.h5", train=20, valid=10, test=10)
        ...     ImageDataset.from_hdf5(f"{folder}/flying.h5", "validation")
        ImageDataset(10 images of 28x28x1, 21 frames, with groups)
    """
    K, T, (H, W) = check_whole(num_objects, "num_objects"), check_frames(num_frames), shapes_size(size)

    def draw(split: str, num_sequences: int, rng: np.random.Generator) -> LabelledSequences:
        return flying_shapes(num_sequences, num_objects=K, num_frames=T, size=(H, W), rng=rng)

    write_splits(
        path,
        draw,
        train=train,
        valid=valid,
        test=test,
        sequence_pixels=T * H * W,
        seed=seed,
        overwrite=overwrite,
        progress=progress,
        attrs={"generator": "pnem.data.flying_shapes", "num_objects": K, "num_frames": T, "size": (H, W)},
    )
