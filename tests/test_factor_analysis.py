"""Factor analysis and probabilistic PCA: scikit-learn's, by EM, with the exact posterior of the factors."""

import math

import numpy as np
import pyro
import pytest
import torch
from cases import factors
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import Trace_ELBO
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn import decomposition

from pnem.errors import ModelError, StrategyError
from pnem.inference import ClassicalEM
from pnem.models import Normal, SpatialMixture, decoders

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]


def table(N: int = 400, C: int = 6, M: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(M, C)) + np.eye(M, C)
    return rng.normal(size=(N, M)) @ loadings + rng.uniform(0.6, 1.2, C) * rng.normal(size=(N, C)) + 5


def images(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows)[:, None]


def holes(x: torch.Tensor, share: float = 0.25) -> torch.Tensor:
    missing = torch.rand_like(x) < share
    missing[..., 0] &= ~missing.all(-1)
    return x.masked_fill(missing, torch.nan)


def covariance(model: SpatialMixture) -> np.ndarray:
    W = model.decoder.linear.weight.detach()
    return (W @ W.T + torch.diag(model.likelihood.sigma.detach().square().expand(len(W)))).numpy()


def test_factor_analysis_is_scikit_learns():
    rows = table()
    model = factors()
    fit = ClassicalEM(model, iterations=5000, tol=1e-11).fit(images(rows))
    theirs = decomposition.FactorAnalysis(2, tol=1e-8, max_iter=10_000, svd_method="lapack").fit(rows)
    assert fit.converged
    assert fit.elbo_trace[-1].item() / len(rows) == pytest.approx(theirs.score(rows), abs=1e-4)
    np.testing.assert_allclose(covariance(model), theirs.get_covariance(), atol=1e-3)
    np.testing.assert_allclose(model.decoder.linear.bias.detach(), theirs.mean_, atol=1e-10)


def test_probabilistic_pca_is_scikit_learns():
    rows = table(5000)
    fit = ClassicalEM(factors(isotropic=True), iterations=5000, tol=1e-12).fit(images(rows))
    # Theirs divides by N - 1, which at this N changes the likelihood by less than the tolerance.
    score = decomposition.PCA(2).fit(rows).score(rows)
    assert fit.elbo_trace[-1].item() / len(rows) == pytest.approx(score, abs=1e-6)


def test_the_posterior_is_exact():
    rows = table()
    model = factors()
    strategy = ClassicalEM(model, iterations=50)
    strategy.fit(images(rows))
    new = table(20, seed=1)
    posterior = strategy.infer(images(new))
    mean, sigma = model.decoder.linear.bias.detach().numpy(), covariance(model)
    np.testing.assert_allclose(posterior.elbo_trace[0], multivariate_normal(mean, sigma).logpdf(new))
    W = model.decoder.linear.weight.detach().numpy()
    np.testing.assert_allclose(posterior.theta[:, 0], (new - mean) @ np.linalg.solve(sigma, W))
    # With q the posterior, log p(x, θ) − log q(θ) is log p(x) whatever θ is drawn.
    for seed in range(3):
        pyro.set_rng_seed(seed)
        loss = Trace_ELBO(max_plate_nesting=2).loss(pyro.poutine.block(model, hide=["z"]), strategy, images(new))
        assert -loss == pytest.approx(posterior.elbo_trace.sum().item(), rel=1e-9)


@pytest.mark.parametrize("isotropic", [False, True])
def test_with_missing_values_the_observed_data_likelihood_is_maximised(isotropic):
    torch.manual_seed(0)
    rows = holes(torch.from_numpy(table(120, 5, 1)))
    model = factors(5, 1, isotropic=isotropic)
    strategy = ClassicalEM(model, iterations=20_000, tol=1e-13)
    fit = strategy.fit(rows[:, None], restarts=5)
    there = ~rows.isnan()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.tensor(flat, requires_grad=True)
        W, b, log_sigma = free[:5, None], free[5:10], free[10:]
        whole = W @ W.T + torch.diag((2 * log_sigma).exp().expand(5))
        total = torch.zeros(())
        for row, has in zip(rows, there, strict=True):
            normal = torch.distributions.MultivariateNormal(b[has], whole[has][:, has])
            total = total - normal.log_prob(row[has])
        total.backward()
        return total.item(), free.grad.numpy()

    linear = model.decoder.linear
    start = torch.cat([linear.weight.flatten(), linear.bias, model.likelihood.log_sigma.reshape(-1)]).detach()
    moved = (start + 0.05 * torch.randn_like(start)).numpy()
    best = -minimize(loss, moved, jac=True, method="BFGS", options={"gtol": 1e-6}).fun
    assert fit.elbo_trace[-1].item() == pytest.approx(best, abs=1e-5)
    assert strategy.infer(rows[:, None]).elbo_trace.sum().item() == pytest.approx(best, abs=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 2))
