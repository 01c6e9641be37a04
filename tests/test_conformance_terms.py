"""The terms of the ELBO: both forms agree, for every strategy, and each term is what its name says."""

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from cases import CLASSICAL, MODELS, PROPER, STRATEGIES, factors, images, items, pair

from pnem.diagnostics import Terms, elbo_terms, terms_at
from pnem.errors import ModelError, StrategyError
from pnem.inference import (
    NUTS,
    RNNEM,
    VAE,
    ClassicalEM,
    ConvergenceWarning,
    MixingWarning,
    Posterior,
    exact_log_marginal,
)
from pnem.models import Bernoulli, SpatialMixture, decoders

every_model = pytest.mark.parametrize("model_name", MODELS)
every_strategy = pytest.mark.parametrize("strategy_name", STRATEGIES)


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        # A few steps and draws are enough for what is tested here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", MixingWarning)
        return function(*arguments, **options)


def assert_identities(terms, tolerance):
    torch.testing.assert_close(terms.free_energy, terms.penalised_fit, rtol=tolerance, atol=0)
    size = terms.elbo.abs()
    gap = terms.reconstruction + terms.log_mixing_prior - terms.elbo
    torch.testing.assert_close(
        gap / size, (terms.divergence + terms.assignment_divergence) / size, rtol=0, atol=tolerance
    )
    assert bool((terms.assignment_divergence > -tolerance * size).all())
    assert bool((terms.assignment_entropy >= 0).all())


@every_model
@every_strategy
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_both_forms_agree(model_name, strategy_name, dtype, tolerance):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, strategy = pair(model_name, strategy_name)
        x = images(3)
        posterior = quietly(strategy.infer, x)
        terms = elbo_terms(model, strategy, x, draws=3, posterior=posterior)
    finally:
        torch.set_default_dtype(default)
    T = 1 if strategy_name.startswith("auto-") and strategy_name in PROPER else len(posterior.trace.theta)
    assert terms.elbo.shape == (T, 3)
    assert_identities(terms, tolerance)
    assert terms.is_bound == (strategy_name in PROPER)
    torch.testing.assert_close(terms.log_evidence[-1], posterior.log_evidence.double())
    if not terms.is_bound:
        assert bool((terms.theta_entropy == 0).all())
        assert bool((terms.monte_carlo_error == 0).all())


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_terms_at_a_state_add_up_to_the_elbo_of_the_strategy(model_name, strategy_name):
    _, strategy = pair(model_name, strategy_name)
    x = images(3)
    with torch.no_grad():
        state = quietly(strategy.unroll, x)[-1]
        terms = terms_at(strategy, state)
    assert_identities(terms, 1e-10)
    # The strategy's own ELBO has the best q(z), whatever its E-step.
    torch.testing.assert_close(terms.elbo + terms.assignment_divergence, strategy.elbo(state), rtol=1e-12, atol=0)
    if strategy.e_step == "consistent":
        torch.testing.assert_close(terms.assignment_divergence, torch.zeros(3), rtol=0, atol=1e-9)
    # Of the plain mixture greff2017's q(z) is the posterior but for 10⁻⁶, and the divergence may be less than rounding.
    assert bool((terms.assignment_divergence > -1e-9).all())


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.usefixtures("float64")
def test_both_forms_agree_for_classical_em(name):
    model = CLASSICAL[name]()
    x = items(name.partition(",")[0] if "student" not in name else name.removesuffix(", prior"), B=1)
    strategy = ClassicalEM(model)
    terms = quietly(elbo_terms, model, strategy, x)
    assert_identities(terms, 1e-10)
    posterior = quietly(strategy.infer, x)
    terms = elbo_terms(model, strategy, x, posterior=posterior)
    torch.testing.assert_close(terms.reconstruction[0], posterior.log_evidence, rtol=1e-9, atol=0)
    # The last entry of the trace is before the last M-step, which never lowers it.
    assert bool((terms.elbo[0] > posterior.elbo_trace[-1] - 1e-6).all())


