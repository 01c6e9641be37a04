"""Static shapes: pixel by pixel what a slow drawing gives, placed uniformly, the same for the same seed."""

import time
import tracemalloc
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pnem.data import OUTLINES, ImageDataset, shapes, static_shapes, write_static_shapes
from pnem.errors import DataError

SQUARE = ["#######", "#######", "##...##", "##...##", "##...##", "#######", "#######"]
UP = [
    ".....##.....",
    "....####....",
    "...######...",
    "..###..###..",
    ".###....###.",
    "############",
    "############",
]
DRAWINGS = [SQUARE, UP, UP[::-1]]

Numbers = NDArray[np.float64]


class Given(np.random.Generator):
    """A generator that gives the same number always."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64())
        self.number = number

    def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
        return np.full(size, self.number)


def drawn_slowly(numbers: Numbers, H: int, W: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """One image from three numbers per object in [0, 1): which outline, which row, which column."""
    objects = np.zeros((H, W), dtype=object)
    for h, w in np.ndindex(H, W):
        objects[h, w] = []
    for k, (shape, row, column) in enumerate(numbers):
        drawing = DRAWINGS[int(shape * 3)]
        top = int(row * (H - len(drawing) + 1))
        left = int(column * (W - len(drawing[0]) + 1))
        for h, line in enumerate(drawing):
            for w, pixel in enumerate(line):
                if pixel == "#":
                    objects[top + h, left + w].append(k + 1)
    features, groups = np.zeros((H, W)), np.zeros((H, W))
    for h, w in np.ndindex(H, W):
        features[h, w] = len(objects[h, w]) > 0
        groups[h, w] = objects[h, w][0] if len(objects[h, w]) == 1 else 0
    return features, groups


def is_uniform(counts: NDArray[np.int64]) -> bool:
    """Pearson's statistic against its mean and standard deviation under uniformity."""
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    degrees = len(counts) - 1
    return bool(abs(statistic - degrees) < 4 * np.sqrt(2 * degrees))


def test_outlines_are_those_of_the_paper() -> None:
    for outline, drawing in zip(OUTLINES.values(), DRAWINGS, strict=True):
        assert outline.dtype == bool
        assert ["".join(".#"[pixel] for pixel in row) for row in outline.astype(int)] == drawing
        with pytest.raises(ValueError, match="read-only"):
            outline[0, 0] = False


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(7, 30), st.integers(12, 30), st.integers(0, 2**40))
def test_every_pixel_is_as_drawn_slowly(N: int, K: int, H: int, W: int, seed: int) -> None:
    features, groups = static_shapes(N, num_objects=K, size=(H, W), seed=seed)
    assert features.shape == groups.shape == (1, N, H, W, 1)
    assert features.dtype == groups.dtype == np.uint8
    for n, numbers in enumerate(np.random.default_rng(seed).random((N, K, 3))):
        expected = drawn_slowly(numbers, H, W)
        np.testing.assert_array_equal(features[0, n, :, :, 0], expected[0])
        np.testing.assert_array_equal(groups[0, n, :, :, 0], expected[1])


def test_a_pixel_covered_three_times_is_not_scored() -> None:
    features, groups = static_shapes(1, rng=Given(0.0))
    assert features.sum() == (np.array(DRAWINGS[0]).view("U1") == "#").sum()
    assert not groups.any()


@pytest.mark.parametrize(("number", "shape", "corner"), [(0.0, 0, "top left"), (np.nextafter(1, 0), 2, "bottom right")])
def test_shapes_reach_the_borders(number: float, shape: int, corner: str) -> None:
    features, groups = static_shapes(1, num_objects=1, size=(20, 33), rng=Given(number))
    drawing = np.array([[pixel == "#" for pixel in line] for line in DRAWINGS[shape]])
    h, w = drawing.shape
    place = features[0, 0, :h, :w, 0] if corner == "top left" else features[0, 0, -h:, -w:, 0]
    np.testing.assert_array_equal(place, drawing)
    assert features.sum() == drawing.sum()
    np.testing.assert_array_equal(groups, features)


def test_shapes_and_places_are_uniform() -> None:
    images = static_shapes(30_000, num_objects=1, seed=5).features[0, ..., 0].astype(bool)
    rows, columns = images.any(axis=2), images.any(axis=1)
    top, left = rows.argmax(axis=1), columns.argmax(axis=1)
    width = columns.sum(axis=1)
    pointing_up = images[np.arange(len(images)), top].sum(axis=1) == 2
    shape = np.where(width == 7, 0, np.where(pointing_up, 1, 2))
    assert (rows.sum(axis=1) == 7).all()
    assert is_uniform(np.bincount(shape))
    for s, (places_down, places_across) in enumerate([(22, 22), (22, 17), (22, 17)]):
        place = (top * places_across + left)[shape == s]
        counts = np.bincount(place, minlength=places_down * places_across)
        assert len(counts) == places_down * places_across
        assert is_uniform(counts)


