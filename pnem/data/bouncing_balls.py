"""Bouncing balls: binary images of discs that collide, as N-EM's successor R-NEM is trained on."""

import os
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pnem.data.arrays import check_size, check_whole
from pnem.data.ball_physics import BOX, place_balls, simulate_balls
from pnem.data.flight import check_frames
from pnem.data.splits import write_splits
from pnem.errors import DataError

__all__ = ["BouncingBalls", "bouncing_balls", "write_bouncing_balls"]

RADIUS = 1.2
SMALLEST, LARGEST = 0.8, 1.6
NORM_OF_VELOCITIES = 0.5

Masses: TypeAlias = Literal["equal", "different"]
Count: TypeAlias = int | tuple[int, int]


class BouncingBalls(NamedTuple):
    """Sequences of images, the ball of each pixel, and what is known of each of K balls.

    features and groups are (T, N, H, W, 1), positions and velocities (T, N, K, 2) rows and columns: of the centre in
    pixels from the corner of the image (that of the first pixel is at 0.5), and in pixels per frame. collisions and
    wall_collisions (T, N, K): whether the ball has met another one, or a wall, since the frame before. masses and radii
    are (1, N, K), radii in pixels; where a sequence has fewer than K balls, all of this is 0 for the last ones. curtain
    (1, N, 4) is the first row, first column, height and width of what hides a part of the image, None without one.
    """

    features: NDArray[np.uint8]
    groups: NDArray[np.unsignedinteger]
    positions: NDArray[np.float32]
    velocities: NDArray[np.float32]
    collisions: NDArray[np.bool_]
    wall_collisions: NDArray[np.bool_]
    masses: NDArray[np.float32]
    radii: NDArray[np.float32]
    curtain: NDArray[np.int32] | None


def bouncing_balls(
    num_sequences: int,
    *,
    num_balls: Count = 4,
    masses: Masses = "equal",
    curtain: bool = False,
    num_frames: int = 51,
    size: int = 64,
    seed: int = 0,
    rng: np.random.Generator | None = None,
) -> BouncingBalls:
    """Draw sequences of balls in a box that bounce off its walls and collide elastically.

    The box is 10 × 10 units, shown by size × size pixels. Balls of equal masses have mass 1 and radius 1.2; else the
    radius is uniform from 0.8 to 1.6, and the mass (r / 1.2)², so that it can be seen. `place_balls` says where they
    start; their velocities are normal, scaled so that those of a sequence have norm 0.5 together, in units per frame;
    `simulate_balls` moves them. A pixel whose centre is at distance d_k from that of ball k is 1 where
    Σ_k exp(-(d_k²/r_k²)⁴) is above 1/2. Its group is the ball of the largest term, 1 to K, or 0 for background.

    A curtain of the background's colour, half as high and wide as the image and at a random place for each sequence,
    hides what is behind it: features and groups are 0 there.

    The first n sequences do not depend on `num_sequences`, nor the first frames on `num_frames`, and successive calls
    with one `rng` continue the sequence. The physics is that of Sutskever, Hinton & Taylor (2008), which the authors of
    R-NEM build on; radii of different masses, and the curtain, are pnem's choice.

    Args:
        num_sequences: N, how many sequences.
        num_balls: balls in each of them, or the fewest and the most of them, (6, 8): uniform between these. K is the
            most.
        masses: "equal" or "different".
        curtain: whether a part of the image is hidden.
        num_frames: T, frames in each sequence.
        size: height and width in pixels.
        seed: the same seed gives the same sequences.
        rng: draw from this generator instead of a new one made from `seed`.

    Raises:
        DataError: if a count is below 1 (of frames: 2), the seed negative, the size below 10 pixels, masses neither
            "equal" nor "different", or there is no room for so many balls.

    Example:
        >>> sequences = bouncing_balls(5, num_balls=3, masses="different", seed=1)
        >>> sequences.features.shape, sequences.positions.shape, sequences.masses.shape
        ((51, 5, 64, 64, 1), (51, 5, 3, 2), (1, 5, 3))
    """
    N, T, (fewest, K) = check_whole(num_sequences, "num_sequences"), check_frames(num_frames), _counts(num_balls)
    H, W = _checked(size, masses)
    rng = np.random.default_rng(check_whole(seed, "seed", 0)) if rng is None else rng
    radii, mass = np.zeros((N, K)), np.zeros((N, K))
    positions, velocities = np.full((N, K, 2), np.nan), np.full((N, K, 2), np.nan)
    corner = np.empty((N, 2))
    # A sequence may take any number of tries: each has a generator of its own, so that none depends on another.
    for n, own in enumerate(map(np.random.default_rng, rng.integers(2**63, size=N))):
        k = own.integers(fewest, K, endpoint=True)
        radii[n, :k] = RADIUS if masses == "equal" else own.uniform(SMALLEST, LARGEST, k)
        mass[n, :k] = (radii[n, :k] / RADIUS) ** 2
        positions[n, :k] = place_balls(radii[n, :k], own)
        direction = own.standard_normal((k, 2))
        velocities[n, :k] = NORM_OF_VELOCITIES * direction / np.linalg.norm(direction)
        corner[n] = own.random(2)

    motion = simulate_balls(positions, velocities, mass, radii, T)
    pixels = H / BOX
    # A sequence with fewer balls than others has none in the last places: 0 there.
    there = (radii > 0)[..., None]
    centres = np.where(there, motion.positions * pixels, 0).astype(np.float32)
    radii_shown = (radii * pixels).astype(np.float32)
    features, groups = _rendered(centres, radii_shown, (H, W))
    hidden = None
    if curtain:
        high, wide = H // 2, W // 2
        top, left = np.floor(corner * (H - high + 1, W - wide + 1)).astype(np.int32).T
        hidden = np.stack([top, left, np.full_like(top, high), np.full_like(left, wide)], axis=-1)[None]
        rows, columns = np.arange(H) - top[:, None], np.arange(W) - left[:, None]
        rows_behind, columns_behind = (rows >= 0) & (rows < high), (columns >= 0) & (columns < wide)
        shown = ~(rows_behind[:, :, None] & columns_behind[:, None, :])[..., None]
        features *= shown
        groups *= shown
    return BouncingBalls(
        features,
        groups,
        centres,
        np.where(there, motion.velocities * pixels, 0).astype(np.float32),
        motion.collisions,
        motion.wall_collisions,
        mass[None].astype(np.float32),
        radii_shown[None],
        hidden,
    )


