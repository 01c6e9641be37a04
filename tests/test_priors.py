"""Maximum a posteriori: conjugate priors on the components and on the mixing weights."""

import numpy as np
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO
from scipy import stats

from pnem.errors import ModelError
from pnem.inference import ClassicalEM
from pnem.models import (
    Bernoulli,
    MultivariateNormal,
    NormalInverseWishart,
    Poisson,
    SpatialMixture,
    StudentT,
    decoders,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]
COVARIANCES = ["spherical", "diagonal", "full", "tied"]
MATRIX = ((2.0, 0.3), (0.3, 1.0))


def mixture(likelihood, K=3, C=2, **options) -> SpatialMixture:
    options = {"mixing": "learned"} | options
    return SpatialMixture(decoders.Constant(likelihood.num_parameters(C)), likelihood, K, **options)


def blobs(B: int = 1, D: int = 80) -> torch.Tensor:
    return torch.randn(B, D, 2) @ torch.randn(2, 2) + 3 * torch.randint(0, 3, (B, D, 1))


def test_its_density_is_scipys():
    prior = NormalInverseWishart((1.0, -1.0), MATRIX, mean_precision=0.5, degrees_of_freedom=4.5)
    likelihood = MultivariateNormal("full")
    psi = torch.randn(5)
    mean, lower = (value.numpy() for value in likelihood.moments(psi))
    sigma = lower @ lower.T
    theirs = stats.invwishart(4.5, np.array(MATRIX)).logpdf(sigma)
    theirs += stats.multivariate_normal((1.0, -1.0), sigma / 0.5).logpdf(mean)
    assert prior.log_prob(psi, likelihood).item() == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("covariance", ["spherical", "diagonal"])
def test_of_independent_channels_it_is_the_product(covariance):
    prior = NormalInverseWishart((1.0, -1.0), (2.0, 3.0), mean_precision=0.5, degrees_of_freedom=4.5)
    likelihood = MultivariateNormal(covariance)
    psi = torch.randn(likelihood.num_parameters(2))
    mean, lower = likelihood.moments(psi)
    theirs = 0.0
    for c, (m, scale) in enumerate(((1.0, 2.0), (-1.0, 3.0))):
        variance = lower[c, c].item() ** 2
        theirs += stats.invgamma(4.5 / 2, scale=scale / 2).logpdf(variance)
        theirs += stats.norm(m, (variance / 0.5) ** 0.5).logpdf(mean[c].item())
    assert prior.log_prob(psi, likelihood).item() == pytest.approx(theirs, rel=1e-10)


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
def test_the_fit_is_its_mode(kind, covariance):
    """The slope of log p(x, μ, Σ, π) along every direction vanishes where EM ends."""
    given = {"degrees_of_freedom": 4.0} if kind is StudentT else {}
    likelihood = kind(covariance, floor=0.0, **given)
    prior = NormalInverseWishart(0.5, 1.5, mean_precision=0.3)
    x = blobs()
    model = mixture(likelihood, 2, prior=prior, mixing_concentration=2.5)
    fit = ClassicalEM(model, iterations=1000, tol=1e-13).fit(x)
    mean, lower = likelihood.moments(fit.theta[0])
    normal = likelihood.normal if isinstance(likelihood, StudentT) else likelihood

    def log_joint(step: torch.Tensor) -> float:
        moved = mean + step[:2]
        factor = torch.eye(2) + torch.diag(step[2:4] if covariance != "spherical" else step[2:3].expand(2))
        if not normal.independent_channels:
            factor = factor + torch.tensor([[0.0, 0.0], [step[4].item(), 0.0]])
        wide = factor @ lower @ lower.mT @ factor.mT
        covariances = wide if not normal.independent_channels else wide.diagonal(dim1=-2, dim2=-1)
        theta = normal.fit(moved, covariances, torch.ones(2, 1))
        if isinstance(likelihood, StudentT):
            theta = torch.cat([theta, fit.theta[0, :, -1:]], -1)
        return (model.log_evidence(x, theta[None]) + model.log_prior(theta[None])).item()

    for direction in torch.eye(5):
        slope = (log_joint(1e-4 * direction) - log_joint(-1e-4 * direction)) / 2e-4
        assert abs(slope) < 2e-3, direction
        curvature = log_joint(1e-2 * direction) + log_joint(-1e-2 * direction) - 2 * log_joint(0 * direction)
        assert curvature <= 1e-9


