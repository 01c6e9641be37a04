"""NaN in x is a missing value: summed or integrated out exactly, in every likelihood."""

import itertools

import numpy as np
import pytest
import torch
from cases import FAMILIES, items, mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize

from pnem.errors import ModelError, StrategyError
from pnem.inference import RNNEM, ClassicalEM
from pnem.models import (
    Bernoulli,
    Binomial,
    Categorical,
    Likelihood,
    MultivariateNormal,
    Normal,
    Poisson,
    SpatialMixture,
    StudentT,
    decoders,
)

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]
every_family = pytest.mark.parametrize("family", FAMILIES)


def holes(x: torch.Tensor, share: float = 0.3) -> torch.Tensor:
    """x with values taken out, but at least one left in every item."""
    missing = torch.rand_like(x) < share
    kept = torch.randint(0, x.shape[-1], x.shape[:-1]).unsqueeze(-1)
    return x.masked_fill(missing.scatter(-1, kept, False), torch.nan)


def fill(x: torch.Tensor, values: tuple[float, ...]) -> torch.Tensor:
    """All ways to fill the holes of one item (C,): (ways, C)."""
    options = [values if bool(v.isnan()) else (v.item(),) for v in x]
    return torch.tensor(list(itertools.product(*options)))


@pytest.mark.parametrize(
    ("likelihood", "values"),
    [
        (Bernoulli(), (0, 1)),
        (Binomial(4), tuple(range(5))),
        (Categorical(3), (0, 1, 2)),
        (Poisson(), tuple(range(60))),
    ],
)
def test_discrete_values_are_summed_out(likelihood, values):
    psi = torch.randn(likelihood.num_parameters(3))
    for x in (torch.tensor([1.0, torch.nan, 0.0]), torch.tensor([torch.nan, 1.0, torch.nan])):
        brute = likelihood.log_prob(fill(x, values), psi).logsumexp(0)
        torch.testing.assert_close(likelihood.log_marginal(x[None], psi)[0], brute)


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "full", "tied"])
@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
def test_real_values_are_integrated_out(kind, covariance):
    likelihood = kind(covariance)
    psi = torch.randn(likelihood.num_parameters(3))
    location, lower = (value.numpy() for value in likelihood.moments(psi))
    x = holes(torch.randn(20, 3))
    for item, ours in zip(x, likelihood.log_marginal(x, psi), strict=True):
        there = ~item.isnan().numpy()
        shape = (lower @ lower.T)[np.ix_(there, there)]
        frozen = (
            stats.multivariate_t(location[there], shape, df=likelihood.degrees_of_freedom(psi).item())
            if isinstance(likelihood, StudentT)
            else stats.multivariate_normal(location[there], shape)
        )
        assert ours.item() == pytest.approx(frozen.logpdf(item.numpy()[there]), rel=1e-9)


def test_a_normal_of_known_scale_leaves_them_out():
    x, psi = torch.tensor([[1.0, torch.nan, 2.0]]), torch.randn(1, 3)
    likelihood = Normal((0.5, 1.0, 2.0))
    there = Normal((0.5, 2.0)).log_prob(x[:, [0, 2]], psi[:, [0, 2]])
    torch.testing.assert_close(likelihood.log_marginal(x, psi), there)


def best_by_brute_force(model: SpatialMixture, x: torch.Tensor, theta: torch.Tensor) -> float:
    """The observed-data log-likelihood of x, maximised over θ from a start by a quasi-Newton method."""

    given = isinstance(model.likelihood, StudentT) and model.likelihood.fixed is not None

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.tensor(flat, requires_grad=True)
        moved = free.reshape(theta.shape)
        moved = torch.cat([moved[..., :-1], theta[..., -1:]], -1) if given else moved
        value = -model.log_evidence(x, moved).sum()
        value.backward()
        return value.item(), free.grad.numpy()

    start = (theta + 0.01 * torch.randn_like(theta)).flatten().numpy()
    return -minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-7, "maxiter": 2000}).fun


BRUTE: dict[str, Likelihood] = {
    "full normal": MultivariateNormal("full", floor=0.0),
    "diagonal normal": MultivariateNormal("diagonal", floor=0.0),
    "spherical normal": MultivariateNormal("spherical", floor=0.0),
    "full t": StudentT("full", floor=0.0),
    "diagonal t": StudentT("diagonal", floor=0.0),
    "poisson": Poisson(),
    "bernoulli": Bernoulli(),
    "categorical": Categorical(3),
}


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("name", BRUTE)
def test_the_observed_data_likelihood_is_maximised(name, K):
    torch.manual_seed(3)
    likelihood = BRUTE[name]
    family = name if name in FAMILIES else "full"
    x = holes(items(family, D=80, C=3, seed=2))
    if isinstance(likelihood, StudentT):
        x = x * (1 + 3 * (torch.rand(1, 80, 1) < 0.2))
        # Degrees of freedom without bound are reached slowly, where components are that normal.
        likelihood = StudentT(likelihood.normal.covariance, degrees_of_freedom=3.0, floor=0.0) if K > 1 else likelihood
    model = mixture(likelihood, K, 3, mixing="uniform")
    posterior = ClassicalEM(model, iterations=3000, tol=1e-13).infer(x)
    best = best_by_brute_force(model, x, posterior.theta)
    assert posterior.log_evidence.item() == pytest.approx(best, abs=1e-5)


