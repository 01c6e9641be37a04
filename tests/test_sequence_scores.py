"""Scores of sequences: what hand-made posteriors must give, batch by batch, and at the edges."""

import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pnem.data import Batch
from pnem.errors import DataError
from pnem.inference import Posterior, State
from pnem.models import Bernoulli, Normal
from pnem.sequence_metrics import grouping_over_time, identity_switches
from pnem.sequence_scores import SequenceScores, score_sequences

T, K, D = 5, 3, 12


def model_of(likelihood: Any) -> Any:
    """What is used of a model; its prediction of two components' means is their largest."""
    return SimpleNamespace(
        likelihood=likelihood, prediction=lambda psi, log_mixing: likelihood.mean(psi).amax(-3) + 0 * log_mixing.sum()
    )


def strategy_of(task: str) -> Any:
    return SimpleNamespace(task=task, steps_ahead=int(task == "prediction"))


def found(model: Any, steps: int, B: int, generator: torch.Generator) -> tuple[Posterior, State]:
    """A posterior, and the same as a rolled state, with random ψ, γ and evidence."""
    psi = torch.randn(steps, B, K, D, 1, generator=generator, dtype=torch.float64)
    gamma = torch.rand(steps, B, K, D, generator=generator, dtype=torch.float64)
    gamma = gamma / gamma.sum(-2, keepdim=True)
    evidence = torch.randn(steps, B, generator=generator, dtype=torch.float64)
    theta, log_mixing, mean = psi[..., :2, 0], torch.zeros(steps, B, K), model.likelihood.mean(psi)
    q = dist.Delta(theta, event_dim=2)
    return (
        Posterior(theta, psi, mean, gamma, evidence, log_mixing, evidence, None, q),
        State(theta, mean, psi, gamma, gamma.log(), evidence, log_mixing),
    )


