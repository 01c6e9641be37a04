"""Flying shapes: straight flight between bounces, objects always whole, every pixel as its objects' places say."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pnem.data import OUTLINES, flying_shapes, write_flying_shapes
from pnem.data.flight import fly

DRAWINGS = list(OUTLINES.values())
SIZES = np.array([drawing.shape for drawing in DRAWINGS])


def covered(positions: NDArray[np.float32], shapes: NDArray[np.uint8], H: int, W: int) -> NDArray[np.bool_]:
    """Which pixels each object of one frame covers, (K, H, W)."""
    masks = np.zeros((len(shapes), H, W), dtype=bool)
    for mask, (row, column), shape in zip(masks, positions, shapes, strict=True):
        for h, w in zip(*np.nonzero(DRAWINGS[shape]), strict=True):
            mask[round(float(row)) + h, round(float(column)) + w] = True
    return masks


def redrawn(masks: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features and groups of one frame from what each object covers."""
    return masks.any(axis=0), np.where(masks.sum(axis=0) == 1, masks.argmax(axis=0) + 1, 0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(2, 9), st.integers(7, 30), st.integers(12, 30), st.integers(0))
def test_every_pixel_is_as_the_places_of_the_objects_say(N: int, K: int, T: int, H: int, W: int, seed: int) -> None:
    sequences = flying_shapes(N, num_objects=K, num_frames=T, size=(H, W), seed=seed)
    assert sequences.features.shape == sequences.groups.shape == (T, N, H, W, 1)
    assert sequences.features.dtype == sequences.groups.dtype == np.uint8
    assert sequences.positions.shape == sequences.velocities.shape == (T, N, K, 2)
    assert sequences.positions.dtype == sequences.velocities.dtype == np.float32
    assert (sequences.shapes.shape, sequences.shapes.dtype) == ((1, N, K), np.uint8)
    for t, n in np.ndindex(T, N):
        features, groups = redrawn(covered(sequences.positions[t, n], sequences.shapes[0, n], H, W))
        np.testing.assert_array_equal(sequences.features[t, n, ..., 0], features)
        np.testing.assert_array_equal(sequences.groups[t, n, ..., 0], groups)


def test_objects_stay_inside_and_fly_straight_between_bounces() -> None:
    sequences = flying_shapes(400, num_objects=3, num_frames=60, size=(28, 33), seed=2)
    x, v = sequences.positions.astype(np.float64), sequences.velocities
    room = np.array([28, 33]) - SIZES[sequences.shapes]
    assert (x >= 0).all()
    assert (x <= room).all()
    bounced = (v[1:] != v[:-1]) | (np.abs(v[1:] - (x[1:] - x[:-1])) > 1e-4)
    straight = ~bounced
    assert straight.mean() > 0.7
    assert bounced.any(axis=(0, 1, 2)).all()
    np.testing.assert_allclose((x[1:] - x[:-1])[straight], v[:-1][straight], atol=1e-5)
    # A border mirrors the way: as far from it on the way back as the straight line would have gone beyond it.
    beyond = x[:-1] + v[:-1]
    mirrored = np.where(beyond < 0, -beyond, 2 * room - beyond)
    once = bounced & (mirrored >= 0) & (mirrored <= room)
    assert once.sum() == bounced.sum()
    np.testing.assert_allclose(x[1:][once], mirrored[once], atol=1e-5)
    np.testing.assert_array_equal(v[1:][once], -v[:-1][once])
    np.testing.assert_array_equal(np.abs(v), np.broadcast_to(np.abs(v[0]), v.shape))


def test_flight_without_room_stands_still_and_in_little_room_bounces_often() -> None:
    numbers = np.random.default_rng(0).random((50, 4, 4))
    still = fly(numbers, (0, 5), 10)
    assert (still.positions[..., 0] == 0).all()
    assert (still.velocities[..., 0] == 0).all()
    assert (still.positions[..., 1] != 0).any()
    narrow = fly(numbers, 0.5, 30).positions
    assert ((narrow >= 0) & (narrow <= 0.5)).all()


def test_speeds_directions_and_places_are_uniform_in_every_frame() -> None:
    sequences = flying_shapes(20_000, num_objects=1, num_frames=4, seed=5)
    for t in (0, 3):
        v = sequences.velocities[t, :, 0]
        speed, angle = np.linalg.norm(v, axis=-1), np.arctan2(v[:, 0], v[:, 1])
        places = sequences.positions[t, :, 0] / (28 - SIZES[sequences.shapes[0, :, 0]])
        for uniform in ((speed - 1) / 2, angle / (2 * np.pi) + 0.5, places[:, 0], places[:, 1]):
            counts, _ = np.histogram(uniform, bins=20, range=(0, 1))
            assert counts.sum() == 20_000
            # Pearson's statistic of 19 degrees of freedom, within four standard deviations.
            assert ((counts - 1000) ** 2 / 1000).sum() < 19 + 4 * np.sqrt(2 * 19)
    assert (np.abs(np.bincount(sequences.shapes.ravel()) - 20_000 / 3) < 5 * np.sqrt(20_000 * 2 / 9)).all()


def test_groups_are_wide_enough() -> None:
    groups = flying_shapes(1, num_objects=300, num_frames=2, size=200).groups
    assert groups.dtype == np.uint16
    assert groups.max() > 255


@pytest.mark.slow
def test_fifty_thousand_sequences_take_minutes(tmp_path: Path) -> None:
    start = time.process_time()
    write_flying_shapes(tmp_path / "flying.h5", valid=1, test=1)
    assert time.process_time() - start < 300
