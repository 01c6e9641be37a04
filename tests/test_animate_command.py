"""``pnem animate``: a sequence of a file as a run goes through it, and one clear message for every mistake."""

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from broken import as_run
from fitting import SHAPE, data_file
from PIL import Image
from typer.testing import CliRunner

import pnem
from pnem import plots
from pnem.cli import app
from pnem.data import ImageDataset
from pnem.inference import RNNEM
from pnem.models import Bernoulli, SpatialMixture, decoders

FRAMES, SEQUENCES = 7, 4


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["animate", *map(str, arguments)], env={"COLUMNS": "300"})
    assert result.exit_code == code, result.output
    if code:
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Sequences and images, and untrained runs for them."""
    folder = tmp_path_factory.mktemp("animate")
    data_file(folder / "sequences.h5", count=SEQUENCES, frames=FRAMES)
    data_file(folder / "images.h5", count=SEQUENCES)
    for task in ("prediction", "denoising", "static"):
        torch.manual_seed(0)
        model = SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), 3, pixel_prior=0.0)
        strategy = RNNEM(model, iterations=3, task=task)
        as_run(model, strategy).save(folder / task)
    return folder


def frames_of(path: Path) -> list[np.ndarray]:
    with Image.open(path) as image:
        pictures = []
        for s in range(getattr(image, "n_frames", 1)):
            image.seek(s)
            pictures.append(np.asarray(image.convert("RGB")))
    return pictures


def test_it_is_the_animation_of_what_the_run_infers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.gif"
    options = ["--index", 2, "--frames", 5, "--rollout", 3, "--fps", 10, "--seed", 4, "--split", "validation"]
    printed = call(folder / "prediction", folder / "sequences.h5", "--out", out, *options)
    assert f"wrote 7 steps to {out}" in printed
    assert [path.name for path in out.parent.iterdir()] == ["a.gif"]

    run = pnem.load(folder / "prediction")
    sequence = ImageDataset.from_hdf5(folder / "sequences.h5", "validation")[2:3].x
    torch.manual_seed(4)
    posterior = run.infer(sequence[:5])
    rolled = run.rollout(posterior, sequence[:5], 3)
    film = plots.animation(
        sequence[:5],
        posterior,
        SHAPE,
        model=run.model,
        rolled=rolled,
        future=sequence[5:],
        frames_per_second=10,
    )
    film.save(tmp_path / "b.gif")
    assert out.read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize(("task", "steps"), [("prediction", FRAMES - 1), ("denoising", FRAMES)])
def test_by_default_all_of_the_first_test_sequence(folder: Path, tmp_path: Path, task: str, steps: int) -> None:
    call(folder / task, folder / "sequences.h5", "--out", tmp_path / "a.gif")
    pictures = frames_of(tmp_path / "a.gif")
    assert len(pictures) == steps
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == 250


def test_torchs_random_state_is_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    call(folder / "prediction", folder / "sequences.h5", "--out", tmp_path / "a.gif", "--frames", 2)
    assert torch.equal(before, torch.get_rng_state())


def test_by_default_it_has_the_name_of_the_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "prediction.gif" in call(folder / "prediction", folder / "sequences.h5")
    assert len(frames_of(tmp_path / "prediction.gif")) == FRAMES - 1
    assert "prediction.gif exists" in call(folder / "prediction", folder / "sequences.h5", code=1)


@pytest.mark.parametrize(
    ("run", "data", "options", "message"),
    [
        ("static", "images.h5", [], "static infers static images: give a run that was trained on sequences"),
        ("static", "sequences.h5", [], "infers static images"),
        ("prediction", "images.h5", [], "static images"),
        ("prediction", "sequences.h5", ["--index", SEQUENCES], "--index is 4, but split 'test'.*4 sequences.*0 to 3"),
        ("prediction", "sequences.h5", ["--frames", FRAMES + 1], "--frames is 8.*7 frames.*from 2 to 7"),
        ("prediction", "sequences.h5", ["--frames", 1], "prediction takes at least 2"),
        ("denoising", "sequences.h5", ["--frames", 8], "denoising takes at least 1"),
        ("denoising", "sequences.h5", ["--rollout", 2], 'the task is "denoising"'),
        ("prediction", "sequences.h5", ["--split", "no"], "has no split 'no'"),
        ("prediction", "sequences.h5", ["--rollout", 10**12], "memory_limit"),
        ("nothing", "sequences.h5", [], "nothing"),
        ("prediction", "nothing.h5", [], "nothing.h5 does not exist"),
    ],
)
def test_mistakes_are_named(
    folder: Path, tmp_path: Path, run: str, data: str, options: list[Any], message: str
) -> None:
    out = tmp_path / "a.gif"
    output = call(folder / run, folder / data, "--out", out, *options, code=1)
    assert re.search(message, output.replace("\n", " ")), output
    assert not out.exists()


def test_files_that_cannot_be_written_are_named_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_text("mine")
    assert "exists already" in call("no-run", "no-data", "--out", tmp_path / "a.gif", code=1)
    assert (tmp_path / "a.gif").read_text() == "mine"
    assert "written as .gif or .mp4" in call("no-run", "no-data", "--out", tmp_path / "a.webm", code=1)
    with matplotlib.rc_context({"animation.ffmpeg_path": "no-such-program"}):
        assert "needs ffmpeg" in call("no-run", "no-data", "--out", tmp_path / "a.mp4", code=1)
