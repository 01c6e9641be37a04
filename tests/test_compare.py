"""Comparing runs: the same images for all, paired differences, honest labels, and no nats that do not compare."""

import dataclasses
import io
import itertools
import json
import math
import time
import warnings

import numpy as np
import pytest
import torch
from fitting import SHAPE, arrays, splits, train
from rich.cells import cell_len
from rich.console import Console

import pnem
from pnem import plots
from pnem.data import ImageDataset
from pnem.diagnostics import compare
from pnem.diagnostics.comparison import Schedule
from pnem.errors import DataError, RunError, StrategyError
from pnem.inference import NUTS, VAE, GradientEM, IterativeVI, exact_log_marginal
from pnem.models import Bernoulli, DiagonalNormal, Normal, SpatialMixture, decoders

FIT = {"epochs": 1, "batch_size": 8, "device": "cpu", "progress": False}


def fitted(strategy=VAE, K=1, *, data=None, features=3, likelihood=None, seed=0, **options):
    torch.manual_seed(seed)
    likelihood = Bernoulli() if likelihood is None else likelihood
    prior = options.pop("prior", "standard_normal")
    model = SpatialMixture(decoders.MLP(features, SHAPE, hidden=(7,)), likelihood, K, prior=prior, **options)
    return pnem.fit(model, strategy(model), splits() if data is None else data, **FIT)


def iterative(model):
    return IterativeVI(model, hidden=6, iterations=2)


def printed(result, width):
    console = Console(width=width, file=io.StringIO())
    console.print(result)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def vae():
    return fitted()


@pytest.fixture(scope="module")
def flat():
    return train(epochs=1)


@pytest.fixture(scope="module")
def mixed(vae):
    """Two models, and one of them inferred in another way."""
    runs = {"vae": vae, "iterative vi": fitted(iterative, 2), "gradient-em": vae.using("gradient-em")}
    return runs, compare(runs, splits(), samples=50, batch_size=8, limit=12, seed=3)


def test_groupings_are_those_that_evaluate_finds(mixed):
    runs, result = mixed
    for name, run in runs.items():
        scores = run.evaluate(splits(), batch_size=8, limit=12, seed=3)
        row = result.table.loc[name]
        assert (row["ami"], row["ami_se"]) == (scores.ami, scores.ami_se)
        assert (row["ari"], row["ari_se"]) == (scores.ari, scores.ari_se)
        assert row["train_seconds"] == run.history["seconds"].iloc[-1]
        # An upper bound on the time that it can have taken, and 0 is none.
        assert 0 < row["ms_per_image"] < 10_000
        assert row["timed_batch"] == 8
    assert result.images == result.available == 12


def test_parameters_are_those_of_model_and_strategy(mixed):
    runs, result = mixed
    of_model = 3 * 7 + 7 + 7 * 12 + 12
    assert result.table["parameters"]["gradient-em"] == of_model
    own = sum(p.numel() for p in runs["vae"].strategy.parameters())
    assert result.table["parameters"]["vae"] == of_model + own


def test_gaps_are_what_lies_between_the_elbo_and_log_p(mixed):
    _, result = mixed
    for name in ("vae", "iterative vi"):
        own = result.scores[name]
        total = own["approximation_gap"] + own["amortisation_gap"]
        np.testing.assert_allclose(own["log_marginal"] - own["elbo"], total, rtol=0, atol=1e-9)
        assert result.table["amortisation_gap"][name] == pytest.approx(own["amortisation_gap"].mean())
    point = result.scores["gradient-em"]
    assert "approximation_gap" not in point
    assert (point["optimality_gap"] > -1e-4).all()
    assert result.table["elbo_is_bound"].tolist() == [True, True, False]
    assert result.table["q"].tolist() == ["density", "density", "point"]


