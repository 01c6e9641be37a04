"""NUTS: exact posteriors within Monte Carlo error, components matched, and warnings where chains have not mixed."""

import math

import pyro
import pytest
import torch
from cases import factors, images
from pyro import poutine
from pyro.infer import TraceEnum_ELBO

import pnem
from pnem.data import ImageDataset
from pnem.errors import RunError, StrategyError
from pnem.inference import NUTS, ClassicalEM, MixingWarning
from pnem.inference.chains import bulk_effective_sample_size, match_components, rank_normalised_r_hat
from pnem.inference.distributions import Draws
from pnem.models import Bernoulli, Normal, Poisson, SpatialMixture, decoders

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.MixingWarning"),
]


def small(K: int = 1, M: int = 2, **options) -> SpatialMixture:
    return SpatialMixture(decoders.Linear(M, (2, 2, 1)), Bernoulli(), K, **{"prior": "standard_normal"} | options)


@pytest.mark.slow
def test_it_reproduces_the_exact_posterior_of_factor_analysis():
    model = factors(C=6, M=2)
    with torch.no_grad():
        model.decoder.linear.weight.copy_(torch.randn(6, 2))
    x = 1.5 * torch.randn(2, 1, 6)
    exact = ClassicalEM(model).infer(x)
    strategy = NUTS(model, chains=2, warmup=150, draws=400)
    torch.manual_seed(1)
    found = strategy.sample(x)
    assert bool((found.r_hat < 1.05).all())
    assert found.divergences == 0
    mean, variance = exact.q.mean, exact.q.base_dist.covariance_matrix.diagonal(dim1=-2, dim2=-1)
    size = found.effective_sample_size
    assert bool((size > 100).all())
    every = found.draws.flatten(0, 1)
    assert bool(((every.mean(0) - mean).abs() < 4.5 * (variance / size).sqrt()).all())
    # The variance of a normal's sample variance is 2 σ⁴ / n; of its squares the draws are worth less.
    of_squares = bulk_effective_sample_size((found.draws - mean).square())
    assert bool(((every.var(0) - variance).abs() < 4.5 * variance * (2 / of_squares).sqrt()).all())
    # The normal with these moments is nearly the posterior.
    q = Draws(found.draws).moment_matched()
    theta = q.sample((200,))
    elbo = (model.log_evidence(x, theta) + model.log_prior(theta) - q.log_prob(theta)).mean(0)
    torch.testing.assert_close(elbo, exact.elbo_trace[-1], rtol=0, atol=0.05)


@pytest.mark.slow
def test_it_agrees_with_integration_on_a_grid():
    """Two components of one number each: moments that do not depend on the components' order."""
    model = SpatialMixture(decoders.Linear(1, (1, 3, 1)), Normal(0.7), 2, prior="standard_normal")
    x = torch.tensor([[[1.0], [-0.8], [0.3]]])
    axis = torch.linspace(-7, 7, 281)
    grid = torch.cartesian_prod(axis, axis).reshape(-1, 1, 2, 1)
    with torch.no_grad():
        weight = (model.log_evidence(x, grid) + model.log_prior(grid)).softmax(0)
    found = NUTS(model, chains=2, warmup=150, draws=400).sample(x)
    for moment in (
        lambda theta: theta.sum((-2, -1)),
        lambda theta: theta.prod(-2).squeeze(-1),
        lambda theta: theta.square().sum((-2, -1)),
        lambda theta: theta.amax((-2, -1)),
    ):
        exact = (weight * moment(grid)).sum()
        values = moment(found.draws)
        error = values.std() / bulk_effective_sample_size(values).sqrt()
        assert (values.mean() - exact).abs().item() < 4.5 * error.item()
        assert rank_normalised_r_hat(values).item() < 1.06


