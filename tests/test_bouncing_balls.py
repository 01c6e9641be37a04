"""Bouncing balls: energy and momentum conserved, balls keep to the box and apart, pixels as the formula says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pnem.data import bouncing_balls, write_bouncing_balls
from pnem.data.ball_physics import BOX, BallMotion, place_balls, simulate_balls
from pnem.errors import DataError

Numbers = NDArray[np.float64]


def simulated(N: int, K: int, *, equal: bool, frames: int = 51, seed: int = 0) -> tuple[BallMotion, Numbers, Numbers]:
    rng = np.random.default_rng(seed)
    radii = np.full((N, K), 1.2) if equal else rng.uniform(0.8, 1.6, (N, K))
    masses = (radii / 1.2) ** 2
    start = np.stack([place_balls(of_sequence, rng) for of_sequence in radii])
    velocities = rng.standard_normal((N, K, 2))
    velocities *= 0.5 / np.linalg.norm(velocities, axis=(1, 2), keepdims=True)
    return simulate_balls(start, velocities, masses, radii, frames), masses, radii


@pytest.mark.parametrize(("K", "equal"), [(4, True), (4, False), (8, True)])
def test_the_laws_of_motion_hold(K: int, equal: bool) -> None:
    motion, masses, radii = simulated(200, K, equal=equal)
    x, v = motion.positions, motion.velocities

    energy = (masses[..., None] * v**2).sum(axis=(2, 3))
    np.testing.assert_allclose(energy, np.broadcast_to(energy[0], energy.shape), rtol=1e-12)

    momentum = (masses[..., None] * v).sum(axis=2)
    no_wall = ~motion.wall_collisions.any(axis=2)[1:]
    assert (motion.collisions.any(axis=2)[1:] & no_wall).any()
    np.testing.assert_allclose(momentum[1:][no_wall], momentum[:-1][no_wall], atol=1e-12)

    assert (x >= radii[..., None] - 1e-12).all()
    assert (x <= BOX - radii[..., None] + 1e-12).all()

    first, second = np.triu_indices(K, 1)
    gap = np.linalg.norm(x[:, :, first] - x[:, :, second], axis=-1) - radii[:, first] - radii[:, second]
    assert (gap[0] >= 0).all()
    # Two balls approach by at most the sum of their speeds, which energy bounds, in half a frame.
    assert gap.min() > -0.5 * np.sqrt(2 * energy[0].max() / masses.min())

    free = ~(motion.collisions | motion.wall_collisions)[1:]
    np.testing.assert_allclose((x[:-1] + v[:-1])[free], x[1:][free], atol=1e-12)
    np.testing.assert_array_equal(v[:-1][free], v[1:][free])
    assert not motion.collisions[0].any()
    assert (v[1:] != v[:-1]).any(axis=-1)[~free].mean() > 0.99


@pytest.mark.parametrize(("m1", "m2"), [(1.0, 1.0), (1.0, 3.0), (5.0, 0.5)])
@pytest.mark.parametrize("angle", [0.0, 0.3, 2.0])
def test_two_masses_collide_as_the_closed_form_says(m1: float, m2: float, angle: float) -> None:
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    u1, u2, w1, w2 = 0.5, -0.2, 0.1, 0.1
    # They meet exactly along the line through their centres, since they drift alike across it.
    start = np.stack([5 - 0.65 * along, 5 + 0.65 * along])[None]
    velocities = np.stack([u1 * along + w1 * across, u2 * along + w2 * across])[None]
    motion = simulate_balls(start, velocities, np.array([[m1, m2]]), np.full((1, 2), 0.5), 3)
    v1, v2 = motion.velocities[-1, 0]
    assert motion.collisions[:, 0].tolist() == [[False, False], [True, True], [False, False]]
    np.testing.assert_allclose(v1 @ along, ((m1 - m2) * u1 + 2 * m2 * u2) / (m1 + m2), rtol=1e-12)
    np.testing.assert_allclose(v2 @ along, ((m2 - m1) * u2 + 2 * m1 * u1) / (m1 + m2), rtol=1e-12)
    np.testing.assert_allclose([v1 @ across, v2 @ across], [w1, w2], atol=1e-12)


def test_a_wall_mirrors_the_way_and_the_velocity() -> None:
    start, velocity = np.array([[[1.5, 5.0]]]), np.array([[[-0.8, 0.3]]])
    motion = simulate_balls(start, velocity, np.ones((1, 1)), np.ones((1, 1)), 3)
    np.testing.assert_allclose(motion.positions[:, 0, 0], [[1.5, 5.0], [1.3, 5.3], [2.1, 5.6]])
    np.testing.assert_allclose(motion.velocities[:, 0, 0], [[-0.8, 0.3], [0.8, 0.3], [0.8, 0.3]])
    assert motion.wall_collisions[:, 0, 0].tolist() == [False, True, False]


@pytest.mark.parametrize("options", [{}, {"masses": "different", "size": 40}, {"num_balls": (1, 6)}])
def test_every_pixel_is_as_the_formula_says(options: dict[str, Any]) -> None:
    sequences = bouncing_balls(4, num_frames=12, seed=1, **options)
    T, N, H, W, _ = sequences.features.shape
    rows, columns = np.mgrid[:H, :W] + 0.5
    for t, n in np.ndindex(T, N):
        terms = np.zeros((sequences.positions.shape[2], H, W))
        for term, centre, r in zip(terms, sequences.positions[t, n], sequences.radii[0, n], strict=True):
            if r:
                term[:] = np.exp(-((((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2) / r**2) ** 4))
        total = terms.sum(axis=0)
        clear = np.abs(total - 0.5) > 1e-4
        features, groups = total > 0.5, np.where(total > 0.5, terms.argmax(axis=0) + 1, 0)
        np.testing.assert_array_equal(sequences.features[t, n, ..., 0][clear], features[clear])
        second, first = np.sort(terms, axis=0)[-2:]
        clear &= first - second > 1e-4
        np.testing.assert_array_equal(sequences.groups[t, n, ..., 0][clear], groups[clear])
        assert clear.mean() > 0.05


def test_what_is_stored_is_in_pixels_and_fits_together() -> None:
    sequences = bouncing_balls(30, num_balls=3, masses="different", seed=2)
    scale = 6.4
    r, m = sequences.radii[0] / scale, sequences.masses[0]
    assert ((r >= 0.8) & (r <= 1.6)).all()
    np.testing.assert_allclose(m, (r / 1.2) ** 2, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(sequences.velocities[0] / scale, axis=(1, 2)), 0.5, rtol=1e-5)
    motion = simulate_balls(
        *((array[0] / scale).astype(np.float64) for array in (sequences.positions, sequences.velocities)), m, r, 20
    )
    before = np.cumsum(motion.collisions | motion.wall_collisions, axis=0).sum(axis=2) == 0
    np.testing.assert_allclose(sequences.positions[:20][before] / scale, motion.positions[before], atol=1e-3)
    assert sequences.collisions.dtype == sequences.wall_collisions.dtype == bool
    assert sequences.collisions.any()
    # Nobody collides alone.
    assert (sequences.collisions.sum(axis=2) != 1).all()
    assert sequences.curtain is None
    equal = bouncing_balls(3, seed=2)
    assert (equal.masses == 1).all()
    np.testing.assert_allclose(equal.radii, 1.2 * scale, rtol=1e-6)


def test_numbers_of_balls_are_uniform_and_absent_balls_are_zero() -> None:
    sequences = bouncing_balls(300, num_balls=(2, 4), num_frames=2, size=10)
    present = sequences.masses[0] > 0
    counts = np.bincount(present.sum(axis=1), minlength=5)
    assert counts[:2].sum() == 0
    assert (np.abs(counts[2:] - 100) < 5 * np.sqrt(300 * 2 / 9)).all()
    assert (np.sort(~present, axis=1) == ~present).all()
    for array in (sequences.positions, sequences.velocities):
        assert (array[:, ~present] == 0).all()
    for n in range(300):
        assert set(np.unique(sequences.groups[:, n])) == set(range(present[n].sum() + 1))


def test_a_curtain_hides_a_quarter_of_the_image() -> None:
    hidden, whole = (bouncing_balls(20, num_balls=3, num_frames=6, curtain=c, seed=5) for c in (True, False))
    np.testing.assert_array_equal(hidden.positions, whole.positions)
    assert hidden.curtain is not None
    assert len(np.unique(hidden.curtain[0], axis=0)) > 15
    for n, (top, left, height, width) in enumerate(hidden.curtain[0]):
        assert (height, width) == (32, 32)
        shown = np.ones((64, 64, 1), dtype=bool)
        shown[top : top + height, left : left + width] = False
        assert shown.sum() == 0.75 * 64**2
        np.testing.assert_array_equal(hidden.features[:, n], whole.features[:, n] * shown)
        np.testing.assert_array_equal(hidden.groups[:, n], whole.groups[:, n] * shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_balls": 0}, "num_balls=0: give at least 1"),
        ({"num_balls": (8, 6)}, r"num_balls=\(8, 6\): give the fewest first"),
        ({"num_balls": (1, 2, 3)}, "give one number, or"),
        ({"num_balls": 20}, "no places were found for 20 balls .*ask for fewer balls"),
        ({"masses": "unequal"}, 'masses=\'unequal\': choose "equal" or "different"'),
        ({"size": (64, 64)}, "size=.*give a whole number"),
    ],
)
def test_impossible_balls_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        bouncing_balls(2, **arguments)
    with pytest.raises(DataError, match=message):
        write_bouncing_balls(tmp_path / "x.h5", train=2, valid=2, test=2, **arguments)
    assert not list(tmp_path.iterdir())