def test_differences_are_paired_over_images(mixed):
    _, result = mixed
    table = result.differences.set_index(["run", "reference", "measure"])
    assert len(table.index) == len(table.index.unique())
    for (name, reference, measure), row in table.iterrows():
        difference = result.scores[name][measure] - result.scores[reference][measure]
        assert row["difference"] == pytest.approx(difference.mean(), abs=1e-12)
        assert row["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(12), abs=1e-12)
        assert row["images"] == 12
    pairs = {(name, reference) for name, reference, _ in table.index}
    assert pairs == {("iterative vi", "vae"), ("gradient-em", "vae"), ("gradient-em", "iterative vi")}
    measured = {pair: {m for *p, m in table.index if tuple(p) == pair} for pair in pairs}
    assert measured["iterative vi", "vae"] == {"log_marginal", "elbo", "ami", "ari"}
    # A plug-in value and a bound do not compare.
    assert measured["gradient-em", "vae"] == {"log_marginal", "ami", "ari"}


def test_a_run_does_not_differ_from_itself(vae):
    state = torch.get_rng_state()
    result = compare({"a": vae, "b": vae}, splits(), samples=30, limit=6)
    assert torch.equal(torch.get_rng_state(), state)
    assert (result.differences[["difference", "standard_error"]] == 0).all(axis=None)
    assert set(result.differences["measure"]) == {"log_marginal", "elbo", "ami", "ari"}


def test_images_with_nothing_to_group_are_left_out_of_groupings_alone(vae, flat):
    features, groups = arrays()
    groups = groups.clone()
    groups[:, [0, 5, 6]] = 0
    data = ImageDataset(features, groups)
    result = compare({"a": vae, "b": vae.using("gradient-em")}, data, measures="marginal", samples=30)
    assert result.counts == {"ami": 25, "ari": 25, "k_hat": 28, "log_marginal": 28}
    assert result.differences.set_index("measure")["images"].to_dict() == {"log_marginal": 28, "ami": 25, "ari": 25}
    for name in ("a", "b"):
        assert result.table["ami"][name] == pytest.approx(np.nanmean(result.scores[name]["ami"]))


def test_log_p_is_right_where_it_is_known():
    """Laplace's approximation is exact where p(θ | x) is normal, and the importance weights then are all p(x)."""
    torch.manual_seed(0)
    shape = (1, 5, 1)
    model = SpatialMixture(decoders.Linear(2, shape), Normal(0.7), 1, prior="standard_normal")
    data = ImageDataset(torch.randn(1, 10, *shape))
    vae = pnem.fit(model, VAE(model), {"training": data, "validation": data}, precision="float64", **FIT)
    runs = {"vae": vae, "point": vae.using(GradientEM(model, iterations=100)), "normal": vae.using("semi-amortised")}
    result = compare(runs, data, samples=200)
    exact = exact_log_marginal(model, data[:].x.double()).log_marginal.numpy()
    np.testing.assert_allclose(result.scores["point"]["log_marginal"], exact, rtol=0, atol=1e-6)
    for name in ("vae", "normal"):
        own = result.scores[name]
        # In expectation; four standard errors of the mean over images and draws.
        error = 4 * (own["log_marginal"] - exact).std(ddof=1) / math.sqrt(10)
        assert -error <= (exact - own["log_marginal"]).mean() <= error + 0.05
        assert (exact - own["elbo"]).mean() > -error
    assert "ami" not in result.table
    assert any("no groups" in note for note in result.notes)
    assert any("All runs infer in one model" in note for note in result.notes)


def test_plug_in_values_are_called_what_they_are(mixed, flat):
    _, result = mixed
    text = printed(result, 200)
    assert "ELBO or †" in text
    assert "no bound on log p(x)" in text
    (row,) = [line for line in text.splitlines() if line.startswith("gradient-em") and "†" in line]
    assert "‡" in row
    only = compare({"a": flat, "b": train(epochs=2)}, splits(), limit=8)
    text = printed(only, 200)
    assert "ELBO" not in text
    assert "log p(x, θ)" in text
    assert "flat prior on θ has no log p(x)" in text
    assert "log_marginal" not in only.table
    assert set(only.differences["measure"]) == {"elbo", "ami", "ari"}


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_tables_fit_the_terminal_and_hold_everything(mixed, width):
    _, result = mixed
    lines = printed(result, width).splitlines()
    assert max(map(cell_len, lines)) <= width
    text = " ".join(lines)
    for title in ("log p(x)", "ELBO or †", "approximation", "k̂ > 0.7", "AMI", "parameters", "training", "inference"):
        assert title in text
    if width > 40:
        cells = f"{result.table['ami']['vae']:.3f} ± {result.table['ami_se']['vae']:.3f}"
        assert any(line.startswith("vae") and cells in line for line in lines)


def test_json_holds_the_table_and_all_pairs(mixed):
    _, result = mixed
    table = result.table.copy()
    table.loc["vae", "elbo_se"] = math.inf
    assert json.loads(dataclasses.replace(result, table=table).to_json(), parse_constant=pytest.fail)["table"]
    stored = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert [row["run"] for row in stored["table"]] == ["vae", "iterative vi", "gradient-em"]
    assert stored["table"][0]["log_marginal"] == result.table["log_marginal"]["vae"]
    assert stored["table"][2]["approximation_gap"] is None
    assert stored["table"][2]["elbo_is_bound"] is False
    assert len(stored["differences"]) == len(result.differences)
    assert stored["counts"] == result.counts


def test_a_sampler_takes_part_as_the_normal_with_its_moments(vae):
    runs = {"vae": vae, "nuts": vae.using(NUTS(vae.model, chains=2, warmup=20, draws=30))}
    with warnings.catch_warnings():
        # So few draws have not mixed.
        warnings.simplefilter("ignore")
        result = compare(runs, splits(), samples=30, limit=2)
    assert result.table["q"].tolist() == ["density", "draws"]
    assert "§" in printed(result, 120)
    assert "amortisation_gap" not in result.scores["nuts"]
    wide = fitted(features=5)
    short = wide.using(NUTS(wide.model, chains=1, warmup=5, draws=4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(StrategyError, match=r"^few: .* full rank"):
            compare({"vae": vae, "few": short}, splits(), samples=30, limit=2)


def other_images():
    features, groups = arrays()
    return splits() | {"training": ImageDataset(1 - features, groups)}


WITHOUT_NATS = 'measures="grouping"'
REFUSED = {
    "data": (lambda: fitted(data=other_images()), "all", "trained on different images"),
    "data, marginal": (lambda: fitted(data=other_images()), "marginal", "trained on different images"),
    "pixels": (lambda: fitted(likelihood=Normal(0.3)), "all", "a probability and a density"),
    "flat": (lambda: train(epochs=1), "all", "different joint densities"),
    "prior": (lambda: fitted(prior=DiagonalNormal(3)), "all", 'measures="marginal".*measures="grouping"'),
    "ownership": (lambda: fitted(iterative, 2, pixel_prior=0.0), "all", "ownership 1 with pixel prior 0"),
    "ownership, marginal": (lambda: fitted(iterative, 2, pixel_prior=0.0), "marginal", "not normalised over x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nats_that_do_not_compare_are_refused_and_groupings_are_not(vae, case):
    make, measures, message = REFUSED[case]
    other = make()
    with pytest.raises(RunError, match=message) as caught:
        compare({"a": vae, "b": other}, splits(), measures=measures, limit=4)
    assert WITHOUT_NATS in str(caught.value)
    result = compare({"a": vae, "b": other}, splits(), measures="grouping", limit=4)
    assert set(result.differences["measure"]) == {"ami", "ari"}
    assert "nats" not in printed(result, 200).replace("nats per image", "", 2)


def test_a_flat_prior_has_no_nats_in_common_with_a_proper_one():
    runs = {"flat": fitted(GradientEM, prior="flat"), "proper": fitted()}
    with pytest.raises(RunError, match=r"prior on θ of flat is flat and that of proper standard_normal: .* no p\(x\)"):
        compare(runs, splits())
    with pytest.raises(RunError, match="flat has no log p"):
        compare(runs, splits(), measures="marginal")


def test_owned_priors_do_not_compare_at_all():
    runs = {name: fitted(iterative, 2, pixel_prior=0.0, prior=prior) for name, prior in PRIORS.items()}
    for measures in ("all", "marginal"):
        with pytest.raises(RunError, match="normalised over x") as caught:
            compare(runs, splits(), measures=measures)
        assert 'measures="marginal"' not in str(caught.value)


PRIORS = {"standard": "standard_normal", "learned": DiagonalNormal(3)}


def test_log_p_compares_across_proper_priors_without_ownership():
    runs = {name: fitted(prior=prior) for name, prior in PRIORS.items()}
    result = compare(runs, splits(), measures="marginal", samples=30, limit=5)
    assert set(result.differences["measure"]) == {"log_marginal", "ami", "ari"}
    assert "elbo" not in result.table


def test_another_number_of_components_or_features_is_the_same_kind_of_model(vae):
    assert compare({"a": vae, "b": fitted(iterative, 3, features=2)}, splits(), samples=30, limit=2).images == 2


def test_images_of_another_shape_never_compare(vae):
    model = SpatialMixture(decoders.MLP(3, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    other = pnem.fit(model, VAE(model), splits(shape=(4, 4, 1)), **FIT)
    with pytest.raises(RunError, match=r"\(3, 4, 1\) and b for \(4, 4, 1\)"):
        compare({"a": vae, "b": other}, splits(), measures="grouping")


def older(run, **data):
    """The run as it would be without a fingerprint."""
    known = {name: value for name, value in run.settings.data.items() if name != "fingerprint"}
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, data=known | data))


@pytest.mark.parametrize(
    ("data", "same"),
    [
        ({}, True),
        ({"source": "elsewhere/x.h5"}, True),
        ({"source": "memory"}, True),
        ({"source": "y.h5"}, False),
        ({"training": 27}, False),
    ],
)
def test_runs_without_a_fingerprint_are_told_apart_by_source_and_size(vae, data, same):
    runs = {"a": older(vae, source="data/x.h5"), "b": older(vae, **{"source": "data/x.h5"} | data)}
    if same:
        compare(runs, splits(), measures="marginal", samples=30, limit=2)
    else:
        with pytest.raises(RunError, match="trained on different images"):
            compare(runs, splits())


def test_mistakes_are_named(vae):
    runs = {"a": vae, "b": vae}
    features, _ = arrays()
    for error, message, arguments in (
        (RunError, "at least two runs", {"runs": {"a": vae}}),
        (RunError, "one of all, marginal, grouping", {"measures": "nats"}),
        (DataError, "one image", {"limit": 1}),
        (DataError, "limit", {"limit": 0}),
        (DataError, "samples=29: give at least 30", {"samples": 29}),
        (DataError, "batch_size", {"batch_size": 0}),
        (DataError, "budget", {"budget": 0}),
        (DataError, "budget", {"budget": math.nan}),
        (DataError, "budget=inf", {"budget": math.inf}),
        (DataError, "budget='60'", {"budget": "60"}),
        (RunError, "mapping from names to runs", {"runs": [vae, vae]}),
        (RunError, "mapping from names to runs", {"runs": {1: vae, 2: vae}}),
        (RunError, "b must be a Run, but is of type VAE", {"runs": {"a": vae, "b": vae.strategy}}),
        (RunError, "b must be a Run, but is of type str: .*pnem.load", {"runs": {"a": vae, "b": "runs/b"}}),
        (DataError, "data are of type Tensor: .*ImageDataset", {"data": features}),
        (DataError, "tset", {"split": "tset"}),
        (DataError, "has no groups", {"measures": "grouping", "data": ImageDataset(features)}),
        (DataError, "the model is for", {"data": splits(shape=(4, 4, 1))}),
        (DataError, "a: split 'test'", {"data": ImageDataset(features - 0.5)}),
    ):
        with pytest.raises(error, match=message):
            compare(**{"runs": runs, "data": splits()} | arguments)


@pytest.mark.parametrize("batch_size", [1, 100])
def test_a_budget_that_is_too_short_still_gives_a_few_images(vae, batch_size):
    result = compare({"a": vae, "b": vae}, splits(), samples=30, budget=1e-6, batch_size=batch_size)
    assert result.images == result.counts["log_marginal"] == 2
    assert result.available == 28
    assert any("budget" in note for note in result.notes)
    assert f"{result.images} of 28 test images" in printed(result, 120)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("budget", "divided", "everything", "images"),
    [(10, True, 72, 280), (10, False, 2, 1000), (1000, True, 1000, 1000), (None, True, 1000, 1000)],
)
def test_the_schedule_keeps_to_its_budget(monkeypatch, budget, divided, everything, images):
    """An image costs 0.11 s with everything, and 0.01 s without."""
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    schedule = Schedule(1000, 100, budget, divided=divided)
    pieces = []
    for piece, expensive in schedule:
        pieces.append((piece, expensive))
        clock.now += len(piece) * (0.11 if expensive and divided else 0.01)
        schedule.cheap = 0.01
    assert budget is None or clock.now - 50 <= budget
    assert [i for piece, _ in pieces for i in piece] == [*range(pieces[-1][0].stop)]
    assert [expensive for _, expensive in pieces] == sorted((expensive for _, expensive in pieces), reverse=True)
    assert sum(len(piece) for piece, expensive in pieces if expensive) == everything
    assert abs(pieces[-1][0].stop - images) <= 10


def test_the_figure_draws_what_was_measured(mixed, flat, tmp_path):
    _, result = mixed
    figure = plots.comparison(result)
    bounds, plug_ins, differences, grouping, cost = figure.axes
    assert [label.get_text() for label in bounds.get_yticklabels()] == ["vae", "iterative vi", "gradient-em"]
    # Of two runs two gaps each; the point has neither.
    bars = bounds.patches
    assert len(bars) == 4
    ends = {round(bar.get_y() + 0.25): bar.get_x() + bar.get_width() for bar in bars}
    for row, name in enumerate(("vae", "iterative vi")):
        assert ends[row] == pytest.approx(result.table["elbo"][name])
    assert plug_ins.lines[0].get_xdata()[0] == pytest.approx(result.table["elbo"]["gradient-em"])
    assert "no bound" in plug_ins.get_xlabel()
    assert "log p(x) minus" in differences.get_xlabel()
    assert grouping.get_xlabel() == "AMI and ARI"
    assert "ms per image" in cost.get_xlabel()
    only = plots.comparison(compare({"a": flat, "b": flat}, splits(), measures="grouping", limit=4))
    assert [axes.get_xlabel() for axes in only.axes] == ["AMI and ARI", "inference\n[ms per image]"]
    only.savefig(tmp_path / "only.png")


def test_labels_of_the_figure_stay_apart_beside_long_names(mixed):
    _, result = mixed
    names = ["a variational autoencoder", "iterative inference, K = 3", "gradient EM, a point estimate of θ"]
    renamed = dataclasses.replace(
        result,
        table=result.table.set_axis(names),
        scores=dict(zip(names, result.scores.values(), strict=True)),
        differences=result.differences.replace(dict(zip(result.table.index, names, strict=True))),
    )
    for axes in plots.comparison(renamed).axes:
        low, high = axes.get_xlim()
        shown = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [label.get_window_extent() for label in shown]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
