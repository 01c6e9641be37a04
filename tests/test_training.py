"""What `fit` promises: exact resuming, nothing lost, nothing overwritten, clear errors."""

import json
import os
import resource
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from fitting import SHAPE, arrays, parts, splits, train, weights

import pnem
from pnem import unrolling
from pnem.data import ImageDataset
from pnem.errors import DataError, DeviceError, PnemError, RunError
from pnem.inference import ELBO, NEM, RNNEM, BitFlip, NEMLoss
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.settings import Settings, TrainingSettings
from pnem.training_module import TrainingModule


class Interrupting(ImageDataset):
    """Images that press Ctrl-C when batch number `at` is asked for, after those that the fingerprint is of."""

    def __init__(self, at: int):
        super().__init__(*arrays())
        self.countdown = at + 1

    def __getitems__(self, indices):
        self.countdown -= 1
        if self.countdown == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitems__(indices)


def interrupted(at: int) -> dict[str, ImageDataset]:
    return splits() | {"training": Interrupting(at)}


def without_seconds(run) -> pd.DataFrame:
    return run.history.drop(columns="seconds")


def assert_same_run(a, b):
    pd.testing.assert_frame_equal(without_seconds(a), without_seconds(b), check_exact=True)
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def last_weights(directory) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


# 28 images in batches of 8: 3 steps an epoch, so that step 5 is in the middle of epoch 2.
def test_an_interrupted_and_resumed_training_ends_exactly_as_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train(tmp_path / "cut", data=interrupted(5))
    assert signal.getsignal(signal.SIGINT) is handler
    # Its directory may move in between.
    (tmp_path / "cut").rename(tmp_path / "moved")
    resumed = train(tmp_path / "moved", resume=True)
    assert len(whole.history) == 4
    assert_same_run(resumed, whole)
    assert_same_run(pnem.load(tmp_path / "moved"), whole)
    cut, uncut = last_weights(tmp_path / "moved"), last_weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], uncut[name]) for name in uncut)


def test_early_stopping_is_resumed_with_its_count(tmp_path):
    settings = {"epochs": 9, "patience": 2, "learning_rate": 1e-12, "schedule": "constant"}
    # With one seed for all validations, a model that does not move does not improve.
    whole = train(tmp_path / "whole", **settings)
    assert 3 <= len(whole.history) < 9
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", data=interrupted(8), **settings)
    assert_same_run(train(tmp_path / "cut", resume=True, **settings), whole)
    assert_same_run(train(tmp_path / "cut", resume=True, **settings), whole)
    more = train(tmp_path / "cut", resume=True, **settings | {"patience": 3})
    assert len(more.history) == len(whole.history) + 1


def test_a_finished_training_can_be_resumed_for_more_epochs(tmp_path):
    settings = {"schedule": "constant"}
    whole = train(tmp_path / "whole", **settings)
    train(tmp_path / "half", epochs=2, **settings)
    assert_same_run(train(tmp_path / "half", resume=True, **settings), whole)


def test_a_run_of_an_older_version_that_lacks_an_argument_is_resumed(tmp_path):
    train(tmp_path / "old", epochs=1)
    path = tmp_path / "old" / "settings.json"
    settings = json.loads(path.read_text())
    assert settings["strategy"].pop("initial") == "random"
    assert settings["model"].pop("prior") == "flat"
    path.write_text(json.dumps(settings))
    assert len(train(tmp_path / "old", resume=True, epochs=2).history) == 2


def test_an_interruption_of_a_resumed_training_leaves_the_best_so_far_loadable(tmp_path):
    train(tmp_path / "run", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", resume=True, data=interrupted(5))
    assert len(pnem.load(tmp_path / "run").history) == 3


def test_an_interruption_in_the_first_epoch_keeps_nothing_and_says_so(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="nothing was kept"):
        train(tmp_path / "run", data=interrupted(2))
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyboardInterrupt, match="out="):
        train(data=interrupted(5))


