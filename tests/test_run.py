"""Run directories: what is saved comes back exactly, nothing is overwritten, and no file can run code."""

import json
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from fitting import SETTINGS, arrays, parts, splits, train, weights

import pnem
from pnem.data import ImageDataset, fingerprint
from pnem.errors import DataError, DeviceError, RunError


@pytest.fixture
def directory(tmp_path):
    train(tmp_path / "run", epochs=1)
    return tmp_path / "run"


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_saved_run_comes_back_exactly(tmp_path):
    run = train(epochs=2)
    assert run.directory is None
    run.save(tmp_path / "saved")
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = pnem.load(tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(again), strict=True))
    assert again.history.equals(run.history)
    assert again.settings == run.settings
    assert again.directory == run.directory == tmp_path / "saved"
    assert again.evaluate(splits()) == run.evaluate(splits())
    x = arrays()[0][0]
    torch.manual_seed(7)
    first = run.infer(x, restarts=2)
    torch.manual_seed(7)
    second = again.infer(x.flatten(1, 2), restarts=2)
    assert all(torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))


def test_nothing_is_written_over(directory):
    before = contents(directory)
    with pytest.raises(RunError, match="exists already"):
        train(directory)
    with pytest.raises(RunError, match="exists already"):
        train(epochs=1).save(directory)
    assert contents(directory) == before
    file = directory.parent / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match="exists already"):
        train(file)
    with pytest.raises(RunError, match="cannot create"):
        train(file / "run")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 7}, "batch_size = 8, but now it is 7"),
        ({"seed": 4}, "seed = 3, but now it is 4"),
        ({"data": splits(count=20)}, "training = 28, but now it is 20"),
    ],
)
def test_a_run_is_only_resumed_with_its_own_settings(directory, change, message):
    before = contents(directory)
    with pytest.raises(RunError, match=message):
        train(directory, resume=True, **change)
    assert contents(directory) == before


def test_a_run_is_only_resumed_with_the_images_it_was_started_with(directory):
    features, groups = arrays()
    with pytest.raises(RunError, match="other training images"):
        train(directory, resume=True, data=splits() | {"training": ImageDataset(1 - features, groups)})


def test_a_run_that_is_older_than_fingerprints_loads_and_is_resumed(directory):
    path = directory / "settings.json"
    settings = json.loads(path.read_text())
    assert settings["data"].pop("fingerprint") == fingerprint(splits()["training"])
    path.write_text(json.dumps(settings))
    assert "fingerprint" not in pnem.load(directory).settings.data
    assert len(train(directory, resume=True, epochs=2).history) == 2


def test_a_run_of_another_shape_or_model_is_not_resumed(directory):
    before = contents(directory)
    for kwargs, message in (
        ({"shape": (4, 4, 1)}, r"\[3, 4, 1\], not \[4, 4, 1\]"),
        ({"features": 6}, "model decoder"),
    ):
        model, strategy = parts(**kwargs)
        data = splits(shape=model.decoder.image_shape)
        with pytest.raises(RunError, match=message):
            pnem.fit(model, strategy, data, out=directory, resume=True, **SETTINGS)
    assert contents(directory) == before


