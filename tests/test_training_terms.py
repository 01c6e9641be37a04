"""What a training writes down of its ELBO, and what it warns of."""

import warnings

import pandas as pd
import pytest
import torch
from broken import two_bars
from fitting import arrays, splits, train, weights

import pnem
from pnem.callbacks import CollapseWatch
from pnem.data import ImageDataset
from pnem.diagnostics import CollapseWarning, collapse, terms_at
from pnem.inference import ELBO, RNNEM, VAE, IterativeVI, PyroGuide, encoders
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.run_directory import HISTORY, TERMS

NEW = [f"valid_{name}" for name in TERMS]
FREE_ENERGY = ["valid_expected_log_joint", "valid_assignment_entropy", "valid_log_prior", "valid_theta_entropy"]


class HalfBlind(decoders.MLP):
    """Sees the first half of θ."""

    def forward(self, theta):
        return super().forward(theta * (torch.arange(theta.shape[-1]) < theta.shape[-1] // 2))


def vae(sigma, *, K=1, shape=(8, 8, 1), decoder=None):
    torch.manual_seed(0)
    likelihood = Bernoulli() if sigma is None else Normal(sigma)
    decoder = decoder or decoders.MLP(3, shape, hidden=(8,))
    model = SpatialMixture(decoder, likelihood, K, prior="standard_normal")
    return model, VAE(model, encoder=encoders.MLP(shape, hidden=(8,)))


def test_the_history_has_the_terms_of_the_validation_elbo():
    run = train(epochs=2, precision="float64")
    assert list(run.history) == HISTORY
    history = run.history
    assert history[NEW].notna().all(axis=None)
    pd.testing.assert_series_equal(history[FREE_ENERGY].sum(axis=1), history.valid_elbo, rtol=1e-10, check_names=False)
    # A Delta under a flat prior.
    assert (history[["valid_log_prior", "valid_theta_entropy", "valid_divergence"]] == 0).all(axis=None)
    pd.testing.assert_series_equal(history.valid_reconstruction, history.valid_elbo, rtol=1e-10, check_names=False)
    x = arrays()[0][0].flatten(1, 2).double()
    torch.manual_seed(3)
    # The validation's initial γ, in its batches of 8 and a last one of 4.
    terms = [terms_at(run.strategy, run.strategy.unroll(batch)[-1]) for batch in x.split(8)]
    best = history.iloc[int(history.valid_loss.argmin())]
    for name in TERMS:
        expected = torch.cat([getattr(part, name) for part in terms]).mean().item()
        assert best[f"valid_{name}"] == pytest.approx(expected, rel=1e-10)


def test_the_terms_of_a_variational_training_add_up_both_ways():
    model, strategy = vae(None, K=2, shape=(3, 4, 1))
    options = {"epochs": 2, "batch_size": 8, "device": "cpu", "progress": False, "precision": "float64"}
    history = pnem.fit(model, strategy, splits(), **options).history
    pd.testing.assert_series_equal(history[FREE_ENERGY].sum(axis=1), history.valid_elbo, rtol=1e-10, check_names=False)
    penalised = history.valid_reconstruction - history.valid_divergence
    pd.testing.assert_series_equal(penalised, history.valid_elbo, rtol=1e-10, check_names=False)
    assert (history.valid_divergence > 0).all()
    assert (history.valid_assignment_entropy > 0).all()


@pytest.mark.parametrize(
    ("frames", "strategy_of"),
    [
        (1, lambda model: PyroGuide(model, "AutoMultivariateNormal", steps=3)),
        (5, lambda model: RNNEM(model, iterations=4, task="prediction")),
        (5, lambda model: IterativeVI(model, iterations=4, hidden=6, task="prediction")),
    ],
)
def test_the_terms_of_joint_guides_and_of_sequences_add_up(frames, strategy_of):
    torch.manual_seed(0)
    model = SpatialMixture(decoders.Linear(2, (3, 4, 1)), Bernoulli(), 2, prior="standard_normal", pixel_prior=0.0)
    features = (torch.rand(frames, 16, 3, 4, 1) < 0.5).float()
    data = {name: ImageDataset(features) for name in ("training", "validation")}
    options = {"epochs": 1, "batch_size": 8, "device": "cpu", "progress": False, "precision": "float64"}
    row = pnem.fit(model, strategy_of(model), data, **options, objective=ELBO("all")).history.iloc[0]
    assert row[FREE_ENERGY].sum() == pytest.approx(row.valid_elbo, rel=1e-10)
    assert row.valid_reconstruction - row.valid_divergence == pytest.approx(row.valid_elbo, rel=1e-10)


def test_another_e_step_leaves_its_own_divergence_between_the_two_forms():
    torch.manual_seed(0)
    model = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 3, pixel_prior=0.0)
    strategy = RNNEM(model, iterations=2, e_step="greff2017")
    options = {"epochs": 1, "batch_size": 8, "device": "cpu", "progress": False, "precision": "float64"}
    row = pnem.fit(model, strategy, splits(), **options).history.iloc[0]
    assert row.valid_reconstruction == pytest.approx(row.valid_elbo, rel=1e-10)
    assert row[FREE_ENERGY].sum() < row.valid_elbo - 1e-6


@pytest.mark.slow
def test_a_compiled_training_has_the_same_terms():
    eager, compiled = (train(epochs=1, precision="float64", compile=flag) for flag in (False, True))
    pd.testing.assert_frame_equal(eager.history[NEW], compiled.history[NEW], rtol=1e-8)


def made_old(directory):
    """Takes from a run what an older pnem would not have written."""
    path = directory / "history.csv"
    pd.read_csv(path, dtype=str).drop(columns=NEW).to_csv(path, index=False)
    path = directory / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for row in checkpoint["callbacks"]["History"]["rows"]:
        for name in NEW:
            del row[name]
    del checkpoint["callbacks"]["CollapseWatch"]
    torch.save(checkpoint, path)


def test_a_run_of_an_older_pnem_loads_and_is_resumed(tmp_path):
    settings = {"schedule": "constant"}
    whole = train(tmp_path / "whole", **settings)
    half = train(tmp_path / "run", epochs=2, **settings)
    made_old(tmp_path / "run")
    loaded = pnem.load(tmp_path / "run")
    assert list(loaded.history) == HISTORY
    assert loaded.history[NEW].isna().all(axis=None)
    pd.testing.assert_frame_equal(loaded.history.drop(columns=NEW), half.history.drop(columns=NEW), check_exact=True)
    resumed = train(tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(weights(resumed), weights(whole), strict=True))
    assert resumed.history[NEW][:2].isna().all(axis=None)
    pd.testing.assert_frame_equal(resumed.history[NEW][2:], whole.history[NEW][2:], check_exact=True)
    assert pnem.load(tmp_path / "run").history.equals(resumed.history)


def test_a_history_with_some_of_the_terms_was_not_written_by_pnem(tmp_path):
    train(tmp_path / "run", epochs=1)
    path = tmp_path / "run/history.csv"
    pd.read_csv(path, dtype=str).drop(columns="valid_log_prior").to_csv(path, index=False)
    with pytest.raises(pnem.errors.RunError, match="not written by pnem"):
        pnem.load(tmp_path / "run")


# --- warnings


def collapsing(out=None, *, sigma=10.0, count=40, decoder=None, **settings):
    """A training in which q(θ) stays at the prior: 10 steps an epoch."""
    data = {"training": ImageDataset(*two_bars(40, seed=1)), "validation": ImageDataset(*two_bars(count))}
    defaults = {"epochs": 6, "batch_size": 4, "learning_rate": 0.01, "device": "cpu", "progress": False}
    model, strategy = vae(sigma, decoder=decoder)
    return pnem.fit(model, strategy, data, out=out, **defaults | settings)


def warned(function, *arguments, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, [str(warning.message) for warning in caught if warning.category is CollapseWarning]


@pytest.fixture
def _soon(monkeypatch):
    monkeypatch.setattr(CollapseWatch, "FIRST_STEPS", 20)


@pytest.mark.usefixtures("_soon")
def test_a_collapse_is_warned_of_once_when_it_has_lasted():
    run, messages = warned(collapsing)
    (message,) = messages
    # Steps 20, 30 and 40.
    assert message.startswith("epoch 4: posterior collapse: 3 of 3 latent dimensions")
    assert "smaller sigma" in message
    data = {"validation": ImageDataset(*two_bars(40))}
    assert [finding.name for finding in collapse(run, data)] == ["posterior collapse"]


@pytest.mark.usefixtures("_soon")
def test_every_training_warns_under_the_default_filters_also_beside_a_progress_bar(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        collapsing(progress=True, epochs=4)
        collapsing(epochs=4)
    # Though the words are the same.
    assert [warning.category for warning in caught] == [CollapseWarning] * 2
    assert "10/10" in capsys.readouterr().out


@pytest.mark.usefixtures("_soon")
def test_a_warning_that_is_an_error_stops_the_training():
    with pytest.raises(CollapseWarning, match="posterior collapse"):
        collapsing()


@pytest.mark.usefixtures("_soon")
def test_a_resumed_training_warns_as_an_uninterrupted_one(tmp_path):
    _, before = warned(collapsing, tmp_path / "run", epochs=3)
    assert before == []
    _, messages = warned(collapsing, tmp_path / "run", resume=True, epochs=5)
    assert messages == warned(collapsing, epochs=5)[1]
    assert len(messages) == 1
    _, again = warned(collapsing, tmp_path / "run", resume=True, epochs=9)
    assert again == []


@pytest.mark.usefixtures("_soon")
def test_a_healthy_training_does_not_warn():
    _, messages = warned(collapsing, sigma=0.3, epochs=12)
    assert messages == []


@pytest.mark.usefixtures("_soon")
def test_latent_dimensions_that_are_not_needed_are_a_finding_but_no_warning():
    run, messages = warned(collapsing, sigma=0.3, decoder=HalfBlind(6, (8, 8, 1), hidden=(8,)), epochs=20)
    (finding,) = collapse(run, {"validation": ImageDataset(*two_bars(40))})
    assert (finding.name, finding.value) == ("posterior collapse", 3)
    assert messages == []


def test_a_training_that_has_just_begun_does_not_warn():
    # 60 steps, of the 500 that do not count.
    assert warned(collapsing)[1] == []


@pytest.mark.usefixtures("_soon")
def test_too_few_validation_images_are_not_judged():
    assert warned(collapsing, count=29)[1] == []


@pytest.mark.usefixtures("_soon")
def test_a_finding_that_goes_away_starts_anew(monkeypatch):
    found = iter([1, 1, 0, 1, 1, 1, 1])
    finding = pnem.diagnostics.Finding("dead components", "seen", 1.0, "advice")
    monkeypatch.setattr("pnem.callbacks.judge", lambda *_, **__: [finding] * next(found))
    _, messages = warned(collapsing, epochs=8)
    # From step 20, in epoch 2, on: epochs 5, 6 and 7 are the first three in a row.
    assert messages == ["epoch 7: dead components: seen; advice"]