def write_bouncing_balls(
    path: str | os.PathLike[str],
    *,
    num_balls: Count = 4,
    masses: Masses = "equal",
    curtain: bool = False,
    num_frames: int = 51,
    size: int = 64,
    train: int = 50_000,
    valid: int = 10_000,
    test: int = 10_000,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Generate bouncing balls into an HDF5 file, for `ImageDataset.from_hdf5`.

    Every split has its own stream of random numbers, spawned from `seed`, so its sequences do not depend on the sizes
    of the others. What `BouncingBalls` has besides ``features`` and ``groups`` is written next to them; the settings
    are attributes of the file. Memory stays bounded whatever the sizes.

    Args:
        path: the file to write.
        num_balls: balls in each sequence, or the fewest and the most.
        masses: "equal" or "different".
        curtain: whether a part of the image is hidden.
        num_frames: frames in each sequence.
        size: height and width in pixels.
        train: sequences in the split ``training``.
        valid: sequences in the split ``validation``.
        test: sequences in the split ``test``.
        seed: the same seed and settings give the same file.
        overwrite: replace an existing file.
        progress: whether to show a progress bar on standard error, if that is a terminal.

    Raises:
        DataError: as `bouncing_balls` and `write_hdf5` do.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bouncing_balls(f"{folder}/balls.h5", train=20, valid=10, test=10)
        ...     ImageDataset.from_hdf5(f"{folder}/balls.h5", "validation")
        ImageDataset(10 images of 64x64x1, 51 frames, with groups)
    """
    counts, T, (H, W) = _counts(num_balls), check_frames(num_frames), _checked(size, masses)

    def draw(split: str, num_sequences: int, rng: np.random.Generator) -> BouncingBalls:
        return bouncing_balls(
            num_sequences, num_balls=counts, masses=masses, curtain=curtain, num_frames=T, size=H, rng=rng
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
            "generator": "pnem.data.bouncing_balls",
            "num_balls": counts,
            "masses": masses,
            "curtain": curtain,
            "num_frames": T,
            "size": (H, W),
        },
    )


def _rendered(
    centres: NDArray[np.float32], radii: NDArray[np.float32], size: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.unsignedinteger]]:
    """Images and groups (T, N, H, W, 1) of balls with centres (T, N, K, 2) and radii (N, K); radius 0 is not drawn."""
    (T, N, K, _), (H, W) = centres.shape, size
    features = np.zeros((T, N, H, W, 1), dtype=np.uint8)
    groups = np.zeros((T, N, H, W, 1), dtype=np.min_scalar_type(K))
    middles = np.arange(max(H, W), dtype=np.float32) + 0.5
    # One sequence at a time stays in the processor's cache.
    for n in range(N):
        total = np.zeros((T, H, W), dtype=np.float32)
        smallest = np.full_like(total, np.inf)
        nearest = np.zeros(total.shape, dtype=groups.dtype)
        for k in np.flatnonzero(radii[n]):
            rows, columns = (((middles - centres[:, n, k, :, None]) / radii[n, k]) ** 2).transpose(1, 0, 2)
            ratio = rows[:, :H, None] + columns[:, None, :W]
            nearest[ratio < smallest] = k + 1
            np.minimum(smallest, ratio, out=smallest)
            np.square(ratio, out=ratio)
            np.square(ratio, out=ratio)
            total += np.exp(np.negative(ratio, out=ratio), out=ratio)
        features[:, n, ..., 0] = total > 0.5
        groups[:, n, ..., 0] = nearest * (total > 0.5)
    return features, groups


def _counts(num_balls: Count) -> tuple[int, int]:
    pair = num_balls if isinstance(num_balls, tuple) else (num_balls, num_balls)
    if len(pair) != 2:
        raise DataError(f"num_balls={num_balls!r}: give one number, or (fewest, most)")
    fewest, most = (check_whole(count, "num_balls") for count in pair)
    if fewest > most:
        raise DataError(f"num_balls={num_balls!r}: give the fewest first, then the most")
    return fewest, most


def _checked(size: int, masses: str) -> tuple[int, int]:
    if masses not in ("equal", "different"):
        raise DataError(f'masses={masses!r}: choose "equal" or "different"')
    return check_size(check_whole(size, "size"), (10, 10), "balls of at least one pixel")
