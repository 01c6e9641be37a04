"""Pyro's guides as strategies: exact where their family holds the posterior, and guests that leave no trace."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import factors, images
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, autoguide
from torch import nn

from pnem.errors import ModelError, StrategyError
from pnem.inference import (
    ClassicalEM,
    ConvergenceWarning,
    PyroGuide,
    SemiAmortised,
    importance_weighted_bound,
    svi,
)
from pnem.models import Bernoulli, DiagonalNormal, MixtureOfNormals, Poisson, SpatialMixture, decoders
from pnem.models.config import build, describe

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]
GUIDES = ["AutoDelta", "AutoNormal", "AutoMultivariateNormal", "AutoLaplaceApproximation", "AutoIAFNormal"]
every_guide = pytest.mark.parametrize("name", [*GUIDES, "callable"])


def own(K: int, M: int):
    """A guide of one's own: a product of normals."""

    def guide(x):
        location = pyro.param("location", lambda: 0.1 * torch.randn(len(x), K, M))
        scale = pyro.param("scale", lambda: torch.full((len(x), K, M), 0.1), constraint=dist.constraints.positive)
        with pyro.plate("images", len(x), dim=-2), pyro.plate("components", K, dim=-1):
            pyro.sample("theta", dist.Normal(location, scale).to_event(1))

    return guide


def mixture(K: int = 2, M: int = 2, shape=(2, 2, 1), **options) -> SpatialMixture:
    return SpatialMixture(
        decoders.MLP(M, shape, hidden=(5,)),
        Bernoulli(),
        K,
        **{"prior": "standard_normal", "pixel_prior": 0.0} | options,
    )


def prior_for(name: str):
    """A learned prior; with one mode where a guide needs to end at one."""
    return DiagonalNormal(2) if name == "AutoLaplaceApproximation" else MixtureOfNormals(2, 3)


def strategy_for(model: SpatialMixture, name: str, **options) -> PyroGuide:
    guide = own(model.num_components, model.latent_features) if name == "callable" else name
    return PyroGuide(model, guide, **{"steps": 30, "learning_rate": 0.05} | options)


def linear_gaussian(B: int = 3):
    """Factor analysis, images, and the exact posterior and evidence of each."""
    model = factors(C=6, M=2)
    with torch.no_grad():
        model.decoder.linear.weight.copy_(torch.randn(6, 2))
        model.decoder.linear.bias.copy_(torch.randn(6))
    x = 1.5 * torch.randn(B, 1, 6)
    return model, x, ClassicalEM(model).infer(x)


@pytest.fixture
def short_windows(monkeypatch):
    """The rule of convergence on windows of 20 steps."""
    monkeypatch.setattr(svi, "WINDOW", 20)


