"""Learned priors on θ, against SciPy and against Pyro's program."""

import numpy as np
import pytest
import torch
from cases import images
from pyro import poutine
from scipy.stats import norm

from pnem.errors import ModelError
from pnem.inference import NEM
from pnem.models import Bernoulli, DiagonalNormal, MixtureOfNormals, SpatialMixture, decoders
from pnem.models.config import build, describe

SHAPE = (3, 4, 1)


def randomised(prior):
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_()
    return prior


def model_with(prior, K=3):
    return SpatialMixture(decoders.MLP(5, SHAPE, hidden=(7,)), Bernoulli(), K, prior=prior)


def density(prior, theta):
    """log p(θ_k) by SciPy: (..., M) -> (...)."""
    location, scale = (value.detach().numpy() for value in (prior.location, prior.log_scale.exp()))
    if isinstance(prior, DiagonalNormal):
        return norm(location, scale).logpdf(theta).sum(-1)
    weights = prior.logits.detach().softmax(0).numpy()
    return np.log((weights * np.exp(norm(location, scale).logpdf(theta[..., None, :]).sum(-1))).sum(-1))


PRIORS = {"diagonal normal": lambda: DiagonalNormal(5), "mixture": lambda: MixtureOfNormals(5, 3)}
every_prior = pytest.mark.parametrize("name", PRIORS)


@every_prior
@pytest.mark.usefixtures("float64")
def test_density_is_scipys_in_the_model_and_in_its_pyro_program(name):
    prior = randomised(PRIORS[name]())
    model = model_with(prior)
    theta = torch.randn(2, 3, 5)
    expected = density(prior, theta.numpy())
    np.testing.assert_allclose(model.log_prior(theta).detach(), expected.sum(-1))
    conditioned = poutine.condition(model, data={"theta": theta})
    site = poutine.trace(conditioned).get_trace(images(2)).nodes["theta"]
    np.testing.assert_allclose(site["fn"].log_prob(theta).detach(), expected)


@every_prior
@pytest.mark.usefixtures("float64")
def test_generated_theta_has_the_priors_moments(name):
    prior = randomised(PRIORS[name]())
    model = model_with(prior)
    theta = poutine.trace(model).get_trace(num_images=20_000).nodes["theta"]["value"].flatten(0, 1)
    p = prior.distribution()
    error = (p.variance / len(theta)).sqrt()
    assert bool(((theta.mean(0) - p.mean).abs() < 4 * error).all())
    torch.testing.assert_close(theta.var(0), p.variance, rtol=0.1, atol=0.0)


@pytest.mark.usefixtures("float64")
def test_divergence_is_torchs_and_none_where_there_is_no_closed_form():
    location, scale = torch.randn(2, 3, 5), torch.rand(2, 3, 5) + 0.1
    q = torch.distributions.Normal(location, scale)
    prior = randomised(DiagonalNormal(5))
    for given, (mean, deviation) in {
        "standard_normal": (torch.zeros(5), torch.ones(5)),
        prior: (prior.location, prior.log_scale.exp()),
    }.items():
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(mean, deviation)).sum((-2, -1))
        torch.testing.assert_close(model_with(given).prior_divergence(location, scale), expected)
    assert model_with(MixtureOfNormals(5, 2)).prior_divergence(location, scale) is None
    assert model_with("flat").prior_divergence(location, scale) is None


def test_divergence_keeps_its_digits_near_the_prior():
    location, scale = torch.zeros(1, 1, 5), torch.full((1, 1, 5), 1 + 1e-4)
    exact = 5 * 0.5 * ((1 + 1e-4) ** 2 - 1 - 2 * np.log1p(1e-4))
    assert model_with("standard_normal", K=1).prior_divergence(location, scale).item() == pytest.approx(exact, rel=0.02)


@every_prior
@pytest.mark.usefixtures("float64")
def test_n_em_steps_along_the_gradient_of_the_prior(name):
    model = model_with(randomised(PRIORS[name]()))
    strategy = NEM(model, step_size=0.7)
    x = images(2)
    state = strategy.unroll(x)[0]
    theta = state.theta.detach().requires_grad_()
    log_joint = model.log_evidence(x, theta) + model.log_prior(theta)
    (gradient,) = torch.autograd.grad(log_joint.sum(), theta)
    moved = strategy.m_step(state._replace(theta=theta.detach(), gamma=model.responsibilities(x, theta).detach()), x)
    torch.testing.assert_close(moved, theta + 0.7 * gradient)


@every_prior
def test_priors_are_described_and_built_again(name):
    prior = PRIORS[name]()
    again = build(describe(prior))
    again.load_state_dict(prior.state_dict())
    theta = torch.randn(4, 5)
    assert torch.equal(again.distribution().log_prob(theta), prior.distribution().log_prob(theta))


def test_proper_priors_are_those_to_draw_from():
    assert all(model_with(p).has_proper_prior for p in ("standard_normal", DiagonalNormal(5), MixtureOfNormals(5)))
    assert not model_with("flat").has_proper_prior


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model_with(DiagonalNormal(4)), "of 4 features, but the decoder takes 5"),
        (lambda: DiagonalNormal(0), "features must be at least 1"),
        (lambda: DiagonalNormal(2.5), "features must be at least 1, and whole"),
        (lambda: MixtureOfNormals(5, 2.5), "num_components must be at least 1, and whole"),
        (lambda: MixtureOfNormals(5, 0), "num_components must be at least 1"),
        (lambda: model_with("laplace"), "or a Prior, but is 'laplace'"),
    ],
)
def test_priors_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()