def test_an_interruption_while_the_run_directory_is_made_leaves_none(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Settings, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_interruption_works_as_the_first():
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(data=interrupted(2))


def test_same_seed_same_run_and_another_seed_another_run():
    assert_same_run(train(epochs=1), train(epochs=1))
    assert not torch.equal(weights(train(epochs=1))[0], weights(train(epochs=1, seed=4))[0])


def test_training_and_scoring_neither_change_nor_follow_torchs_random_state():
    model, strategy = parts()
    settings = {"epochs": 1, "batch_size": 8, "device": "cpu", "progress": False}
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = pnem.fit(model, strategy, splits(), **settings)
    scores = first.evaluate(splits(), batch_size=5)
    assert torch.equal(torch.get_rng_state(), before)
    model, strategy = parts()
    torch.manual_seed(12)
    second = pnem.fit(model, strategy, splits(), **settings)
    assert_same_run(first, second)
    torch.manual_seed(13)
    assert second.evaluate(splits(), batch_size=5) == scores
    for _ in second.infer_batches(splits(), batch_size=20):
        state = torch.get_rng_state()
        torch.manual_seed(13)
        assert torch.equal(torch.get_rng_state(), state)


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_go_on(tmp_path):
    settings = {"schedule": "constant"}
    whole = train(tmp_path / "whole", **settings)
    train(tmp_path / "run", epochs=2, **settings)
    last = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    best = (tmp_path / "run/checkpoints/best.ckpt").read_bytes()
    with no_file_larger_than(2_000), pytest.raises(RunError, match=r"cannot write .*ckpt.*unchanged"):
        train(tmp_path / "run", resume=True, **settings)
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == last
    assert (tmp_path / "run/checkpoints/best.ckpt").read_bytes() == best
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]
    assert_same_run(train(tmp_path / "run", resume=True, **settings), whole)


@pytest.mark.parametrize("precision", ["bfloat16", "float64"])
def test_precisions_train_and_round_trip(tmp_path, precision):
    run = train(tmp_path / "run", epochs=1, precision=precision)
    x = arrays()[0][0]
    torch.manual_seed(0)
    first = run.infer(x)
    torch.manual_seed(0)
    second = pnem.load(tmp_path / "run").infer(x)
    assert first.gamma.dtype == (torch.float64 if precision == "float64" else torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))


