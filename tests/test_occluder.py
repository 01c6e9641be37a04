"""The moving occluder: flying shapes, less what a moving band hides; what it hides is known."""

from typing import Any

import numpy as np
import pytest

from pnem.data import OUTLINES, moving_occluder
from pnem.data.shapes import draw_outlines
from pnem.errors import DataError

DRAWINGS = list(OUTLINES.values())


@pytest.mark.parametrize(("curtain", "size"), [(12, 28), (5, (20, 33)), (28, 28)])
def test_images_are_flying_shapes_less_what_the_curtain_hides(curtain: int, size: Any) -> None:
    sequences = moving_occluder(30, num_objects=3, curtain=curtain, num_frames=15, size=size, seed=1)
    T, N, H, W, _ = sequences.features.shape
    top, left = np.moveaxis(np.rint(sequences.positions).astype(int), -1, 0)
    whole = draw_outlines(sequences.shapes[0], top, left, (H, W))
    for t, n in np.ndindex(T, N):
        first = round(float(sequences.curtain_positions[t, n]))
        shown = np.array([not first <= column < first + curtain for column in range(W)])
        for name in ("features", "groups"):
            image, expected = getattr(sequences, name)[t, n, ..., 0], getattr(whole, name)[t, n, ..., 0]
            np.testing.assert_array_equal(image, expected * shown)
        for k, shape in enumerate(sequences.shapes[0, n]):
            columns = left[t, n, k] + np.nonzero(DRAWINGS[shape])[1]
            np.testing.assert_allclose(sequences.visible[t, n, k], shown[columns].mean(), atol=1e-6)


def test_the_curtain_goes_straight_from_outside_to_outside() -> None:
    sequences = moving_occluder(500, num_frames=80, curtain=10, seed=2)
    x, v = sequences.curtain_positions.astype(np.float64), sequences.curtain_velocities
    assert x.min() >= -10
    assert x.max() <= 28
    assert (x.min(axis=0) < -9).any()
    assert (x.max(axis=0) > 27).any()
    straight = (v[1:] == v[:-1]) & (np.abs(x[:-1] + v[:-1] - 9) <= 19)
    assert straight.mean() > 0.9
    np.testing.assert_allclose((x[1:] - x[:-1])[straight], v[:-1][straight], atol=1e-5)
    assert (np.abs(v) <= 3).all()


def test_objects_vanish_entirely_and_come_back() -> None:
    hidden = moving_occluder(1000).visible == 0
    back = (hidden[:-1] & ~hidden[1:]).any(axis=(0, 2))
    assert 0.6 < back.mean() < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_objects": 0}, "num_objects=0: give at least 1"),
        ({"curtain": 0}, "curtain=0: give at least 1"),
        ({"curtain": 29}, "curtain=29 is wider than the image: give at most 28"),
        ({"size": (28, 11)}, "too small for the outlines"),
    ],
)
def test_impossible_curtains_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        moving_occluder(5, **arguments)
