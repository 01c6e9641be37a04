"""The command line: what each command writes, and one clear message for every mistake."""

import functools
import json
import os
import signal
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
import torch
from fitting import arrays, data_file
from typer.testing import CliRunner

import pnem
from pnem import cli
from pnem.cli import app
from pnem.data import ImageDataset, write_hdf5
from pnem.presets import PRESETS, STRATEGIES, find_preset
from pnem.scores import Scores

TRAINING = ["--components", "3", "--iterations", "2", "--epochs", "1", "--batch-size", "8", "--device", "cpu"]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
        assert result.stderr.strip()
        if code == 1:
            assert result.stderr.startswith("error: ")
    return result.output


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_file(tmp_path_factory.mktemp("data") / "data.h5")


@pytest.fixture(scope="module")
def run(data):
    out = data.parent / "run"
    assert "pnem evaluate" in call("train", data, "--strategy", "rnn-em", "--out", out, *TRAINING)
    return out


def test_version_and_help():
    assert call("--version").startswith("pnem 0")
    for command in (
        [],
        ["data", "static-shapes"],
        ["data", "mnist"],
        ["train"],
        ["evaluate"],
        ["infer"],
        ["diagnose"],
        ["animate"],
        ["compare"],
        ["bench"],
        ["demo"],
    ):
        assert "Example: pnem" in call(*command, "--help").replace("`", "")


def test_data_are_written_once(tmp_path):
    arguments = ["data", "static-shapes", tmp_path / "s.h5", "--objects", 2, "--size", 20, "--train", 4, "--valid", 3]
    arguments += ["--test", 2, "--seed", 1]
    assert "4 training" in call(*arguments)
    assert ImageDataset.from_hdf5(tmp_path / "s.h5", "test").image_shape == (20, 20, 1)
    before = (tmp_path / "s.h5").read_bytes()
    assert "exists" in call(*arguments, code=1)
    assert (tmp_path / "s.h5").read_bytes() == before


def test_digits_are_written_once(tmp_path):
    arguments = ["data", "mnist", tmp_path / "d.h5", "--train", 30, "--valid", 20, "--test", 10, "--grey"]
    assert "30 training" in call(*arguments)
    features = ImageDataset.from_hdf5(tmp_path / "d.h5", "test", with_groups=False)[:].x
    assert features.shape == (10, 784, 1)
    assert ((features > 0) & (features < 1)).any()
    assert "exists" in call(*arguments, code=1)
    assert "5000" in call("data", "mnist", tmp_path / "e.h5", "--train", 4001, code=1)
    assert not (tmp_path / "e.h5").exists()


def test_grey_images_without_groups_are_trained_on_and_scored(tmp_path):
    data, out = tmp_path / "x.h5", tmp_path / "run"
    features = torch.rand(1, 20, 3, 4, 1)
    write_hdf5(data, dict.fromkeys(("training", "validation", "test"), (features, None)))
    output = call("train", data, "--strategy", "rnn-em", "--out", out, *TRAINING)
    assert "ARI" not in output
    output = call("evaluate", out, data, "--json", tmp_path / "scores.json", "--device", "cpu")
    (ami,) = [line for line in output.splitlines() if line.startswith("│ AMI")]
    assert ami.count("–") == 2
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["ami"] is scores["ari"] is scores["ari_se"] is None
    assert scores["log_evidence"] < 0
    assert scores["images"] == 20


def test_evaluate_prints_a_table_and_writes_json(run, data, tmp_path):
    scores = tmp_path / "scores.json"
    output = call("evaluate", run, data, "--limit", 10, "--json", scores, "--device", "cpu")
    assert "AMI" in output
    assert "nats per image" in output
    assert "no bound" in output
    assert "ELBO" not in output
    stored = json.loads(scores.read_text())
    assert list(stored) == list(Scores._fields)
    assert stored["images"] == 10
    assert stored["elbo"] is stored["log_marginal"] is None
    assert "exists already" in call("evaluate", run, data, "--json", scores, code=1)


def test_infer_writes_predictions_also_for_images_without_groups(run, tmp_path):
    write_hdf5(tmp_path / "x.h5", {"test": (arrays()[0], None)})
    out = tmp_path / "pred.h5"
    call("infer", run, tmp_path / "x.h5", "--out", out, "--limit", 5)
    with h5py.File(out) as file:
        gamma, labels, psi, theta = (file[name][:] for name in ("gamma", "labels", "psi", "theta"))
        assert "theta_scale" not in file
    assert gamma.shape == (5, 3, 3, 4)
    assert psi.shape == (5, 3, 3, 4, 1)
    assert theta.shape == (5, 3, 250)
    np.testing.assert_array_equal(labels, gamma.argmax(1))
    np.testing.assert_allclose(gamma.sum(1), 1, rtol=1e-5)
    assert ((psi >= 0) & (psi <= 1)).all()
    assert "exists already" in call("infer", run, tmp_path / "x.h5", "--out", out, code=1)
    assert "cannot write" in call("infer", run, tmp_path / "x.h5", "--out", out / "inside.h5", code=1)


