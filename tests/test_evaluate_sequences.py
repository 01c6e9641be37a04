"""Runs on sequences are scored over time, by `Run.evaluate` and on the command line."""

import json
import math

import h5py
import pytest
import torch
from fitting import SETTINGS, arrays, data_file, splits
from fitting import parts as static_parts
from test_cli import call

import pnem
from pnem.data import ImageDataset, write_hdf5
from pnem.errors import DataError, PnemError, StrategyError
from pnem.inference import ELBO, RNNEM, IterativeVI
from pnem.inference.rollouts import check_memory
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.scores import Scores
from pnem.sequence_scores import SequenceScores, score_sequences

SHAPE, FRAMES = (3, 4, 1), 7


def train(out=None, *, likelihood=None, strategy=RNNEM, prior="flat", **options):
    torch.manual_seed(0)
    likelihood = Bernoulli() if likelihood is None else likelihood
    model = SpatialMixture(decoders.Linear(5, SHAPE), likelihood, 3, pixel_prior=0.0, prior=prior)
    settings = SETTINGS | {"epochs": 1}
    fitted = strategy(model, iterations=3, **{"task": "prediction"} | options)
    return pnem.fit(model, fitted, splits(frames=FRAMES), objective=ELBO("all"), out=out, **settings)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "prediction"
    train(out)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return data_file(tmp_path_factory.mktemp("data") / "data.h5", frames=FRAMES)


@pytest.mark.parametrize("task", ["prediction", "denoising"])
def test_evaluate_scores_what_infer_finds(task):
    run = train(task=task)
    scores = run.evaluate(splits(frames=FRAMES), batch_size=10, limit=25)
    steps = FRAMES - (task == "prediction")
    assert isinstance(scores, SequenceScores)
    assert (scores.task, scores.sequences, len(scores.ari_by_step)) == (task, 25, steps)
    results = [(*each, None) for each in run.infer_batches(splits(frames=FRAMES), batch_size=10, limit=25)]
    expected = score_sequences(results, run.model, run.strategy)
    assert scores == expected


def test_a_rollout_sees_none_of_the_frames_that_it_predicts(directory):
    run = pnem.load(directory)
    features, groups = arrays(frames=FRAMES)
    rollout = 3
    scores = run.evaluate(ImageDataset(features, groups), rollout=rollout)
    # By hand: the first part is all that the strategy gets.
    batch = ImageDataset(features, groups)[:]
    torch.manual_seed(0)
    posterior = run.infer(batch.x[: FRAMES - rollout], keep_trace=False)
    rolled = run.rollout(posterior, batch.x[: FRAMES - rollout], rollout)
    assert rolled.gamma.shape == (rollout, 28, 3, 12)
    expected = score_sequences([(batch, posterior, rolled)], run.model, run.strategy)
    assert scores == expected
    assert len(scores.rollout_error) == len(scores.rollout_ari) == rollout
    assert len(scores.prediction_error_by_step) == FRAMES - rollout - 1

    changed = features.clone()
    changed[FRAMES - rollout :] = 1 - changed[FRAMES - rollout :]
    other = run.evaluate(ImageDataset(changed, groups), rollout=rollout)
    assert other.prediction_error == scores.prediction_error
    assert other.rollout_ari == scores.rollout_ari
    # The BCE of the same predictions against the inverted frames.
    both = [a + b for a, b in zip(scores.rollout_error, other.rollout_error, strict=True)]
    p = run.model.prediction(rolled.psi)
    exact = -(p.log() + (1 - p).log()).sum((-2, -1)).mean(-1)
    assert both == pytest.approx(exact.tolist(), rel=1e-5)


def test_iterations_are_the_steps_before_the_rollout(directory):
    run = pnem.load(directory)
    features, groups = arrays(frames=FRAMES)
    scores = run.evaluate(ImageDataset(features, groups), rollout=2, iterations=3)
    shorter = run.evaluate(ImageDataset(features[:6], groups[:6]), rollout=2)
    assert scores == shorter
    assert len(scores.ari_by_step) == 3


def test_pixels_that_are_not_bernoulli_have_a_squared_error():
    run = train(likelihood=Normal(0.5))
    scores = run.evaluate(splits(frames=FRAMES), rollout=1)
    (batch, posterior), *_ = run.infer_batches(splits(frames=FRAMES), iterations=5)
    error = (batch.x[1:6] - run.model.prediction(posterior.psi)).square().sum((-2, -1))
    assert scores.measure == "squared error"
    assert scores.prediction_error == pytest.approx(error[1:].mean().item(), rel=1e-5)
    assert any("squared error of the next frame" in title for title, *_ in scores.rows())


