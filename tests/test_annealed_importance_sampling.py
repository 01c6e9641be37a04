"""Annealed importance sampling: what leaves a distribution invariant, the closed form, brute force."""

import math

import pytest
import torch
from cases import MODELS, PROPER, factors, images, pair
from test_marginal_likelihood import assert_agree, delta, exact, linear_gaussian, short_trained, tiny, width_of
from torch import Tensor

from pnem.errors import ModelError, StrategyError
from pnem.inference import (
    VAE,
    GradientEM,
    PyroGuide,
    annealed_importance_sampling,
    encoders,
    evidence_lower_bound,
    exact_log_marginal,
    hmc,
    importance_weighted_bound,
    prior_monte_carlo,
)
from pnem.inference.annealed_importance_sampling import inverse_temperatures

pytestmark = pytest.mark.usefixtures("float64")


def normal_at(mean: Tensor, covariance: Tensor):
    """`evaluate` of normals, one per image, of a θ of shape (S, B, 1, M), in closed form."""
    precision = torch.linalg.inv(covariance)

    def evaluate(theta: Tensor) -> hmc.Point:
        gradient = -torch.einsum("bij,sbkj->sbki", precision, theta - mean[:, None])
        return hmc.Point(theta, 0.5 * ((theta - mean[:, None]) * gradient).sum((-2, -1)), gradient)

    return evaluate


