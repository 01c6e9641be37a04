"""``pnem compare``: what it prints and writes, and one clear message for every mistake."""

import json
import shutil

import pytest
import torch
from fitting import SHAPE, data_file, train
from typer.testing import CliRunner

import pnem
from pnem.cli import app
from pnem.inference import VAE
from pnem.models import Bernoulli, SpatialMixture, decoders


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
        assert result.stderr.startswith("error: ") or code == 2
        return result.stderr
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_file(tmp_path_factory.mktemp("data") / "data.h5")


@pytest.fixture(scope="module")
def runs(data):
    """Directories of two VAEs with the same name, and of an RNN-EM."""
    paths = [data.parent / name for name in ("a/vae", "b/vae", "rnn-em")]
    for seed, path in enumerate(paths[:2]):
        torch.manual_seed(seed)
        model = SpatialMixture(decoders.MLP(3, SHAPE, hidden=(7,)), Bernoulli(), 1, prior="standard_normal")
        pnem.fit(model, VAE(model), data, out=path, epochs=1, batch_size=8, device="cpu", progress=False)
    train(paths[2], data=data, epochs=1)
    return paths


def test_it_prints_the_tables_and_writes_json_and_a_figure(runs, data, tmp_path):
    options = ["--limit", 12, "--batch-size", 6, "--importance-samples", 30, "--device", "cpu"]
    files = ["--json", tmp_path / "c.json", "--figure", tmp_path / "c.pdf"]
    output = call(*runs[:2], data, *options, *files)
    assert "2 runs on 12 test images" in output
    assert "Differences to a/vae" in output
    stored = json.loads((tmp_path / "c.json").read_text())
    assert [row["run"] for row in stored["table"]] == ["a/vae", "b/vae"]
    assert stored["images"] == 12
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    for option in (files[:2], files[2:]):
        assert "exists already" in call(*runs[:2], data, *option, code=1)


def test_nats_that_do_not_compare_are_refused_but_groupings_compare(runs, data):
    message = call(*runs, data, code=1)
    assert "rnn-em" in message
    assert "--measures grouping" in message
    output = call(*runs, data, "--measures", "grouping", "--split", "validation", "--budget", 60, "--device", "cpu")
    assert "3 runs on 28 validation images: mean ± standard error\n" in output
    assert "ELBO" not in output


def test_mistakes_are_one_message_and_write_nothing(runs, data, tmp_path):
    a, b, _ = runs
    assert "1 run directory before the data" in call(a, data, code=1)
    for order in ((a, b), (a, data, b), (a,)):
        assert f"the last argument, {order[-1]}, is a directory" in call(*order, code=1)
    for option in ("--json", "--figure"):
        assert f"{data} is not a folder" in call(a, b, data, option, data / "c.png", code=1)
    assert "given 2 times" in call(a, a.parent / ".." / "a" / "vae", data, code=1)
    assert "no run directory" in call(a, tmp_path / "none", data, code=1)
    assert "does not exist" in call(a, b, tmp_path / "no.h5", code=1)
    assert "no split 'tset'" in call(a, b, data, "--split", "tset", code=1)
    assert "measures must be one of" in call(a, b, data, "--measures", "nats", code=1)
    assert "budget" in call(a, b, data, "--budget", -1, code=1)
    assert ".png, .pdf or .svg" in call(a, b, data, "--figure", tmp_path / "c.docx", code=1)
    assert "--batch-size" in call(a, b, data, "--batch-size", 0, code=2)
    call(code=2)
    assert "Example: pnem compare" in call("--help").replace("`", "")
    assert not list(tmp_path.iterdir())


def test_a_run_directory_may_move(runs, data, tmp_path):
    shutil.copytree(runs[0], tmp_path / "moved")
    output = call(tmp_path / "moved", runs[1], data, "--limit", 3, "--importance-samples", 30, "--device", "cpu")
    assert "Differences to moved" in output