VAE_TRAINING = ["--strategy", "vae", "--epochs", "2", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def vae(data):
    out = data.parent / "vae"
    call("train", data, "--out", out, *VAE_TRAINING)
    return out


def test_a_vae_is_scored_by_its_bounds(vae, data, tmp_path):
    scores = tmp_path / "scores.json"
    options = ["--importance-samples", 50, "--json", scores, "--device", "cpu"]
    output = call("evaluate", vae, data, *options)
    assert "log p(x), importance-weighted bound, L = 50" in output
    assert "ELBO" in output
    stored = json.loads(scores.read_text())
    assert stored["importance_samples"] == 50
    # By how much the means of bounds on the same 28 images may be apart the wrong way, in standard errors.
    assert stored["elbo"] <= stored["log_marginal"] + 3 * stored["elbo_se"]
    assert stored["log_marginal"] < 0
    assert 0 < stored["log_marginal_se"] < 5
    again = tmp_path / "again.json"
    call("evaluate", vae, data, *options[:2], "--json", again, "--device", "cpu")
    assert again.read_text() == scores.read_text()


def test_inference_by_a_vae_writes_its_normals(vae, data, tmp_path):
    out = tmp_path / "pred.h5"
    assert "theta" in call("infer", vae, data, "--out", out, "--device", "cpu")
    with h5py.File(out) as file:
        assert set(file) == {"gamma", "labels", "psi", "theta", "theta_scale"}
        theta, scale, psi = (torch.from_numpy(file[name][:]) for name in ("theta", "theta_scale", "psi"))
    run = pnem.load(vae)
    assert theta.shape == scale.shape == (28, 1, run.model.latent_features)
    q = run.infer(arrays()[0][0]).q
    torch.testing.assert_close(q.mean, theta)
    torch.testing.assert_close(q.stddev, scale)
    torch.testing.assert_close(run.model.likelihood.mean(run.model.decode(theta)).flatten(), psi.flatten())


def test_a_run_is_scored_and_inferred_with_another_strategy(vae, data, tmp_path):
    out = tmp_path / "refined.h5"
    options = ["--strategy", "semi-amortised", "--limit", 5, "--batch-size", 3, "--device", "cpu"]
    assert "by semi-amortised on 5 test images" in " ".join(call("evaluate", vae, data, *options).split())
    call("infer", vae, data, "--out", out, *options)
    with h5py.File(out) as file:
        assert file["theta_scale"].shape[0] == 5
    assert "choose one of semi-amortised" in call("evaluate", vae, data, "--strategy", "hmc", code=1)


def test_requests_that_do_not_fit_a_strategy_are_one_message(run, vae, data, tmp_path):
    out = tmp_path / "out"
    for command in (["evaluate", vae, data], ["infer", vae, data, "--out", out]):
        for option in ("--restarts", "--iterations"):
            assert "in one pass: leave restarts" in call(*command, option, 4, code=1)
    assert "importance_samples=0: give at least 1" in call("evaluate", vae, data, "--importance-samples", 0, code=1)
    message = call("evaluate", run, data, "--importance-samples", 5, code=1)
    assert "RNNEM" in message
    assert "width" in message
    assert not list(tmp_path.iterdir())


def test_the_default_preset_is_the_strategys_own_and_help_names_all_strategies_and_presets():
    output = " ".join(call("train", "--help").replace("│", "").split())
    for strategy in STRATEGIES:
        assert find_preset(strategy).strategy == strategy
        assert strategy in output
    for preset in PRESETS:
        assert preset in output
    assert find_preset("vae") is find_preset("vae", "vae-mnist")
    assert find_preset("rnn-em") is find_preset("rnn-em", "rnn-em")


@pytest.mark.slow
def test_a_full_disk_during_infer_is_one_message_and_leaves_no_file(run, data, tmp_path):
    out = tmp_path / "pred.h5"
    command = f"ulimit -f 4; {sys.executable} -m pnem.cli infer {run} {data} --out {out}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: cannot write {out}")
    assert not list(tmp_path.iterdir())


