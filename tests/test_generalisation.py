"""A run on other numbers of objects and components than in training."""

import json

import pytest
import torch
from cases import sequences
from typer.testing import CliRunner

import pnem
from pnem.cli import app
from pnem.data import ImageDataset, write_hdf5
from pnem.errors import DataError, ModelError, RunError
from pnem.generalisation import generalise
from pnem.inference import RNNEM
from pnem.models import Bernoulli, SpatialMixture, decoders


def dataset(objects: int, frames: int = 4, count: int = 8) -> ImageDataset:
    features = sequences(frames, count).float().unflatten(2, (3, 4))
    groups = torch.randint(0, objects + 1, features.shape)
    groups[0, 0, 0, 0, 0] = objects
    return ImageDataset(features, groups)


def trained(task: str = "prediction", frames: int = 4, out=None, **options) -> pnem.Run:
    model = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 3, pixel_prior=0.0, **options)
    data = {"training": dataset(3, frames), "validation": dataset(3, frames)}
    strategy = RNNEM(model, iterations=3, task=task)
    return pnem.fit(model, strategy, data, epochs=1, batch_size=8, device="cpu", progress=False, out=out)


@pytest.mark.parametrize(("task", "frames"), [("prediction", 4), ("static", 1)])
def test_scores_every_data_set_with_every_number_of_components(task, frames):
    run = trained(task, frames)
    data = {"three": dataset(3, frames), "five": dataset(5, frames)}
    found = generalise(run, data, [2, 3], seed=4)
    assert found.trained_components == 3
    assert list(found.table[["data", "objects", "components"]].itertuples(index=False, name=None)) == [
        ("three", 3, 2), ("three", 3, 3), ("five", 5, 2), ("five", 5, 3),
    ]  # fmt: skip
    for row in found.table.itertuples():
        scores = run.with_components(row.components).evaluate(data[row.data], seed=4)
        error = scores.bce if task == "static" else scores.prediction_error
        assert (row.ami, row.ari, row.error) == pytest.approx((scores.ami, scores.ari, error), abs=0)
        assert row.count == 8
    assert run.model.num_components == 3


def test_refuses_what_cannot_be_scored():
    run = trained()
    with pytest.raises(DataError, match="at least one data set"):
        generalise(run, {}, [3])
    with pytest.raises(DataError, match="at least one data set and one number"):
        generalise(run, {"three": dataset(3)}, [])
    with pytest.raises(ModelError, match="num_components must be at least 1"):
        generalise(run, {"three": dataset(3)}, [0])
    with pytest.raises(DataError, match="mute has no groups"):
        generalise(run, {"mute": ImageDataset(sequences(4, 2).unflatten(2, (3, 4)))}, [3])
    with pytest.raises(RunError, match="only models with uniform ones"):
        generalise(trained(mixing="learned"), {"three": dataset(3)}, [4])


def test_one_command_prints_and_writes_the_table(tmp_path):
    run = trained(out=tmp_path / "run")
    for objects in (3, 4):
        data = dataset(objects)
        x, groups = (value.unflatten(2, (3, 4)).numpy() for value in (data[:].x, data[:].groups.unsqueeze(-1)))
        write_hdf5(tmp_path / f"{objects}.h5", {"test": (x, groups)})
    files = [str(tmp_path / f"{objects}.h5") for objects in (3, 4)]
    command = ["generalise", str(tmp_path / "run"), *files, "-k", "3", "-k", "5", "--json", str(tmp_path / "out.json")]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert "trained with K = 3" in result.output
    assert "K = 5" in result.output
    assert f"of {len(data)} of the test split" in result.output
    assert not result.output.startswith("\n")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    expected = generalise(run, {name: name for name in files}, [3, 5]).table
    assert [row["ami"] for row in rows] == pytest.approx(list(expected["ami"]))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 1
    assert "exists already" in again.output
    inside = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "out.json" / "inside.json")])
    assert inside.exit_code == 1
    assert "cannot write" in inside.output
    assert "AMI" not in inside.output