def test_rollouts_that_draw_are_reproduced_and_leave_the_random_state():
    run = train(strategy=IterativeVI, hidden=6, prior="standard_normal")
    before = torch.get_rng_state()
    first, again, other = (run.evaluate(splits(frames=FRAMES), rollout=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first.rollout_error != other.rollout_error
    assert not math.isnan(first.rollout_error_se[1])


def test_requests_that_sequences_cannot_serve_are_refused(directory):
    run, data = pnem.load(directory), splits(frames=FRAMES)
    for kwargs, message in (
        ({"rollout": 5}, r"2 steps of prediction .* rollout of 5 frames take sequences of 8 frames, .* have 7"),
        ({"rollout": 100}, "take sequences of 103 frames"),
        ({"rollout": 4, "iterations": 3}, "3 steps of prediction .* rollout of 4 frames take sequences of 8"),
        ({"iterations": 7}, "take sequences of 8 frames"),
        ({"iterations": 1}, "give at least 2 iterations"),
        ({"rollout": -1}, "rollout=-1"),
        ({"rollout": 1.5}, "rollout=1.5"),
    ):
        with pytest.raises(DataError, match=message):
            run.evaluate(data, **kwargs)
    assert run.evaluate(data, rollout=4).sequences == 28
    with pytest.raises(StrategyError, match=r"importance samples .* this run is on sequences"):
        run.evaluate(data, importance_samples=5)
    with pytest.raises(PnemError, match="static images"):
        run.evaluate(splits())
    with pytest.raises(DataError, match="take sequences of 3 frames, but these have 2"):
        run.evaluate(splits(frames=2))
    with pytest.raises(StrategyError, match="a rollout needs predictions of the next frame"):
        train(task="denoising").evaluate(data, rollout=2)
    model, strategy = static_parts()
    static = pnem.fit(model, strategy, splits(), objective=ELBO("ramp"), **SETTINGS | {"epochs": 1})
    assert isinstance(static.evaluate(splits()), Scores)
    with pytest.raises(StrategyError, match="a rollout is for strategies on sequences"):
        static.evaluate(splits(), rollout=2)


def test_the_command_prints_a_table_and_writes_json(directory, data, tmp_path):
    file = tmp_path / "scores.json"
    output = call("evaluate", directory, data, "--rollout", 2, "--json", file, "--device", "cpu", "--limit", 12)
    assert "12 test sequences" in output
    assert "over all steps but the first" in output
    for title in ("identity switches", "BCE of the next frame", "predictive log p", "rollout, frame 2: ARI"):
        assert title in output
    stored = json.loads(file.read_text())
    assert list(stored) == list(SequenceScores._fields)
    scores = pnem.load(directory).evaluate(data, rollout=2, limit=12)
    assert stored == json.loads(json.dumps(scores._asdict()))
    inside = call("evaluate", directory, data, "--json", file / "inside.json", code=1)
    assert "cannot write" in inside
    assert "AMI" not in inside
    assert "a rollout of 9 frames take sequences of 12 frames" in call(
        "evaluate", directory, data, "--rollout", 9, code=1
    )


def test_infer_writes_what_is_found_at_every_step(directory, data, tmp_path):
    out = tmp_path / "found.h5"
    options = ["--batch-size", 4, "--limit", 7, "--device", "cpu"]
    assert "prediction of 7 test sequences" in call("infer", directory, data, "--out", out, *options)
    run, (H, W, C) = pnem.load(directory), SHAPE
    found = [posterior for _, posterior in run.infer_batches(data, batch_size=4, limit=7)]
    with h5py.File(out) as file:
        written = {name: torch.from_numpy(array[:]) for name, array in file.items()}
    S = FRAMES - 1
    assert {name: tuple(value.shape) for name, value in written.items()} == {
        "gamma": (S, 7, 3, H, W),
        "labels": (S, 7, H, W),
        "psi": (S, 7, 3, H, W, C),
        "theta": (S, 7, 3, 5),
        "prediction": (S, 7, H, W, C),
    }
    for name, values in (
        ("gamma", [posterior.gamma for posterior in found]),
        ("labels", [posterior.labels.short() for posterior in found]),
        ("psi", [posterior.mean for posterior in found]),
        ("theta", [posterior.theta for posterior in found]),
        ("prediction", [run.model.prediction(posterior.psi, posterior.log_mixing) for posterior in found]),
    ):
        expected = torch.cat(values, 1)
        assert torch.equal(written[name].reshape(expected.shape), expected)


def test_nan_is_null_in_json_also_along_curves(directory, tmp_path):
    features, groups = arrays(frames=FRAMES, count=3)
    groups[4] = 0
    write_hdf5(tmp_path / "x.h5", {"test": (features, groups)})
    call("evaluate", directory, tmp_path / "x.h5", "--json", tmp_path / "with.json", "--device", "cpu")
    stored = json.loads((tmp_path / "with.json").read_text(), parse_constant=pytest.fail)
    assert [value is None for value in stored["ari_by_step"]] == [False, False, False, True, False, False]
    write_hdf5(tmp_path / "y.h5", {"test": (features, None)})
    output = call("evaluate", directory, tmp_path / "y.h5", "--json", tmp_path / "without.json", "--device", "cpu")
    stored = json.loads((tmp_path / "without.json").read_text(), parse_constant=pytest.fail)
    assert stored["ami"] is stored["switches"] is None
    assert stored["ari_by_step"] == []
    assert "–" in output


def test_a_rollout_beyond_the_memory_is_refused_before_anything_is_inferred(directory, data, monkeypatch):
    run = pnem.load(directory)
    monkeypatch.setattr(type(run), "infer", lambda *_, **__: pytest.fail("it has inferred"))
    monkeypatch.setitem(check_memory.__kwdefaults__, "memory_limit", 100)
    with pytest.raises(StrategyError, match=r"a rollout of 2 frames of 20 sequences takes .* smaller batch_size"):
        run.evaluate(data, rollout=2, batch_size=20)
