"""Student's t mixtures: what scipy finds, and what outliers cannot do."""

import numpy as np
import pytest
import torch
from cases import mixture
from scipy import stats

from pnem.errors import ModelError
from pnem.inference import ClassicalEM
from pnem.models import MultivariateNormal, StudentT

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]


def draws(df: float, size: int = 1500, seed: int = 0) -> torch.Tensor:
    values = stats.t.rvs(df, loc=2, scale=1.5, size=size, random_state=np.random.default_rng(seed))
    return torch.from_numpy(values)[None, :, None]


@pytest.mark.parametrize("df", [1.0, 3.0, 8.0])
def test_one_dimension_is_as_scipy_fits_it(df):
    x = draws(df)
    likelihood = StudentT(floor=0.0)
    theta = ClassicalEM(mixture(likelihood, 1, 1), iterations=5000, tol=1e-12).fit(x).theta[0, 0]
    location, lower = likelihood.moments(theta)
    ours = [likelihood.degrees_of_freedom(theta).item(), location.item(), lower.item()]
    theirs = stats.t.fit(x.numpy().ravel())
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("covariance", ["spherical", "diagonal", "full", "tied"])
def test_the_density_is_scipys(covariance):
    likelihood = StudentT(covariance)
    x, psi = torch.randn(7, 3), torch.randn(likelihood.num_parameters(3))
    location, lower = (value.numpy() for value in likelihood.moments(psi))
    theirs = stats.multivariate_t(location, lower @ lower.T, df=psi[-1].exp().item()).logpdf(x.numpy())
    np.testing.assert_allclose(likelihood.log_prob(x, psi), theirs, rtol=1e-10)
    np.testing.assert_allclose(likelihood.distribution(psi.expand(7, -1)).log_prob(x), theirs, rtol=1e-10)


def test_degrees_of_freedom_are_per_component_shared_or_given():
    x = torch.cat([draws(2.0), draws(30.0, seed=1) + 40], 1)
    found = {}
    for name, likelihood in {
        "own": StudentT(),
        "shared": StudentT(shared=True),
        "given": StudentT(degrees_of_freedom=5.0),
    }.items():
        fit = ClassicalEM(mixture(likelihood, 2, 1), iterations=2000, tol=1e-9).fit(x, restarts=3)
        found[name] = likelihood.degrees_of_freedom(fit.theta[0]).sort().values, fit.elbo_trace[-1].item()
    own, shared, given = (found[name][0] for name in ("own", "shared", "given"))
    assert own[0] == pytest.approx(2.0, abs=0.4)
    assert own[1] > 10
    assert shared[0] == pytest.approx(shared[1].item())
    assert own[0] < shared[0] < own[1]
    assert given.tolist() == pytest.approx([5.0, 5.0])
    assert found["own"][1] > found["shared"][1]


def test_outliers_do_not_move_the_location():
    clean = torch.randn(1, 300, 2)
    x = torch.cat([clean, 100 + torch.randn(1, 15, 2)], 1)
    t, normal = StudentT(), MultivariateNormal()
    robust = t.mean(ClassicalEM(mixture(t, 1), iterations=500).fit(x).theta)
    moved = normal.mean(ClassicalEM(mixture(normal, 1), iterations=500).fit(x).theta)
    assert robust.abs().max() < 0.3
    assert moved.abs().min() > 3


def test_normal_data_have_many_degrees_of_freedom():
    x = torch.randn(1, 5000, 1)
    likelihood = StudentT()
    fit = ClassicalEM(mixture(likelihood, 1, 1), iterations=500, tol=1e-8).fit(x)
    assert likelihood.degrees_of_freedom(fit.theta).item() > 30
    normal = ClassicalEM(mixture(MultivariateNormal(), 1, 1)).fit(x)
    assert fit.elbo_trace[-1].item() == pytest.approx(normal.elbo_trace[-1].item(), abs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degrees_of_freedom": 0.0}, "degrees_of_freedom"),
        ({"degrees_of_freedom": 3.0, "shared": True}, "degrees_of_freedom"),
        ({"covariance": "round"}, "spherical"),
        ({"floor": -1.0}, "floor"),
    ],
)
def test_parts_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        StudentT(**arguments)