@pytest.mark.parametrize(("speed", "warns"), [(0.02, True), (4.0, False)])
def test_bfloat16_where_it_is_slower_warns(monkeypatch, speed, warns):
    monkeypatch.setattr("pnem.training.bfloat16_speed", lambda device: speed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(epochs=1, precision="bfloat16")
    shown = [str(warning.message) for warning in caught if "bfloat16" in str(warning.message)]
    assert len(shown) == int(warns)
    assert all("cpu multiplies matrices 50 times as slowly" in text for text in shown)


def test_automatic_device_and_progress_bar(capsys):
    run = train(epochs=1, device="auto", progress=True)
    assert run.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    shown = capsys.readouterr()
    for word in ("loss=", "ELBO=", "nats/image", "ARI="):
        assert word in shown.out + shown.err


def test_history_holds_means_over_images(tmp_path):
    run = train(tmp_path / "run", epochs=1)
    assert (tmp_path / "run/history.csv").read_text().startswith("epoch,train_loss,train_elbo,valid_loss,valid_elbo,")
    x = arrays()[0][0].flatten(1, 2)
    torch.manual_seed(3)
    # The validation's initial γ, in its batches of 8 and a last one of 4.
    elbos = [run.strategy.elbo(run.strategy.unroll(batch)[-1]) for batch in x.split(8)]
    assert run.history["valid_elbo"][0] == pytest.approx(torch.cat(elbos).mean().item(), rel=1e-5)


def test_images_without_groups_train_without_ari():
    run = train(epochs=1, data={name: ImageDataset(arrays()[0]) for name in ("training", "validation")})
    assert run.history["valid_ari"].isna().all()


def test_a_strategy_left_in_evaluation_mode_trains_with_its_noise():
    model, strategy = parts()
    run = pnem.fit(
        model.eval(), strategy.eval(), splits(), epochs=1, batch_size=8, device="cpu", progress=False, seed=3
    )
    model, strategy = parts()
    assert_same_run(
        run, pnem.fit(model, strategy, splits(), epochs=1, batch_size=8, device="cpu", progress=False, seed=3)
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"epochs": 0}, RunError, "epochs must be a whole number of at least 1"),
        ({"epochs": -1}, RunError, "epochs"),
        ({"epochs": 1.5}, RunError, "epochs"),
        ({"batch_size": -8}, RunError, "batch_size"),
        ({"batch_size": 29}, DataError, "28 images, fewer than a batch of 29"),
        ({"train_limit": 7}, DataError, "7 images, fewer than a batch of 8"),
        ({"train_limit": 0}, RunError, "train_limit"),
        ({"learning_rate": -1.0}, RunError, "learning_rate"),
        ({"learning_rate": float("nan")}, RunError, "learning_rate"),
        ({"gradient_clip": 0.0}, RunError, "gradient_clip"),
        ({"schedule": "linear"}, RunError, "schedule"),
        ({"warmup_steps": -1}, RunError, "warmup_steps"),
        ({"seed": -1}, RunError, "seed"),
        ({"seed": 2**64}, RunError, "seed"),
        ({"precision": "float8"}, DeviceError, "float32, bfloat16, float64"),
        ({"device": "tpu"}, DeviceError, "unknown device 'tpu'"),
        ({"device": "cuda:99"}, DeviceError, "cuda:99 was asked for, but this machine has"),
        ({"patient": 3}, RunError, "patience"),
        ({"data": splits(frames=2)}, DataError, "sequences of 2 frames"),
        ({"data": splits(shape=(4, 4, 1))}, DataError, r"\(4, 4, 1\).*the model is for \(3, 4, 1\)"),
        ({"data": {"training": splits()["training"]}}, DataError, "'validation' is needed"),
        ({"data": "missing.h5"}, DataError, "missing.h5 does not exist"),
        ({"resume": True}, RunError, "there is no run directory"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("gradient_clip", "low", "high"), [(None, 0.5, 1.01), (1e-12, 0.0, 1e-3)])
def test_gradients_are_clipped(precision, gradient_clip, low, high):
    """Adam's first step is of the learning rate, unless gradients are far below its ε."""
    model, strategy = parts()
    before = model.decoder.linear.weight.detach().clone()
    settings = {"batch_size": len(arrays()[0][0]), "epochs": 1, "learning_rate": 1e-3, "warmup_steps": 0}
    settings |= {"precision": precision, "gradient_clip": gradient_clip, "progress": False}
    pnem.fit(model, strategy, splits(), **settings)
    step = (model.decoder.linear.weight - before).abs().max().item() / 1e-3
    assert low <= step <= high


@pytest.mark.parametrize("split", ["training", "validation"])
def test_values_that_are_no_bernoulli_pixels_are_found_in_any_batch(tmp_path, split):
    features, groups = arrays()
    features[0, -1, 0, 0, 0] = 1.5
    data = splits() | {split: ImageDataset(features, groups)}
    with pytest.raises(DataError, match=rf"the {split} split: Bernoulli pixels must lie in \[0, 1\].*rescale"):
        train(tmp_path / "run", data=data, batch_size=7)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_training_and_keeps_the_epochs_before(tmp_path):
    train(tmp_path / "run", epochs=1, schedule="constant", gradient_clip=None)
    last = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()

    class Broken(ImageDataset):
        def __getitems__(self, indices):
            batch = super().__getitems__(indices)
            with torch.no_grad():
                next(strategy.parameters()).fill_(float("nan"))
            return batch

    model, strategy = parts()
    data = splits() | {"training": Broken(*arrays())}
    with pytest.raises(RunError, match=r"the training loss is nan in epoch 2.*learning_rate"):
        pnem.fit(
            model,
            strategy,
            data,
            objective=ELBO("ramp"),
            out=tmp_path / "run",
            resume=True,
            epochs=4,
            batch_size=8,
            learning_rate=0.02,
            warmup_steps=2,
            patience=3,
            seed=3,
            device="cpu",
            progress=False,
        )
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == last


