"""Classical EM: exactly scikit-learn's where they meet, exactly the model's evidence, and never downhill."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COVARIANCES, FAMILIES, items, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO
from scipy.special import comb
from sklearn.mixture import GaussianMixture

import pnem
from pnem.errors import ModelError, RunError, StrategyError
from pnem.inference import NEM, RNNEM, ClassicalEM, ConvergenceWarning, MStep, register_m_step
from pnem.models import (
    Bernoulli,
    Binomial,
    Categorical,
    ExponentialFamily,
    MultivariateNormal,
    Poisson,
    SpatialMixture,
    decoders,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]

every_family = pytest.mark.parametrize("family", FAMILIES)


def blobs(N: int = 400, K: int = 4, C: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate(
        [rng.normal(size=(N // K, C)) @ rng.normal(size=(C, C)) + 4 * rng.normal(size=C) for _ in range(K)]
    )


def sklearn_from(gamma: np.ndarray, x: np.ndarray, covariance: str, iterations: int) -> GaussianMixture:
    """scikit-learn's fit from given responsibilities (N, K)."""
    mixture = GaussianMixture(gamma.shape[1], covariance_type=covariance, max_iter=iterations, tol=0)
    mixture._initialize_parameters = lambda x, _, **options: mixture._initialize(x, gamma, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mixture.fit(x)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_a_gaussian_mixture_climbs_as_scikit_learns(covariance):
    x, K = blobs(), 4
    gamma = np.random.default_rng(1).dirichlet(np.ones(K), len(x))
    model = mixture(MultivariateNormal(covariance), K, 3)
    posterior = ClassicalEM(model, iterations=30, tol=0).infer(
        torch.from_numpy(x)[None], gamma=torch.from_numpy(gamma.T.copy())[None]
    )
    for iterations in (1, 2, 3, 10, 30):
        theirs = sklearn_from(gamma, x, COVARIANCES[covariance], iterations).lower_bound_
        # Ours stops where rounding is all that moves it.
        ours = posterior.elbo_trace[:iterations][-1].item() / len(x)
        assert ours == pytest.approx(theirs, rel=1e-8)
    theirs = sklearn_from(gamma, x, COVARIANCES[covariance], 30)
    mean, lower = model.likelihood.moments(posterior.theta[0])
    full = {
        "spherical": lambda: np.array([v * np.eye(3) for v in theirs.covariances_]),
        "diagonal": lambda: np.array([np.diag(v) for v in theirs.covariances_]),
        "full": lambda: theirs.covariances_,
        "tied": lambda: np.array([theirs.covariances_] * K),
    }[covariance]()
    np.testing.assert_allclose(mean, theirs.means_, atol=1e-6)
    np.testing.assert_allclose(lower @ lower.mT, full, atol=1e-6)
    np.testing.assert_allclose(model.mixing.detach(), theirs.weights_, atol=1e-6)
    np.testing.assert_allclose(posterior.gamma[0].T, theirs.predict_proba(x), atol=1e-6)


@every_family
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from(["learned", "uniform", "per_image"]))
def test_the_evidence_never_falls(family, seed, K, mixing):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    x = items(family, B=2, seed=seed)
    strategy = ClassicalEM(mixture(FAMILIES[family](), K, mixing=mixing), iterations=15, tol=0, initial="random")
    evidence = strategy.infer(x, restarts=2).elbo_trace
    # Images that share their weights climb together.
    evidence = evidence.sum(-1) if mixing == "learned" else evidence
    assert bool((evidence.diff(dim=0) >= -1e-9 * evidence[1:].abs()).all())


@every_family
@pytest.mark.parametrize("mixing", ["learned", "uniform", "per_image"])
def test_what_is_fitted_is_the_declared_model(family, mixing):
    x, model = items(family, B=2), mixture(FAMILIES[family](), mixing=mixing)
    posterior = ClassicalEM(model, iterations=5).infer(x)
    torch.testing.assert_close(posterior.log_evidence, model.log_evidence(x, posterior.theta))
    torch.testing.assert_close(posterior.gamma, model.responsibilities(x, posterior.theta))

    def guide(*_: object) -> None:
        with pyro.plate("images", 2, dim=-2), pyro.plate("components", 3, dim=-1):
            pyro.sample("theta", dist.Delta(posterior.theta, event_dim=1))

    theirs = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, guide, x)
    assert posterior.log_evidence.sum().item() == pytest.approx(theirs, rel=1e-10)
    drawn = model(num_images=2, num_pixels=7)
    assert drawn.shape == (2, 7, 2)
    model.check(drawn)


