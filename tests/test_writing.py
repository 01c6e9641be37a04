"""Writing: a file holds exactly what was given, or nothing is left behind and nothing is lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from pixels import FEATURES, GROUPS, Array, arrays

from pnem.data import ImageDataset, write_hdf5
from pnem.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.h5"


@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_a_file_holds_what_was_written(path: Path, dtype: str) -> None:
    features, groups = arrays(N=20, dtype=dtype)
    pairs = ((features[:, n : n + 6], torch.from_numpy(groups[:, n : n + 6])) for n in range(0, 20, 6))
    write_hdf5(path, {"training": pairs, "test": (features, groups)}, attrs={"seed": 3, "by": "test"})
    with h5py.File(path) as file:
        assert dict(file.attrs) == {"seed": 3, "by": "test"}
        assert set(file) == {"training", "test"}
        for split in file.values():
            for name, written in (("features", features), ("groups", groups)):
                assert split[name].dtype == written.dtype
                np.testing.assert_array_equal(split[name][:], written)
    assert list(path.parent.iterdir()) == [path]


def test_a_chunk_holds_all_frames_of_few_images(path: Path) -> None:
    static, moving = np.zeros((1, 50, 28, 28, 1), "uint8"), np.zeros((21, 3, 64, 64, 1), "uint8")
    write_hdf5(path, {"static": (static, None), "moving": (moving, None)})
    with h5py.File(path) as file:
        assert file["static/features"].chunks == (1, 20, 28, 28, 1)
        assert file["moving/features"].chunks == (21, 1, 64, 64, 1)


def test_an_existing_file_is_kept_unless_asked(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(DataError, match="overwrite=True"):
        write_hdf5(path, {"training": (FEATURES, GROUPS)})
    assert path.read_text() == "precious"
    write_hdf5(path, {"training": (FEATURES, GROUPS)}, overwrite=True)
    assert len(ImageDataset.from_hdf5(path)) == 10


def test_a_file_made_meanwhile_is_kept(path: Path) -> None:
    def pairs() -> Iterator[tuple[Array, Array]]:
        yield FEATURES, GROUPS
        path.write_text("precious")

    with pytest.raises(DataError, match="overwrite=True"):
        write_hdf5(path, {"training": pairs()})
    assert path.read_text() == "precious"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_write_leaves_nothing_new(path: Path, interruption: type[BaseException]) -> None:
    def pairs() -> Iterator[tuple[Array, Array]]:
        yield FEATURES, GROUPS
        raise interruption

    with pytest.raises(interruption):
        write_hdf5(path, {"training": pairs()})
    assert not list(path.parent.iterdir())
    path.write_text("precious")
    with pytest.raises(interruption):
        write_hdf5(path, {"training": pairs()}, overwrite=True)
    assert path.read_text() == "precious"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("full_after", [0, 1, 3])
@pytest.mark.parametrize(("num_images", "space"), [(1, 10), (1, 10_000), (1000, 10), (1000, 400_000)])
def test_a_full_disk_stops_the_write_and_leaves_nothing_new(
    path: Path, full_after: int, num_images: int, space: int
) -> None:
    resource = pytest.importorskip("resource", reason="no limits on the size of files here")
    ones = np.ones((1, num_images, 28, 28, 1), "uint8")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    taken = []

    def pairs() -> Iterator[tuple[Array, Array]]:
        for n in range(3):
            if n == full_after:
                resource.setrlimit(resource.RLIMIT_FSIZE, (space, limits[1]))
            yield ones, ones
            taken.append(n)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))

    try:
        with pytest.raises(DataError, match=f"cannot write {path} .*space"):
            write_hdf5(path, {"training": pairs()})
        left = list(path.parent.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not left
    assert len(taken) == full_after or num_images == 1


def test_a_missing_folder_is_named(path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot write .*No such file.*folder"):
        write_hdf5(path / "images.h5", {"training": (FEATURES, GROUPS)})


def test_a_folder_that_is_a_file_is_named(path: Path) -> None:
    path.write_text("a file")
    with pytest.raises(DataError, match=r"cannot write .*Not a directory.*folder"):
        write_hdf5(path / "images.h5", {"training": (FEATURES, GROUPS)})


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({}, "no splits"),
        ({"training": []}, "split 'training' has no images"),
        ({"training": FEATURES}, "expected pairs"),
        ({"training": [(FEATURES, GROUPS, GROUPS)]}, "expected pairs"),
        ({"training": (None, GROUPS)}, "expected pairs"),
        ({"training": [(FEATURES, GROUPS), (FEATURES, None)]}, "same"),
        ({"training": [(FEATURES, None), (FEATURES.astype("float32"), None)]}, "same .*uint8.*float32"),
        ({"training": [(FEATURES, None), (FEATURES[:, :, :2], None)]}, "same"),
    ],
)
def test_splits_that_do_not_fit_together_are_refused(path: Path, splits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_hdf5(path, splits)
    assert not list(path.parent.iterdir())


def test_labels_are_stored_beside_the_images(path: Path) -> None:
    labels = np.arange(10, dtype=np.uint8)
    write_hdf5(path, {"training": (FEATURES, GROUPS), "test": (FEATURES, None)}, labels={"test": labels})
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["test/labels"][:], labels)
        assert "labels" not in file["training"]
    assert len(ImageDataset.from_hdf5(path, "test", with_groups=False)) == 10


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"test": np.arange(10)}, "labels of split 'test', but it has no images"),
        ({"training": np.arange(9)}, r"labels has shape \(9,\).*there are 10 images"),
        ({"training": 1}, r"labels has shape \(\)"),
        ({"training": ["a"] * 10}, "dtype <U1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(path: Path, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_hdf5(path, {"training": (FEATURES, GROUPS)}, labels=labels)
    assert not list(path.parent.iterdir())