@pytest.mark.slow
def test_the_modes_guides_reach_the_exact_posterior(short_windows):
    model, x, exact = linear_gaussian()
    mode = PyroGuide(model, "AutoDelta", learning_rate=0.1).infer(x)
    torch.testing.assert_close(mode.theta, exact.theta, rtol=0, atol=1e-5)
    joint = model.log_evidence(x, exact.theta) + model.log_prior(exact.theta)
    torch.testing.assert_close(mode.elbo_trace[-1], joint)
    laplace = PyroGuide(model, "AutoLaplaceApproximation", learning_rate=0.1, steps=400).infer(x)
    torch.testing.assert_close(laplace.q.mean, exact.theta, rtol=0, atol=1e-5)
    covariance = exact.q.base_dist.covariance_matrix.squeeze(1)
    torch.testing.assert_close(laplace.q.flat.covariance_matrix, covariance)
    # At the posterior log p(x, θ) − log q(θ) is log p(x) for every θ.
    torch.testing.assert_close(laplace.elbo_trace[-1], exact.elbo_trace[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoNormal", "callable"])
def test_the_normals_reach_the_best_of_their_family(name):
    model, x, exact = linear_gaussian(2)
    posterior = strategy_for(model, name, learning_rate=0.02, steps=1500).infer(x)
    torch.testing.assert_close(posterior.theta, exact.theta, rtol=0, atol=0.03)
    covariance = exact.q.base_dist.covariance_matrix.squeeze(1)
    precision = torch.linalg.inv(covariance)
    if name == "AutoMultivariateNormal":
        torch.testing.assert_close(posterior.q.flat.covariance_matrix, covariance, rtol=0, atol=0.02)
        gap = torch.zeros(2)
    else:
        # KL(q ‖ p) is least where the precisions are the diagonal of the posterior's (Bishop 2006, section 10.1.2).
        variance = 1 / precision.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(posterior.q.variance.squeeze(1), variance, rtol=0.05, atol=0)
        gap = -0.5 * (variance.log().sum(-1) - torch.logdet(covariance))
    # The gap is exact; what is reported is a mean over 100 draws.
    draws = torch.stack([elbo_at_a_draw(model, posterior, x) for _ in range(1000)])
    torch.testing.assert_close(draws.mean(0), exact.elbo_trace[-1] - gap, rtol=0, atol=0.05 if gap.any() else 0.01)
    error = draws.std(0) / 10
    assert bool(((posterior.elbo_trace[-1] - draws.mean(0)).abs() < 4.5 * error).all())


def elbo_at_a_draw(model, posterior, x):
    theta = posterior.q.sample()
    return model.log_evidence(x, theta) + model.log_prior(theta) - posterior.q.log_prob(theta)


@every_guide
def test_q_is_a_distribution_that_pyro_scores_alike(name):
    model = mixture()
    strategy, x = strategy_for(model, name), images(3, (2, 2, 1))
    posterior = strategy.infer(x)
    assert posterior.q.batch_shape == (3,)
    assert posterior.q.event_shape == (2, 2)
    assert posterior.theta.shape == (3, 2, 2)
    assert posterior.elbo_trace.shape == posterior.trace.theta.shape[:2] == (1, 3)
    draws = posterior.q.sample((4,))
    assert draws.shape == (4, 3, 2, 2)
    assert posterior.q.log_prob(draws).shape == (4, 3)
    if name != "AutoDelta":
        assert bool((draws[0] != draws[1]).all())
    torch.manual_seed(3)
    stock = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.guide_at(posterior), x)
    torch.manual_seed(3)
    log_weight = elbo_at_a_draw(model, posterior, x) if name != "AutoDelta" else posterior.elbo_trace[-1]
    assert log_weight.sum().item() == pytest.approx(stock, rel=1e-10)
    assert not any(value.requires_grad for value in (posterior.theta, draws, posterior.elbo_trace))


@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "AutoIAFNormal", "AutoLaplaceApproximation"])
def test_the_density_of_joint_guides_integrates_to_one(name):
    """On a grid over θ of one component: what `log_prob` says of values that were not drawn."""
    model = mixture(K=1, pixel_prior=None)
    q = strategy_for(model, name, steps=200).infer(images(1, (2, 2, 1))).q
    axis = torch.linspace(-8, 8, 321)
    grid = torch.cartesian_prod(axis, axis).reshape(-1, 1, 1, 2)
    with torch.no_grad():
        density = q.log_prob(grid).exp()
    area = (axis[1] - axis[0]) ** 2
    assert (density.sum() * area).item() == pytest.approx(1, abs=1e-3)
    mean = (density.unsqueeze(-1) * grid[:, 0, 0].unsqueeze(1)).sum((0, 1)) * area
    draws = q.sample((4000,)).reshape(-1, 2)
    assert bool(((draws.mean(0) - mean).abs() < 4.5 * draws.std(0) / 4000**0.5).all())


@pytest.mark.parametrize("name", GUIDES[:4])
def test_images_of_a_batch_do_not_touch_each_other(name):
    model = mixture()
    x = images(3, (2, 2, 1))
    posteriors = []
    for others in (x[1:], 1 - x[1:]):
        torch.manual_seed(5)
        posteriors.append(strategy_for(model, name, steps=150).infer(torch.cat([x[:1], others])))
    first, second = posteriors
    torch.testing.assert_close(first.theta[0], second.theta[0])
    torch.testing.assert_close(first.elbo_trace[:-1, 0], second.elbo_trace[:-1, 0])
    assert not torch.equal(first.theta[1:], second.theta[1:])
    # Two windows, each with its own mean of q.
    assert first.trace.theta.shape == (2, 3, 2, 2)
    assert not torch.isclose(first.trace.theta[0], first.trace.theta[1]).any()


