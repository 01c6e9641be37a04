"""The gap between log p(x) and the ELBO, and its parts: closed forms, every strategy, errors that are true."""

import functools
import math
import warnings
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import MODELS, PROPER, STRATEGIES, factors, images, items, mixture, pair
from torch import Tensor
from torch.distributions import kl_divergence

from pnem.diagnostics import InferenceGap, elbo_terms, inference_gap
from pnem.errors import DataError, ModelError, StrategyError
from pnem.inference import (
    NUTS,
    RNNEM,
    VAE,
    ClassicalEM,
    ConvergenceWarning,
    GradientEM,
    MixingWarning,
    Normals,
    NormalStrategy,
    PyroGuide,
    SemiAmortised,
    annealed_importance_sampling,
    exact_log_marginal,
)
from pnem.inference.factor_analysis import posterior_of_factors
from pnem.inference.svi import log_joint_of_theta
from pnem.metrics import Estimate
from pnem.models import MultivariateNormal, SpatialMixture
from pnem.plots import inference_gap as bars

pytestmark = pytest.mark.usefixtures("float64")


class Given(NormalStrategy):
    """One iteration that finds a given q(θ)."""

    def __init__(self, model: SpatialMixture, location: Tensor, scale: Tensor):
        super().__init__(model, iterations=1)
        self.location, self.scale = location, scale

    def find_q(self, state, x_in) -> Normals:
        return Normals(self.location, self.scale)


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        # A few steps and draws are enough for what is tested here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", MixingWarning)
        return function(*arguments, **options)


def linear_gaussian(count: int, M: int = 3, *, orthogonal: bool = False):
    """Factor analysis, images drawn from it, and the mean (B, 1, M) and precision (M, M) of p(θ | x)."""
    model = factors(C=6, M=M)
    with torch.no_grad():
        model.decoder.linear.weight.normal_(0, 0.6)
        if orthogonal:
            model.decoder.linear.weight.copy_(torch.linalg.qr(model.decoder.linear.weight).Q * torch.arange(1.0, M + 1))
        x = model(num_images=count)
        mean, covariance, _ = posterior_of_factors(model, x)
    return model, x, mean.unsqueeze(1), covariance[0].inverse()