@every_family
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 2))
def test_the_evidence_never_falls_and_is_the_models(family, seed, K, B):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    x = holes(items(family, B=B, C=3, seed=seed))
    model = mixture(FAMILIES[family](), K, 3, mixing="per_image")
    strategy = ClassicalEM(model, iterations=12, tol=0, initial="random")
    posterior = strategy.infer(x)
    assert bool((posterior.elbo_trace.diff(dim=0) >= -1e-9 * posterior.elbo_trace[1:].abs()).all())
    torch.testing.assert_close(posterior.log_evidence, model.log_evidence(x, posterior.theta))
    torch.testing.assert_close(posterior.gamma, model.responsibilities(x, posterior.theta))


@every_family
def test_images_with_holes_are_fitted_as_if_alone(family):
    x = holes(items(family, B=3, C=3))
    gamma = torch.rand(3, 2, 60).softmax(1)
    # A start without parameters fills holes from all items of an image.
    together = ClassicalEM(mixture(FAMILIES[family](), 2, 3, mixing="per_image"), iterations=5, tol=0)
    evidence = together.infer(x, gamma=gamma).elbo_trace[-1]
    for b in range(3):
        alone = ClassicalEM(mixture(FAMILIES[family](), 2, 3), iterations=5, tol=0)
        expected = alone.infer(x[b : b + 1], gamma=gamma[b : b + 1]).elbo_trace[-1]
        torch.testing.assert_close(evidence[b : b + 1], expected)


@every_family
def test_weights_count_items_with_holes(family):
    x = holes(items(family, C=3, D=30))
    counts = torch.randint(0, 3, (1, 30))
    model = mixture(FAMILIES[family](), 2, 3)
    theta = ClassicalEM(model, iterations=2).infer(x).theta
    repeated = x[:, torch.arange(30).repeat_interleave(counts[0])]
    start = model.log_mixing.detach().clone()
    evidence = []
    for data, weight in ((x, counts.double()), (repeated, None)):
        model.set_log_mixing(start[None])
        evidence.append(ClassicalEM(model, iterations=6, tol=0).infer(data, theta=theta, weight=weight).elbo_trace[-1])
    torch.testing.assert_close(*evidence)


def test_a_correlated_channel_tells_of_a_missing_one():
    """Conditional moments, not the mean: what is gone where its neighbour is large was itself large."""
    x = torch.randn(1, 4000, 1).expand(-1, -1, 2) + 0.1 * torch.randn(1, 4000, 2)
    x[..., 1] = x[..., 1].masked_fill(x[..., 0] > 0, torch.nan)
    likelihood = MultivariateNormal("full")
    posterior = ClassicalEM(mixture(likelihood, 1), iterations=500, tol=1e-9).infer(x)
    mean, lower = likelihood.moments(posterior.theta[0, 0])
    torch.testing.assert_close(mean, torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(lower @ lower.T, torch.tensor([[1.01, 1.0], [1.0, 1.01]]), atol=0.06, rtol=0)


@pytest.mark.parametrize("initial", ["k-means++", "random", "points"])
def test_every_start_copes_with_holes(initial):
    centres = torch.tensor([[0.0, 0.0, 0.0], [20.0, 0.0, 20.0], [0.0, 20.0, -20.0]])
    x = holes((centres.repeat_interleave(60, 0) + torch.randn(180, 3))[None], 0.2)
    model = mixture(MultivariateNormal("full"), 3, 3)
    posterior = ClassicalEM(model, iterations=300, initial=initial).infer(x, restarts=10)
    means = model.likelihood.mean(posterior.theta[0])
    assert torch.cdist(means, centres).min(0).values.max() < 1


def test_items_without_any_value_are_refused():
    x = torch.randn(1, 5, 2)
    x[0, 3] = torch.nan
    with pytest.raises(ModelError, match="1 items have no value at all, the first at index 3"):
        ClassicalEM(mixture(MultivariateNormal())).infer(x)


def test_channels_without_any_value_are_refused():
    x = torch.randn(2, 5, 2)
    x[1, :, 1] = torch.nan
    strategy = ClassicalEM(mixture(MultivariateNormal(), mixing="per_image"))
    with pytest.raises(StrategyError, match="channel 1 of image 1 has no value at all"):
        strategy.infer(x)
    with pytest.raises(StrategyError, match="channel 1 has no value"):
        strategy.fit([x[1]])


def test_infinity_is_not_a_missing_value():
    x = torch.randn(1, 5, 2)
    x[0, 3, 0], x[0, 2, 1] = torch.inf, torch.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        ClassicalEM(mixture(MultivariateNormal())).infer(x)


def test_who_cannot_leave_values_out_says_so():
    x = torch.zeros(1, 4, 2)
    x[0, 1:, 1] = torch.nan
    owned = SpatialMixture(decoders.Linear(3, (2, 2, 2)), Bernoulli(), 2, pixel_prior=0.0)
    with pytest.raises(ModelError, match="ownership"):
        owned.log_evidence(x, torch.zeros(1, 2, 3))
    with pytest.raises(ModelError, match="NaN"):
        RNNEM(owned).infer(x)

    class Dependent(Poisson):
        independent_channels = False

    with pytest.raises(StrategyError, match="Dependent with missing values"):
        ClassicalEM(mixture(Dependent())).infer(x)