@every_family
def test_a_step_is_one_iteration(family):
    x, model = items(family), mixture(FAMILIES[family](), mixing="uniform")
    strategy = ClassicalEM(model, iterations=3, tol=0)
    gamma = torch.rand(1, 3, 60).softmax(1)
    states = [strategy.init(x, gamma), *strategy.unroll(x, gamma)]
    climbed = torch.stack([state.log_evidence for state in states])
    torch.testing.assert_close(strategy.infer(x, gamma=gamma).elbo_trace, climbed[:3])


def test_the_three_coins_are_solved_as_brute_force_does():
    """A first coin chooses which of two is tossed three times: HHH, HTH, HHT, HTT."""
    heads = np.array([3, 2, 2, 1])
    model = mixture(Binomial(3), K=2, C=1)
    strategy = ClassicalEM(model, iterations=5000, tol=1e-13, initial="random")
    posterior = strategy.infer(torch.from_numpy(heads.astype(float))[None, :, None], restarts=5)
    grid = np.linspace(0.005, 0.995, 199)
    chance = comb(3, heads) * grid[:, None] ** heads * (1 - grid[:, None]) ** (3 - heads)
    best = max(np.log(w * chance[:, None] + (1 - w) * chance[None]).sum(-1).max() for w in np.linspace(0.01, 0.99, 99))
    # The sequences in their order are one of the comb(3, heads) that have as many heads.
    assert posterior.log_evidence.item() >= best - 1e-9
    assert posterior.log_evidence.item() == pytest.approx(best, abs=1e-3)


@every_family
def test_weights_count_items(family):
    x = items(family, D=20)
    counts = torch.randint(0, 4, (1, 20))
    repeated = x.repeat_interleave(counts[0], 1)
    theta = ClassicalEM(mixture(FAMILIES[family]()), iterations=2).infer(x).theta
    weighted, plain = (
        ClassicalEM(mixture(FAMILIES[family]()), iterations=8, tol=0).infer(data, theta=theta, weight=weight)
        for data, weight in ((x, counts.double()), (repeated, None))
    )
    # Means, because a logit near certainty is anything large.
    mean = FAMILIES[family]().mean
    torch.testing.assert_close(mean(weighted.theta), mean(plain.theta))
    torch.testing.assert_close(weighted.elbo_trace[-1], plain.elbo_trace[-1])


@every_family
def test_images_with_their_own_weights_are_fitted_as_if_alone(family):
    x = items(family, B=3, D=30)
    gamma = torch.rand(3, 2, 30).softmax(1)
    likelihood = FAMILIES[family]()
    model = mixture(likelihood, 2, mixing="per_image")
    together = ClassicalEM(model, iterations=6, tol=0).infer(x, gamma=gamma)
    assert model.mixing.shape == (3, 2)
    for b in range(3):
        alone_model = mixture(likelihood, 2)
        alone = ClassicalEM(alone_model, iterations=6, tol=0).infer(x[b : b + 1], gamma=gamma[b : b + 1])
        torch.testing.assert_close(together.theta[b], alone.theta[0])
        torch.testing.assert_close(model.mixing[b], alone_model.mixing.detach())


def test_restarts_keep_the_best_start():
    x = torch.from_numpy(blobs())[None]
    evidence = []
    for seed in range(5):
        torch.manual_seed(seed)
        strategy = ClassicalEM(mixture(MultivariateNormal("tied"), 6, 3), tol=1e-8, initial="points")
        evidence.append(strategy.infer(x).log_evidence.item())
    torch.manual_seed(0)
    best = strategy.infer(x, restarts=40)
    assert best.elbo_trace.shape[1] == 1
    assert best.log_evidence.item() >= max(evidence) - 1e-3
    assert min(evidence) < max(evidence) - 1


