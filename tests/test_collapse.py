"""What goes wrong is found where it was made to, and nothing is found where nothing is wrong."""

import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from broken import as_run, dataset, painted, two_bars
from torch import nn

import pnem
from pnem.data import ImageDataset, write_hdf5
from pnem.diagnostics import collapse
from pnem.diagnostics.collapse import judge
from pnem.diagnostics.parting import parting
from pnem.diagnostics.symptoms import Symptoms, confidently_wrong, duplicates, foreground, shares, symptoms
from pnem.errors import DataError
from pnem.inference import RNNEM, VAE, IterativeVI, encoders
from pnem.models import Bernoulli, DiagonalNormal, MixtureOfNormals, Normal, SpatialMixture, StudentT, decoders

SHAPE = (8, 8, 1)


def names(findings):
    return [finding.name for finding in findings]


def random_gamma(*shape):
    return torch.rand(*shape, dtype=torch.float64).log().mul(3).softmax(-2)


# --- the functions of tensors


def test_the_background_is_the_mean_of_the_pixel_prior_or_the_median_of_the_image():
    x = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]]).unsqueeze(-1)
    assert foreground(x).tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert foreground(x, torch.zeros(1)).tolist() == x.squeeze(-1).tolist()
    colours = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.5, 1.5], [2.5, -0.5]]])
    assert foreground(colours).tolist() == [[0, 0, 1, 5]]


def test_shares_count_the_foreground_alone_where_the_background_is_undivided():
    contrast = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).double()
    gamma = torch.full((1, 3, 6), 1 / 3).double()
    gamma[0, :, :4] = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(shares(gamma, contrast), torch.tensor([[0.75, 0.25, 0.0]]).double())


def test_shares_count_foreground_and_background_the_same_however_small_the_objects_are():
    D = 10_000
    contrast = torch.zeros(1, D).double()
    contrast[0, :2] = 1
    gamma = torch.zeros(1, 3, D).double()
    gamma[0, 2], gamma[0, 2, :2], gamma[0, 0, 0], gamma[0, 1, 1] = 1, 0, 1, 1
    torch.testing.assert_close(shares(gamma, contrast), torch.tensor([[0.25, 0.25, 0.5]]).double())


def test_shares_at_the_edges():
    undivided = torch.full((1, 4, 5), 0.25).double()
    contrast = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]).double()
    assert shares(undivided, contrast).tolist() == [[0.25] * 4]
    gamma = random_gamma(1, 4, 5)
    assert shares(gamma, torch.zeros(1, 5).double()).isnan().all()
    # All pixels as far from the background as one another.
    assert shares(gamma, torch.ones(1, 5).double()).sum().item() == pytest.approx(1)
    assert shares(torch.ones(2, 1, 5), torch.zeros(2, 5)).tolist() == [[1], [1]]


def test_permuting_the_components_permutes_the_shares_and_leaves_the_duplicates():
    gamma, contrast = random_gamma(20, 4, 30), torch.rand(20, 30).double()
    gamma[:10, 2] = gamma[:10, 0] = (gamma[:10, 2] + gamma[:10, 0]) / 2
    mean = torch.rand(20, 4, 30, 1).double()
    mean[:10, 2] = mean[:10, 0]
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(shares(gamma[:, order], contrast), shares(gamma, contrast)[:, order])
    torch.testing.assert_close(shares(gamma, contrast).sum(-1), torch.ones(20).double())
    found = duplicates(gamma, mean, contrast)
    assert found[:10].all()
    assert not found[10:].any()
    assert torch.equal(duplicates(gamma[:, order], mean[:, order], contrast), found)