def test_a_run_saved_without_checkpoints_is_not_resumed(tmp_path):
    train(epochs=1).save(tmp_path / "saved")
    with pytest.raises(RunError, match="cannot be resumed"):
        train(tmp_path / "saved", resume=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize("name", ["settings.json", "weights.safetensors", "history.csv"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_damaged_files_are_reported(directory, name, damage):
    path = directory / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: -200 if name != "history.csv" else 20])
    else:
        path.write_bytes(b"\x00\xff\xfe not ours" if damage == "foreign" else b"")
    with pytest.raises(RunError, match=r"corrupt|cannot be built"):
        pnem.load(directory)


def test_damaged_checkpoints_are_reported(directory):
    last = directory / "checkpoints/last.ckpt"
    for content in (last.read_bytes()[:-500], b"", b"not a checkpoint"):
        last.write_bytes(content)
        with pytest.raises(RunError, match=r"last.ckpt is corrupt"):
            train(directory, resume=True)


def test_missing_directories_and_files_are_reported(directory):
    with pytest.raises(RunError, match="no run directory"):
        pnem.load(directory / "nowhere")
    with pytest.raises(RunError, match="not written by pnem"):
        pnem.load(directory.parent)
    with pytest.raises(DeviceError, match="unknown device"):
        pnem.load(directory, device="abacus")
    (directory / "weights.safetensors").unlink()
    pnem.load(directory)
    (directory / "checkpoints/best.ckpt").unlink()
    with pytest.raises(RunError, match="has no weights"):
        pnem.load(directory)


def test_weights_of_another_model_are_refused(directory):
    model, strategy = parts(features=6)
    other = pnem.fit(model, strategy, splits(), out=directory.parent / "other", **SETTINGS | {"epochs": 1})
    for name in ("weights.safetensors", "checkpoints/last.ckpt"):
        (directory / name).write_bytes((other.directory / name).read_bytes())
    with pytest.raises(RunError, match="do not belong to this run's model"):
        pnem.load(directory)
    with pytest.raises(RunError, match="do not belong to this run's model"):
        train(directory, resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "os.system", "command": "true"}},
        {"model": {"type": ["pnem"]}},
        {"model": {"type": "pnem.models.likelihoods.Bernoulli"}},
        {"strategy": {"type": "pnem.inference.rnn_em.RNNEM", "iterations": "many"}},
        {"strategy": {"type": "pnem.inference.rnn_em.RNNEM", "iterations": 0}},
        {"strategy": {"type": "pnem.inference.rnn_em.RNNEM", "surprise": 1}},
        {"strategy": "pnem.inference.rnn_em.RNNEM"},
        {"image_shape": 7},
        {"format": 99},
        {"surprise": 1},
    ],
    ids=str,
)
def test_settings_that_pnem_did_not_write_are_refused(directory, change):
    path = directory / "settings.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=r"cannot be built|corrupt|format"):
        pnem.load(directory)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("form", ["pickle", "zip", "plain pickle"])
def test_loading_never_runs_code(directory, form):
    crater = directory.parent / "crater"
    best, last = (directory / "checkpoints" / name for name in ("best.ckpt", "last.ckpt"))
    if form == "plain pickle":
        best.write_bytes(pickle.dumps(Bomb(crater)))
    else:
        torch.save({"state_dict": Bomb(crater)}, best, _use_new_zipfile_serialization=form == "zip")
        assert zipfile.is_zipfile(best) == (form == "zip")
    last.write_bytes(best.read_bytes())
    bomb = best.read_bytes()
    weights_file = directory / "weights.safetensors"
    weights_file.unlink()
    for attempt in (lambda: pnem.load(directory), lambda: train(directory, resume=True)):
        with pytest.raises(RunError, match="corrupt, or was not written by pnem") as caught:
            attempt()
        assert "weights_only" not in str(caught.value)
    weights_file.write_bytes(bomb)
    with pytest.raises(RunError, match="corrupt"):
        pnem.load(directory)
    assert not crater.exists()


def test_bad_requests_of_a_run_are_refused(directory):
    run = pnem.load(directory)
    for kwargs, message in (
        ({"limit": 0}, "limit"),
        ({"batch_size": 0}, "batch_size"),
        ({"restarts": 0}, "restarts"),
        ({"iterations": 0}, "iterations"),
        ({"split": "tset"}, "tset"),
    ):
        with pytest.raises(pnem.errors.PnemError, match=message):
            run.evaluate(splits(), **kwargs)
    with pytest.raises(DataError, match=r"the model is for \(3, 4, 1\)"):
        run.evaluate(splits(shape=(4, 4, 1)))
    with pytest.raises(DataError, match="sequences"):
        run.evaluate(splits(frames=2))


def test_scores_do_not_depend_on_what_comes_after_a_batch_and_limits_count(directory):
    run = pnem.load(directory)
    assert run.evaluate(splits(), limit=10).images == 10
    assert run.evaluate(splits(), limit=8, batch_size=8) == run.evaluate(
        {"test": splits()["test"].limited(8)}, batch_size=8
    )


@pytest.mark.slow
def test_importing_pnem_is_light():
    code = """
import sys, time
import pyro
start = time.process_time()
import pnem
import pnem.models, pnem.inference
seconds = time.process_time() - start
heavy = {"lightning", "matplotlib", "arviz"} & set(sys.modules)
assert not heavy, heavy
print(seconds)
"""
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) <= 0.3