def test_the_bound_never_falls(seed, M, isotropic, bias, missing, D):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    x = torch.from_numpy(table(40, 4 * D, 2, seed % 1000)).reshape(40, D, 4)
    x = holes(x) if missing else x
    model = factors(4, M, isotropic=isotropic, bias=bias, D=D)
    strategy = ClassicalEM(model, iterations=30, tol=0)
    trace = strategy.fit(x, restarts=2).elbo_trace
    assert bool((trace.diff(dim=0) >= -1e-9 * trace[1:].abs()).all())
    assert strategy.infer(x).elbo_trace.sum() >= trace[-1] - 1e-9 * trace[-1].abs()


def test_a_known_scale_stays():
    model = factors(learn_sigma=False)
    ClassicalEM(model, iterations=20).fit(images(table()))
    assert bool((model.likelihood.sigma == 1).all())


def test_weights_count_rows():
    rows = torch.from_numpy(table(40))
    counts = torch.randint(0, 3, (40,))
    weighted, repeated = factors(), factors()
    weight = counts.double()[:, None]
    a = ClassicalEM(weighted, iterations=5000, tol=1e-12).fit(rows[:, None], weight=weight)
    b = ClassicalEM(repeated, iterations=5000, tol=1e-12).fit(rows.repeat_interleave(counts, 0)[:, None])
    assert a.elbo_trace[-1].item() == pytest.approx(b.elbo_trace[-1].item(), abs=1e-5)
    np.testing.assert_allclose(covariance(weighted), covariance(repeated), atol=1e-3)


def test_constant_columns_and_single_precision_give_finite_numbers():
    rows = torch.from_numpy(table())
    rows[:, 2] = 7
    model = factors().float()
    posterior_of = ClassicalEM(model, iterations=200)
    fit = posterior_of.fit(rows[:, None].float())
    assert math.isfinite(fit.elbo_trace[-1].item())
    posterior = posterior_of.infer(rows[:, None].float())
    assert posterior.theta.dtype == torch.float32
    assert bool(posterior.elbo_trace.isfinite().all())


BAD = {
    "two components": (
        lambda: SpatialMixture(decoders.Linear(2, (1, 1, 3)), Normal(learn_sigma=True), 2, prior="standard_normal"),
        {},
        "one component",
    ),
    "a squashed input": (
        lambda: SpatialMixture(
            decoders.Linear(2, (1, 1, 3), input_activation="sigmoid"), Normal(), 1, prior="standard_normal"
        ),
        {},
        "identity",
    ),
    "a flat prior": (lambda: SpatialMixture(decoders.Linear(2, (1, 1, 3)), Normal(), 1), {}, "GradientEM"),
    "responsibilities": (lambda: factors(3), {"gamma": torch.ones(5, 1, 1)}, "leave gamma and theta out"),
    "weights of images of many pixels": (lambda: factors(3, D=2), {"weight": torch.ones(5, 2)}, "images of one pixel"),
    "given factors": (lambda: factors(3), {"theta": torch.ones(5, 1, 2)}, "leave gamma and theta out"),
    "weights below zero": (lambda: factors(3), {"weight": -torch.ones(5, 1)}, "at least 0"),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_fitted_so_is_refused(make, arguments, message):
    D = arguments["weight"].shape[1] if "weight" in arguments else 1
    with pytest.raises(StrategyError, match=message):
        ClassicalEM(make()).fit(torch.randn(5, D, 3), **arguments)


def test_infer_fits_nothing_and_says_so():
    with pytest.raises(StrategyError, match="leave all but x out"):
        ClassicalEM(factors(3)).infer(torch.randn(5, 1, 3), restarts=3)


def test_little_noise_costs_no_digits():
    torch.manual_seed(1)
    trace = ClassicalEM(factors(4, 3), iterations=200, tol=0).fit(torch.randn(3, 1, 4)).elbo_trace
    assert bool((trace.diff(dim=0) > -1e-8).all())


def test_rows_of_other_width_are_refused():
    with pytest.raises(ModelError, match=r"D=1, C=6"):
        ClassicalEM(factors()).fit(torch.randn(5, 1, 3))
    with pytest.raises(StrategyError, match="found by `fit`"):
        ClassicalEM(factors()).unroll(torch.randn(5, 1, 6))