def sequences(
    model: Any, strategy: Any, *, count: int = 6, horizon: int = 0, groups: bool = True
) -> tuple[Batch, Posterior, State | None]:
    """Sequences of T frames and a horizon, and what was found in the T."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(T + horizon, count, D, 1, generator=generator).round()
    objects = torch.randint(0, 3, (T + horizon, count, D), generator=generator) if groups else None
    posterior, _ = found(model, T - strategy.steps_ahead, count, generator)
    batch = Batch(x, objects)
    return batch, posterior, found(model, horizon, count, generator)[1] if horizon else None


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))


def nats(x: Tensor, p: Tensor) -> float:
    pairs = zip(x.flatten().tolist(), p.flatten().tolist(), strict=True)
    return -sum(v * math.log(p) + (1 - v) * math.log(1 - p) for v, p in pairs)


def squares(x: Tensor, p: Tensor) -> float:
    return sum((v - p) ** 2 for v, p in zip(x.flatten().tolist(), p.flatten().tolist(), strict=True))


@pytest.mark.parametrize("task", ["prediction", "denoising"])
@pytest.mark.parametrize(("likelihood", "error"), [(Bernoulli(), nats), (Normal(0.3), squares)])
def test_every_number_is_the_mean_over_steps_but_the_first_and_then_over_sequences(
    task: str, likelihood: Any, error: Any
) -> None:
    model, strategy = model_of(likelihood), strategy_of(task)
    batch, posterior, rolled = sequences(model, strategy, horizon=3)
    scores = score_sequences([(batch, posterior, rolled)], model, strategy)
    B, S, ahead = 6, T - strategy.steps_ahead, strategy.steps_ahead
    assert (scores.task, scores.sequences) == (task, B)
    assert scores.measure == ("binary cross-entropy" if error is nats else "squared error")

    predicted, known = np.zeros((S, B)), np.zeros((S, B))
    for s, b in itertools.product(range(S), range(B)):
        target, means, gamma = batch.x[s + ahead, b], posterior.mean[s, b], posterior.gamma[s, b]
        predicted[s, b] = error(target, means.amax(0))
        known[s, b] = error(target, sum(gamma[k, :, None] * means[k] for k in range(K)))
    for name, values in (
        ("prediction_error", predicted),
        ("reconstruction_error", known),
        ("log_evidence", posterior.log_evidence.numpy()),
    ):
        expected = mean_and_error([values[1:, b].mean() for b in range(B)])
        assert (getattr(scores, name), getattr(scores, f"{name}_se")) == pytest.approx(expected, rel=1e-6)
        assert getattr(scores, f"{name}_by_step") == pytest.approx(values.mean(1), rel=1e-6)

    assert batch.groups is not None
    groups, labels = batch.groups[ahead:T], posterior.gamma.argmax(-2)
    for name, values in grouping_over_time(groups, labels)._asdict().items():
        expected = mean_and_error(values[1:].mean(0).tolist())
        assert (getattr(scores, name), getattr(scores, f"{name}_se")) == pytest.approx(expected, rel=1e-9)
        assert getattr(scores, f"{name}_by_step") == pytest.approx(values.mean(1).numpy(), rel=1e-9)
    switches, objects = identity_switches(groups, labels)
    assert (scores.switches, scores.switches_se) == pytest.approx(mean_and_error((switches / objects).tolist()))
    assert scores.switches > 0

    assert rolled is not None
    for n in range(3):
        values = [error(batch.x[T + n, b], rolled.mean[n, b].amax(0)) for b in range(B)]
        assert (scores.rollout_error[n], scores.rollout_error_se[n]) == pytest.approx(mean_and_error(values), rel=1e-6)
        ari = grouping_over_time(batch.groups[T:], rolled.gamma.argmax(-2)).ari[n].tolist()
        assert (scores.rollout_ari[n], scores.rollout_ari_se[n]) == pytest.approx(mean_and_error(ari), rel=1e-9)


def test_batches_give_the_scores_of_all_sequences_together() -> None:
    model, strategy = model_of(Bernoulli()), strategy_of("prediction")
    batch, posterior, rolled = sequences(model, strategy, horizon=2)
    assert rolled is not None
    together = score_sequences([(batch, posterior, rolled)], model, strategy)

    def part(values: Any, chosen: slice) -> Any:
        return type(values)._make(v[:, chosen] if isinstance(v, Tensor) else v for v in values)

    parts = (
        tuple(part(whole, chosen) for whole in (batch, posterior, rolled))
        for chosen in (slice(0, 1), slice(1, 4), slice(4, None))
    )
    apart = score_sequences(parts, model, strategy)  # type: ignore[arg-type]
    for value, expected in zip(apart, together, strict=True):
        assert value == (expected if isinstance(expected, str) else pytest.approx(expected, rel=1e-12))


def test_perfect_posteriors() -> None:
    """Objects that move, each in its component and predicted exactly, but for the first step."""
    model, strategy = model_of(Bernoulli()), strategy_of("prediction")
    groups = torch.zeros(T, 1, D).long()
    for t in range(T):
        groups[t, 0, [t, t + 1]], groups[t, 0, [11 - t, 10 - t]] = 1, 2
    x = (groups > 0).float().unsqueeze(-1)
    owner = groups[1:].clone()
    owner[0] = 0
    gamma = torch.nn.functional.one_hot(owner, K).transpose(-1, -2).double()
    psi = torch.where(gamma > 0.5, x[1:].transpose(-1, -2), 0).unsqueeze(-1) * 200 - 100
    posterior, _ = found(model, T - 1, 1, torch.Generator())
    posterior = posterior._replace(gamma=gamma, psi=psi, mean=psi.sigmoid())
    scores = score_sequences([(Batch(x, groups), posterior, None)], model, strategy)
    assert (scores.ami, scores.ari, scores.switches) == (1, 1, 0)
    assert scores.ari_by_step == (0, 1, 1, 1)
    assert scores.prediction_error == pytest.approx(0, abs=1e-9)
    assert scores.reconstruction_error == pytest.approx(0, abs=1e-9)
    assert math.isnan(scores.ami_se)


def test_without_groups_or_a_rollout_there_are_dashes_and_empty_curves() -> None:
    model, strategy = model_of(Bernoulli()), strategy_of("prediction")
    scores = score_sequences([sequences(model, strategy, groups=False)], model, strategy)
    assert all(map(math.isnan, (scores.ami, scores.ami_se, scores.ari, scores.ari_se, scores.switches)))
    assert scores.ami_by_step == scores.ari_by_step == scores.rollout_error == scores.rollout_ari == ()
    assert len(scores.prediction_error_by_step) == T - 1
    assert scores.rows()[:3] == [("AMI", "–", "–"), ("ARI", "–", "–"), ("identity switches per object", "–", "–")]
    rolled = score_sequences([sequences(model, strategy, groups=False, horizon=2)], model, strategy)
    assert (len(rolled.rollout_error), rolled.rollout_ari) == (2, ())
    assert [title for title, *_ in rolled.rows()[6:]] == [
        "rollout, frame 1: BCE, nats per frame",
        "rollout, frame 2: BCE, nats per frame",
    ]


def test_frames_and_sequences_without_objects_are_left_out() -> None:
    model, strategy = model_of(Bernoulli()), strategy_of("denoising")
    batch, posterior, rolled = sequences(model, strategy, horizon=1)
    assert batch.groups is not None
    batch.groups[:, 0] = 0
    batch.groups[2, 1] = 0
    batch.groups[T, 2] = 0
    scores = score_sequences([(batch, posterior, rolled)], model, strategy)
    ari = grouping_over_time(batch.groups[:T], posterior.gamma.argmax(-2)).ari
    expected = [ari[[1, 3, 4], 1].mean().item(), *ari[1:, 2:].mean(0).tolist()]
    assert (scores.ari, scores.ari_se) == pytest.approx(mean_and_error(expected))
    assert not math.isnan(scores.rollout_ari[0])


def test_what_diverged_is_not_left_out() -> None:
    model, strategy = model_of(Normal(1.0)), strategy_of("prediction")
    batch, posterior, *_ = sequences(model, strategy)
    posterior.log_evidence[2, 3] = math.nan
    posterior.psi[2, 3] = math.nan
    scores = score_sequences([(batch, posterior, None)], model, strategy)
    assert all(map(math.isnan, (scores.log_evidence, scores.log_evidence_se, scores.prediction_error)))
    assert [math.isnan(value) for value in scores.log_evidence_by_step] == [False, False, True, False]


def test_rows_name_the_error_and_some_horizons() -> None:
    by_step = (0.5,) * 4
    scores = SequenceScores(
        "prediction", "squared error", 0.9, 0.01, 0.8, math.nan, 0.25, 0.1, 12.346, 0.5, 10.0, 0.4, -3.0, 0.2,
        by_step, by_step, by_step, by_step, by_step,
        tuple(map(float, range(1, 13))), (0.5,) * 12, (0.75,) * 12, (0.125,) * 12, 7,
    )  # fmt: skip
    rows = scores.rows()
    assert rows[:6] == [
        ("AMI", "0.9000", "0.0100"),
        ("ARI", "0.8000", "–"),
        ("identity switches per object", "0.2500", "0.1000"),
        ("squared error of the next frame, predicted, per frame", "12.35", "0.50"),
        ("squared error of the next frame, γ known, per frame", "10.00", "0.40"),
        ("predictive log p(next frame | θ), nats per frame", "-3.00", "0.20"),
    ]
    assert rows[6:8] == [
        ("rollout, frame 1: squared error, per frame", "1.00", "0.50"),
        ("rollout, frame 1: ARI", "0.7500", "0.1250"),
    ]
    shown = [int(title.split("frame ")[1].split(":")[0]) for title, *_ in rows[6::2]]
    assert shown == [1, 2, 5, 10, 12]
    denoised = scores._replace(task="denoising", measure="binary cross-entropy").rows()
    assert denoised[3][0] == "BCE of the clean frame, without γ, nats per frame"
    assert json.loads(json.dumps(scores._asdict()))["rollout_error"] == [*range(1, 13)]


def test_too_few_frames_or_none_are_refused() -> None:
    model, strategy = model_of(Bernoulli()), strategy_of("prediction")
    batch, posterior, rolled = sequences(model, strategy, horizon=3)
    one_step = posterior._replace(log_evidence=posterior.log_evidence[:1])
    with pytest.raises(DataError, match="only 1 step of prediction, and the first is not scored"):
        score_sequences([(batch, one_step, None)], model, strategy)
    with pytest.raises(DataError, match="3 frames were rolled out after 5, but the sequences have 7"):
        score_sequences([(Batch(batch.x[:7], None), posterior, rolled)], model, strategy)
    with pytest.raises(DataError, match="no sequences to score"):
        score_sequences([], model, strategy)
