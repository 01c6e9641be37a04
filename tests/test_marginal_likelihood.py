"""Estimates of log p(x): the closed form, brute force, and what their errors promise."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import MODELS, PROPER, factors, images, pair
from torch import Tensor

from pnem.errors import ModelError, StrategyError
from pnem.inference import (
    VAE,
    ClassicalEM,
    Estimate,
    GradientEM,
    Posterior,
    Strategy,
    encoders,
    evidence_lower_bound,
    exact_log_marginal,
    importance_weighted_bound,
    prior_monte_carlo,
)
from pnem.inference.estimates import log_mean_weight
from pnem.inference.proposals import laplace, proposal
from pnem.inference.svi import log_joint_of_theta
from pnem.models import Bernoulli, DiagonalNormal, MixtureOfNormals, Normal, SpatialMixture, decoders

pytestmark = pytest.mark.usefixtures("float64")


def linear_gaussian(B: int = 20, M: int = 2, log_sigma: float | None = None) -> tuple[SpatialMixture, Tensor]:
    """A model of random parameters and images drawn from it."""
    model = factors(6, M)
    with torch.no_grad():
        model.decoder.linear.weight.normal_()
        model.decoder.linear.bias.normal_()
        model.likelihood.log_sigma.uniform_(-0.5, 0.2)
        if log_sigma is not None:
            model.likelihood.log_sigma.fill_(log_sigma)
        return model, model(num_images=B)


def short_trained(model: SpatialMixture, x: Tensor, steps: int) -> VAE:
    vae = VAE(model, encoder=encoders.MLP((1, 1, 6), hidden=(16,)))
    optimiser = torch.optim.Adam(vae.parameters(), 0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        (-vae.elbo(vae.unroll(x)[-1]).mean()).backward()
        optimiser.step()
    return vae


def exact(model: SpatialMixture, x: Tensor) -> tuple[Strategy, Posterior]:
    strategy = ClassicalEM(model)
    return strategy, strategy.infer(x)


def delta(model: SpatialMixture, x: Tensor) -> tuple[Strategy, Posterior]:
    """A Delta at the posterior's mean, which is its mode."""
    strategy = GradientEM(model, iterations=1)
    return strategy, strategy.infer(x)._replace(q=dist.Delta(exact(model, x)[1].theta, event_dim=2))


def width_of(q: dist.TorchDistribution) -> float | None:
    return 0.3 if isinstance(q, dist.Delta) else None


def assert_agree(estimate: Estimate, log_p: Tensor) -> None:
    """The mean over images within three of its Monte Carlo errors, and no image beyond five of its own."""
    difference = estimate.log_marginal - log_p
    assert abs(difference.mean().item()) <= 3 * estimate.monte_carlo_error_of_mean + 1e-9
    assert bool((difference.abs() <= 5 * estimate.monte_carlo_error + 1e-9).all())


def test_the_closed_form_is_the_density_of_a_normal():
    model, x = linear_gaussian()
    W, b = model.decoder.linear.weight, model.decoder.linear.bias
    covariance = W @ W.T + model.likelihood.sigma.square().diag()
    log_p = dist.MultivariateNormal(b, covariance).log_prob(x.squeeze(1))
    estimate = exact_log_marginal(model, x)
    torch.testing.assert_close(estimate.log_marginal, log_p.detach())
    assert not estimate.monte_carlo_error.any()


