"""A fitted run, inferred with another strategy."""

import pytest
import torch
from cases import images, pair

import pnem
from pnem.alternatives import ALTERNATIVES, find_alternative
from pnem.data import ImageDataset
from pnem.errors import ModelError, RunError, StrategyError
from pnem.inference import NUTS, ClassicalEM, MixingWarning, PyroGuide, SemiAmortised


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(0)
    model, strategy = pair("owned Normal", "vae")
    features = images(16).reshape(1, 16, 3, 4, 1).numpy()
    data = dict.fromkeys(("training", "validation", "test"), ImageDataset(features))
    run = pnem.fit(model, strategy, data, epochs=2, batch_size=8, device="cpu", progress=False)
    return run, data


@pytest.mark.parametrize("name", ALTERNATIVES)
def test_every_name_is_a_strategy_of_the_runs_model(run, name):
    run, _ = run
    strategy = find_alternative(name, run.strategy)
    assert strategy.model is run.model
    assert run.using(name).settings.strategy != run.settings.strategy


def test_another_strategy_scores_and_infers_in_the_same_model(run, tmp_path):
    run, data = run
    refined = run.using("semi-amortised")
    assert refined.model is run.model
    assert run.strategy is refined.strategy.strategy
    before = run.evaluate(data, importance_samples=200)
    after = refined.evaluate(data, importance_samples=200)
    assert after.log_marginal == pytest.approx(before.log_marginal, abs=4 * before.log_marginal_se)
    assert refined.infer(images(2)).trace.scale.shape[0] == refined.strategy.iterations
    refined.save(tmp_path / "refined")
    again = pnem.load(tmp_path / "refined")
    assert isinstance(again.strategy, SemiAmortised)
    torch.manual_seed(1)
    first = refined.infer(images(2, (3, 4, 1)))
    torch.manual_seed(1)
    assert torch.equal(again.infer(images(2, (3, 4, 1))).theta, first.theta)


def test_a_strategy_that_keeps_no_trace_can_be_used(run):
    run, _ = run
    sampled = run.using(NUTS(run.model, chains=2, warmup=5, draws=20, max_tree_depth=3))
    with pytest.warns(MixingWarning):
        posterior = sampled.infer(images(1))
    assert posterior.trace is None


def test_what_cannot_infer_in_the_runs_model_is_refused(run):
    run, _ = run
    with pytest.raises(StrategyError, match=r"unknown strategy 'hmc'.*semi-amortised.*nuts"):
        run.using("hmc")
    other = pair("owned Normal", "vae")[0]
    with pytest.raises(RunError, match="another model"):
        run.using(NUTS(other))
    with pytest.raises(ModelError, match="cannot describe"):
        run.using(PyroGuide(run.model, lambda x: None))
    with pytest.raises(StrategyError, match=r"no closed-form M-step|GradientEM"):
        run.using(ClassicalEM(run.model))