def test_duplicates_are_alike_in_responsibility_and_in_prediction_and_own_something():
    contrast = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).double()
    gamma = torch.tensor([[[0.5, 0.5, 0.3, 0.3], [0.5, 0.5, 0.3, 0.3], [0.0, 0.0, 0.4, 0.4]]]).double()
    mean = torch.tensor([[[0.9, 0.9, 0.0, 0.0], [0.9, 0.9, 0.0, 0.0], [0.0] * 4]]).double().unsqueeze(-1)
    assert duplicates(gamma, mean, contrast).tolist() == [True]
    other = mean.clone()
    other[0, 1, :2] = 0.75
    assert duplicates(gamma, other, contrast).tolist() == [False]
    uneven = gamma.clone()
    uneven[0, :2, :2] = torch.tensor([[0.6, 0.6], [0.4, 0.4]])
    assert duplicates(uneven, mean, contrast).tolist() == [False]
    # Spare components: alike in every respect, but on the background only.
    spare = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]]]).double()
    assert duplicates(spare, torch.zeros_like(mean), contrast).tolist() == [False]
    assert duplicates(gamma, mean, torch.zeros_like(contrast)).tolist() == [False]


def test_a_wrong_bernoulli_pixel_counts_from_a_logit_of_ten_and_a_right_one_never():
    x = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]]).unsqueeze(-1)
    psi = torch.tensor([[[-9.9, -10.1, 40.0, 10.1, -40.0]]]).unsqueeze(-1)
    assert confidently_wrong(Bernoulli(), x, psi, torch.ones(1, 1, 5)).item() == pytest.approx(2 / 5)
    # Only as far as the component that is wrong is responsible.
    two = torch.cat([psi, torch.zeros_like(psi)], 1)
    gamma = torch.tensor([0.25, 0.75]).view(1, 2, 1).expand(1, 2, 5)
    assert confidently_wrong(Bernoulli(), x, two, gamma).item() == pytest.approx(0.25 * 2 / 5)


def test_a_normal_pixel_is_wrong_where_its_residual_costs_ten_nats():
    away = math.sqrt(20) * 0.1
    x = torch.tensor([0.0, 0.99 * away, 1.01 * away, -1.01 * away]).view(1, 4, 1)
    wrong = confidently_wrong(Normal(0.1), x, torch.zeros(1, 1, 4, 1), torch.ones(1, 1, 4))
    assert wrong.tolist() == [0.5]


def test_right_predictions_of_many_channels_are_not_wrong():
    torch.manual_seed(0)
    x = 0.3 * torch.randn(50, 64, 10)
    psi = torch.zeros(50, 1, 64, 10)
    assert confidently_wrong(Normal(0.3), x, psi, torch.ones(50, 1, 64)).mean() < 1e-3
    assert confidently_wrong(Normal(0.3), x, psi + 2, torch.ones(50, 1, 64)).mean() > 0.99


def test_a_likelihood_without_a_best_is_not_judged():
    likelihood = StudentT("diagonal")
    psi = torch.zeros(1, 1, 4, likelihood.num_parameters(1))
    assert confidently_wrong(likelihood, torch.zeros(1, 4, 1), psi, torch.ones(1, 1, 4)).isnan().all()


@pytest.mark.parametrize("prior", ["standard_normal", "mixture"])
@pytest.mark.usefixtures("float64")
def test_divergences_per_dimension_add_up_to_the_divergence(prior):
    prior = MixtureOfNormals(5, 2) if prior == "mixture" else prior
    model = SpatialMixture(decoders.MLP(5, SHAPE, hidden=(7,)), Bernoulli(), 3, prior=prior)
    strategy = IterativeVI(model, hidden=6, iterations=2)
    x = two_bars(4)[0][0].flatten(1, 2).double()
    state = strategy.unroll(x)[-1]
    divergence = symptoms(model, state, x).divergence
    if isinstance(prior, MixtureOfNormals):
        assert divergence is None
    else:
        assert divergence.shape == (4, 3, 5)
        torch.testing.assert_close(divergence.sum((-2, -1)), strategy.divergence(state))