def test_the_seed_decides() -> None:
    for first, second, equal in ((3, 3, True), (3, 4, False)):
        one, two = static_shapes(20, seed=first), static_shapes(20, seed=second)
        assert (one.features == two.features).all() == equal
        assert (one.groups == two.groups).all() == equal


def test_more_images_begin_with_the_same_ones() -> None:
    few, many = static_shapes(10, seed=1), static_shapes(25, seed=1)
    np.testing.assert_array_equal(many.groups[:, :10], few.groups)
    rng = np.random.default_rng(1)
    parts = [static_shapes(n, rng=rng).groups for n in (10, 1, 14)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), many.groups)


def test_groups_are_wide_enough() -> None:
    groups = static_shapes(1, num_objects=300, size=200).groups
    assert groups.dtype == np.uint16
    assert groups.max() > 255


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images=0: give at least 1"),
        ({"num_images": 1.5}, "num_images=1.5: give a whole number"),
        ({"num_objects": 0}, "num_objects=0: give at least 1"),
        ({"seed": -1}, "seed=-1: give at least 0"),
        ({"size": 11}, "size=11 .*7 rows and 12 columns"),
        ({"size": (6, 28)}, "7 rows and 12 columns"),
        ({"size": (28, 11)}, "7 rows and 12 columns"),
        ({"size": (28, 28, 1)}, "height, width"),
        ({"size": "28"}, "size='28': give a whole number"),
    ],
)
def test_impossible_images_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        static_shapes(**{"num_images": 5} | arguments)
    if "num_images" not in arguments:
        with pytest.raises(DataError, match=message):
            write_static_shapes(tmp_path / "shapes.h5", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_splits_are_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match=f"{split}=0: give at least 1"):
        write_static_shapes(tmp_path / "shapes.h5", **{split: 0})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def written(path: Path, **settings: Any) -> dict[str, NDArray[Any]]:
    write_static_shapes(path, **{"train": 30, "valid": 20, "test": 10} | settings)
    with h5py.File(path) as file:
        return {name: array[:] for name in file for array in [file[name]["groups"]]}


def test_the_file_holds_the_images_and_how_they_were_made(tmp_path: Path) -> None:
    path = tmp_path / "shapes.h5"
    write_static_shapes(path, num_objects=2, size=(20, 24), train=30, valid=20, test=10, seed=7)
    streams = np.random.SeedSequence(7).spawn(3)
    for (split, N), stream in zip({"training": 30, "validation": 20, "test": 10}.items(), streams, strict=True):
        expected = static_shapes(N, num_objects=2, size=(20, 24), rng=np.random.default_rng(stream))
        batch = ImageDataset.from_hdf5(path, split).__getitems__(range(N))
        assert batch.groups is not None
        np.testing.assert_array_equal(batch.x.numpy(), expected.features.reshape(N, 480, 1))
        np.testing.assert_array_equal(batch.groups.numpy(), expected.groups.reshape(N, 480))
    with h5py.File(path) as file:
        assert file.attrs["generator"] == "pnem.data.static_shapes"
        assert (file.attrs["num_objects"], file.attrs["seed"]) == (2, 7)
        assert file.attrs["size"].tolist() == [20, 24]


def test_splits_do_not_depend_on_each_other(tmp_path: Path) -> None:
    small = written(tmp_path / "small.h5")
    large = written(tmp_path / "large.h5", train=70, valid=21)
    for split, groups in small.items():
        np.testing.assert_array_equal(large[split][:, : groups.shape[1]], groups)
    images = np.concatenate(list(large.values()), axis=1)[0].reshape(101, -1)
    assert len(np.unique(images, axis=0)) == 101


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(tmp_path / "whole.h5")
    monkeypatch.setattr(shapes, "BLOCK", 7)
    for split, groups in written(tmp_path / "blocks.h5").items():
        np.testing.assert_array_equal(groups, whole[split])


def test_files_are_equal_byte_for_byte_and_not_replaced_unasked(tmp_path: Path) -> None:
    written(tmp_path / "one.h5")
    written(tmp_path / "two.h5")
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    with pytest.raises(DataError, match="overwrite=True"):
        written(tmp_path / "one.h5", seed=1)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    written(tmp_path / "one.h5", seed=1, overwrite=True)
    assert (tmp_path / "one.h5").read_bytes() != (tmp_path / "two.h5").read_bytes()


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "BLOCK", 100)
    tracemalloc.start()
    try:
        write_static_shapes(tmp_path / "shapes.h5", train=5000, valid=1, test=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5000 * 784 / 2


@pytest.mark.slow
def test_the_whole_data_set_takes_seconds(tmp_path: Path) -> None:
    start = time.perf_counter()
    static_shapes(70_000)
    drawn = time.perf_counter()
    write_static_shapes(tmp_path / "shapes.h5")
    assert drawn - start < 20
    assert time.perf_counter() - drawn < 20
