"""Discs in a box: where they start, how they fly, and what happens when they meet."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnem.errors import DataError

__all__ = ["BOX", "BallMotion", "place_balls", "simulate_balls"]

BOX = 10.0
"""Height and width of the box, in its own units."""
STEPS_PER_FRAME = 2
TRIES = 64
RESTARTS = 100

Numbers = NDArray[np.float64]


class BallMotion(NamedTuple):
    """What T frames show of N × K balls: centres and velocities (T, N, K, 2) in units of the box and per frame.

    collisions and wall_collisions (T, N, K): whether a ball has met another one, or a wall, since the frame before.
    """

    positions: Numbers
    velocities: Numbers
    collisions: NDArray[np.bool_]
    wall_collisions: NDArray[np.bool_]


def place_balls(radii: Numbers, rng: np.random.Generator) -> Numbers:
    """Centres (K, 2) of balls that lie in the box and do not overlap, one sequence.

    One ball after the other gets a place uniform in the box, of which the first is kept that is free; where one ball
    finds none in 64 tries, all begin anew.

    Raises:
        DataError: no places were found in 100 beginnings.

    Example:
        >>> place_balls(np.array([5.0]), np.random.default_rng(0))
        array([[5., 5.]])
    """
    if 2 * radii.max() <= BOX:
        for _ in range(RESTARTS):
            places = np.empty((0, 2))
            for k, radius in enumerate(radii):
                tried = radius + (BOX - 2 * radius) * rng.random((TRIES, 2))
                apart = np.linalg.norm(tried[:, None] - places, axis=-1) >= radius + radii[:k]
                free = apart.all(axis=1)
                if not free.any():
                    break
                places = np.append(places, tried[free.argmax(), None], axis=0)
            if len(places) == len(radii):
                return places
    raise DataError(
        f"no places were found for {len(radii)} balls that do not overlap, of radii up to {radii.max():.2g} in a box "
        f"of {BOX:g}x{BOX:g}: ask for fewer balls"
    )


def simulate_balls(
    positions: Numbers, velocities: Numbers, masses: Numbers, radii: Numbers, num_frames: int
) -> BallMotion:
    """Let balls fly, bounce off the walls and collide elastically, as in Sutskever, Hinton & Taylor (2008).

    Each frame is two half steps: every ball moves by half its velocity; where it would leave the box, its way and its
    velocity are mirrored at the wall; then each pair of balls that overlap and approach, in a fixed order, exchanges
    momentum along the line n between their centres, the relative velocity along it being u:

        v_i ← v_i - 2 m_j u n / (m_i + m_j),    v_j ← v_j + 2 m_i u n / (m_i + m_j).

    So energy is conserved throughout, and momentum but at the walls; balls overlap briefly when they collide, by not
    much more than they approach in half a step.

    Args:
        positions: centres in the first frame, (N, K, 2), NaN for balls that do not exist.
        velocities: in units of the box per frame, (N, K, 2).
        masses: (N, K).
        radii: (N, K).
        num_frames: T. The first frames do not depend on how many there are.

    Example:
        >>> start, speed, one = np.array([[[5.0, 2.0], [5.0, 5.0]]]), np.array([[[0, 1.0], [0, 0]]]), np.ones((1, 2))
        >>> motion = simulate_balls(start, speed, one, one, num_frames=3)
        >>> motion.velocities[:, 0, :, 1]
        array([[1., 0.],
               [1., 0.],
               [0., 1.]])
        >>> motion.collisions[:, 0, 0]
        array([False, False,  True])
    """
    x, v = positions.astype(np.float64), velocities.astype(np.float64)
    N, K, _ = x.shape
    low, high = radii[..., None], BOX - radii[..., None]
    first, second = np.triu_indices(K, 1)
    reach = radii[:, first] + radii[:, second]
    motion = BallMotion(
        np.empty((num_frames, N, K, 2)),
        np.empty((num_frames, N, K, 2)),
        np.zeros((num_frames, N, K), dtype=bool),
        np.zeros((num_frames, N, K), dtype=bool),
    )
    motion.positions[0], motion.velocities[0] = x, v
    for t in range(1, num_frames):
        for _ in range(STEPS_PER_FRAME):
            x = x + v / STEPS_PER_FRAME
            motion.wall_collisions[t] |= ((x < low) | (x > high)).any(axis=-1)
            v = np.where(x < low, np.abs(v), np.where(x > high, -np.abs(v), v))
            x = np.where(x < low, 2 * low - x, np.where(x > high, 2 * high - x, x))
            apart = x[:, first] - x[:, second]
            distance = np.linalg.norm(apart, axis=-1)
            touching = distance < reach
            for p in np.flatnonzero(touching.any(axis=0)):
                (n,) = np.nonzero(touching[:, p])
                i, j = first[p], second[p]
                normal = apart[n, p] / distance[n, p, None]
                closing = ((v[n, i] - v[n, j]) * normal).sum(axis=-1)
                n, normal, closing = n[closing < 0], normal[closing < 0], closing[closing < 0]
                impulse = (2 * closing / (masses[n, i] + masses[n, j]))[:, None] * normal
                v[n, i] -= masses[n, j, None] * impulse
                v[n, j] += masses[n, i, None] * impulse
                motion.collisions[t, n, i] = motion.collisions[t, n, j] = True
        motion.positions[t], motion.velocities[t] = x, v
    return motion