def test_one_component_in_closed_form():
    x = blobs(D=12)
    prior = NormalInverseWishart((1.0, -1.0), MATRIX, mean_precision=0.5, degrees_of_freedom=4.0)
    likelihood = MultivariateNormal("full", floor=0.0)
    fit = ClassicalEM(mixture(likelihood, 1, prior=prior)).fit(x)
    mean, lower = likelihood.moments(fit.theta[0, 0])
    m, average = torch.tensor([1.0, -1.0]), x[0].mean(0)
    torch.testing.assert_close(mean, (x[0].sum(0) + 0.5 * m) / 12.5)
    centred = x[0] - average
    shrinkage = 0.5 * 12 / 12.5 * torch.outer(average - m, average - m)
    expected = (torch.tensor(MATRIX) + centred.T @ centred + shrinkage) / (12 + 4 + 2 + 2)
    torch.testing.assert_close(lower @ lower.T, expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(COVARIANCES), st.booleans(), st.booleans(), st.integers(1, 3))
def test_the_penalised_evidence_never_falls(seed, covariance, heavy, missing, B):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    x = blobs(B, 40)
    if missing:
        x[..., 0] = x[..., 0].masked_fill(torch.rand(B, 40) < 0.3, torch.nan)
    likelihood = (StudentT if heavy else MultivariateNormal)(covariance, floor=0.0)
    prior = NormalInverseWishart(0.0, 1.0)
    model = mixture(likelihood, 4, prior=prior, mixing="per_image", mixing_concentration=1.5)
    # Far seeds make some components die.
    strategy = ClassicalEM(model, iterations=40, tol=0, initial="random" if seed % 2 else "k-means++")
    trace = strategy.fit(x).elbo_trace
    assert bool((trace.diff(dim=0) >= -1e-9 * trace[1:].abs()).all())


@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
def test_it_prevents_collapse_without_any_floor(kind, covariance):
    likelihood = kind(covariance, floor=0.0)
    model = mixture(likelihood, 4, prior=NormalInverseWishart(0.0, 0.5))
    posterior = ClassicalEM(model, tol=0).infer(torch.ones(1, 30, 2))
    assert bool(posterior.theta.isfinite().all())
    assert bool(posterior.gamma.isfinite().all())
    assert bool((posterior.elbo_trace.diff(dim=0) > -1e-9).all())


@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
def test_a_component_that_dies_does_not_cost_the_bound(kind):
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.cat([torch.randn(1, 40, 2), torch.randn(1, 3, 2) + 4], 1)
        if kind is MultivariateNormal:
            x[0, 5, 0] = torch.nan
        model = mixture(kind(floor=0.0), 4, prior=NormalInverseWishart(0.0, 1.0, mean_precision=1.0))
        trace = ClassicalEM(model, iterations=300, tol=0).fit(x).elbo_trace
        assert bool((trace.diff(dim=0) > -1e-9).all())


def test_a_concentration_keeps_weights_from_vanishing():
    x = blobs()
    gamma = torch.rand(1, 3, 80).softmax(1)
    model = mixture(Poisson(), mixing_concentration=5.0)
    fit = ClassicalEM(model, iterations=1).fit(x.abs().round(), gamma=gamma)
    start = mixture(Poisson())
    state = ClassicalEM(start).init(x.abs().round(), gamma)
    # The first start of both is MAP, so the iteration counts what the E-step there owns.
    first = ClassicalEM(model).init(x.abs().round(), gamma)
    owned = first.gamma.sum(-1)
    torch.testing.assert_close(fit.log_mixing.exp(), (owned + 4) / (80 + 12))
    torch.testing.assert_close(first.log_mixing.exp(), (gamma.sum(-1) + 4) / (80 + 12))
    torch.testing.assert_close(state.log_mixing.exp(), gamma.sum(-1) / 80)