def test_symptoms_of_batches_are_those_of_the_whole():
    model = SpatialMixture(decoders.MLP(5, SHAPE, hidden=(7,)), Bernoulli(), 2, prior="standard_normal")
    strategy = VAE(model, encoder=encoders.MLP(SHAPE, hidden=(9,)))
    x = two_bars(7)[0][0].flatten(1, 2)
    whole = symptoms(model, strategy.infer(x), x)
    joined = Symptoms.concatenate([symptoms(model, strategy.infer(piece), piece) for piece in x.split(3)])
    assert len(joined) == len(whole) == 7
    for name in ("shares", "duplicated", "wrong", "location", "divergence"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))


# --- fits


@pytest.mark.parametrize(
    ("painting", "options"),
    [
        ("an object each", {}),
        ("an object each", {"K": 2}),
        ("an object each", {"K": 4}),
        # Confident, and right.
        ("an object each", {"logit": 40.0}),
        ("background and objects", {"pixel_prior": None}),
        # All but eight of a thousand pixels are background, and one component takes it.
        ("background and objects", {"pixel_prior": None, "size": 30}),
        ("one for all", {"K": 1}),
    ],
)
def test_nothing_is_found_in_a_healthy_fit(painting, options):
    assert collapse(painted(painting, **options), dataset(size=options.get("size", 8))) == []


@pytest.mark.parametrize(
    ("painting", "options", "name", "value", "words"),
    [
        ("an object each", {"fixed": True}, "dead components", 1, ["[2]", "num_components=2"]),
        ("an object each", {"K": 6}, "dead components", 4, ["2.0 of 6", "num_components=3"]),
        ("twice the same", {}, "duplicated components", 1, ["100%", "ownership above 1"]),
        ("twice the same", {"K": 2, "pixel_prior": None}, "duplicated components", 1, ["pixel_prior"]),
        ("one for all", {}, "one component explains everything", 1, ["100%", "fewer than 64 latent_features", "noise"]),
        ("one for all", {"pixel_prior": None}, "one component explains everything", 1, ["pixel_prior"]),
        ("two pixels wrong", {"logit": 20.0, "K": 1}, "saturated decoder", 2 / 64, ["3.1%", "±10", "learning_rate"]),
    ],
)
def test_what_is_wrong_with_a_broken_fit_is_found(painting, options, name, value, words):
    findings = collapse(painted(painting, **options), dataset())
    assert names(findings) == [name]
    assert findings[0].value == pytest.approx(value)
    assert all(word in str(findings[0]) for word in words)


@pytest.mark.parametrize("painting", ["an object each", "one for all"])
def test_learned_mixing_weights_are_named_where_they_may_be_the_cause(painting):
    run = painted(painting, fixed=True)
    assert "mixing" not in collapse(run, dataset())[0].advice
    run.model.mixing_kind = "learned"
    assert 'mixing="uniform"' in collapse(run, dataset())[0].advice


def variational(K=1, likelihood=None, M=4):
    model = SpatialMixture(
        decoders.MLP(M, SHAPE, hidden=(16,)),
        Bernoulli() if likelihood is None else likelihood,
        K,
        prior="standard_normal",
        pixel_prior=0.0,
    )
    return model, VAE(model, encoder=encoders.MLP(SHAPE, hidden=(16,)))


def fit(model, strategy, **options):
    data = {"training": ImageDataset(*two_bars(64, seed=1)), "validation": dataset()}
    settings = {"epochs": 15, "batch_size": 16, "learning_rate": 0.01, "device": "cpu", "progress": False}
    return pnem.fit(model, strategy, data, **settings | options)


@pytest.mark.parametrize(("sigma", "inactive"), [(0.3, 0), (10.0, 4)])
def test_a_vae_whose_pixels_count_less_than_the_prior_collapses(sigma, inactive):
    findings = collapse(fit(*variational(likelihood=Normal(sigma))), dataset())
    if inactive:
        (finding,) = findings
        assert (finding.name, finding.value) == ("posterior collapse", 4)
        assert "4 of 4" in finding.seen
        assert "smaller sigma" in finding.advice
    else:
        assert findings == []