@pytest.mark.parametrize("bias", [True, False])
def test_the_closed_form_takes_a_learned_normal_prior_into_the_loadings(bias):
    prior = DiagonalNormal(2)
    model = SpatialMixture(decoders.Linear(2, (1, 3, 2), bias=bias), Normal(0.7), 1, prior=prior)
    with torch.no_grad():
        prior.location.normal_(), prior.log_scale.normal_()
    x = torch.randn(4, 3, 2)
    W = model.decoder.linear.weight
    mean = W @ prior.location + (model.decoder.linear.bias if bias else 0)
    covariance = (W * (2 * prior.log_scale).exp()) @ W.T + 0.49 * torch.eye(6)
    log_p = dist.MultivariateNormal(mean, covariance).log_prob(x.flatten(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.testing.assert_close(exact_log_marginal(model, x).log_marginal, log_p.detach())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("steps", [0, 200])
def test_importance_weighting_by_a_vae_agrees_with_the_closed_form(steps):
    model, x = linear_gaussian()
    vae = short_trained(model, x, steps)
    log_p = exact_log_marginal(model, x).log_marginal
    estimate = importance_weighted_bound(model, vae, x, samples=4000, chunk=500)
    assert_agree(estimate, log_p)
    elbo = evidence_lower_bound(model, vae, x, samples=1000, chunk=500)
    assert elbo.mean < log_p.mean() - 3 * elbo.monte_carlo_error_of_mean


def test_after_em_the_estimate_is_its_evidence_and_has_no_variance():
    model, x = linear_gaussian(200)
    strategy = ClassicalEM(model, iterations=300, tol=1e-9)
    fit = strategy.fit(x)
    for estimator in (importance_weighted_bound, evidence_lower_bound):
        estimate = estimator(model, strategy, x, samples=7)
        torch.testing.assert_close(estimate.log_marginal, exact_log_marginal(model, x).log_marginal)
        assert estimate.monte_carlo_error.max().item() < 1e-7
        assert estimate.log_marginal.sum().item() == pytest.approx(fit.elbo_trace[-1].item(), abs=1e-4)


@pytest.mark.parametrize("width", [0.6, 1.2])
def test_a_normal_of_given_width_around_a_delta_agrees_with_the_closed_form(width):
    model, x = linear_gaussian()
    strategy, posterior = delta(model, x)
    log_p = exact_log_marginal(model, x).log_marginal
    estimate = importance_weighted_bound(model, strategy, x, samples=5000, chunk=500, width=width, posterior=posterior)
    assert_agree(estimate, log_p)


@pytest.mark.parametrize("given", ["laplace", "moments"])
def test_laplace_width_and_matched_moments_are_exact_where_the_posterior_is_normal(given):
    model, x = linear_gaussian()
    if given == "laplace":
        (strategy, posterior), width = delta(model, x), "laplace"
    else:
        (strategy, posterior), width = exact(model, x), None

        class Draws(dist.Empirical):
            def moment_matched(self, q: dist.TorchDistribution = posterior.q) -> dist.TorchDistribution:
                return q

        draws = posterior.q.sample((10,)).transpose(0, 1)
        posterior = posterior._replace(q=Draws(draws, torch.zeros(20, 10)))
    estimate = importance_weighted_bound(model, strategy, x, samples=5, width=width, posterior=posterior)
    torch.testing.assert_close(estimate.log_marginal, exact_log_marginal(model, x).log_marginal)
    assert estimate.monte_carlo_error.max().item() < 1e-6
    torch.testing.assert_close(estimate.effective_sample_size, torch.full((20,), 5.0))


def test_laplace_width_is_the_inverse_hessian_and_never_wider_than_the_prior():
    """Against torch.autograd, image by image; at a θ far from any mode, where some curvature is negative."""
    model = SpatialMixture(decoders.MLP(2, (2, 3, 1), hidden=(7,)), Bernoulli(), 2, prior=DiagonalNormal(2))
    with torch.no_grad():
        model.prior.log_scale.normal_()
        for parameter in model.decoder.parameters():
            parameter.mul_(4)
    x, theta = images(30, (2, 3, 1)), 2 * torch.randn(30, 2, 2)
    q = laplace(model, x, theta)
    deviation = model.prior.log_scale.exp().detach().repeat(2)
    repaired = 0
    centred = q.sample((20_000,)).flatten(2) - theta.flatten(1)
    covariance = torch.einsum("lbi,lbj->bij", centred, centred) / len(centred)
    for b in range(30):

        def minus(flat: Tensor, b: int = b) -> Tensor:
            return -log_joint_of_theta(model, x[b : b + 1], flat.view(1, 2, 2)).sum()

        hessian = torch.autograd.functional.hessian(minus, theta[b].flatten())
        precision = deviation[:, None] * hessian * deviation
        value, vector = torch.linalg.eigh(precision)
        repaired += bool((value < 1).any())
        expected = deviation[:, None] * ((vector / value.clamp_min(1)) @ vector.T) * deviation
        limit = 5 * math.sqrt(2 / len(centred)) * (expected.diagonal().outer(expected.diagonal())).sqrt()
        assert bool(((covariance[b] - expected).abs() < limit).all())
        normal = dist.MultivariateNormal(theta[b].flatten(), expected)
        torch.testing.assert_close(q.log_prob(theta + 0.1)[b], normal.log_prob(theta[b].flatten() + 0.1))
    assert 0 < repaired < 30


def test_in_many_dimensions_laplace_width_is_of_each_alone(monkeypatch):
    model, x = linear_gaussian(3)
    theta = torch.randn(3, 1, 2)
    precision = torch.eye(2) + (model.decoder.linear.weight / model.likelihood.sigma[:, None]).square().sum(0).diag()
    monkeypatch.setattr("pnem.inference.proposals.LARGEST_COVARIANCE", 1)
    q = laplace(model, x, theta)
    torch.testing.assert_close(q.variance, precision.diagonal().reciprocal().detach().expand(3, 1, 2))


def tiny() -> tuple[SpatialMixture, Tensor, Tensor]:
    """Two components of one feature on three binary pixels, all eight images, and log p(x) on a grid of θ."""
    model = SpatialMixture(decoders.MLP(1, (1, 3, 1), hidden=(6,)), Bernoulli(), 2, prior=MixtureOfNormals(1, 2))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(4)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).unsqueeze(-1)
    line = torch.linspace(-10, 10, 401)
    grid = torch.cartesian_prod(line, line).view(-1, 1, 2, 1)
    with torch.no_grad():
        log_p = log_joint_of_theta(model, x, grid).logsumexp(0) + 2 * math.log(20 / 400)
    return model, x, log_p


def test_estimates_agree_with_an_integral_over_a_grid():
    model, x, log_p = tiny()
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)
    vae = VAE(model, encoder=encoders.MLP((1, 3, 1), hidden=(9,)))
    em = GradientEM(model)
    assert_agree(prior_monte_carlo(model, x, samples=5000, chunk=1000), log_p)
    assert_agree(importance_weighted_bound(model, vae, x, samples=5000, chunk=1000), log_p)
    assert_agree(importance_weighted_bound(model, em, x, samples=5000, chunk=1000, width=2.0), log_p)


