"""MixtureModel with priors: the modes they have in closed form, defaults that follow the data, and no collapse."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.mixture import BayesianGaussianMixture
from sklearn.utils.estimator_checks import check_estimator

from pnem.errors import ModelError
from pnem.estimators import MixtureModel
from pnem.models.config import describe

COVARIANCES = ("full", "tied", "diag", "spherical")
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES)


def data(N: int = 200, C: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, C)) @ rng.normal(size=(C, C)) + 4 * rng.integers(0, 2, (N, 1))


def single(covariance: str = "full", **options: object) -> MixtureModel:
    return MixtureModel(1, covariance_type=covariance, reg_covar=0.0, random_state=0, **options)


@every_covariance
def test_the_mode_of_one_component_is_its_closed_form(covariance: str) -> None:
    X, (N, C) = data(30), (30, 3)
    m, kappa, df, scale = np.array([1.0, -1.0, 0.5]), 2.0, 7.0, np.diag([1.0, 2.0, 3.0])
    model = single(
        covariance, mean_prior=m, mean_precision_prior=kappa, degrees_of_freedom_prior=df, covariance_prior=scale
    ).fit(X)
    np.testing.assert_allclose(model.means_[0], (X.sum(0) + kappa * m) / (N + kappa), rtol=1e-10)
    centred, pulled = X - X.mean(0), X.mean(0) - m
    scatter = scale + centred.T @ centred + kappa * N / (kappa + N) * np.outer(pulled, pulled)
    expected = {
        "full": scatter[None] / (N + df + C + 2),
        "tied": scatter / (N + df + C + 2),
        "diag": scatter.diagonal()[None] / (N + df + 3),
        "spherical": scatter.diagonal().mean()[None] / (N + df + 3),
    }[covariance]
    np.testing.assert_allclose(model.covariances_, expected, rtol=1e-9)


def test_what_is_left_out_is_chosen_from_the_data() -> None:
    X, weight = data(50), np.random.default_rng(1).integers(1, 4, 50)
    repeated = X.repeat(weight, 0)
    S = np.cov(repeated.T, bias=True)
    for covariance, scale in (("full", S), ("diag", np.diag(S.diagonal())), ("spherical", np.eye(3) * S.trace() / 3)):
        model = MixtureModel(4, covariance_type=covariance, mean_precision_prior=0.01, reg_covar=0.0, random_state=0)
        prior = model.fit(X, sample_weight=weight).model_.prior
        np.testing.assert_allclose(prior.location.numpy(), repeated.mean(0), rtol=1e-12)
        np.testing.assert_allclose(prior.matrix.numpy(), scale / 4 ** (2 / 3), rtol=1e-10, atol=1e-12)
        assert prior.mean_precision == 0.01
        assert prior.degrees_of_freedom is None


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_missing_values_leave_the_default_positive_definite() -> None:
    X = data(60)
    X[np.arange(60), np.arange(60) % 3] = np.nan
    prior = MixtureModel(2, mean_precision_prior=0.1, random_state=0).fit(X).model_.prior
    np.testing.assert_allclose(prior.location.numpy(), np.nanmean(X, 0))
    variances = prior.matrix.numpy().diagonal() * 2 ** (2 / 3)
    np.testing.assert_allclose(variances, np.nanvar(X, 0) + 1e-6)
    assert np.linalg.eigvalsh(prior.matrix.numpy()).min() > 0


@every_covariance
@pytest.mark.parametrize("likelihood", ["gaussian", "student-t"])
def test_nothing_collapses_onto_equal_points(likelihood: str, covariance: str) -> None:
    X = np.repeat([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]], 20, axis=0)
    options = {"covariance_type": covariance, "reg_covar": 0.0, "random_state": 0, "max_iter": 1000}
    model = MixtureModel(3, likelihood=likelihood, mean_precision_prior=0.01, **options).fit(X)
    for name, value in vars(model).items():
        if name.endswith("_") and isinstance(value, np.ndarray):
            assert np.isfinite(value).all(), name
    assert np.isfinite(model.score_samples(X)).all()
    assert (np.diff(model.lower_bounds_) >= -1e-9).all()
    if likelihood == "gaussian" and covariance != "tied":
        with pytest.raises(ModelError, match="positive definite"):
            MixtureModel(3, **options).fit(X)


@every_covariance
def test_the_lower_bound_has_the_prior_and_scores_have_not(covariance: str) -> None:
    X = data()
    model = MixtureModel(
        2,
        covariance_type=covariance,
        weight_concentration_prior=3.0,
        covariance_prior=2.0,
        tol=1e-12,
        max_iter=5000,
        random_state=0,
    ).fit(X)
    log_prior = stats.dirichlet([3.0, 3.0]).logpdf(model.weights_)
    if covariance == "full":
        for mean, matrix in zip(model.means_, model.covariances_, strict=True):
            log_prior += stats.invwishart(5, 2 * np.eye(3)).logpdf(matrix)
            log_prior += stats.multivariate_normal(X.mean(0), matrix / 0.01).logpdf(mean)
    else:
        log_prior += model.model_.log_prior(model.theta_[None]).item()
    # But for the floor, which is added after what the prior makes of a covariance.
    assert len(X) * model.lower_bound_ == pytest.approx(len(X) * model.score(X) + log_prior, rel=1e-8)
    joint = [
        np.log(weight) + stats.multivariate_normal(mean, matrix).logpdf(X)
        for weight, mean, matrix in zip(model.weights_, model.means_, _full(model.covariances_), strict=True)
    ]
    np.testing.assert_allclose(model.score_samples(X), np.logaddexp.reduce(joint), rtol=1e-9)


def _full(covariances: np.ndarray) -> np.ndarray:
    """As matrices (2, 3, 3)."""
    if covariances.shape == (3, 3):
        return np.stack([covariances] * 2)
    if covariances.ndim == 3:
        return covariances
    return np.stack([np.eye(3) * value for value in covariances])


@pytest.mark.parametrize("likelihood", ["gaussian", "poisson", "categorical"])
def test_a_concentration_pulls_weights_together(likelihood: str) -> None:
    X = np.concatenate([np.zeros((90, 2)), np.full((10, 2), 20.0 if likelihood != "categorical" else 1.0)])
    X[::2, 0] += likelihood != "categorical"
    weights = {
        alpha: np.sort(
            MixtureModel(
                2, likelihood=likelihood, covariance_type="spherical", weight_concentration_prior=alpha, random_state=0
            )
            .fit(X)
            .weights_
        )
        for alpha in (None, 1.0, 21.0)
    }
    np.testing.assert_array_equal(weights[None], weights[1.0])
    if likelihood != "categorical":
        np.testing.assert_allclose(weights[21.0], [30 / 140, 110 / 140], atol=1e-3)
    assert weights[21.0][0] > weights[1.0][0]


def test_names_and_meanings_are_scikit_learns() -> None:
    ours, theirs = MixtureModel().get_params(), BayesianGaussianMixture().get_params()
    assert {name for name in ours if name.endswith("_prior")} == {name for name in theirs if name.endswith("_prior")}
    # Variational EM's expectation of the precision has the same Ψ, with the divisor of a mean in place of a mode's.
    X, given = data(), {"mean_precision_prior": 0.5, "degrees_of_freedom_prior": 6.0, "mean_prior": np.ones(3)}
    mine = single(covariance_prior=2 * np.eye(3), **given).fit(X)
    other = BayesianGaussianMixture(covariance_prior=2 * np.eye(3), reg_covar=0.0, **given).fit(X)
    np.testing.assert_allclose(mine.means_, other.means_, rtol=1e-9)
    np.testing.assert_allclose(mine.covariances_ * (200 + 6 + 3 + 2), other.covariances_ * (200 + 6), rtol=1e-9)


def test_a_model_with_a_prior_can_be_cloned_and_described() -> None:
    model = MixtureModel(2, covariance_prior=np.eye(3), mean_prior=[0, 0, 0], random_state=0)
    fitted = clone(model).fit(data())
    described = json.loads(json.dumps(describe(fitted.model_)))
    assert described["prior"]["scale"] == np.eye(3).tolist()
    np.testing.assert_array_equal(fitted.means_, clone(fitted).fit(data()).means_)


BAD = {
    "a small concentration": ({"weight_concentration_prior": 0.5}, "weight_concentration_prior must be .* at least 1"),
    "words": ({"weight_concentration_prior": "much"}, "weight_concentration_prior"),
    "no precision": ({"mean_precision_prior": 0.0}, "mean_precision"),
    "precisions": ({"mean_precision_prior": [1.0, 2.0, 3.0]}, "one number"),
    "few degrees of freedom": ({"degrees_of_freedom_prior": 1.5}, "more than C - 1 = 2"),
    "channels of the mean": ({"mean_prior": [0.0, 1.0]}, "mean_prior: .* 2 channels"),
    "a negative covariance": ({"covariance_prior": -1.0}, "positive definite"),
    "a mean of words": ({"mean_prior": "here"}, "mean_prior must be a number"),
    "a likelihood without it": (
        {"likelihood": "poisson", "mean_precision_prior": 1.0},
        "mean_precision_prior: .*Poiss",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        MixtureModel(2, **options).fit(np.abs(data()).round())


def test_data_without_a_covariance_need_a_given_one() -> None:
    X = np.ones((10, 2))
    with pytest.raises(ModelError, match="give covariance_prior, or a larger reg_covar"):
        single(mean_precision_prior=0.01).fit(X)
    model = single(covariance_prior=0.5).fit(X)
    np.testing.assert_allclose(model.covariances_[0], 0.5 * np.eye(2) / (10 + 4 + 2 + 2), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@every_covariance
@pytest.mark.parametrize("likelihood", ["gaussian", "student-t"])
def test_scikit_learns_checks(likelihood: str, covariance: str) -> None:
    model = MixtureModel(
        2,
        likelihood=likelihood,
        covariance_type=covariance,
        weight_concentration_prior=1.5,
        mean_precision_prior=0.1,
        reg_covar=1e-4,
        max_iter=20,
    )
    results = check_estimator(model, on_skip=None, on_fail=None)
    assert len(results) > 40
    assert [f"{r['check_name']}: {r['exception']!r}" for r in results if r["status"] == "failed"] == []