def test_a_sigma_far_below_the_residuals_is_found():
    (finding,) = collapse(fit(*variational(likelihood=Normal(0.02), M=1), epochs=4), dataset())
    assert finding.name == "saturated decoder"
    assert "σ = 0.02" in finding.seen
    assert "learn_sigma=True" in finding.advice


def test_components_that_differ_by_their_index_alone_do_not_count_as_activity():
    model, strategy = variational(K=2)
    nn.init.zeros_(strategy.head.weight)
    with torch.no_grad():
        strategy.head.bias.copy_(torch.arange(16.0) - 8)
    run = as_run(model, strategy)
    theta = next(run.infer_batches(dataset()))[1].theta
    assert theta.var((0, 1)).min() > 1
    assert "posterior collapse" in names(collapse(run, dataset()))


def test_half_of_the_latent_dimensions_are_inactive():
    model, strategy = variational()
    nn.init.normal_(strategy.head.weight)
    with torch.no_grad():
        strategy.head.weight[:2] = 0
        strategy.head.weight[4:] = 0
    (finding,) = collapse(as_run(model, strategy), dataset())
    assert finding.value == 2
    assert "latent_features=2" in finding.advice
    with torch.no_grad():
        strategy.head.weight[:1] = 1
    assert collapse(as_run(model, strategy), dataset()) == []


def test_activity_is_measured_by_the_scale_that_the_prior_has_learned():
    prior = DiagonalNormal(4)
    with torch.no_grad():
        prior.log_scale.copy_(torch.tensor([0.02, 0.02, 1.0, 20.0]).log())
    model = SpatialMixture(decoders.MLP(4, SHAPE, hidden=(16,)), Bernoulli(), 1, prior=prior)
    x = dataset(50)[:].x
    strategy = VAE(model)
    means = 0.9 * prior.distribution().sample((50, 1))
    means[..., 3] /= 50
    q = strategy.unroll(x)[-1]._replace(location=means, scale=0.4 * prior.log_scale.exp().expand_as(means))
    assert judge(symptoms(model, q, x), strategy) == []
    (finding,) = judge(symptoms(model, q, x), strategy, inactive=0.25)
    assert (finding.name, finding.value) == ("posterior collapse", 1)


def test_only_a_distribution_of_theta_can_collapse():
    model = SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), 3, pixel_prior=0.0)
    with torch.no_grad():
        model.decoder.linear.weight.zero_()
    assert "posterior collapse" not in names(collapse(as_run(model, RNNEM(model, iterations=1)), dataset()))


def test_images_without_foreground_are_left_out():
    features, groups = two_bars(60)
    features[0, :31], groups[0, :31] = 0, 0
    assert collapse(painted("one for all"), ImageDataset(features, groups)) == []
    features, groups = two_bars(61)
    features[0, :31], groups[0, :31] = 0, 0
    assert names(collapse(painted("one for all"), ImageDataset(features, groups))) == [
        "one component explains everything"
    ]


# --- history


def history(ari, loss):
    return pd.DataFrame({"epoch": range(1, len(ari) + 1), "valid_loss": loss, "valid_ari": ari})


STRATEGY = painted("an object each").strategy
FALLING = [100.0, 80, 70, 65, 62, 60, 59, 58]


def test_loss_and_grouping_that_part_ways_are_found():
    (finding,) = parting(history([0.5, 0.68, 0.7, 0.69, 0.66, 0.62, 0.57, 0.54], FALLING), STRATEGY)
    assert finding.name == "loss and grouping part ways"
    assert finding.value == pytest.approx(0.69 - 0.57)
    assert "from 0.69 to 0.57" in finding.seen
    assert "epochs=4" in finding.advice
    assert "latent_features" in finding.advice
    plain = painted("an object each", pixel_prior=None).strategy
    assert "pixel_prior" in parting(history([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], FALLING), plain)[0].advice
    run = as_run(STRATEGY.model, STRATEGY, history([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], FALLING))
    assert names(collapse(run, dataset())) == ["loss and grouping part ways"]