@pytest.mark.slow
def test_images_that_converge_first_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(svi, "WINDOW", 5)
    model, x, _ = linear_gaussian(2)
    x[1] = 30 * x[1]
    posterior = PyroGuide(model, "AutoDelta", learning_rate=0.2, steps=800).infer(x)
    trace = posterior.elbo_trace
    ended = [int((trace[:, b] != trace[-2, b]).nonzero()[:-1].max()) for b in range(2)]
    assert ended[0] < ended[1] - 10
    torch.testing.assert_close(posterior.theta, ClassicalEM(model).infer(x).theta, rtol=0, atol=1e-4)


@every_guide
def test_it_leaves_everything_as_it_was(name):
    model = mixture(prior=prior_for(name), mixing="learned")
    pyro.param("mine", torch.ones(2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    strategy, x = strategy_for(model, name), images(2, (2, 2, 1))
    with poutine.trace() as outer:
        strategy.infer(x)
    assert list(outer.trace.nodes) == []
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.get_default_dtype() == torch.float64
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.inference_mode():
        assert bool(strategy.infer(x.clone()).elbo_trace.isfinite().all())


@every_guide
def test_the_model_is_trained_at_a_constant_q(name):
    model = mixture(prior=prior_for(name), mixing="learned")
    strategy, x = strategy_for(model, name), images(2, (2, 2, 1))
    (state,) = strategy.unroll(x)
    gradients = torch.autograd.grad(strategy.elbo(state).sum(), list(model.parameters()))
    joint = model.log_evidence(x, state.theta.detach()) + model.log_prior(state.theta.detach())
    for ours, expected in zip(gradients, torch.autograd.grad(joint.sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", GUIDES)
def test_the_best_of_several_starts_is_kept(name):
    model = mixture(K=3, M=1, shape=(2, 3, 1))
    x = images(2, (2, 3, 1))
    options = {"steps": 5, "learning_rate": 1e-3} if name == "AutoIAFNormal" else {"steps": 20, "learning_rate": 0.01}
    one, several = (strategy_for(model, name, **options).infer(x, restarts=R) for R in (1, 4))
    assert several.q.batch_shape == (2,)
    assert several.q.sample().shape == several.trace.theta[-1].shape == (2, 3, 1)
    # A mean over 100 draws is what is reported; flows after five steps are all alike.
    assert name == "AutoIAFNormal" or bool((several.elbo_trace[-1] > one.elbo_trace[-1] - 0.1).all())
    # What is reported belongs to the q that is kept.
    mean = several.q.sample((3000,)).mean(0)
    torch.testing.assert_close(mean, several.theta, rtol=0, atol=0.15)


def test_the_divergence_is_that_of_q():
    """At a draw where q is neither a Delta nor a product of normals; and a mode needs no draws."""
    model, x = mixture(), images(3, (2, 2, 1))
    strategy = strategy_for(model, "AutoMultivariateNormal")
    state = strategy.unroll(x)[-1]
    expected = state.q.log_prob(state.theta) - model.log_prior(state.theta)
    torch.testing.assert_close(strategy.divergence(state), expected)
    decoded = []
    model.decoder.register_forward_hook(lambda *_: decoded.append(1))
    strategy = strategy_for(model, "AutoDelta")
    state = strategy.unroll(x)[-1]
    decoded.clear()
    torch.testing.assert_close(strategy.merit(state, x), strategy.elbo(state))
    assert len(decoded) == 1


def test_more_starts_find_better_modes():
    x = images(20, (2, 3, 1))
    model = mixture(K=3, shape=(2, 3, 1), prior="flat")
    one, several = (strategy_for(model, "AutoDelta", steps=60).infer(x, restarts=R) for R in (1, 8))
    assert several.elbo_trace[-1].mean() > one.elbo_trace[-1].mean() + 0.1


def test_a_flat_prior_is_for_the_mode_alone(short_windows):
    model = SpatialMixture(decoders.Linear(1, (1, 3, 1), bias=False), Poisson(), 1)
    x = torch.tensor([[[3.0], [1.0], [2.0]]])
    theta = PyroGuide(model, autoguide.AutoDelta, learning_rate=0.05, steps=3000).infer(x).theta.requires_grad_()
    (score,) = torch.autograd.grad(model.log_evidence(x, theta).sum(), theta)
    assert score.abs().item() < 1e-6
    for name in GUIDES[1:]:
        with pytest.raises(StrategyError, match=rf"{name} needs a proper prior"):
            PyroGuide(model, name)


def test_guides_are_described_by_name_and_a_callable_says_that_it_cannot_be():
    model = mixture()
    strategy = PyroGuide(model, autoguide.AutoMultivariateNormal, steps=7)
    again = build(json.loads(json.dumps(describe(strategy))), model)
    assert again.guide == "AutoMultivariateNormal"
    assert again.options == strategy.options
    with pytest.raises(ModelError, match=r"cannot describe <function own"):
        describe(PyroGuide(model, own(2, 2)))


def test_it_warns_where_the_elbo_still_rises():
    model, x, _ = linear_gaussian(2)
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 images were still improving after 5 steps"):
        PyroGuide(model, "AutoDelta", steps=5).infer(x)


class Amortised(nn.Module):
    """A module as a guide: it starts afresh for every fit, and stays as it was."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        pyro.module("amortised", self)
        location = self.linear(x.squeeze(-1)).reshape(-1, 2, 2)
        with pyro.plate("images", len(x), dim=-2), pyro.plate("components", 2, dim=-1):
            pyro.sample("theta", dist.Normal(location, 0.3).to_event(1))


def test_a_module_as_a_guide_stays_as_it_was():
    model, guide, x = mixture(), Amortised(), images(3, (2, 2, 1))
    weight = guide.linear.weight.detach().clone()
    strategy = PyroGuide(model, guide, steps=50, learning_rate=0.05)
    posteriors = []
    for _ in range(2):
        torch.manual_seed(0)
        posteriors.append(strategy.infer(x))
    assert torch.equal(guide.linear.weight, weight)
    assert torch.equal(posteriors[0].theta, posteriors[1].theta)
    untrained = guide.linear(x.squeeze(-1)).reshape(3, 2, 2)
    assert not torch.allclose(posteriors[0].theta, untrained)


@pytest.mark.parametrize("kind", ["delta", "normal"])
def test_a_simple_guide_of_ones_own_is_what_it_says(kind):
    """A Delta is no density to weight by, and both can be refined."""

    def delta(x):
        location = pyro.param("location", lambda: torch.zeros(len(x), 2, 2))
        with pyro.plate("images", len(x), dim=-2), pyro.plate("components", 2, dim=-1):
            pyro.sample("theta", dist.Delta(location, event_dim=1))

    model, x = mixture(), images(3, (2, 2, 1))
    strategy = PyroGuide(model, {"delta": delta, "normal": own(2, 2)}[kind], steps=10)
    posterior = strategy.infer(x)
    if kind == "delta":
        assert isinstance(posterior.q, dist.Delta)
        with pytest.raises(StrategyError, match="give width"):
            importance_weighted_bound(model, strategy, x, posterior=posterior)
    refined = SemiAmortised(strategy, steps=3).infer(x)
    assert type(refined.q) is type(posterior.q)


def test_the_trace_of_a_guide_of_ones_own_is_kept(short_windows):
    model = mixture()
    posterior = strategy_for(model, "callable", steps=60).infer(images(3, (2, 2, 1)))
    assert posterior.trace.theta.shape == (3, 3, 2, 2)
    assert not torch.isclose(posterior.trace.theta[:-1], posterior.trace.theta[1:]).any()


def guide_of(name="theta", event_dim=1, plates=("images", "components"), shape=(3, 2, 2)):
    def guide(x):
        location = pyro.param("location", torch.zeros(shape))
        with pyro.plate(plates[0], len(x), dim=-2), pyro.plate(plates[1], 2, dim=-1):
            pyro.sample(name, dist.Normal(location, 1.0).to_event(event_dim))

    return guide


def silent(x):
    pyro.param("location", torch.zeros(3, 2, 2))


def without_parameters(x):
    with pyro.plate("images", len(x), dim=-2), pyro.plate("components", 2, dim=-1):
        pyro.sample("theta", dist.Normal(torch.zeros(3, 2, 2), 1.0).to_event(1))


def infinite(x):
    location = pyro.param("location", torch.full((3, 2, 2), 1e308))
    with pyro.plate("images", len(x), dim=-2), pyro.plate("components", 2, dim=-1):
        pyro.sample("theta", dist.Normal(location, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("guide", "message"),
    [
        (guide_of("latent"), r'samples one site, "theta".*but this one samples "latent" of shape \(3, 2, 2\)'),
        (
            guide_of(plates=("images", "parts")),
            r'but this one samples "theta".*"parts" \(size 2, dim -1\).*write it as',
        ),
        (guide_of(shape=(3, 2, 5)), r"\(B, K, M\) = \(3, 2, 2\).*but this one samples.*shape \(3, 2, 5\)"),
        (guide_of(event_dim=0, shape=(3, 2)), r"but this one samples.*shape \(3, 2\) with event dim 0"),
        (guide_of(shape=(4, 2, 2)), r"but this one fails: Shape mismatch"),
        (silent, r"but this one samples nothing: write it as"),
        (without_parameters, r"has no parameters to optimise: declare them by pyro.param"),
        (infinite, r"ELBO is not finite after 30 steps: lower learning_rate"),
    ],
)
def test_guides_of_other_sites_or_shapes_are_refused(guide, message):
    with pytest.raises(StrategyError, match=message):
        PyroGuide(mixture(), guide, steps=30).infer(images(3, (2, 2, 1)))
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize(
    ("guide", "options", "message"),
    [
        ("AutoGaussian", {}, r"one of AutoDelta.*but is 'AutoGaussian'"),
        (autoguide.AutoDiagonalNormal, {}, r"one of AutoDelta.*AutoDiagonalNormal"),
        (3, {}, r"or a callable guide\(x\).*but is 3"),
        ("AutoNormal", {"steps": 0}, "steps must be at least 1"),
        ("AutoNormal", {"particles": 1.5}, "particles must be at least 1, and whole"),
        ("AutoNormal", {"learning_rate": float("nan")}, "learning_rate must be positive"),
        ("AutoNormal", {"init_scale": 0.0}, "init_scale must be positive"),
    ],
)
def test_bad_arguments(guide, options, message):
    with pytest.raises(StrategyError, match=message):
        PyroGuide(mixture(), guide, **options)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(StrategyError, match=r"one of AutoDelta"):
        PyroGuide(mixture(), autoguide.AutoNormal(mixture()))
    with pytest.raises(StrategyError, match=r"flow needs θ of at least two numbers.*AutoNormal"):
        PyroGuide(mixture(K=1, M=1), "AutoIAFNormal")
    with pytest.raises(StrategyError, match=r"per_image"):
        PyroGuide(mixture(mixing="per_image"), "AutoNormal")
    with pytest.raises(StrategyError, match=r"decoder of images, not Constant: use ClassicalEM"):
        PyroGuide(SpatialMixture(decoders.Constant(1), Poisson(), 2), "AutoDelta")
    x = images(3, (2, 2, 1))
    with pytest.raises(StrategyError, match=r"leave gamma out"):
        PyroGuide(mixture()).unroll(x, torch.ones(3, 2, 4))
    with pytest.raises(StrategyError, match=r"steps=\.\.\.\), not iterations"):
        PyroGuide(mixture()).infer(x, iterations=5)
    with pytest.raises(StrategyError, match=r"leave restarts at 1"):
        PyroGuide(mixture(), own(2, 2)).infer(x, restarts=2)