def test_a_strategy_on_another_model_is_refused():
    with pytest.raises(RunError, match="another model"):
        pnem.fit(parts()[0], parts()[1], splits())


def test_weights_that_do_not_fit_the_iterations_are_refused():
    model, strategy = parts()
    with pytest.raises(PnemError, match="2 weights were given for 3 iterations"):
        pnem.fit(model, strategy, splits(), objective=ELBO([1.0, 2.0]))


@pytest.mark.slow
@pytest.mark.parametrize("objective", [ELBO("ramp"), NEMLoss("last")], ids=["elbo", "n-em loss"])
@pytest.mark.parametrize("name", ["rnn-em", "n-em"])
def test_the_compiled_iteration_gives_the_same_loss_and_gradients(name, objective):
    model = SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), 3, pixel_prior=0.0).double()
    make = {"rnn-em": RNNEM, "n-em": NEM}[name]
    strategy = make(model, iterations=4, noise=BitFlip(0.1)).double()
    x = arrays()[0][0].flatten(1, 2).double()
    results = []
    for compiled in (False, True):
        compile_on = torch.device("cpu") if compiled else None
        module = TrainingModule(model, strategy, objective, TrainingSettings(), 10, compile_on=compile_on)
        module.zero_grad()
        torch.manual_seed(5)
        outcome = module.unroll(x)
        outcome.loss.backward()
        results.append([*outcome, *(p.grad.clone() for p in module.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)


def test_long_unrolls_are_compiled_in_pieces_of_about_equal_length(monkeypatch):
    pieces = []

    def recorded(function, **_):
        return lambda *args: pieces.append(len(args[1])) or function(*args)

    monkeypatch.setattr(unrolling, "compiled", recorded)
    monkeypatch.setattr(unrolling, "COMPILED_AT_ONCE", 4)
    model = SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), 3, pixel_prior=0.0).double()
    strategy = RNNEM(model, iterations=9).double()
    x, results = arrays()[0][0].flatten(1, 2).double(), []
    for compile_on in (None, torch.device("cpu")):
        module = TrainingModule(model, strategy, ELBO("ramp"), TrainingSettings(), 10, compile_on=compile_on)
        module.zero_grad()
        torch.manual_seed(5)
        outcome = module.unroll(x)
        outcome.loss.backward()
        results.append([*outcome, *(p.grad.clone() for p in module.parameters())])
    assert pieces == [3, 3, 3]
    for whole, in_pieces in zip(*results, strict=True):
        torch.testing.assert_close(in_pieces, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_compiled_training_equals_eager_training():
    eager, compiled = (train(epochs=1, precision="float64", compile=flag) for flag in (False, True))
    for a, b in zip(weights(eager), weights(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_normal_pixels_may_be_anything_finite():
    features, groups = arrays()
    torch.manual_seed(0)
    model = SpatialMixture(decoders.Linear(5, SHAPE), Normal(0.5), 3, pixel_prior=0.0)
    data = {name: ImageDataset(3 * features - 1, groups) for name in ("training", "validation", "test")}
    run = pnem.fit(model, RNNEM(model, iterations=2), data, epochs=1, batch_size=8, device="cpu", progress=False)
    assert run.evaluate(data).bce != run.evaluate(data).bce