def divergence(location: Tensor, scale: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """KL(N(location, scale²) ‖ N(mean, precision⁻¹)) in closed form: (B,)."""
    q = dist.MultivariateNormal(location, scale_tril=scale.diag_embed())
    return kl_divergence(q, dist.MultivariateNormal(mean, precision_matrix=precision)).squeeze(-1)


def assert_agree(values: Tensor, truth: Tensor, error: Tensor) -> None:
    """The mean over images within three of its Monte Carlo errors, and no image beyond five of its own."""
    difference = values - truth
    assert abs(difference.mean().item()) <= 3 * (error.norm() / len(error)).item() + 1e-9
    assert bool((difference.abs() <= 5 * error + 1e-9).all())


@pytest.mark.parametrize("estimator", ["importance", "annealed"])
def test_gaps_of_a_vae_are_those_of_the_closed_form(estimator, monkeypatch):
    few = functools.partial(annealed_importance_sampling, chains=30, temperatures=10, leapfrog=3)
    monkeypatch.setattr("pnem.diagnostics.gaps.annealed_importance_sampling", few)
    model, x, mean, precision = linear_gaussian(100)
    strategy = VAE(model)
    posterior = strategy.infer(x)
    gap = inference_gap(model, strategy, x, samples=2000, chunk=500, posterior=posterior, estimator=estimator)
    log_p = exact_log_marginal(model, x).log_marginal
    q = posterior.q
    total = divergence(q.mean, q.stddev, mean, precision).detach()
    approximation = divergence(mean, precision.diagonal().rsqrt().expand_as(mean), mean, precision)
    assert total.mean() > approximation.mean() + 1 > 1.05
    assert_agree(gap.log_marginal - gap.elbo, total, gap.total_error)
    assert_agree(gap.log_marginal - gap.best, approximation, gap.approximation_error)
    assert_agree(gap.best - gap.elbo, total - approximation, gap.amortisation_error)
    assert_agree(gap.elbo, log_p - total, gap.total_error.hypot(gap.amortisation_error))
    assert gap.amortised
    assert gap.refined
    assert not gap.rising.any()
    for estimate, truth in (
        (gap.total, total),
        (gap.approximation, approximation),
        (gap.amortisation, total - approximation),
    ):
        # These errors are over images too, of which the truth is the mean.
        assert abs(estimate.mean - truth.mean().item()) < 3 * estimate.standard_error


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_guide_of_a_known_wrong_variance_has_the_divergence_that_algebra_says(factor):
    """KL(N(μ, c Σ) ‖ N(m, Σ)) = M/2 (c − 1 − log c) + (μ − m)ᵀ Σ⁻¹ (μ − m) / 2."""
    model, x, mean, precision = linear_gaussian(40)
    covariance = factor * precision.inverse()

    def guide(x: Tensor) -> None:
        location = pyro.param("location", mean + 0.1)
        with pyro.plate("images", len(x), dim=-2), pyro.plate("components", 1, dim=-1):
            pyro.sample("theta", dist.MultivariateNormal(location, covariance))

    strategy = PyroGuide(model, guide, learning_rate=0.01, steps=20)
    posterior = quietly(strategy.infer, x)
    gap = inference_gap(model, strategy, x, samples=3000, chunk=500, posterior=posterior)
    shift = posterior.theta - mean
    expected = 1.5 * (factor - 1 - math.log(factor)) + 0.5 * ((shift @ precision) * shift).sum((-2, -1))
    assert_agree(gap.log_marginal - gap.elbo, expected, gap.total_error)
    assert gap.approximation == gap.total
    assert not gap.refined
    assert not gap.amortised
    assert gap.amortisation == Estimate(0.0, 0.0, 40)


@pytest.mark.parametrize("factor", [1e-6, 0.3, 0.7, 1.5])
def test_of_a_product_of_normals_a_wrong_variance_is_an_optimisation_gap(factor):
    model, x, mean, precision = linear_gaussian(60, orthogonal=True)
    scale = (factor / precision.diagonal()).sqrt().expand_as(mean)
    gap = inference_gap(model, Given(model, mean, scale), x, samples=2000, chunk=500)
    expected = torch.full((60,), 1.5 * (factor - 1 - math.log(factor)))
    assert_agree(gap.best - gap.elbo, expected, gap.amortisation_error)
    assert_agree(gap.log_marginal - gap.elbo, expected, gap.total_error)
    torch.testing.assert_close(gap.log_marginal, exact_log_marginal(model, x).log_marginal, rtol=0, atol=1e-3)
    assert gap.approximation.mean == pytest.approx(0, abs=1e-3)
    assert not gap.amortised
    assert [row[0] for row in gap.rows()][-3:] == ["approximation gap", "optimisation gap", "total gap"]


def test_where_q_is_the_best_of_its_family_nothing_is_left():
    model, x, mean, precision = linear_gaussian(60)
    gap = inference_gap(model, Given(model, mean, precision.diagonal().rsqrt().expand_as(mean)), x)
    assert gap.amortisation.mean == pytest.approx(0, abs=1e-6)


def test_the_exact_posterior_loses_nothing():
    model, x, *_ = linear_gaussian(5)
    gap = inference_gap(model, ClassicalEM(model), x, samples=7)
    log_p = exact_log_marginal(model, x).log_marginal
    for values in (gap.elbo, gap.best, gap.log_marginal):
        torch.testing.assert_close(values, log_p, rtol=1e-10, atol=0)
    for error in (gap.approximation_error, gap.amortisation_error, gap.total_error):
        assert error.max() < 1e-9


@pytest.mark.parametrize("model_name", ["owned Bernoulli", "owned Normal"])
@pytest.mark.parametrize("strategy_name", STRATEGIES)
def test_every_strategy_has_its_gap(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(3)
    strategy.train()
    posterior = quietly(strategy.infer, x, keep_trace=False)
    gap = quietly(inference_gap, model, strategy, x, samples=50, steps=12, posterior=posterior)
    assert strategy.training
    assert gap.is_bound == (strategy_name in PROPER)
    assert gap.elbo.shape == gap.best.shape == gap.rising.shape == (3,)
    assert gap.amortised == any(True for _ in strategy.parameters())
    if gap.is_bound:
        assert gap.optimality is None
        assert gap.total.mean == pytest.approx(gap.approximation.mean + gap.amortisation.mean)
        # By Jensen's inequality, for the same draws.
        assert bool((gap.log_marginal >= gap.best).all())
        assert gap.refined == (strategy_name != "auto-multivariate-normal")
        assert bool((gap.best >= gap.elbo - 5 * gap.amortisation_error).all())
        terms = elbo_terms(model, strategy, x, draws=50, posterior=posterior)
        error = (terms.monte_carlo_error[-1].square() + gap.total_error.square()).sqrt()
        assert bool(((terms.elbo[-1] - gap.elbo).abs() < 5 * error).all())
    else:
        assert gap.total is gap.approximation is gap.amortisation is None
        assert gap.optimality.mean > 0
        assert bool((gap.best >= gap.elbo).all())
        terms = elbo_terms(model, strategy, x, posterior=posterior)
        torch.testing.assert_close(gap.elbo, (terms.reconstruction + terms.log_prior)[-1])


def test_a_sampler_loses_what_a_normal_with_its_moments_does():
    model, x, *_ = linear_gaussian(2)
    gap = quietly(inference_gap, model, NUTS(model, chains=2, warmup=30, draws=60, max_tree_depth=3), x)
    assert not gap.refined
    assert gap.amortisation.mean == 0
    # The posterior is normal: what is left is the error of the moments, M (M + 3) / 4 / draws for independent ones.
    assert 0 < gap.total.mean < 0.2
    assert [name for name, *_ in gap.rows()][1:] == ["ELBO", "approximation gap"]


def test_what_is_left_after_refinement_is_less():
    model = MODELS["plain Bernoulli"](proper=True)
    strategy, x = VAE(model), images(10)
    before = inference_gap(model, strategy, x)
    after = inference_gap(model, SemiAmortised(strategy, steps=10), x)
    assert 0 <= after.amortisation.mean < 0.2 * before.amortisation.mean
    assert after.approximation.mean == pytest.approx(
        before.approximation.mean, abs=4 * math.hypot(*((g.approximation_error.norm() / 10) for g in (before, after)))
    )


@pytest.mark.parametrize("proper", [False, True])
def test_a_delta_ends_at_a_maximum(proper):
    model = MODELS["tied Bernoulli"]() if proper else MODELS["owned Normal"]()
    assert model.has_proper_prior == proper
    strategy, x = RNNEM(model, iterations=3), images(4)
    posterior = strategy.infer(x)
    gap = inference_gap(model, strategy, x, steps=2000, posterior=posterior)
    assert not gap.rising.any()
    torch.testing.assert_close(
        gap.elbo, log_joint_of_theta(model, x, posterior.theta).detach() if proper else posterior.log_evidence
    )
    # A quasi-Newton method from the same θ gets there too.
    theta = posterior.theta.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([theta], max_iter=2000, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = -log_joint_of_theta(model, x, theta).sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert -loss().item() == pytest.approx(gap.best.sum().item(), abs=0.5)
    assert [name for name, *_ in gap.rows()][-1] == "optimality gap"


def test_a_classical_mixture_goes_on_with_its_own_iterations():
    model = mixture(MultivariateNormal("full"))
    x = items("full", B=2)
    fitted = ClassicalEM(model, iterations=500, tol=1e-9)
    gap = inference_gap(model, fitted, x)
    assert gap.optimality.mean == pytest.approx(0, abs=1e-3)
    stopped = ClassicalEM(model, iterations=2, tol=0.0)
    torch.manual_seed(3)
    posterior = quietly(stopped.infer, x)
    gap = inference_gap(model, stopped, x, posterior=posterior, steps=500)
    assert gap.optimality.mean > 0.1
    longer = quietly(stopped.infer, x, theta=posterior.theta, iterations=500)
    assert gap.best.sum().item() == pytest.approx(longer.log_evidence.sum().item(), abs=0.05)
    x[:, ::3, 0] = math.nan
    assert inference_gap(model, fitted, x).optimality.mean == pytest.approx(0, abs=1e-3)
    by_gradients = GradientEM(model, iterations=2)
    assert quietly(inference_gap, model, by_gradients, items("full", B=2), steps=50).optimality.mean > 0


def test_monte_carlo_errors_are_the_spread_of_repeated_estimates():
    model, x, mean, precision = linear_gaussian(2)
    repeats = 400
    location = mean.repeat(repeats, 1, 1) + 0.02
    strategy = Given(model, location, 1.02 * precision.diagonal().rsqrt().expand_as(location))
    gap = inference_gap(model, strategy, x.repeat(repeats, 1, 1), samples=500, chunk=50)
    for values, error in (
        (gap.best - gap.elbo, gap.amortisation_error),
        (gap.log_marginal - gap.best, gap.approximation_error),
        (gap.log_marginal - gap.elbo, gap.total_error),
    ):
        spread = values.view(repeats, 2).std(0)
        # The spread of 400 has a standard error of 3.5 %, and the delta method is of first order.
        torch.testing.assert_close(error.view(repeats, 2).square().mean(0).sqrt(), spread, rtol=0.2, atol=0)
    # The same random numbers for both: the difference of two ELBOs is better known than either.
    assert bool(((gap.best - gap.elbo).view(repeats, 2).std(0) < 0.5 * gap.best.view(repeats, 2).std(0)).all())


def test_images_that_were_still_rising_are_named():
    model = MODELS["plain Bernoulli"](proper=True)
    with pytest.warns(ConvergenceWarning, match="of 4 of 4 images was still getting better after 2 steps"):
        gap = inference_gap(model, VAE(model), images(4), samples=5, steps=2)
    assert gap.rising.all()


def test_parts_are_joined_and_one_image_has_no_error():
    model, x, *_ = linear_gaussian(5)
    strategy = VAE(model)
    parts = [inference_gap(model, strategy, piece, samples=30) for piece in x.split(2)]
    gap = InferenceGap.concatenate(parts)
    assert torch.equal(gap.best, torch.cat([part.best for part in parts]))
    assert gap.total.count == 5
    assert gap.estimator == "importance-weighted bound from q*, L = 30"
    total = gap.log_marginal - gap.elbo
    assert gap.total == pytest.approx((total.mean().item(), total.std().item() / 5**0.5, 5))
    assert gap.rows()[-1] == ("total gap", f"{gap.total.mean:.2f}", f"{gap.total.standard_error:.2f}")
    assert math.isnan(parts[-1].total.standard_error)
    assert [error for *_, error in parts[-1].rows()] == ["–"] * 6
    single = inference_gap(model, strategy, x, samples=1)
    assert single.total_error.isnan().all()


class FullCovariance(RNNEM):
    """An amortised strategy whose q(θ) is not a product of normals."""

    def infer(self, x, **options):
        posterior = super().infer(x, **options)
        flat = dist.MultivariateNormal(posterior.theta, torch.eye(posterior.theta.shape[-1])).to_event(1)
        return posterior._replace(q=flat)


def test_what_has_no_gap_is_refused():
    model, strategy = pair("owned Bernoulli", "vae")
    x = images(2)
    other = MODELS["owned Bernoulli"](proper=True)
    for options, message in (
        ({"samples": 0}, "samples must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"estimator": "exact"}, '"importance" or "annealed", but is \'exact\''),
        ({"posterior": strategy.infer(images(3))}, "of 3 images, but x holds 2"),
    ):
        with pytest.raises(StrategyError, match=message):
            inference_gap(model, strategy, x, **options)
    with pytest.raises(StrategyError, match="of another model"):
        inference_gap(other, strategy, x)
    with pytest.raises(StrategyError, match="at least one image"):
        inference_gap(model, strategy, images(0))
    with pytest.raises(ModelError, match="12"):
        inference_gap(model, strategy, images(2, (3, 3, 1)))
    with pytest.raises(StrategyError, match="amortises a q"):
        inference_gap(model, FullCovariance(model), x)


def test_a_gap_that_is_nan_is_not_left_out():
    model, x, *_ = linear_gaussian(3)
    gap = inference_gap(model, VAE(model), x, samples=10)
    gap.elbo[1] = math.nan
    assert math.isnan(gap.total.mean)
    assert ("total gap", "–", "–") in gap.rows()


def test_bars_are_as_long_as_the_gaps():
    model, x, mean, _ = linear_gaussian(6)
    vae = inference_gap(model, VAE(model), x, samples=50)
    given = inference_gap(model, Given(model, mean, torch.ones_like(mean)), x, samples=50)
    exact = inference_gap(model, ClassicalEM(model), x, samples=50)
    delta = quietly(inference_gap, model, GradientEM(model, iterations=1), x)
    figure = bars({"VAE": vae, "given": given, "exact": exact, "GradientEM": delta})
    above, below = figure.axes
    widths = [patch.get_width() for patch in above.patches]
    expected = [vae.approximation, vae.amortisation, given.approximation, given.amortisation, exact.approximation]
    assert widths == pytest.approx([estimate.mean for estimate in expected])
    assert [patch.get_width() for patch in below.patches] == pytest.approx([delta.optimality.mean])
    assert [label.get_text() for label in above.get_yticklabels()] == ["VAE", "given", "exact"]
    assert above.get_xlabel() == "log p(x) − ELBO  [nats per image]"
    assert below.get_xlabel() == "optimality gap of a Delta  [nats per image]"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["approximation gap", "amortisation gap", "optimisation gap"]
    assert len(bars({"GradientEM": delta}).axes) == 1
    assert not bars({"GradientEM": delta}).legends
    assert [label.get_text() for label in bars(vae).axes[0].get_yticklabels()] == [""]
    with pytest.raises(DataError, match="empty mapping"):
        bars({})


def test_findings_are_gaps_that_are_certainly_large():
    gap = InferenceGap(
        elbo=torch.tensor([-10.0, -12.0, -11.0]),
        best=torch.tensor([-7.0, -9.1, -7.9]),
        log_marginal=torch.tensor([-6.9, -9.0, -7.8]),
        amortisation_error=torch.zeros(3),
        approximation_error=torch.zeros(3),
        total_error=torch.zeros(3),
        rising=torch.zeros(3, dtype=torch.bool),
        amortised=True,
        refined=True,
        estimator="a bound",
    )
    (found,) = gap.findings
    assert (found.name, found.value) == ("large amortisation gap", pytest.approx(3.0))
    assert "3.00 ± 0.06 nats per image" in found.seen
    assert replace(gap, elbo=torch.tensor([-7.0, -9.1, -30.0])).findings == []
    assert [found.name for found in replace(gap, log_marginal=gap.best + 2).findings][1:] == ["large approximation gap"]
    # A Delta has no gap to log p(x).
    assert replace(gap, log_marginal=None).findings == []