@pytest.mark.parametrize("initial", ["k-means++", "random", "points"])
def test_every_start_finds_well_separated_blobs(initial):
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    x = (centres.repeat_interleave(50, 0) + torch.randn(150, 2))[None]
    model = mixture(MultivariateNormal("spherical"))
    posterior = ClassicalEM(model, iterations=200, initial=initial).infer(x, restarts=10)
    means = model.likelihood.mean(posterior.theta[0])
    assert torch.cdist(means, centres).min(0).values.max() < 0.5


@pytest.mark.parametrize("initial", ["k-means++", "points"])
def test_items_that_do_not_count_are_no_seeds(initial):
    x = torch.cat([torch.randn(1, 50, 2), torch.randn(1, 50, 2) + 8, torch.full((1, 10, 2), 1e3)], 1)
    weight = (torch.arange(110) < 100).double()[None]
    model = mixture(MultivariateNormal("spherical"), 2)
    posterior = ClassicalEM(model, initial=initial).infer(x, weight=weight, restarts=5)
    without = ClassicalEM(mixture(MultivariateNormal("spherical"), 2)).infer(x[:, :100], restarts=5)
    assert posterior.elbo_trace[-1].item() == pytest.approx(without.elbo_trace[-1].item(), abs=0.2)


def test_collapse_without_a_floor_is_an_error_that_says_so():
    with pytest.raises(ModelError, match="larger floor"):
        ClassicalEM(mixture(MultivariateNormal("full", floor=0.0))).infer(torch.ones(1, 30, 2))


@pytest.mark.filterwarnings("default::pnem.inference.ConvergenceWarning")
def test_stopping_early_is_a_warning():
    x = torch.from_numpy(blobs())[None]
    with pytest.warns(ConvergenceWarning, match="after 2 iterations .* nats per item"):
        ClassicalEM(mixture(MultivariateNormal(), 4, 3), iterations=2, tol=1e-6).infer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ClassicalEM(mixture(MultivariateNormal(), 4, 3), iterations=500, tol=1e-3).infer(x)


def test_a_new_rule_joins_by_registering():
    class Shifted(Poisson):
        pass

    class Ours(decoders.Constant):
        pass

    model = SpatialMixture(Ours(2), Shifted(), 3)
    inherited = ClassicalEM(model).rule

    @register_m_step(Ours, Shifted)
    class Rule(inherited):
        pass

    assert ClassicalEM(model).rule is Rule
    assert issubclass(inherited, MStep)
    assert ClassicalEM(mixture(Poisson())).rule is inherited


def test_parts_without_a_rule_name_strategies_that_work():
    neural = SpatialMixture(decoders.MLP(3, (2, 2, 1)), Bernoulli(), 2)
    with pytest.raises(
        StrategyError, match=r"MLP, Bernoulli .* flat: use GradientEM, or NEM or RNNEM.*register_m_step"
    ):
        ClassicalEM(neural)
    owned = SpatialMixture(decoders.Constant(2), Bernoulli(), 2, pixel_prior=0.0)
    with pytest.raises(StrategyError, match="ownership"):
        ClassicalEM(owned)


def test_a_start_that_collapses_loses_to_those_that_do_not():
    x = torch.cat([torch.randn(1, 200, 2), torch.ones(1, 5, 2)], 1)
    likelihood = MultivariateNormal("full", floor=0.0)
    posterior = ClassicalEM(mixture(likelihood)).infer(x, restarts=20)
    assert bool(posterior.theta.isfinite().all())


@pytest.mark.filterwarnings("default::pnem.inference.ConvergenceWarning")
def test_a_floor_that_spoils_the_fit_is_noticed():
    x = 1e-4 * torch.cat([torch.randn(1, 100, 1), torch.randn(1, 100, 1) + 5], 1)
    with pytest.warns(ConvergenceWarning, match="floor"):
        ClassicalEM(mixture(MultivariateNormal("full"), 2, 1), tol=0, initial="random").infer(x, restarts=3)


def test_an_error_leaves_fitted_weights_alone():
    model = mixture(Poisson(), mixing="per_image").float()
    strategy = ClassicalEM(model)
    strategy.infer(items("poisson", B=3).float())
    before = model.mixing.clone()
    assert before.dtype == torch.float32
    with pytest.raises(ModelError):
        strategy.infer(torch.full((4, 5, 2), torch.inf))
    assert torch.equal(model.mixing, before)