@pytest.mark.parametrize(
    ("ari", "loss"),
    [
        ([0.5, 0.68, 0.7, 0.71, 0.72, 0.72, 0.72, 0.73], FALLING),
        # Over-fitting: the loss shows it.
        ([0.5, 0.68, 0.7, 0.69, 0.66, 0.62, 0.57, 0.54], [100.0, 60, 50, 55, 60, 65, 70, 75]),
        # One epoch that is out of line, the last or the best.
        ([0.7, 0.7, 0.71, 0.7, 0.71, 0.7, 0.71, 0.3], FALLING),
        ([0.7, 0.7, 0.95, 0.7, 0.71, 0.7, 0.71, 0.7], FALLING),
        # Too early to say, and no groups.
        ([0.7, 0.6, 0.5, 0.4, 0.3], FALLING[:5]),
        ([math.nan] * 8, FALLING),
    ],
)
def test_no_parting_is_seen_where_there_is_none(ari, loss):
    assert parting(history(ari, loss), STRATEGY) == []


def test_noise_is_no_parting():
    rng = np.random.default_rng(0)
    found = [parting(history(0.7 + rng.normal(0, 0.1, 20), np.linspace(90, 80, 20)), STRATEGY) for _ in range(300)]
    # By chance the noise is taken for less than it is: seen in about one of a hundred.
    assert sum(map(bool, found)) <= 9


# --- requests


def test_the_runs_own_data_are_used_where_they_still_are(tmp_path):
    run = painted("one for all")
    with pytest.raises(DataError, match=r"in memory.*collapse\(run, data\)"):
        collapse(run)
    path = tmp_path / "bars.h5"
    run.settings.data["source"] = str(path)
    with pytest.raises(DataError, match=r"bars.h5, which is not there: .*collapse\(run, data\)"):
        collapse(run)
    write_hdf5(path, {"training": two_bars(5), "validation": two_bars(40), "test": two_bars(40)})
    state = torch.get_rng_state()
    found = collapse(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert names(found) == names(collapse(run, path, split="test")) == ["one component explains everything"]
    with pytest.raises(DataError, match="at least 30 images to say anything, but was given 5"):
        collapse(run, split="training")


def test_too_few_images_are_refused():
    run = painted("one for all")
    with pytest.raises(DataError, match=r"at least 30 images.*given 29: raise limit"):
        collapse(run, dataset(), limit=29)
    with pytest.raises(DataError, match="limit"):
        collapse(run, dataset(), limit=0)
    with pytest.raises(DataError, match="batch_size"):
        collapse(run, dataset(), batch_size=0)
    assert len(collapse(run, dataset(), limit=30, batch_size=7)) == 1


def test_a_missing_split_is_named():
    with pytest.raises(DataError, match="'validation' is needed"):
        collapse(painted("one for all"), {"test": dataset()})


def test_the_location_is_the_mean_of_q_and_not_a_draw():
    model, strategy = variational()
    x = two_bars(4)[0][0].flatten(1, 2)
    state = strategy.unroll(x)[-1]
    assert not torch.equal(state.theta, state.location)
    assert torch.equal(symptoms(model, state, x).location, state.location)
    posterior = strategy.infer(x)
    seen = symptoms(model, posterior, x)
    assert torch.equal(seen.location, posterior.q.mean)
    assert seen.divergence.shape == (4, 1, 4)
    # Any other q(θ), of which `theta` is the mean as well.
    correlated = dist.MultivariateNormal(posterior.theta, torch.eye(4)).to_event(1)
    seen = symptoms(model, posterior._replace(q=correlated), x)
    assert torch.equal(seen.location, posterior.theta)
    assert seen.divergence is None
    seen = symptoms(model, posterior._replace(q=dist.Delta(posterior.theta, event_dim=2)), x)
    assert seen.location is None
    assert seen.divergence is None
