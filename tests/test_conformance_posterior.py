"""What every strategy promises whose q(θ) is a distribution, samplers included, that have nothing to unroll."""

import warnings

import pytest
import torch
from cases import MODELS, PROPER, STRATEGIES, images
from pyro.infer import TraceEnum_ELBO

from pnem.errors import StrategyError
from pnem.inference import NUTS, ConvergenceWarning, MixingWarning, evidence_lower_bound
from pnem.inference.proposals import proposal

PROPER_STRATEGIES = {
    **{name: STRATEGIES[name] for name in sorted(PROPER)},
    "nuts": lambda model: NUTS(model, chains=2, warmup=10, draws=40, max_tree_depth=3),
}

every_model = pytest.mark.parametrize("model_name", MODELS)
every_strategy = pytest.mark.parametrize("strategy_name", PROPER_STRATEGIES)


def pair(model_name, strategy_name, *shape_and_k):
    model = MODELS[model_name](*shape_and_k, proper=True)
    return model, PROPER_STRATEGIES[strategy_name](model)


def infer(strategy, x):
    with warnings.catch_warnings():
        # A few steps and draws are enough for what is tested here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", MixingWarning)
        return strategy.infer(x)


@every_strategy
@pytest.mark.parametrize(
    ("B", "K", "shape"), [(1, 3, (3, 4, 1)), (2, 1, (3, 4, 1)), (2, 3, (1, 1, 1)), (2, 2, (2, 3, 3)), (1, 1, (1, 1, 1))]
)
def test_shapes_hold_at_the_edges(strategy_name, B, K, shape):
    model, strategy = pair("owned Normal", strategy_name, shape, K)
    x, D = images(B, shape), shape[0] * shape[1]
    posterior = infer(strategy, x)
    assert posterior.theta.shape == (B, K, 5)
    assert posterior.psi.shape == posterior.mean.shape == (B, K, D, shape[2])
    assert posterior.gamma.shape == (B, K, D)
    assert posterior.elbo_trace.shape[1:] == posterior.log_evidence.shape == (B,)
    assert bool(posterior.elbo_trace.isfinite().all())
    assert posterior.q.batch_shape + posterior.q.event_shape == (B, K, 5)
    assert posterior.q.sample((7,)).shape == (7, B, K, 5)
    q = proposal(model, strategy, x, posterior=posterior)
    assert q.log_prob(q.sample((7,))).shape == (7, B)


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_posterior_is_reported_at_one_theta(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(3)
    posterior = infer(strategy, x)
    torch.testing.assert_close(posterior.log_evidence, model.log_evidence(x, posterior.theta))
    torch.testing.assert_close(posterior.gamma, model.responsibilities(x, posterior.theta))
    torch.testing.assert_close(posterior.theta, posterior.q.mean)


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_its_density_is_that_of_its_guide_in_stock_pyro(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(3)
    posterior = infer(strategy, x)
    posterior = posterior._replace(q=proposal(model, strategy, x, posterior=posterior))
    torch.manual_seed(3)
    stock = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.guide_at(posterior), x)
    torch.manual_seed(3)
    theta = posterior.q.sample()
    ours = model.log_evidence(x, theta) + model.log_prior(theta) - posterior.q.log_prob(theta)
    assert ours.sum().item() == pytest.approx(stock, rel=1e-10)


@every_strategy
@pytest.mark.usefixtures("float64")
def test_its_elbo_is_an_estimate_of_the_mean_log_weight(strategy_name):
    """Up to what one draw of θ, by which some strategies estimate it, may be off."""
    model, strategy = pair("owned Normal", strategy_name)
    x = images(3)
    posterior = infer(strategy, x)
    estimate = evidence_lower_bound(model, strategy, x, samples=1000, chunk=100, posterior=posterior)
    spread = estimate.monte_carlo_error * 1000**0.5
    assert bool(((posterior.elbo_trace[-1] - estimate.log_marginal).abs() < 5 * spread).all())


@every_strategy
def test_no_images_are_refused(strategy_name):
    model, strategy = pair("owned Normal", strategy_name)
    for call in (strategy.infer, lambda x: evidence_lower_bound(model, strategy, x)):
        with pytest.raises(StrategyError, match="at least one image"):
            call(images(0))