def test_a_collapse_in_the_last_m_step_is_an_error_too():
    model = mixture(MultivariateNormal("full", floor=0.0), 1)
    theta = model.likelihood.psi(torch.zeros(1, 1, 2), torch.eye(2).expand(1, 1, 2, 2))
    with pytest.raises(ModelError, match="image 0"):
        ClassicalEM(model).infer(torch.ones(1, 9, 2), theta=theta, iterations=1)


def test_other_images_get_their_own_weights():
    model = mixture(Poisson(), mixing="per_image")
    strategy = ClassicalEM(model)
    three = strategy.infer(items("poisson", B=3))
    torch.testing.assert_close(three.log_mixing, model.log_mixing)
    with pytest.raises(ModelError, match="fitted to 3"):
        model.log_evidence(items("poisson", B=2), three.theta[:2])
    assert strategy.infer(items("poisson", B=2)).log_mixing.shape == (2, 3)


@every_family
def test_it_is_an_ordinary_pyro_guide(family):
    x, model = items(family, B=2), mixture(FAMILIES[family]())
    strategy = ClassicalEM(model)
    torch.manual_seed(1)
    posterior = strategy.infer(x)
    torch.manual_seed(1)
    loss = TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy, x)
    assert posterior.log_evidence.sum().item() == pytest.approx(-loss, rel=1e-10)


@pytest.mark.parametrize("strategy", [NEM, RNNEM])
def test_learned_strategies_refuse_a_constant_decoder(strategy):
    with pytest.raises(StrategyError, match="use ClassicalEM"):
        strategy(mixture(Poisson()))


def test_fit_says_that_there_is_nothing_to_train():
    model = mixture(Bernoulli(), C=1)
    with pytest.raises(RunError, match=r"strategy\.infer"):
        pnem.fit(model, ClassicalEM(model), {})


BAD = {
    "a rank": (torch.zeros(5, 2), {}, r"needs \(B, D, C=2\)"),
    "channels": (torch.zeros(1, 5, 3), {}, r"C=2"),
    "nothing": (torch.zeros(1, 0, 2), {}, "at least one item"),
    "infinity": (torch.full((1, 5, 2), torch.inf), {}, "NaN or infinite"),
    "weights below zero": (torch.zeros(1, 5, 2), {"weight": -torch.ones(1, 5)}, "weights must be"),
    "weights of zero": (torch.zeros(1, 5, 2), {"weight": torch.zeros(1, 5)}, "weights must be"),
    "weights' shape": (torch.zeros(1, 5, 2), {"weight": torch.ones(5)}, r"weight has shape \(5,\)"),
    "theta's shape": (torch.zeros(1, 5, 2), {"theta": torch.zeros(1, 3, 4)}, r"theta has shape .* need \(1, 3, 5\)"),
    "gamma's shape": (torch.zeros(1, 5, 2), {"gamma": torch.ones(1, 5, 3)}, "gamma has shape"),
    "NaN in theta": (torch.zeros(1, 5, 2), {"theta": torch.full((1, 3, 5), torch.nan)}, "theta holds values"),
    "gamma below zero": (torch.zeros(1, 5, 2), {"gamma": -torch.ones(1, 3, 5)}, "gamma must be at least 0"),
    "no images": (torch.zeros(0, 5, 2), {}, "at least one item"),
    "no restarts": (torch.zeros(1, 5, 2), {"restarts": 0}, "restarts"),
    "iterations in parts": (torch.zeros(1, 5, 2), {"iterations": 2.5}, "whole"),
    "weights that are no tensor": (torch.zeros(1, 5, 2), {"weight": np.ones((1, 5))}, "torch.as_tensor"),
    "an array": (np.zeros((1, 5, 2)), {}, "must be a tensor"),
    "no iterations": (torch.zeros(1, 5, 2), {"iterations": 0}, "iterations"),
    "the same start twice": (torch.zeros(1, 5, 2), {"restarts": 2, "gamma": torch.ones(1, 3, 5)}, "all be the same"),
    "a trace": (torch.zeros(1, 5, 2), {"keep_trace": True}, "trace"),
}