@pytest.mark.usefixtures("float64")
def test_missing_values_are_left_out():
    model = CLASSICAL["full"]()
    x = items("full", B=2)
    x[:, ::3, 0] = math.nan
    posterior = quietly(ClassicalEM(model).infer, x[:1])
    terms = elbo_terms(model, ClassicalEM(model), x[:1], posterior=posterior)
    assert_identities(terms, 1e-10)
    torch.testing.assert_close(terms.reconstruction[0], posterior.log_evidence)
    torch.testing.assert_close(terms.expected_log_joint + terms.assignment_entropy, posterior.log_evidence[None])


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.usefixtures("float64")
def test_the_exact_posterior_loses_nothing(missing):
    """At q(θ) = p(θ | x) every draw of the ELBO is log p(x)."""
    model = factors(D=1)
    x = torch.randn(5, 1, 6)
    if missing:
        x[:, 0, 2] = math.nan
    terms = elbo_terms(model, ClassicalEM(model), x, draws=4)
    torch.testing.assert_close(terms.elbo[0], exact_log_marginal(model, x).log_marginal, rtol=1e-10, atol=0)
    assert bool((terms.monte_carlo_error < 1e-10).all())
    assert_identities(terms, 1e-10)


@pytest.mark.usefixtures("float64")
def test_each_term_of_a_normal_q_is_its_expectation():
    """Against Monte Carlo with Pyro's own densities."""
    model = factors()
    strategy = VAE(model)
    x = torch.randn(4, 1, 6)
    posterior = strategy.infer(x)
    terms = elbo_terms(model, strategy, x, draws=4000, posterior=posterior)
    theta = posterior.q.sample((4000,))
    log_prior = dist.Normal(0.0, 1.0).log_prob(theta).sum((-2, -1))
    for term, samples in (
        (terms.log_prior, log_prior),
        (terms.theta_entropy, -posterior.q.log_prob(theta)),
        (terms.divergence, posterior.q.log_prob(theta) - log_prior),
        (terms.reconstruction, torch.stack([model.log_evidence(x, draw) for draw in theta])),
    ):
        error = samples.std(0) / 4000**0.5
        assert bool(((term[0] - samples.mean(0)).abs() < 4.5 * 2**0.5 * error).all())
    expected = samples.std(0) / 4000**0.5
    torch.testing.assert_close(terms.monte_carlo_error[0], expected, rtol=0.1, atol=0)


@pytest.mark.usefixtures("float64")
def test_a_sampler_has_terms_too():
    model = MODELS["owned Normal"](proper=True)
    strategy = NUTS(model, chains=2, warmup=10, draws=40, max_tree_depth=3)
    terms = quietly(elbo_terms, model, strategy, images(2))
    assert terms.elbo.shape == (1, 2)
    assert_identities(terms, 1e-10)
    posterior = Posterior.concatenate([quietly(strategy.infer, images(count)) for count in (1, 2)])
    terms = elbo_terms(model, strategy, images(3), posterior=posterior)
    assert terms.elbo.shape == (1, 3)
    assert_identities(terms, 1e-10)


@pytest.mark.usefixtures("float64")
def test_batches_give_the_same_terms():
    model = MODELS["tied Bernoulli"]()
    strategy = RNNEM(model, iterations=3)
    x = images(5)
    gamma = torch.full((5, 3, 12), 1 / 3)
    posterior = strategy.infer(x, gamma=gamma)
    whole = elbo_terms(model, strategy, x, posterior=posterior)
    parts = [
        elbo_terms(model, strategy, x[i : i + 2], posterior=strategy.infer(x[i : i + 2], gamma=gamma[i : i + 2]))
        for i in (0, 2, 4)
    ]
    torch.testing.assert_close(Terms.concatenate(parts).elbo, whole.elbo)
    assert elbo_terms(model, strategy, x, batch_size=2).elbo.shape == (3, 5)


