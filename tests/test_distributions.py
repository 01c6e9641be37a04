"""Distributions of θ: one batch axis for images, event shape (K, M)."""

import pyro.distributions as dist
import pytest
import torch
from cases import factors, images, pair
from pyro import poutine

from pnem.inference import RNNEM, VAE, ClassicalEM, Posterior, encoders
from pnem.inference.distributions import AsOneSite, Concatenated, Draws, OfAllComponents, by_component, concatenated
from pnem.models import Bernoulli, SpatialMixture, decoders


def normal(batch, K=3, M=2):
    return dist.Normal(torch.randn(batch, K, M), torch.rand(batch, K, M) + 0.1).to_event(2)


def coupled(batch, K=3, M=2):
    """Components that depend on one another."""
    factor = torch.randn(batch, K * M, K * M)
    flat = dist.MultivariateNormal(torch.zeros(batch, K * M), factor @ factor.mT + torch.eye(K * M))
    reshape = dist.transforms.ReshapeTransform((K * M,), (K, M))
    return dist.TransformedDistribution(flat, [reshape])


@pytest.mark.usefixtures("float64")
def test_concatenated_is_its_parts_one_after_the_other():
    parts = [normal(2), coupled(1), normal(3)]
    both = Concatenated([Concatenated(parts[:2]), parts[2]])
    assert both.batch_shape == (6,)
    assert both.event_shape == (3, 2)
    assert len(both.parts) == 3
    theta = both.sample((7,))
    assert theta.shape == (7, 6, 3, 2)
    pieces = [part.log_prob(value) for part, value in zip(parts, theta.split([2, 1, 3], 1), strict=True)]
    torch.testing.assert_close(both.log_prob(theta), torch.cat(pieces, 1))
    torch.manual_seed(1)
    drawn = both.rsample()
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, torch.cat([part.rsample() for part in parts]))


@pytest.mark.usefixtures("float64")
def test_concatenated_knows_means_and_variances():
    parts = [normal(2), normal(3)]
    both = Concatenated(parts)
    torch.testing.assert_close(both.mean, torch.cat([part.mean for part in parts]))
    torch.testing.assert_close(both.variance, torch.cat([part.variance for part in parts]))


def test_products_over_components_are_found():
    q = normal(2)
    factor = by_component(q)
    assert factor.batch_shape == (2, 3)
    theta = q.sample()
    torch.testing.assert_close(factor.log_prob(theta).sum(-1), q.log_prob(theta))
    point = by_component(dist.Delta(theta, event_dim=2))
    assert torch.equal(point.sample(), theta)
    assert by_component(coupled(2)) is None


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [normal, coupled])
def test_guide_samples_theta_with_the_density_of_q(make):
    model, strategy = pair("owned Bernoulli", "vae")
    x = images(4)
    q = make(4, M=5)
    trace = poutine.trace(strategy.guide_at(strategy.infer(x)._replace(q=q))).get_trace(x)
    theta = trace.nodes["theta"]["value"]
    assert theta.shape == (4, 3, 5)
    assert trace.log_prob_sum().item() == pytest.approx(q.log_prob(theta).sum().item())
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace(x)
    assert torch.equal(replayed.nodes["theta"]["value"], theta)


def test_site_of_all_components_has_its_images_at_dim_minus_two():
    q = coupled(4)
    site = AsOneSite(q)
    theta = site.sample()
    assert (site.batch_shape, site.event_shape, theta.shape) == ((4, 1), (3, 2), (4, 1, 3, 2))
    torch.testing.assert_close(site.log_prob(theta).squeeze(-1), q.log_prob(theta.squeeze(1)))


@pytest.mark.usefixtures("float64")
def test_exact_posterior_of_factors_is_its_q():
    model = factors()
    x = torch.randn(5, 1, 6)
    posterior = ClassicalEM(model).infer(x)
    theta = posterior.q.sample((3,))
    log_joint = torch.stack([model.log_evidence(x, draw) + model.log_prior(draw) for draw in theta])
    torch.testing.assert_close(log_joint - posterior.q.log_prob(theta), posterior.elbo_trace.expand(3, -1))


def test_posteriors_of_batches_become_one():
    model = SpatialMixture(decoders.Linear(2, (3, 4, 1)), Bernoulli(), 2, prior="standard_normal")
    strategy = VAE(model, encoder=encoders.Identity((3, 4, 1)))
    x = images(5)
    together, parts = strategy.infer(x), [strategy.infer(x[:2]), strategy.infer(x[2:])]
    one = Posterior.concatenate(parts)
    torch.testing.assert_close(one.theta, together.theta)
    torch.testing.assert_close(one.q.mean, together.q.mean)
    assert one.trace.scale.shape == (1, 5, 2, 2)


def test_posteriors_of_batches_that_took_other_numbers_of_iterations_become_one():
    model = SpatialMixture(decoders.Linear(2, (3, 4, 1)), Bernoulli(), 2)
    strategy, x = RNNEM(model), images(5)
    few, many = strategy.infer(x[:2], iterations=2), strategy.infer(x[2:], iterations=4)
    one = Posterior.concatenate([few, many])
    torch.testing.assert_close(one.elbo_trace[1:, :2], few.elbo_trace[-1].expand(3, 2))
    torch.testing.assert_close(one.trace.theta[:, 2:], many.trace.theta)
    torch.testing.assert_close(one.trace.theta[-1], one.theta)
    assert Posterior.concatenate([few, many._replace(trace=None)]).trace is None


def test_printing_a_distribution_of_theta_says_what_it_is():
    both = Concatenated([normal(2), OfAllComponents(dist.MultivariateNormal(torch.zeros(3, 6), torch.eye(6)), 3)])
    assert "Independent(Normal" in repr(both)
    assert "OfAllComponents(MultivariateNormal(" in repr(both)
    assert repr(Draws(torch.zeros(2, 5, 3, 3, 2))) == "Draws(draws: (2, 5, 3, 3, 2))"


def test_posteriors_of_batches_have_the_q_of_all_images():
    deltas = [dist.Delta(torch.randn(n, 3, 2), event_dim=2) for n in (2, 4)]
    normals = [dist.Normal(torch.randn(n, 3, 2), torch.rand(n, 3, 2)).to_event(2) for n in (2, 4)]
    mixed = concatenated([deltas[0], normals[1]])
    assert isinstance(mixed, Concatenated)
    assert isinstance(concatenated(deltas), dist.Delta)
    assert isinstance(concatenated(normals).base_dist, dist.Normal)
    theta = torch.randn(7, 6, 3, 2)
    for parts in (deltas, normals):
        whole = concatenated(parts)
        torch.testing.assert_close(whole.log_prob(theta), Concatenated(parts).log_prob(theta))
        torch.testing.assert_close(whole.mean, Concatenated(parts).mean)