@pytest.mark.parametrize("model_name", ["owned Bernoulli", "plain Bernoulli"])
@pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")
@pytest.mark.parametrize("strategy_name", sorted(PROPER))
def test_the_bound_rises_with_the_number_of_samples_from_the_elbo(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(4)
    posterior = strategy.infer(x)
    repeated = Posterior.concatenate([posterior] * 100)
    width = width_of(posterior.q)
    means, errors = [], []
    for samples in (1, 10, 100):
        bound = importance_weighted_bound(
            model, strategy, x.repeat(100, 1, 1), samples=samples, chunk=100, width=width, posterior=repeated
        )
        by_repetition = bound.log_marginal.view(100, 4).mean(1)
        means.append(by_repetition.mean().item()), errors.append(by_repetition.std().item() / 10)
    elbo = evidence_lower_bound(model, strategy, x, samples=2000, chunk=100, width=width, posterior=posterior)
    assert abs(elbo.mean - means[0]) <= 3 * math.hypot(errors[0], elbo.monte_carlo_error_of_mean)
    assert means[0] <= means[1] + 3 * math.hypot(*errors[:2])
    assert means[1] <= means[2] + 3 * math.hypot(*errors[1:])
    assert means[0] <= means[2] + 3 * math.hypot(errors[0], errors[2])


def test_the_bound_of_a_poor_q_rises_strictly():
    model, x = linear_gaussian()
    vae = VAE(model, encoder=encoders.MLP((1, 1, 6), hidden=(16,)))
    many = x.repeat(50, 1, 1)
    bounds = [importance_weighted_bound(model, vae, many, samples=L).mean for L in (1, 10, 100)]
    assert bounds[0] < bounds[1] - 0.5 < bounds[2] - 0.6
    assert bounds[2] < exact_log_marginal(model, x).mean


def test_reported_errors_are_the_spread_of_repeated_estimates():
    model, x = linear_gaussian(3)
    vae = short_trained(model, x, 300)
    many = x.repeat_interleave(400, 0)
    for estimator, samples in ((importance_weighted_bound, 400), (evidence_lower_bound, 50)):
        estimate = estimator(model, vae, many, samples=samples)
        spread = estimate.log_marginal.view(3, 400).std(1)
        reported = estimate.monte_carlo_error.view(3, 400).square().mean(1).sqrt()
        # The spread of 400 has a standard error of 3.5 %, and the delta method is of first order.
        torch.testing.assert_close(reported, spread, rtol=0.2, atol=0)


def test_the_value_does_not_depend_on_the_chunks():
    """All weights count once whatever the chunks, the last one smaller: with q exact every sum has one value."""
    model, x = linear_gaussian()
    vae = short_trained(model, x, 50)
    pieces = [importance_weighted_bound(model, vae, x, samples=3000, chunk=chunk) for chunk in (7, 3000)]
    difference = pieces[0].mean - pieces[1].mean
    assert abs(difference) < 3 * math.hypot(*(p.monte_carlo_error_of_mean for p in pieces))
    strategy, posterior = exact(model, x)
    for samples, chunk in ((10, 3), (10, 10), (10, 11), (1, 1)):
        estimate = importance_weighted_bound(model, strategy, x, samples=samples, chunk=chunk, posterior=posterior)
        torch.testing.assert_close(estimate.log_marginal, exact_log_marginal(model, x).log_marginal)
        torch.testing.assert_close(estimate.effective_sample_size, torch.full((20,), float(samples)))


def test_no_more_draws_are_decoded_at_once_than_a_chunk():
    model, x = linear_gaussian()
    seen = []
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    prior_monte_carlo(model, x, samples=23, chunk=5)
    assert seen == [5, 5, 5, 5, 3]


def test_the_prior_needs_many_more_draws():
    model, x = linear_gaussian(M=4, log_sigma=-3.0)
    prior = prior_monte_carlo(model, x, samples=500, chunk=500)
    assert prior.mean < exact_log_marginal(model, x).mean - 50
    assert prior.effective_sample_size.median().item() < 2


def test_an_estimate_summarises_over_images():
    estimate = Estimate(torch.tensor([-1.0, -2.0, -6.0]), torch.tensor([0.3, 0.0, 0.4]))
    assert estimate.mean == pytest.approx(-3)
    assert estimate.standard_error == pytest.approx(math.sqrt(7 / 3))
    assert estimate.monte_carlo_error_of_mean == pytest.approx(0.5 / 3)
    assert repr(estimate) == "Estimate(mean=-3, standard_error=1.53, monte_carlo_error=0.167, images=3)"
    assert math.isnan(Estimate(torch.zeros(1), torch.zeros(1)).standard_error)


def test_the_error_of_a_log_mean_is_the_relative_error_of_the_mean():
    weights = torch.rand(50, 4)
    log_w = weights.log()
    estimate = log_mean_weight(log_w.logsumexp(0), (2 * log_w).logsumexp(0), 50)
    torch.testing.assert_close(estimate.log_marginal, weights.mean(0).log())
    torch.testing.assert_close(estimate.monte_carlo_error, weights.std(0) / weights.mean(0) / math.sqrt(50))
    one = log_mean_weight(log_w[0], 2 * log_w[0], 1)
    assert bool(one.monte_carlo_error.isnan().all())


def test_a_weight_that_is_nan_is_not_hidden():
    model, x = linear_gaussian(3)
    strategy, posterior = delta(model, x)
    posterior.q.v[1] = math.nan
    for estimator in (importance_weighted_bound, evidence_lower_bound):
        estimate = estimator(model, strategy, x, width=0.1, posterior=posterior)
        assert estimate.log_marginal.isnan().tolist() == [False, True, False]
        assert math.isnan(estimate.mean)
    with pytest.raises(StrategyError, match="not finite at this q"):
        importance_weighted_bound(model, strategy, x, width="laplace", posterior=posterior)


def test_posteriors_of_several_batches_are_one_proposal():
    model, x = linear_gaussian(5)
    strategy, posterior = delta(model, x)
    parts = [posterior._replace(q=dist.Delta(v, event_dim=2)) for v in posterior.q.v.split([2, 3])]
    both = Posterior.concatenate([part._replace(trace=None) for part in parts])
    for width in (0.3, "laplace"):
        whole = proposal(model, strategy, x, width=width, posterior=posterior)
        pieces = proposal(model, strategy, x, width=width, posterior=both)
        theta = torch.randn(4, 5, 1, 2)
        torch.testing.assert_close(pieces.log_prob(theta), whole.log_prob(theta))


def test_nothing_of_the_model_or_strategy_changes():
    model, strategy = pair("owned Normal", "vae")
    strategy.train()
    x = images(3)
    before = [p.detach().clone() for p in (*model.parameters(), *strategy.parameters())]
    estimate = importance_weighted_bound(model, strategy, x)
    assert not estimate.log_marginal.requires_grad
    assert strategy.training
    after = [*model.parameters(), *strategy.parameters()]
    assert all(torch.equal(old, new) and new.grad is None for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("bad", [0, -1, 2.0, True])
@pytest.mark.parametrize("name", ["samples", "chunk"])
def test_counts_that_are_none_are_refused(name, bad):
    model, strategy = pair("owned Bernoulli", "vae")
    for estimator in (importance_weighted_bound, evidence_lower_bound):
        with pytest.raises(StrategyError, match=f"{name} must be at least 1"):
            estimator(model, strategy, images(2), **{name: bad})
    with pytest.raises(StrategyError, match=f"{name} must be at least 1"):
        prior_monte_carlo(model, images(2), **{name: bad})


@pytest.mark.parametrize("width", [0, -0.1, math.nan, math.inf, "wide", True])
def test_a_width_that_is_none_is_refused(width):
    model = MODELS["owned Bernoulli"](proper=True)
    with pytest.raises(StrategyError, match="width must be a positive"):
        importance_weighted_bound(model, GradientEM(model), images(2), width=width)


def test_what_cannot_be_estimated_is_refused_with_the_remedy():
    model, vae = pair("owned Bernoulli", "vae")
    x = images(2)
    flat = MODELS["owned Bernoulli"]()
    with pytest.raises(StrategyError, match="needs a proper prior"):
        importance_weighted_bound(flat, GradientEM(flat), x, width=0.1)
    with pytest.raises(StrategyError, match="needs a proper prior"):
        prior_monte_carlo(flat, x)
    with pytest.raises(StrategyError, match="give width"):
        importance_weighted_bound(model, GradientEM(model), x)
    with pytest.raises(StrategyError, match="leave width out"):
        importance_weighted_bound(model, vae, x, width=0.1)
    with pytest.raises(StrategyError, match="of another model"):
        importance_weighted_bound(model, pair("owned Bernoulli", "vae")[1], x)
    with pytest.raises(StrategyError, match="posterior of the same images"):
        importance_weighted_bound(model, vae, x, posterior=vae.infer(images(3)))
    with pytest.raises(ModelError, match="NaN or infinite"):
        importance_weighted_bound(model, vae, x.masked_fill(x > 0, math.nan))
    with pytest.raises(ModelError, match="NaN or infinite"):
        prior_monte_carlo(model, x.masked_fill(x > 0, math.inf))


@pytest.mark.parametrize(
    "model",
    [
        lambda: SpatialMixture(decoders.Linear(2, (1, 3, 1)), Normal(), 2, prior="standard_normal"),
        lambda: SpatialMixture(decoders.Linear(2, (1, 3, 1)), Normal(), 1),
        lambda: SpatialMixture(decoders.Linear(2, (1, 3, 1)), Normal(), 1, prior=MixtureOfNormals(2, 2)),
        lambda: SpatialMixture(decoders.Linear(2, (1, 3, 1)), Bernoulli(), 1, prior="standard_normal"),
        lambda: SpatialMixture(decoders.MLP(2, (1, 3, 1)), Normal(), 1, prior="standard_normal"),
        lambda: SpatialMixture(
            decoders.Linear(2, (1, 3, 1), input_activation="sigmoid"), Normal(), 1, prior="standard_normal"
        ),
    ],
)
def test_other_models_have_no_closed_form(model):
    with pytest.raises(StrategyError, match="importance_weighted_bound or annealed"):
        exact_log_marginal(model(), torch.zeros(2, 3, 1))