@pytest.mark.parametrize("mixing", ["learned", "per_image"])
@pytest.mark.parametrize("prior", ["flat", NormalInverseWishart(0.0, 1.0)])
def test_pyro_sees_the_same_density(mixing, prior):
    x = blobs(B=2)
    model = mixture(MultivariateNormal(), prior=prior, mixing=mixing, mixing_concentration=3.0)
    strategy = ClassicalEM(model, iterations=7, tol=0)
    state = strategy.init(x)
    posterior = strategy.infer(x)
    loss = TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.guide_at(posterior), x)
    again = strategy.fit(x, theta=posterior.theta, iterations=1).elbo_trace[0]
    assert again.sum().item() == pytest.approx(-loss, rel=1e-10)
    assert strategy.elbo(state).shape == (2,)
    trace = pyro.poutine.trace(pyro.condition(model, {"theta": posterior.theta})).get_trace(x)
    assert "mixing_prior" in trace.nodes


def test_the_strategys_elbo_counts_the_priors():
    x = blobs(B=2)
    model = mixture(MultivariateNormal(), prior=NormalInverseWishart(0.0, 1.0), mixing_concentration=3.0)
    strategy = ClassicalEM(model, iterations=3, tol=0)
    gamma = torch.rand(2, 3, 80).softmax(1)
    states = [strategy.init(x, gamma), *strategy.unroll(x, gamma)[:2]]
    trace = strategy.fit(x, gamma=gamma).elbo_trace
    torch.testing.assert_close(torch.stack([strategy.elbo(state) for state in states]), trace)


BAD = {
    "a likelihood without it": (lambda: mixture(Bernoulli(), prior=NormalInverseWishart(0.0, 1.0)), "Bernoulli"),
    "channels of the mean": (
        lambda: mixture(MultivariateNormal(), prior=NormalInverseWishart((0.0, 0.0, 0.0), 1.0)),
        "3 channels",
    ),
    "channels of the scale": (
        lambda: mixture(MultivariateNormal(), prior=NormalInverseWishart(0.0, (1.0, 1.0, 1.0))),
        "3 channels",
    ),
    "few degrees of freedom": (
        lambda: mixture(MultivariateNormal(), prior=NormalInverseWishart(0.0, 1.0, degrees_of_freedom=0.5)),
        "more than C - 1",
    ),
    "a negative scale": (lambda: NormalInverseWishart(0.0, -1.0), "positive definite"),
    "a lopsided scale": (lambda: NormalInverseWishart(0.0, ((1.0, 0.5), (0.0, 1.0))), "symmetric"),
    "an infinite mean": (lambda: NormalInverseWishart(float("inf"), 1.0), "finite"),
    "no precision": (lambda: NormalInverseWishart(0.0, 1.0, mean_precision=0.0), "mean_precision"),
    "a neural decoder": (
        lambda: SpatialMixture(decoders.MLP(3, (2, 2, 1)), Bernoulli(), 2, prior=NormalInverseWishart(0.0, 1.0)),
        r"decoders\.Constant",
    ),
    "a small concentration": (lambda: mixture(Poisson(), mixing_concentration=0.5), "at least 1"),
    "weights that are not fitted": (
        lambda: mixture(Poisson(), mixing="uniform", mixing_concentration=2.0),
        "fitted mixing weights",
    ),
    "an unknown prior": (lambda: mixture(Poisson(), prior="wide"), "standard_normal"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def test_a_prior_is_not_drawn_from():
    with pytest.raises(ModelError, match="cannot be drawn from"):
        mixture(MultivariateNormal(), prior=NormalInverseWishart(0.0, 1.0))(num_images=2)