def normals(B: int = 2, M: int = 3) -> tuple[Tensor, Tensor]:
    root = torch.randn(B, M, M)
    return torch.randn(B, M), root @ root.mT + 0.3 * torch.eye(M)


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Draws (S, B, M) within four and a half standard errors of mean and covariance."""
    S, variance = len(draws), covariance.diagonal(dim1=-2, dim2=-1)
    assert bool(((draws.mean(0) - mean).abs() < 4.5 * (variance / S).sqrt()).all())
    centred = draws - mean
    found = torch.einsum("sbi,sbj->bij", centred, centred) / S
    error = ((variance.unsqueeze(-1) * variance.unsqueeze(-2) + covariance.square()) / S).sqrt()
    assert bool(((found - covariance).abs() < 4.5 * error).all())


def test_a_transition_leaves_normals_invariant():
    """At step sizes of its own for every image, large enough that the rejections are what keeps them invariant."""
    mean, covariance = normals()
    evaluate = normal_at(mean, covariance)
    narrowest = torch.linalg.eigvalsh(covariance)[:, 0].sqrt()
    size = torch.tensor([1.5, 1.7]) * narrowest
    root = torch.linalg.cholesky(covariance)
    point = evaluate((mean + torch.einsum("bij,sbj->sbi", root, torch.randn(40_000, 2, 3))).unsqueeze(-2))
    start = point.theta
    for _ in range(4):
        point, probability = hmc.transition(evaluate, point, size, 3)
        assert bool(((probability.mean(0) > 0.3) & (probability.mean(0) < 0.95)).all())
    assert_moments(point.theta.squeeze(-2), mean, covariance)
    assert (point.theta != start).any(-1).double().mean().item() > 0.9
    again = evaluate(point.theta)
    torch.testing.assert_close(again.log_density, point.log_density)
    torch.testing.assert_close(again.gradient, point.gradient)


def test_transitions_find_normals_from_afar():
    mean, covariance = normals()
    evaluate = normal_at(mean, covariance)
    size = torch.linalg.eigvalsh(covariance)[:, 0].sqrt()
    point = evaluate(torch.zeros(2000, 2, 1, 3))
    for _ in range(60):
        point, _ = hmc.transition(evaluate, point, size * (0.5 + 0.5 * torch.rand(2000, 2)), 10)
    assert_moments(point.theta.squeeze(-2), mean, covariance)


@pytest.mark.parametrize("beyond", [-math.inf, math.nan])
def test_what_is_not_finite_is_rejected(beyond):
    """A half-normal, whose density is 0 or not a number below 0: chains stay inside, with its moments."""

    def evaluate(theta: Tensor) -> hmc.Point:
        log_density = torch.where(theta > 0, -0.5 * theta.square(), beyond).sum((-2, -1))
        return hmc.Point(theta, log_density, -theta)

    point = evaluate(torch.randn(20_000, 1, 1, 1).abs())
    for _ in range(5):
        point, _ = hmc.transition(evaluate, point, torch.tensor([0.5]), 3)
    assert bool((point.theta > 0).all())
    deviation = math.sqrt((1 - 2 / math.pi) / 20_000)
    assert point.theta.mean().item() == pytest.approx(math.sqrt(2 / math.pi), abs=4 * deviation)
    assert point.theta.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 20_000))


@pytest.mark.parametrize("schedule", ["linear", "sigmoidal"])
def test_temperatures_rise_from_zero_to_one(schedule):
    for temperatures in (1, 2, 7, 100):
        beta = torch.tensor(inverse_temperatures(temperatures, schedule))
        assert beta[0].item() == 0
        assert beta[-1].item() == 1
        assert len(beta) == temperatures + 1
        steps = beta.diff()
        assert bool((steps > 0).all())
        torch.testing.assert_close(steps, steps.flip(0))
    assert (steps[0] < 0.2 * steps[50]) == (schedule == "sigmoidal")


@pytest.mark.parametrize("start", ["prior", "untrained", "trained", "delta", "laplace"])
def test_it_agrees_with_the_closed_form(start):
    model, x = linear_gaussian()
    options: dict[str, object] = {"width": {"delta": 0.3, "laplace": "laplace"}.get(start)}
    if start in ("delta", "laplace"):
        strategy, options["posterior"] = delta(model, x)
    else:
        strategy = None if start == "prior" else short_trained(model, x, {"untrained": 0, "trained": 100}[start])
    estimate = annealed_importance_sampling(
        model, strategy, x, chains=64, temperatures=20, leapfrog=4, schedule="linear", **options
    )
    assert_agree(estimate, exact_log_marginal(model, x).log_marginal)
    assert estimate.monte_carlo_error_of_mean < 0.05
    assert bool(((estimate.acceptance > 0.4) & (estimate.acceptance < 0.95)).all())
    if start == "laplace":
        assert estimate.monte_carlo_error.max().item() < 1e-6


def test_from_the_exact_posterior_it_has_no_variance():
    model, x = linear_gaussian()
    strategy, posterior = exact(model, x)
    estimate = annealed_importance_sampling(
        model, strategy, x, chains=3, temperatures=4, leapfrog=2, posterior=posterior
    )
    torch.testing.assert_close(estimate.log_marginal, exact_log_marginal(model, x).log_marginal)
    assert estimate.monte_carlo_error.max().item() < 1e-6


def test_it_is_unbiased_for_p_of_x_with_few_temperatures_too():
    """The mean weight of many chains that are far from equilibrium."""
    model, x = linear_gaussian(8)
    log_p = exact_log_marginal(model, x).log_marginal
    vae = VAE(model, encoder=encoders.MLP((1, 1, 6), hidden=(16,)))
    for temperatures in (1, 3):
        estimate = annealed_importance_sampling(model, vae, x, chains=5000, temperatures=temperatures, leapfrog=2)
        assert_agree(estimate, log_p)
    assert estimate.acceptance.shape == (8,)
    assert annealed_importance_sampling(model, vae, x, temperatures=1).acceptance is None


def test_it_reaches_what_the_prior_does_not():
    """Images of a θ three standard deviations out, near which the prior hardly ever draws."""
    model, x = linear_gaussian(5, log_sigma=-0.7)
    x = x + (model.decode(torch.full((5, 1, 2), 3.0)) - model.decode(torch.zeros(5, 1, 2))).detach().squeeze(1)
    log_p = exact_log_marginal(model, x).log_marginal
    annealed = annealed_importance_sampling(model, None, x, chains=300, temperatures=60, leapfrog=5)
    prior = prior_monte_carlo(model, x, samples=500, chunk=500)
    assert prior.mean < log_p.mean().item() - 1 - 5 * prior.monte_carlo_error_of_mean
    assert abs(annealed.mean - log_p.mean().item()) < 3 * annealed.monte_carlo_error_of_mean < 0.5


def test_more_temperatures_make_the_weights_more_equal():
    model, x = linear_gaussian(8)
    sizes = [
        annealed_importance_sampling(model, None, x, chains=50, temperatures=temperatures, leapfrog=4)
        .effective_sample_size.mean()
        .item()
        for temperatures in (2, 8, 32)
    ]
    assert 1 <= sizes[0] < 0.7 * sizes[1] < 0.7 * sizes[2] <= 35


def test_it_agrees_with_an_integral_over_a_grid():
    model, x, log_p = tiny()
    vae = VAE(model, encoder=encoders.MLP((1, 3, 1), hidden=(9,)))
    for strategy, width in ((None, None), (vae, None), (GradientEM(model), 1.0)):
        estimate = annealed_importance_sampling(model, strategy, x, chains=200, temperatures=5, leapfrog=3, width=width)
        assert_agree(estimate, log_p)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("strategy_name", sorted(PROPER))
@pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")
def test_the_elbo_is_below_the_importance_weighted_bound_and_that_below_annealing(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(4)
    posterior = strategy.infer(x)
    given = {"posterior": posterior, "width": width_of(posterior.q)}
    elbo = evidence_lower_bound(model, strategy, x, samples=1000, chunk=100, **given)
    bound = importance_weighted_bound(model, strategy, x, samples=1000, chunk=100, **given)
    annealed = annealed_importance_sampling(
        model, strategy, x, chains=20, temperatures=10, leapfrog=5, schedule="linear", **given
    )
    for lower, upper in ((elbo, bound), (bound, annealed)):
        error = math.hypot(lower.monte_carlo_error_of_mean, upper.monte_carlo_error_of_mean)
        assert lower.mean <= upper.mean + 3 * error
        each = torch.hypot(lower.monte_carlo_error, upper.monte_carlo_error)
        assert bool((lower.log_marginal <= upper.log_marginal + 5 * each).all())


def test_reported_errors_are_the_spread_of_repeated_estimates():
    model, x = linear_gaussian(2)
    estimate = annealed_importance_sampling(
        model, None, x.repeat_interleave(200, 0), chains=50, temperatures=10, leapfrog=3
    )
    spread = estimate.log_marginal.view(2, 200).std(1)
    reported = estimate.monte_carlo_error.view(2, 200).square().mean(1).sqrt()
    # The spread of 200 has a standard error of 5 %.
    torch.testing.assert_close(reported, spread, rtol=0.25, atol=0)


def test_a_weight_that_is_nan_is_not_hidden():
    model, x = linear_gaussian(3)
    strategy, posterior = delta(model, x)
    posterior.q.v[1] = math.nan
    estimate = annealed_importance_sampling(
        model, strategy, x, temperatures=3, leapfrog=2, width=0.1, posterior=posterior
    )
    assert estimate.log_marginal.isnan().tolist() == [False, True, False]
    assert math.isnan(estimate.mean)


def test_progress_is_shown_on_request(capsys):
    model, x = linear_gaussian(2)
    for progress in (False, True):
        annealed_importance_sampling(model, None, x, temperatures=3, leapfrog=1, progress=progress)
        output = capsys.readouterr()
        assert not output.out
        assert ("AIS" in output.err and "6/6" in output.err) == progress


def test_no_gradient_reaches_model_or_strategy():
    model, strategy = pair("owned Normal", "vae")
    estimate = annealed_importance_sampling(model, strategy, images(2), temperatures=2, leapfrog=1)
    assert not estimate.log_marginal.requires_grad
    assert all(p.grad is None for p in (*model.parameters(), *strategy.parameters()))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", ["chains", "temperatures", "leapfrog"])
def test_counts_that_are_none_are_refused(name, bad):
    model, strategy = pair("owned Bernoulli", "vae")
    with pytest.raises(StrategyError, match=f"{name} must be at least 1"):
        annealed_importance_sampling(model, strategy, images(2), **{name: bad})


def test_what_cannot_be_estimated_is_refused_with_the_remedy():
    model, vae = pair("owned Bernoulli", "vae")
    x = images(2)
    flat = MODELS["owned Bernoulli"]()
    for strategy in (None, GradientEM(flat)):
        with pytest.raises(StrategyError, match="needs a proper prior"):
            annealed_importance_sampling(flat, strategy, x)
    with pytest.raises(StrategyError, match='"linear" or "sigmoidal"'):
        annealed_importance_sampling(model, vae, x, schedule="geometric")
    with pytest.raises(StrategyError, match="give the strategy"):
        annealed_importance_sampling(model, None, x, width=0.1)
    with pytest.raises(StrategyError, match="give width"):
        annealed_importance_sampling(model, GradientEM(model), x)
    with pytest.raises(StrategyError, match="of another model"):
        annealed_importance_sampling(model, pair("owned Bernoulli", "vae")[1], x)
    with pytest.raises(ModelError, match="NaN or infinite"):
        annealed_importance_sampling(model, None, x.masked_fill(x > 0, math.nan))


@pytest.mark.parametrize("guide", ["AutoMultivariateNormal", pytest.param("AutoIAFNormal", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")
def test_inference_mode_changes_nothing(guide):
    model = factors()
    strategy, x = PyroGuide(model, guide, steps=10), torch.randn(2, 1, 6)
    estimates = []
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            posterior = strategy.infer(x)
            estimates.append(
                annealed_importance_sampling(model, strategy, x, chains=3, temperatures=4, posterior=posterior)
            )
    torch.testing.assert_close(estimates[1].log_marginal, estimates[0].log_marginal)
