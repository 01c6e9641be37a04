"""Flying shapes behind a moving curtain: do components stay with their objects while these are out of sight?"""

import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnem.data.arrays import check_whole
from pnem.data.flight import check_frames, fly
from pnem.data.flying_shapes import place_shapes
from pnem.data.shapes import OUTLINES, draw_outlines, shapes_size
from pnem.data.splits import write_splits
from pnem.errors import DataError

__all__ = ["OccludedSequences", "moving_occluder", "write_moving_occluder"]

MARKS = np.zeros((len(OUTLINES), max(outline.shape[1] for outline in OUTLINES.values())))
for row, outline in zip(MARKS, OUTLINES.values(), strict=True):
    row[: outline.shape[1]] = outline.mean(axis=0) / outline.mean(axis=0).sum()
"""The share of each outline's pixels in each of its columns."""


class OccludedSequences(NamedTuple):
    """What `LabelledSequences` has, and what is known of the curtain.

    visible (T, N, K) is the share of an object's pixels that the curtain leaves to be seen, whether or not another
    object covers them. curtain_positions and curtain_velocities (T, N): its first column in pixels, and pixels per
    frame; it is drawn from ``np.rint(curtain_positions)``.
    """

    features: NDArray[np.uint8]
    groups: NDArray[np.unsignedinteger]
    positions: NDArray[np.float32]
    velocities: NDArray[np.float32]
    shapes: NDArray[np.uint8]
    visible: NDArray[np.float32]
    curtain_positions: NDArray[np.float32]
    curtain_velocities: NDArray[np.float32]


def moving_occluder(
    num_sequences: int,
    *,
    num_objects: int = 3,
    curtain: int = 12,
    num_frames: int = 21,
    size: int | tuple[int, int] = 28,
    seed: int = 0,
    rng: np.random.Generator | None = None,
) -> OccludedSequences:
    """Draw sequences of `num_objects` outlines each that fly as `flying_shapes` do, behind a moving curtain.

    The curtain is as high as the image and has the colour of the background, so that it is no object itself and shows
    only in what it hides: features and groups are 0 there. It moves sideways as an object would, between the left and
    the right of the image, where it hides nothing. One of 12 columns, the widest outline, can hide any object entirely:
    by default, in three quarters of the sequences an object vanishes and comes back.

    The first n sequences do not depend on `num_sequences`, nor the first frames on `num_frames`, and successive calls
    with one `rng` continue the sequence.

    Args:
        num_sequences: N, how many sequences.
        num_objects: K, objects in each of them.
        curtain: its width in pixels.
        num_frames: T, frames in each sequence.
        size: height and width in pixels, or one number for both.
        seed: the same seed gives the same sequences.
        rng: draw from this generator instead of a new one made from `seed`.

    Raises:
        DataError: if a count is below 1 (of frames: 2), the seed negative, the size too small for an outline, or the
            curtain wider than the image.

    Example:
        >>> sequences = moving_occluder(100, seed=1)
        >>> sequences.features.shape, sequences.visible.shape
        ((21, 100, 28, 28, 1), (21, 100, 3))
        >>> sequences.visible.min(), sequences.visible.max()
        (np.float32(0.0), np.float32(1.0))
    """
    N, K = check_whole(num_sequences, "num_sequences"), check_whole(num_objects, "num_objects")
    T, (H, W) = check_frames(num_frames), shapes_size(size)
    width = _width(curtain, W)
    rng = np.random.default_rng(check_whole(seed, "seed", 0)) if rng is None else rng
    # Five numbers an object and four for the curtain, drawn sequence by sequence.
    numbers = rng.random((N, 5 * K + 4))
    shapes, flight = place_shapes(numbers[:, :-4].reshape(N, K, 5), T, (H, W))
    curtain_flight = fly(numbers[:, None, -4:], (0, W + width), T)
    curtain_positions = curtain_flight.positions[:, :, 0, 1] - width
    top, left = np.moveaxis(np.rint(flight.positions).astype(np.intp), -1, 0)
    features, groups = draw_outlines(shapes, top, left, (H, W))

    first = np.rint(curtain_positions).astype(np.intp)
    behind = np.arange(W) - first[..., None]
    shown = (behind < 0) | (behind >= width)
    features *= shown[:, :, None, :, None]
    groups *= shown[:, :, None, :, None]
    columns = np.minimum(left[..., None] + np.arange(MARKS.shape[1]), W - 1)
    seen = np.take_along_axis(shown[:, :, None], columns, axis=-1)
    visible = np.einsum("tnkw,nkw->tnk", seen, MARKS[shapes])
    return OccludedSequences(
        features,
        groups,
        *flight,
        shapes[None],
        visible.astype(np.float32),
        curtain_positions,
        curtain_flight.velocities[:, :, 0, 1],
    )


def write_moving_occluder(
    path: str | os.PathLike[str],
    *,
    num_objects: int = 3,
    curtain: int = 12,
    num_frames: int = 21,
    size: int | tuple[int, int] = 28,
    train: int = 50_000,
    valid: int = 10_000,
    test: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Generate flying shapes behind a moving curtain into an HDF5 file, for `ImageDataset.from_hdf5`.

    Every split has its own stream of random numbers, spawned from `seed`, so its sequences do not depend on the sizes
    of the others. What `OccludedSequences` has besides ``features`` and ``groups`` is written next to them; the
    settings are attributes of the file. Memory stays bounded whatever the sizes.

    Args:
        path: the file to write.
        num_objects: objects in each sequence.
        curtain: width of the curtain in pixels.
        num_frames: frames in each sequence.
        size: height and width in pixels, or one number for both.
        train: sequences in the split ``training``.
        valid: sequences in the split ``validation``.
        test: sequences in the split ``test``.
        seed: the same seed and settings give the same file.
        overwrite: replace an existing file.
        progress: whether to show a progress bar on standard error, if that is a terminal.

    Raises:
        DataError: as `moving_occluder` and `write_hdf5` do.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_moving_occluder(f"{folder}/occluder.h5", train=20, valid=10, test=10)
        ...     ImageDataset.from_hdf5(f"{folder}/occluder.h5", "validation")
        ImageDataset(10 images of 28x28x1, 21 frames, with groups)
    """
    K, T, (H, W) = check_whole(num_objects, "num_objects"), check_frames(num_frames), shapes_size(size)
    width = _width(curtain, W)

    def draw(split: str, num_sequences: int, rng: np.random.Generator) -> OccludedSequences:
        return moving_occluder(num_sequences, num_objects=K, curtain=width, num_frames=T, size=(H, W), rng=rng)

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
        attrs={
            "generator": "pnem.data.moving_occluder",
            "num_objects": K,
            "curtain": width,
            "num_frames": T,
            "size": (H, W),
        },
    )


def _width(curtain: int, W: int) -> int:
    if (width := check_whole(curtain, "curtain")) > W:
        raise DataError(f"curtain={width} is wider than the image: give at most {W}")
    return width