def test_resuming_at_the_command_line(run, data):
    base = ["train", data, "--strategy", "rnn-em", "--out", run]
    assert "--resume" in call(*base, *TRAINING, code=1)
    assert "seed = 0, but now it is 1" in call(*base, *TRAINING, "--seed", 1, "--resume", code=1)
    assert "trained 1 epochs" in call(*base, *TRAINING, "--resume")
    assert "no run directory" in call(*base[:-1], run.parent / "none", *TRAINING, "--resume", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "nem"], "unknown strategy 'nem': choose one of rnn-em, n-em"),
        (["--strategy", "rnn-em", "--preset", "best"], "unknown preset 'best'"),
        (["--strategy", "rnn-em", "--preset", "n-em"], "is for the strategy"),
        (["--strategy", "vae", "--preset", "rnn-em"], "is for the strategy"),
        (["--strategy", "vae", "--components", "0"], "num_components must be at least 1"),
        (["--strategy", "vae", "--iterations", "3"], "in one iteration, not 3"),
        (["--strategy", "rnn-em", "--components", "0"], "num_components must be at least 1"),
        (["--strategy", "rnn-em", "--iterations", "0"], "iterations must be at least 1"),
        (["--strategy", "rnn-em", "--epochs", "-1"], "epochs must be"),
        (["--strategy", "rnn-em", "--batch-size", "-1"], "batch_size must be"),
        (["--strategy", "rnn-em", "--batch-size", "64"], "fewer than a batch"),
        (["--strategy", "rnn-em", "--device", "tpu"], "unknown device"),
        (["--strategy", "rnn-em", "--device", "cuda:77"], "this machine has"),
        (["--strategy", "rnn-em", "--precision", "half"], "unknown precision"),
    ],
)
def test_mistakes_in_training_are_one_message_and_write_nothing(data, tmp_path, arguments, message):
    assert message in call("train", data, "--out", tmp_path / "run", *arguments, code=1)
    assert not (tmp_path / "run").exists()


def test_mistakes_about_files_are_one_message(run, data, tmp_path):
    foreign = tmp_path / "foreign.h5"
    foreign.write_text("not HDF5")
    other = data_file(tmp_path / "other.h5", shape=(5, 4, 1))
    out = tmp_path / "out"
    assert "does not exist" in call("train", "no.h5", "--strategy", "rnn-em", "--out", out, code=1)
    assert "not an HDF5 file" in call("train", foreign, "--strategy", "rnn-em", "--out", out, code=1)
    assert "the model is for (3, 4, 1)" in call("evaluate", run, other, code=1)
    assert "no split 'tset'" in call("evaluate", run, data, "--split", "tset", code=1)
    assert "no run directory" in call("evaluate", "nowhere", data, code=1)
    assert "not written by pnem" in call("infer", tmp_path, data, "--out", out, code=1)
    assert "limit" in call("infer", run, data, "--out", out, "--limit", 0, code=1)
    assert not out.exists()
    assert "exists already" in call("demo", "--out", tmp_path, code=1)


def test_usage_errors_have_exit_code_2(data):
    train = ("train", data, "--strategy", "rnn-em", "--out", "x")
    assert "--strategy" in call("train", data, code=2)
    assert "--epochs" in call(*train, "--epochs", "many", code=2)
    assert "--seed" in call(*train, "--seed", "-1", code=2)
    assert "No such command 'fly'" in call("fly", code=2)


@pytest.mark.slow
def test_ctrl_c_keeps_the_run_and_says_how_to_resume(data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "pnem.cli", "train", str(data), "--strategy", "rnn-em", "--out", str(out)]
    command += ["--batch-size", "4", "--epochs", "100000", "--iterations", "2"]
    # What runs in the background of a shell ignores Ctrl-C, and so would its children.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=listen, **pipes) as process:
        try:
            while process.poll() is None and not (out / "checkpoints/last.ckpt").exists():
                pass
            os.kill(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert (out / "checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_a_small_demo(tmp_path):
    output = call("demo", "--small", "--device", "cpu", "--out", tmp_path / "demo")
    assert "RNN-EM" in output
    assert {path.suffix for path in (tmp_path / "demo").iterdir()} >= {".h5", ".png"}


def test_a_warning_is_one_line(monkeypatch, capsys):
    def command(*_, **__):
        warnings.simplefilter("always")
        warnings.warn("not as fast as it might be", stacklevel=1)

    monkeypatch.setattr(cli, "app", command)
    shown = warnings.showwarning
    cli.main(["train"])
    assert capsys.readouterr().err == "warning: not as fast as it might be\n"
    assert warnings.showwarning is shown