@pytest.mark.parametrize(("x", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_requests_are_refused(x, arguments, message):
    with pytest.raises((ModelError, StrategyError), match=message):
        ClassicalEM(mixture(MultivariateNormal())).infer(x, **arguments)


@pytest.mark.parametrize(
    ("likelihood", "value", "message"),
    [
        (Poisson(), -1.0, "whole numbers from 0"),
        (Poisson(), 1.5, "whole"),
        (Binomial(3), 4.0, "from 0 up to 3"),
        (Categorical(3), 3.0, "from 0 up to 2"),
        (Bernoulli(), 2.0, r"\[0, 1\]"),
    ],
)
def test_items_outside_the_support_are_refused(likelihood, value, message):
    with pytest.raises(ModelError, match=message):
        ClassicalEM(mixture(likelihood)).infer(torch.full((1, 4, 2), value))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MultivariateNormal("round"), ModelError, "spherical"),
        (lambda: MultivariateNormal(floor=-1), ModelError, "floor"),
        (lambda: Binomial(0), ModelError, "trials"),
        (lambda: Categorical(1), ModelError, "categories"),
        (lambda: MultivariateNormal("full").num_channels(4), ModelError, "cannot have 4 parameters"),
        (lambda: Categorical(3).num_channels(4), ModelError, "multiple of 3"),
        (lambda: ClassicalEM(mixture(Poisson()), tol=-1), StrategyError, "tol"),
        (lambda: ClassicalEM(mixture(Poisson()), initial="best"), StrategyError, "k-means"),
    ],
)
def test_parts_that_cannot_work_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_psi_holds_a_mean_and_a_covariance():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    for name in COVARIANCES:
        likelihood = MultivariateNormal(name)
        mean, lower = likelihood.moments(likelihood.psi(torch.tensor([1.0, -2.0]), covariance))
        torch.testing.assert_close(mean, torch.tensor([1.0, -2.0]))
        kept = {"spherical": 1.5 * torch.eye(2), "diagonal": torch.diag(covariance.diag())}.get(name, covariance)
        torch.testing.assert_close(lower @ lower.mT, kept)


@every_family
def test_natural_form_and_log_prob_agree(family):
    likelihood = FAMILIES[family]()
    if not isinstance(likelihood, ExponentialFamily):
        pytest.skip("not an exponential family")
    x, psi = items(family, D=10), torch.randn(likelihood.num_parameters(2))
    eta, log_partition = likelihood.natural(psi)
    natural = (likelihood.statistics(x) * eta).sum(-1) - log_partition.sum(-1) + likelihood.log_base_measure(x)
    torch.testing.assert_close(natural, likelihood.log_prob(x, psi))
    torch.testing.assert_close(natural, likelihood.distribution(psi.expand(1, 10, -1)).log_prob(x))
    # At the ψ that matches the mean of T, the log-likelihood has no slope: its gradient is E[T] − mean.
    if likelihood.num_parameters(2) == 2:
        mean = likelihood.statistics(x).mean(-2)
        matched = likelihood.match(mean, torch.ones(1)).requires_grad_()
        likelihood.log_prob(x, matched).sum().backward()
        torch.testing.assert_close(matched.grad, torch.zeros_like(matched), atol=1e-8, rtol=0)


def test_a_mixture_in_few_lines():
    """An hour of faithful-like waiting times: two normals of one channel."""
    x = torch.cat([55 + 6 * torch.randn(100), 80 + 6 * torch.randn(170)])[None, :, None]
    model = mixture(MultivariateNormal("full"), 2, 1)
    posterior = ClassicalEM(model, tol=1e-6, iterations=1000).infer(x, restarts=3)
    mean, lower = model.likelihood.moments(posterior.theta[0])
    order = mean[:, 0].argsort()
    assert mean[order, 0].tolist() == pytest.approx([55, 80], abs=2)
    assert lower[order, 0, 0].tolist() == pytest.approx([6, 6], abs=1.5)
    assert model.mixing.detach()[order].tolist() == pytest.approx([100 / 270, 170 / 270], abs=0.08)
    assert math.isfinite(posterior.log_evidence.item())
