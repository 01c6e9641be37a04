"""Straight flight that bounces off the borders: the motion of flying shapes and flying digits."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pnem.data.arrays import check_whole
from pnem.errors import DataError

__all__ = ["FASTEST", "SLOWEST", "Flight", "check_frames", "fly"]

SLOWEST, FASTEST = 1.0, 3.0
"""Pixels per frame: at any of these speeds the last frame is a bad guess of the next, and an object overlaps itself in
the next frame."""


class Flight(NamedTuple):
    """Rows and columns, (T, N, K, 2) each: top left corners in pixels, velocities in pixels per frame."""

    positions: NDArray[np.float32]
    velocities: NDArray[np.float32]


def check_frames(num_frames: int) -> int:
    """The number of frames; raises `DataError` below 2."""
    if (T := check_whole(num_frames, "num_frames")) < 2:
        raise DataError(f"num_frames={T}: a sequence has at least 2, one frame and the next; see static_shapes for one")
    return T


def fly(numbers: ArrayLike, room: ArrayLike, num_frames: int) -> Flight:
    """The flights of N × K objects, each on its own.

    A corner starts uniformly in [0, room] and moves with constant speed on a straight line, which the borders of that
    range reflect. The direction is uniform over the circle, the speed uniform from 1 to 3 pixels per frame. The corner
    is then uniform in its range in every frame, not only in the first. In closed form, for each coordinate: the line
    p₀ + v t is folded into [0, room] as a triangle wave of period 2 room.

    Args:
        numbers: four uniform random numbers in [0, 1) for each object, (N, K, 4): row, column, direction and speed.
        room: how far each corner can go down and right, in pixels from 0, (N, K, 2) or a shape that broadcasts to it.
        num_frames: T. The first frames do not depend on how many there are.

    Returns:
        positions and velocities, the latter as they are at the time of each frame; 0 where there is no room.

    Example:
        >>> positions, velocities = fly([[[0.5, 0, 0.25, 0.5]]], room=3.0, num_frames=4)
        >>> positions[:, 0, 0, 1]
        array([0., 2., 2., 0.], dtype=float32)
        >>> velocities[:, 0, 0, 1]
        array([ 2.,  2., -2.,  2.], dtype=float32)
    """
    start, angle, speed = np.split(np.asarray(numbers, dtype=np.float64), [2, 3], axis=-1)
    room = np.broadcast_to(np.asarray(room, dtype=np.float64), start.shape)
    speed = SLOWEST + (FASTEST - SLOWEST) * speed
    velocity = np.where(room > 0, speed * np.concatenate([np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)], -1), 0)
    unfolded = start * room + np.arange(num_frames)[:, None, None, None] * velocity
    folded = np.mod(unfolded, np.where(room > 0, 2 * room, 1))
    returning = folded >= room
    positions = np.where(returning, 2 * room - folded, folded)
    # Adding 0 turns the -0 of an object without room into 0.
    return Flight(positions.astype(np.float32), (np.where(returning, -velocity, velocity) + 0).astype(np.float32))
