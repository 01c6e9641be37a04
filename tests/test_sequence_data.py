"""What holds for every generator of sequences: streams, seeds, files, and what is refused."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from pnem.cli import app
from pnem.data import (
    ImageDataset,
    bouncing_balls,
    flying_mnist,
    flying_shapes,
    moving_occluder,
    splits,
    write_bouncing_balls,
    write_flying_mnist,
    write_flying_shapes,
    write_hdf5,
    write_moving_occluder,
)
from pnem.errors import DataError

SMALL = {"train": 7, "valid": 5, "test": 3, "num_frames": 4}


class Generator(NamedTuple):
    draw: Callable[..., Any]
    write: Callable[..., None]
    options: dict[str, Any]
    command: list[str]
    size: int


GENERATORS = {
    "shapes": Generator(
        flying_shapes, write_flying_shapes, {"num_objects": 2}, ["flying-shapes", "--objects", "2"], 28
    ),
    "mnist": Generator(
        flying_mnist, write_flying_mnist, {"variations": 20}, ["flying-mnist", "--variations", "20"], 24
    ),
    "balls": Generator(
        bouncing_balls,
        write_bouncing_balls,
        {"num_balls": (2, 3), "masses": "different", "curtain": True},
        ["bouncing-balls", "--balls", "2", "--most", "3", "--masses", "different", "--curtain"],
        64,
    ),
    "occluder": Generator(moving_occluder, write_moving_occluder, {"curtain": 9}, ["occluder", "--curtain", "9"], 28),
}


@pytest.fixture(params=GENERATORS.values(), ids=GENERATORS)
def generator(request: pytest.FixtureRequest) -> Generator:
    chosen: Generator = request.param
    return chosen


def arrays(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    with h5py.File(path) as file:
        return {split: {name: array[:] for name, array in file[split].items()} for split in file}


def test_the_seed_decides(generator: Generator) -> None:
    one, same, other = (generator.draw(6, num_frames=5, seed=seed, **generator.options) for seed in (3, 3, 4))
    for name, array in one._asdict().items():
        np.testing.assert_array_equal(array, getattr(same, name))
    assert (one.features != other.features).any()
    assert (one.positions != other.positions).all(axis=(0, 3)).any()


def test_neither_more_sequences_nor_more_frames_change_the_first(generator: Generator) -> None:
    many = generator.draw(15, num_frames=8, seed=1, **generator.options)
    few = generator.draw(6, num_frames=5, seed=1, **generator.options)
    rng = np.random.default_rng(1)
    parts = [generator.draw(n, num_frames=8, rng=rng, **generator.options) for n in (6, 1, 8)]
    for name, array in many._asdict().items():
        np.testing.assert_array_equal(array[:5, :6], getattr(few, name), name)
        np.testing.assert_array_equal(array, np.concatenate([getattr(part, name) for part in parts], axis=1), name)


def test_the_file_holds_the_sequences_and_what_is_known_of_them(generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    generator.write(path, **SMALL, **generator.options, seed=7)
    streams = np.random.SeedSequence(7).spawn(3)
    for (split, found), N, stream in zip(
        sorted(arrays(path).items(), key=lambda item: ["training", "validation", "test"].index(item[0])),
        (7, 5, 3),
        streams,
        strict=True,
    ):
        expected = generator.draw(N, num_frames=4, rng=np.random.default_rng(stream), **generator.options)._asdict()
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, name)
        batch = ImageDataset.from_hdf5(path, split)[:]
        assert batch.x.shape == (4, N, generator.size**2, 1)
        assert batch.groups is not None
        assert batch.groups.max() <= expected["positions"].shape[2]
    with h5py.File(path) as file:
        assert file.attrs["generator"] == f"pnem.data.{generator.draw.__name__}"
        assert (file.attrs["seed"], file.attrs["num_frames"]) == (7, 4)
        for option, value in generator.options.items():
            np.testing.assert_array_equal(file.attrs[option], value)


def test_blocks_and_the_sizes_of_other_splits_do_not_show(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator.write(tmp_path / "one.h5", **SMALL, **generator.options)
    generator.write(tmp_path / "two.h5", **SMALL, **generator.options)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    monkeypatch.setattr(splits, "BLOCK_BYTES", 2 * 4 * generator.size**2)
    generator.write(tmp_path / "blocks.h5", **SMALL | {"train": 9, "valid": 6}, **generator.options)
    small, large = arrays(tmp_path / "one.h5"), arrays(tmp_path / "blocks.h5")
    for split, known in small.items():
        for name, array in known.items():
            np.testing.assert_array_equal(large[split][name][:, : array.shape[1]], array)
    frames = [known["features"][0].reshape(-1, generator.size**2) for known in large.values()]
    assert len(np.unique(np.concatenate(frames), axis=0)) == 9 + 6 + 3


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "BLOCK_BYTES", 20 * 21 * 784)
    tracemalloc.start()
    try:
        write_flying_shapes(tmp_path / "shapes.h5", train=800, valid=1, test=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 800 * 21 * 784 / 2


def test_files_are_not_replaced_unasked(generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_text("precious")
    with pytest.raises(DataError, match="overwrite=True"):
        generator.write(path, **SMALL, **generator.options)
    assert path.read_text() == "precious"
    generator.write(path, **SMALL, **generator.options, overwrite=True)
    assert ImageDataset.from_hdf5(path, "test").num_frames == 4
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 1}, "num_frames=1: a sequence has at least 2"),
        ({"num_frames": 0}, "num_frames=0: give at least 1"),
        ({"num_frames": 2.5}, "num_frames=2.5: give a whole number"),
        ({"seed": -1}, "seed=-1: give at least 0"),
        ({"size": 9}, "size=9 is too small for"),
        ({"size": "28"}, "size='28': give a whole number"),
    ],
)
def test_impossible_sequences_are_refused(
    generator: Generator, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        generator.draw(**{"num_sequences": 2} | generator.options | arguments)
    with pytest.raises(DataError, match=message):
        generator.write(tmp_path / "x.h5", **SMALL | generator.options | arguments)
    assert not list(tmp_path.iterdir())


def test_empty_splits_and_no_sequences_are_refused(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="num_sequences=0: give at least 1"):
        generator.draw(0)
    for split in ("train", "valid", "test"):
        with pytest.raises(DataError, match=f"{split}=0: give at least 1"):
            generator.write(tmp_path / "x.h5", **SMALL | {split: 0})
    assert not list(tmp_path.iterdir())


def test_the_command_writes_the_same_file(generator: Generator, tmp_path: Path) -> None:
    path = tmp_path / "command.h5"
    sizes = ["--train", "7", "--valid", "5", "--test", "3", "--frames", "4", "--seed", "2"]
    call = ["data", generator.command[0], str(path), *generator.command[1:], *sizes]
    result = CliRunner().invoke(app, call, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == f"wrote 7 training, 5 validation and 3 test sequences to {path}".split()
    generator.write(tmp_path / "python.h5", **SMALL, **generator.options, seed=2)
    assert path.read_bytes() == (tmp_path / "python.h5").read_bytes()
    for wrong, message in ((call, "exists"), ([*call[:2], "new.h5", "--frames", "1"], "at least 2")):
        result = CliRunner().invoke(app, wrong, env={"COLUMNS": "300"})
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
    assert "Example: pnem" in CliRunner().invoke(app, [*call[:2], "--help"]).output.replace("`", "")


def test_the_progress_bar_is_written_to_standard_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for progress in (False, True):
        write_flying_shapes(tmp_path / f"{progress}.h5", **SMALL, progress=progress)
        shown = capsys.readouterr()
        assert not shown.out
        assert ("sequences" in shown.err) == progress


IMAGES = np.ones((4, 6, 3, 3, 1), dtype=np.uint8)


def test_further_arrays_are_stored_beside_the_images(tmp_path: Path) -> None:
    speed, mass = np.arange(48.0).reshape(4, 6, 2), np.arange(6).reshape(1, 6)
    chunks = [(IMAGES[:, n], None, {"speed": speed[:, n], "mass": mass[:, n]}) for n in (slice(4), slice(4, 6))]
    write_hdf5(tmp_path / "x.h5", {"training": iter(chunks), "test": (IMAGES, IMAGES, {"speed": speed})})
    found = arrays(tmp_path / "x.h5")
    assert found["training"].keys() == {"features", "speed", "mass"}
    np.testing.assert_array_equal(found["training"]["speed"], speed)
    np.testing.assert_array_equal(found["training"]["mass"], mass)
    assert found["test"].keys() == {"features", "groups", "speed"}


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"speed": np.ones((4, 5))}, r"speed has shape \(4, 5\).*T = 4 frames of N = 6 images"),
        ({"speed": np.ones((3, 6))}, r"speed has shape \(3, 6\)"),
        ({"speed": np.ones(6)}, r"speed has shape \(6,\)"),
        ({"speed": 1.0}, r"speed has shape \(\)"),
        ({"speed": np.ones((4, 6, 0))}, r"speed has shape \(4, 6, 0\)"),
        ({"speed": [["a"] * 6] * 4}, "dtype <U1"),
        ({"speed": np.full((4, 6), np.nan)}, "speed has NaN"),
        ({"features": np.ones((4, 6))}, "cannot be called 'features'"),
        ({"labels": np.ones((1, 6))}, "cannot be called 'labels'"),
        ({"a/b": np.ones((4, 6))}, "cannot be called 'a/b'"),
        ({3: np.ones((4, 6))}, "cannot be called 3"),
        (np.ones((4, 6)), "expected pairs .*mapping"),
    ],
)
def test_further_arrays_that_do_not_fit_are_refused(tmp_path: Path, further: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"split 'training'.*{message}"):
        write_hdf5(tmp_path / "x.h5", {"training": [(IMAGES, None, further)]})
    assert not list(tmp_path.iterdir())


def test_every_chunk_needs_the_same_further_arrays(tmp_path: Path) -> None:
    speed = np.ones((4, 6))
    for other in ((IMAGES, None), (IMAGES, None, {"mass": speed}), (IMAGES, None, {"speed": speed > 0})):
        with pytest.raises(DataError, match="need the same arrays"):
            write_hdf5(tmp_path / "x.h5", {"training": [(IMAGES, None, {"speed": speed}), other]})
    assert not list(tmp_path.iterdir())