def test_chains_in_swapped_orders_are_matched():
    modes = torch.tensor([[[-3.0, 0.0], [0.0, 2.0], [3.0, 3.0]], [[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]])
    draws = modes + 0.3 * torch.randn(4, 200, 2, 3, 2)
    shuffled = draws.clone()
    shuffled[1] = draws[1][..., [2, 0, 1], :]
    shuffled[2, 100:, 0] = draws[2, 100:, 0][..., [1, 0, 2], :]
    assert bool((rank_normalised_r_hat(shuffled)[0] > 1.2).any())
    matched = match_components(shuffled, torch.randn(4, 200, 2))
    assert bool((rank_normalised_r_hat(matched) < 1.02).all())
    # All is as before the shuffle, in one order for each image.
    for b in range(2):
        order = torch.cdist(matched.mean((0, 1))[b], modes[b]).argmin(-1)
        assert sorted(order.tolist()) == [0, 1, 2]
        assert torch.equal(matched[:, :, b], draws[:, :, b][..., order, :])


def test_matching_is_for_exchangeable_components():
    x = torch.cat([torch.zeros(1, 4, 1), torch.ones(1, 4, 1)])
    learned = small(K=2, M=1, mixing="learned")
    options = {"chains": 2, "warmup": 5, "draws": 6}
    for logits, exchangeable in (((0.0, 0.0), True), ((0.0, 1.0), False)):
        learned.mixing_logits.data = torch.tensor(logits)
        torch.manual_seed(2)
        found = NUTS(learned, **options).sample(x)
        again = match_components(found.draws, found.log_density)
        assert torch.equal(again, found.draws) == exchangeable


def test_r_hat_and_effective_sample_size_of_known_chains():
    independent = torch.randn(4, 500, 3)
    assert bool((rank_normalised_r_hat(independent) < 1.01).all())
    torch.testing.assert_close(bulk_effective_sample_size(independent), torch.full((3,), 2000.0), rtol=0.25, atol=0)
    # An autoregression of order one is worth (1 − ρ) / (1 + ρ) of its length.
    chains = [torch.randn(4)]
    for _ in range(4000):
        chains.append(0.8 * chains[-1] + 0.6 * torch.randn(4))
    correlated = torch.stack(chains[1:], 1)
    assert bulk_effective_sample_size(correlated).item() == pytest.approx(16000 / 9, rel=0.2)
    # Draws that alternate around the mean are worth more than they are many.
    chains = [torch.randn(4)]
    for _ in range(400):
        chains.append(-0.9 * chains[-1] + 0.19**0.5 * torch.randn(4))
    assert 5000 < bulk_effective_sample_size(torch.stack(chains[1:], 1)).item() <= 1600 * math.log10(1600) + 1e-6
    apart = independent + torch.tensor([0.0, 0.0, 0.0, 1.0]).reshape(4, 1, 1)
    assert bool((rank_normalised_r_hat(apart) > 1.05).all())
    # Chains of one mean and other widths, and those that Cauchy's tails would hide.
    wider = independent * torch.tensor([1.0, 1.0, 1.0, 4.0]).reshape(4, 1, 1)
    assert bool((rank_normalised_r_hat(wider) > 1.1).all())
    torch.testing.assert_close(
        rank_normalised_r_hat(independent.sinh()), rank_normalised_r_hat(independent), rtol=1e-2, atol=0
    )


def test_draws_that_are_the_same_have_the_same_rank():
    coarse = torch.randn(4, 500, 3).round()
    # Whatever order the same values come in, within a half of a chain, R̂ is the same.
    shuffled = torch.cat([half[:, torch.randperm(250)] for half in coarse.split(250, 1)], 1)
    torch.testing.assert_close(rank_normalised_r_hat(shuffled), rank_normalised_r_hat(coarse))
    still = torch.ones(4, 100, 1)
    assert bool(rank_normalised_r_hat(still).isnan())
    assert bool(bulk_effective_sample_size(still).isnan())


def test_draws_as_a_distribution():
    draws = torch.randn(3, 40, 5, 2, 2) + torch.arange(5.0).reshape(5, 1, 1)
    q = Draws(draws)
    assert q.batch_shape == (5,)
    sampled = q.sample((6, 4))
    assert sampled.shape == (6, 4, 5, 2, 2)
    for b in range(5):
        every = draws[:, :, b].reshape(-1, 4)
        assert bool((sampled[:, :, b].reshape(-1, 1, 4) == every).all(-1).any(-1).all())
    normal = q.moment_matched()
    torch.testing.assert_close(normal.mean, draws.mean((0, 1)))
    torch.testing.assert_close(normal.variance, q.variance)
    expected = torch.cov(draws[:, :, 3].reshape(-1, 4).T)
    torch.testing.assert_close(normal.flat.covariance_matrix[3], expected)
    with pytest.raises(StrategyError, match=r"have no density: use q.moment_matched\(\)"):
        q.log_prob(draws[0, 0])
    with pytest.raises(StrategyError, match=r"4 draws of θ with K·M = 4 have no covariance.*more draws"):
        Draws(draws[:1, :4]).moment_matched()
    for b in range(5):
        with pytest.raises(StrategyError, match="no covariance of full rank"):
            Draws(draws[:1, :4, b : b + 1]).moment_matched()


@pytest.mark.parametrize("model", ["bernoulli", "constant"])
def test_the_posterior_and_a_warning_of_a_run_too_short(model):
    x = images(2, (2, 2, 1))
    if model == "constant":
        mixture = SpatialMixture(decoders.Constant(1), Poisson(), 2, prior="standard_normal")
    else:
        mixture = small(K=2, pixel_prior=0.0)
    strategy = NUTS(mixture, chains=2, warmup=10, draws=20)
    pyro.param("mine", torch.ones(1))
    with pytest.warns(MixingWarning, match=r"of \d entries of θ, \d have R̂ above 1.01 .*below 200.*of 40 transitions"):
        posterior = strategy.infer(x)
    B, K, M = 2, 2, mixture.latent_features
    assert posterior.q.draws.shape == (2, 20, B, K, M)
    torch.testing.assert_close(posterior.theta, posterior.q.mean)
    torch.testing.assert_close(posterior.log_evidence, mixture.log_evidence(x, posterior.theta))
    assert posterior.elbo_trace.shape == (1, B)
    assert posterior.psi.shape[:3] == posterior.mean.shape[:3] == posterior.gamma.shape == (B, K, 4)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert all(p.requires_grad and p.grad is None for p in mixture.parameters())
    # Pyro passes on what the distribution says, as a ValueError of its own.
    with pytest.raises(ValueError, match=r"moment_matched"):
        TraceEnum_ELBO(max_plate_nesting=2).loss(mixture, strategy.guide_at(posterior), x)
    matched = posterior._replace(q=posterior.q.moment_matched())
    torch.manual_seed(0)
    stock = -TraceEnum_ELBO(max_plate_nesting=2).loss(mixture, strategy.guide_at(matched), x)
    torch.manual_seed(0)
    theta = matched.q.sample()
    ours = mixture.log_evidence(x, theta) + mixture.log_prior(theta) - matched.q.log_prob(theta)
    assert ours.sum().item() == pytest.approx(stock)


def test_the_log_density_is_that_of_the_draws_and_no_outer_trace_sees_them():
    model, x = small(), images(2, (2, 2, 1))
    with poutine.trace() as outer, torch.inference_mode():
        found = NUTS(model, chains=1, warmup=5, draws=30).sample(x.clone())
    assert list(outer.trace.nodes) == []
    draws = found.draws[0].clone()
    expected = model.log_evidence(x, draws) + model.log_prior(draws)
    torch.testing.assert_close(found.log_density[0].clone(), expected.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": 0}, "chains must be at least 1, and whole, but is 0"),
        ({"warmup": 0}, "warmup must be at least 1"),
        ({"draws": 3}, "draws must be at least 4"),
        ({"draws": 10.0}, "draws must be at least 4, and whole"),
        ({"max_tree_depth": 0}, "max_tree_depth must be at least 1"),
        ({"max_dimensions": 0}, "max_dimensions must be at least 1"),
        ({"target_accept": 1.0}, "target_accept must be between 0 and 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(StrategyError, match=message):
        NUTS(small(), **options)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(StrategyError, match=r"NUTS needs a proper prior"):
        NUTS(small(prior="flat"))
    model, x = small(K=2), images(3, (2, 2, 1))
    strategy = NUTS(model, max_dimensions=10)
    with pytest.raises(StrategyError, match=r"B·K·M = 3·2·2 = 12 dimensions.*max_dimensions=12"):
        strategy.infer(x)
    for options in ({"restarts": 2}, {"iterations": 3}, {"gamma": torch.ones(3, 2, 4)}):
        with pytest.raises(StrategyError, match=r"leave restarts, iterations and gamma out"):
            strategy.infer(x, **options)
    with pytest.raises(StrategyError, match=r"leave keep_trace out"):
        strategy.infer(x, keep_trace=True)
    for call in (strategy.unroll, strategy):
        with pytest.raises(StrategyError, match=r"no iterations to unroll"):
            call(x)
    data = {name: ImageDataset(x.float().reshape(1, 3, 2, 2, 1).numpy()) for name in ("training", "validation")}
    with pytest.raises(RunError, match=r"NUTS trains nothing.*NUTS\(model\).infer"):
        pnem.fit(model, strategy, data)
    far = SpatialMixture(decoders.Linear(2, (2, 2, 1)), Normal(1.0), 1, prior="standard_normal").float()
    with pytest.raises(StrategyError, match=r"not finite at a draw of N\(0, I\).*check that the images"):
        NUTS(far).infer(torch.full((2, 4, 1), 1e25, dtype=torch.float32))