def test_table_has_means_and_standard_errors():
    model = MODELS["tied Bernoulli"]()
    terms = elbo_terms(model, RNNEM(model, iterations=3), images(5))
    table = terms.table()
    assert list(table.index) == [1, 2, 3]
    assert table["elbo"].to_numpy() == pytest.approx(terms.elbo.mean(1).numpy())
    assert table["elbo_se"].to_numpy() == pytest.approx(terms.elbo.std(1).numpy() / 5**0.5)
    sums = table[["expected_log_joint", "assignment_entropy", "log_prior", "theta_entropy", "log_mixing_prior"]].sum(
        axis=1
    )
    assert sums.to_numpy() == pytest.approx(table["elbo"].to_numpy())
    assert elbo_terms(model, RNNEM(model, iterations=1), images(1)).table()["elbo_se"].isna().all()


def test_what_cannot_be_taken_apart_is_refused():
    model = MODELS["tied Bernoulli"]()
    strategy = RNNEM(model, iterations=2)
    other = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 3)
    with pytest.raises(StrategyError, match="of another model"):
        elbo_terms(other, strategy, images(2))
    with pytest.raises(StrategyError, match="draws must be at least 1"):
        elbo_terms(model, strategy, images(2), draws=0)
    with pytest.raises(StrategyError, match="at least one image"):
        elbo_terms(model, strategy, images(0))
    with pytest.raises(StrategyError, match="of 3 images, but x holds 2"):
        elbo_terms(model, strategy, images(2), posterior=strategy.infer(images(3)))
    smaller = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 2)
    with pytest.raises(StrategyError, match=r"theta has shape \(2, 3, 5\), but x and this model need .* = \(2, 2, 5\)"):
        elbo_terms(smaller, RNNEM(smaller), images(2), posterior=strategy.infer(images(2)))
    with pytest.raises(StrategyError, match=r"must be what strategy\.infer\(x\) gives, but is of type Tensor"):
        elbo_terms(model, strategy, images(2), posterior=images(2))
    for wrong, kind in ((model, "of type SpatialMixture"), (RNNEM, "the class RNNEM")):
        with pytest.raises(StrategyError, match=f"strategy must be a Strategy, but is {kind}: .*run.strategy"):
            elbo_terms(model, wrong, images(2))
    with pytest.raises(ModelError, match="12"):
        elbo_terms(model, strategy, images(2, (3, 3, 1)))


@pytest.mark.parametrize("strategy_name", ["rnn-em", "vae"])
@pytest.mark.usefixtures("float64")
def test_a_posterior_of_several_batches_has_the_terms_of_each(strategy_name):
    model, strategy = pair("tied Bernoulli", strategy_name)
    batches = images(2), images(3)
    posteriors = [strategy.infer(x) for x in batches]
    whole = elbo_terms(model, strategy, torch.cat(batches), posterior=Posterior.concatenate(posteriors), draws=200)
    parts = [elbo_terms(model, strategy, x, posterior=q, draws=200) for x, q in zip(batches, posteriors, strict=True)]
    assert whole.is_bound == (strategy_name == "vae")
    assert whole.elbo.shape == (strategy.iterations, 5)
    joined = Terms.concatenate(parts)
    error = joined.monte_carlo_error.hypot(whole.monte_carlo_error)
    assert bool(((whole.elbo - joined.elbo).abs() <= 4.5 * error + 1e-9).all())


@pytest.mark.usefixtures("float64")
def test_images_that_share_mixing_weights_are_inferred_together():
    model = CLASSICAL["diagonal"]()
    x = items("diagonal", B=3)
    strategy = ClassicalEM(model)
    torch.manual_seed(0)
    found = quietly(elbo_terms, model, strategy, x, batch_size=1)
    torch.manual_seed(0)
    posterior = quietly(strategy.infer, x)
    torch.testing.assert_close(found.reconstruction[0], posterior.log_evidence, rtol=1e-9, atol=0)
