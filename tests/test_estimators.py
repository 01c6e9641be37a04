"""The scikit-learn estimators: they keep scikit-learn's conventions, and its numbers where the two meet."""

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from pnem.errors import DataError, ModelError, PnemError
from pnem.estimators import FactorAnalysis, MixtureModel
from pnem.models import SpatialMixture

COVARIANCES = ("full", "tied", "diag", "spherical")
FAMILIES: dict[str, dict] = {
    "gaussian": {},
    "student-t": {},
    "poisson": {},
    "bernoulli": {},
    "binomial": {"n_trials": 9},
    "categorical": {"n_categories": 4},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES)


def data(family: str = "gaussian", N: int = 150, C: int = 2, seed: int = 0) -> np.ndarray:
    """Samples of three groups."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 3, (N, 1))
    draw = {
        "poisson": lambda: rng.poisson(1 + 6 * group, (N, C)),
        "bernoulli": lambda: rng.random((N, C)) < 0.1 + 0.4 * group,
        "binomial": lambda: rng.binomial(9, 0.1 + 0.4 * group, (N, C)),
        "student-t": lambda: rng.standard_t(3, (N, 1)) * rng.normal(size=(N, C)) + 12 * group,
        "categorical": lambda: (group + (rng.random((N, C)) < 0.2)) % 4,
    }.get(family, lambda: rng.normal(size=(N, C)) @ rng.normal(size=(C, C)) + 5 * group)
    return np.asarray(draw(), dtype=float)


def mixture(family: str = "gaussian", K: int = 3, **options: object) -> MixtureModel:
    return MixtureModel(K, likelihood=family, **FAMILIES[family], **{"random_state": 0, **options})


class OnItsSupport(MixtureModel):
    """Takes the real numbers that scikit-learn's checks draw to the support of the likelihood."""

    def _validate(self, X: object, *, reset: bool) -> np.ndarray:
        X = super()._validate(X, reset=reset)
        return 1 / (1 + np.exp(-X)) if self.likelihood == "bernoulli" else np.clip(X, 0, 3).round()


def failures(estimator: MixtureModel | FactorAnalysis, expected: dict[str, str] | None = None) -> list[str]:
    results = check_estimator(estimator, expected_failed_checks=expected, on_skip=None, on_fail=None)
    assert len(results) > 40
    return [f"{result['check_name']}: {result['exception']!r}" for result in results if result["status"] == "failed"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
class TestScikitLearnsChecks:
    @every_covariance
    @pytest.mark.parametrize(("family", "K"), [("gaussian", 1), ("gaussian", 2), ("student-t", 2)])
    def test_of_real_numbers(self, family: str, K: int, covariance: str) -> None:
        # One check has fewer samples than features: without this floor it tells the order in which sums are rounded.
        options = {"reg_covar": 1e-4, "max_iter": 20}
        assert failures(MixtureModel(K, likelihood=family, covariance_type=covariance, **options)) == []

    @pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gaussian", "student-t"}))
    def test_of_the_other_families(self, family: str) -> None:
        assert failures(OnItsSupport(2, likelihood=family, **FAMILIES[family])) == []

    @pytest.mark.parametrize("options", [{}, {"noise": "isotropic"}, {"n_components": 2}])
    def test_of_factor_analysis(self, options: dict) -> None:
        assert failures(FactorAnalysis(**options, max_iter=50)) == []

    def test_from_random_points(self) -> None:
        assert failures(MixtureModel(2, init_params="random_from_data")) == []

    def test_from_random_responsibilities(self) -> None:
        reason = "every sample draws its own responsibilities, a repeated one several times"
        expected = {"check_sample_weight_equivalence_on_dense_data": reason}
        assert failures(MixtureModel(2, init_params="random"), expected) == []


class TestGaussianMixture:
    @staticmethod
    def theirs(ours: MixtureModel) -> GaussianMixture:
        """scikit-learn's mixture at our parameters."""
        theirs = GaussianMixture(ours.n_components, covariance_type=ours.covariance_type)
        theirs.weights_, theirs.means_, theirs.covariances_ = ours.weights_, ours.means_, ours.covariances_
        # What they score with: precision = U Uᵀ, the square root of it where it is diagonal.
        theirs.precisions_cholesky_ = (
            np.linalg.inv(np.linalg.cholesky(ours.covariances_)).swapaxes(-1, -2)
            if ours.covariance_type in ("full", "tied")
            else ours.covariances_**-0.5
        )
        return theirs

    @every_covariance
    def test_scores_as_scikit_learns_at_the_same_parameters(self, covariance: str) -> None:
        X, new = data(C=3), data(C=3, seed=1)
        ours = mixture(covariance_type=covariance).fit(X)
        theirs = self.theirs(ours)
        np.testing.assert_allclose(ours.score_samples(new), theirs.score_samples(new), rtol=1e-8)
        np.testing.assert_allclose(ours.predict_proba(new), theirs.predict_proba(new), atol=1e-8)
        np.testing.assert_array_equal(ours.predict(new), theirs.predict(new))
        assert ours.score(new) == pytest.approx(theirs.score(new), rel=1e-8)
        assert ours.bic(new) == pytest.approx(theirs.bic(new), rel=1e-8)
        assert ours.aic(new) == pytest.approx(theirs.aic(new), rel=1e-8)

    @every_covariance
    def test_converges_to_the_same_optimum(self, covariance: str) -> None:
        X, options = data(C=3), {"covariance_type": covariance, "tol": 1e-10, "max_iter": 5000, "n_init": 10}
        ours = mixture(**options).fit(X)
        theirs = GaussianMixture(3, random_state=0, **options).fit(X)
        assert ours.lower_bound_ == pytest.approx(theirs.lower_bound_, rel=1e-7)
        mine, other = np.lexsort(ours.means_.T), np.lexsort(theirs.means_.T)
        np.testing.assert_allclose(ours.means_[mine], theirs.means_[other], atol=1e-3)
        np.testing.assert_allclose(ours.weights_[mine], theirs.weights_[other], atol=1e-3)
        tied = covariance == "tied"
        for name in ("covariances_", "precisions_"):
            mine_, other_ = getattr(ours, name), getattr(theirs, name)
            np.testing.assert_allclose(mine_ if tied else mine_[mine], other_ if tied else other_[other], rtol=1e-2)


class TestFamilies:
    @pytest.mark.parametrize(
        ("family", "log_prob"),
        [
            (
                "student-t",
                lambda X, m: np.stack(
                    [
                        stats.multivariate_t.logpdf(X, location, scale, df)
                        for location, scale, df in zip(m.means_, m.scales_, m.degrees_of_freedom_, strict=True)
                    ],
                    1,
                ),
            ),
            ("poisson", lambda X, m: stats.poisson.logpmf(X[:, None], m.means_).sum(-1)),
            ("bernoulli", lambda X, m: stats.bernoulli.logpmf(X[:, None], m.probabilities_).sum(-1)),
            ("binomial", lambda X, m: stats.binom.logpmf(X[:, None], 9, m.probabilities_).sum(-1)),
            (
                "categorical",
                lambda X, m: sum(np.log(m.probabilities_[:, c, X[:, c].astype(int)]).T for c in range(X.shape[1])),
            ),
        ],
    )
    def test_scores_as_its_attributes_say(self, family, log_prob) -> None:
        X = data(family)
        model = mixture(family).fit(X)
        joint = log_prob(X, model) + np.log(model.weights_)
        np.testing.assert_allclose(model.score_samples(X), np.logaddexp.reduce(joint, 1), rtol=1e-8)
        np.testing.assert_allclose(model.predict_proba(X).sum(1), 1, rtol=1e-12)

    @pytest.mark.parametrize(
        ("family", "per_component"),
        [("gaussian", 5), ("student-t", 6), ("poisson", 2), ("bernoulli", 2), ("binomial", 2), ("categorical", 6)],
    )
    def test_the_criteria_count_its_free_parameters(self, family: str, per_component: int) -> None:
        X = data(family)
        model = mixture(family).fit(X)
        free = 3 * per_component + 2
        assert model.aic(X) == pytest.approx(-2 * len(X) * model.score(X) + 2 * free)
        assert model.bic(X) == pytest.approx(-2 * len(X) * model.score(X) + np.log(len(X)) * free)

    @pytest.mark.parametrize("family", ["gaussian", "poisson", "bernoulli", "binomial"])
    def test_means_are_those_of_the_data_they_own(self, family: str) -> None:
        X = data(family)
        model = mixture(family, tol=1e-12, max_iter=10_000).fit(X)
        gamma = model.predict_proba(X)
        np.testing.assert_allclose(model.means_, gamma.T @ X / gamma.sum(0)[:, None], atol=1e-4)

    @every_covariance
    def test_scales_are_in_the_shapes_of_covariances(self, covariance: str) -> None:
        X = data()
        scales = mixture("student-t", covariance_type=covariance).fit(X).scales_
        assert scales.shape == mixture(covariance_type=covariance).fit(X).covariances_.shape

    def test_outliers_move_a_student_t_little(self) -> None:
        X = data()
        far = np.concatenate([X, np.full((3, 2), 1e3)])
        moved = {
            family: np.abs(MixtureModel(likelihood=family).fit(far).means_ - X.mean(0)).max()
            for family in ("gaussian", "student-t")
        }
        assert moved["student-t"] < 1 < 15 < moved["gaussian"]

    def test_categories_are_counted_where_none_are_given(self) -> None:
        model = MixtureModel(likelihood="categorical").fit([[0], [1], [4]])
        np.testing.assert_allclose(model.probabilities_[0, 0], [1 / 3, 1 / 3, 0, 0, 1 / 3], atol=1e-12)

    @every_family
    def test_the_model_is_pnems(self, family: str) -> None:
        X = data(family)
        model = mixture(family).fit(X)
        assert isinstance(model.model_, SpatialMixture)
        log_evidence = model.model_.log_evidence(torch.from_numpy(X)[None], model.theta_[None])
        assert model.score(X) == pytest.approx(log_evidence.item() / len(X))


class TestFit:
    @every_family
    def test_the_lower_bound_is_the_log_likelihood_and_never_falls(self, family: str) -> None:
        X = data(family)
        model = mixture(family, tol=1e-10, max_iter=3000).fit(X)
        assert model.converged_
        assert model.n_iter_ == len(model.lower_bounds_) > 1
        assert model.lower_bounds_[-1] == model.lower_bound_ == pytest.approx(model.score(X), abs=1e-8)
        assert (np.diff(model.lower_bounds_) >= -1e-9).all()

    @every_family
    @pytest.mark.parametrize("init_params", ["k-means++", "random_from_data"])
    def test_weights_count_repetitions_in_any_order(self, family: str, init_params: str) -> None:
        rng = np.random.default_rng(0)
        X, weight = data(family), rng.integers(0, 4, 150)
        X_repeated = rng.permutation(X.repeat(weight, axis=0))
        model = mixture(family, init_params=init_params)
        weighted, repeated = clone(model).fit(X, sample_weight=weight), clone(model).fit(X_repeated)
        np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-8)
        np.testing.assert_allclose(weighted.lower_bounds_, repeated.lower_bounds_, rtol=1e-8)

    def test_samples_without_weight_are_not_there(self) -> None:
        X = data()
        far = np.concatenate([X, [[1e9, -1e9]]])
        model = mixture().fit(far, sample_weight=[1] * len(X) + [0])
        np.testing.assert_array_equal(model.means_, mixture().fit(X, sample_weight=[1] * len(X)).means_)

    @pytest.mark.parametrize("init_params", ["k-means++", "random", "random_from_data"])
    def test_a_seed_decides_the_fit_and_touches_no_other_random_state(self, init_params: str) -> None:
        X, model = data(), mixture(init_params=init_params, max_iter=1)
        ours, theirs = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        with pytest.warns(ConvergenceWarning):
            first = clone(model).fit(X).means_
        assert torch.equal(torch.get_rng_state(), ours)
        np.testing.assert_array_equal(np.random.get_state()[1], theirs)  # noqa: NPY002
        torch.manual_seed(5)
        with pytest.warns(ConvergenceWarning):
            np.testing.assert_array_equal(clone(model).fit(X).means_, first)
        with pytest.warns(ConvergenceWarning):
            assert not np.array_equal(clone(model).set_params(random_state=1).fit(X).means_, first)

    def test_more_starts_do_not_end_lower(self) -> None:
        X = data(C=4)
        one, many = (mixture(K=6, n_init=n, tol=1e-6, max_iter=1000).fit(X) for n in (1, 20))
        assert many.lower_bound_ >= one.lower_bound_

    def test_it_warns_as_scikit_learn_does(self) -> None:
        with pytest.warns(ConvergenceWarning, match="raise max_iter or tol"):
            model = mixture(K=6, max_iter=2, tol=0.0).fit(data())
        assert not model.converged_
        assert model.n_iter_ == 2

    def test_it_shows_a_progress_bar_where_asked_to(self, capsys: pytest.CaptureFixture[str]) -> None:
        mixture().fit(data())
        assert capsys.readouterr().err == ""
        mixture(verbose=1).fit(data())
        shown = capsys.readouterr()
        assert "EM" in shown.err
        assert shown.out == ""

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @every_family
    def test_a_gpu_gives_the_same(self, family: str) -> None:
        X = data(family)
        # The random numbers of a GPU are others: one component has no need of them.
        cpu, gpu = (mixture(family, K=1, device=device).fit(X) for device in ("cpu", "cuda"))
        np.testing.assert_allclose(gpu.score_samples(X), cpu.score_samples(X), rtol=1e-9)
        assert gpu.theta_.device.type == "cpu"


class TestMissingValues:
    @every_family
    def test_absent_features_are_marginalised(self, family: str) -> None:
        X, rng = data(family, C=3), np.random.default_rng(1)
        X[rng.random(X.shape) < 0.2] = np.nan
        X = X[~np.isnan(X).all(1)]
        model = mixture(family, tol=1e-8, max_iter=5000).fit(X)
        assert model.lower_bound_ == pytest.approx(model.score(X), abs=1e-6)
        assert (np.diff(model.lower_bounds_) >= -1e-9).all()
        np.testing.assert_allclose(model.predict_proba(X).sum(1), 1, rtol=1e-12)

    @every_covariance
    def test_scores_are_those_of_the_marginals(self, covariance: str) -> None:
        X = data(C=3)
        model = mixture(covariance_type=covariance).fit(X)
        full = {"full": lambda v: v, "tied": lambda v: [v] * 3, "diag": lambda v: [np.diag(d) for d in v]}
        covariances = full.get(covariance, lambda v: [d * np.eye(3) for d in v])(model.covariances_)
        first_two = [
            stats.multivariate_normal.logpdf(X[:, :2], mean[:2], cov[:2, :2]) + np.log(weight)
            for mean, cov, weight in zip(model.means_, covariances, model.weights_, strict=True)
        ]
        X[:, 2] = np.nan
        np.testing.assert_allclose(model.score_samples(X), np.logaddexp.reduce(first_two, 0), rtol=1e-9)

    @pytest.mark.parametrize("estimator", [MixtureModel(), FactorAnalysis(1)])
    def test_a_feature_of_nothing_is_refused(self, estimator: MixtureModel | FactorAnalysis) -> None:
        X = data()
        X[:, 1] = np.nan
        with pytest.raises(DataError, match="1 features have no value at all, only NaN, the first at index 1"):
            estimator.fit(X)

    def test_a_sample_of_nothing_is_refused(self) -> None:
        X = np.array([[0.0, 1.0], [np.nan, np.nan], [1.0, np.nan]])
        fitted = mixture(K=1).fit(data()), FactorAnalysis(1).fit(data())
        for call in (fitted[0].fit, fitted[0].predict, fitted[1].fit, fitted[1].transform):
            with pytest.raises(DataError, match="1 samples have no value at all, only NaN, the first at index 1"):
                call(X)


class TestSample:
    @every_family
    def test_has_the_moments_of_the_mixture(self, family: str) -> None:
        model = mixture(family).fit(data(family))
        X, y = model.sample(40_000)
        assert X.shape == (40_000, 2)
        np.testing.assert_allclose(np.bincount(y, minlength=3) / len(y), model.weights_, atol=0.01)
        for k in range(3):
            of_k = X[y == k]
            if family == "categorical":
                shares = [[(of_k[:, c] == s).mean() for s in range(4)] for c in range(2)]
                np.testing.assert_allclose(shares, model.probabilities_[k], atol=0.02)
            elif family == "student-t":
                np.testing.assert_allclose(np.median(of_k, 0), model.means_[k], atol=0.1)
            else:
                np.testing.assert_allclose(of_k.mean(0), model.means_[k], atol=1e-9 + 5 * of_k.std() / len(of_k) ** 0.5)

    @every_covariance
    def test_has_the_covariance_of_the_components(self, covariance: str) -> None:
        model = mixture(covariance_type=covariance, K=1).fit(data())
        X, _ = model.sample(40_000)
        full = {"full": lambda v: v[0], "tied": lambda v: v, "diag": lambda v: np.diag(v[0])}
        expected = full.get(covariance, lambda v: v[0] * np.eye(2))(model.covariances_)
        np.testing.assert_allclose(np.cov(X.T), expected, atol=0.05 * np.abs(expected).max())

    def test_is_reproducible_and_leaves_torch_alone(self) -> None:
        model = mixture().fit(data())
        before = torch.get_rng_state()
        first, second = model.sample(10)[0], model.sample(10)[0]
        np.testing.assert_array_equal(first, second)
        assert torch.equal(torch.get_rng_state(), before)


class TestConventions:
    def test_it_works_in_a_pipeline_and_a_grid_search(self) -> None:
        X = data(N=300)
        pipeline = make_pipeline(StandardScaler(), mixture())
        search = GridSearchCV(pipeline, {"mixturemodel__n_components": [1, 3]}, cv=3).fit(X)
        assert search.best_params_ == {"mixturemodel__n_components": 3}
        assert search.best_score_ > search.cv_results_["mean_test_score"][0] + 0.1
        assert search.predict(X).shape == (300,)

    @every_family
    def test_a_pickled_one_predicts_the_same(self, family: str) -> None:
        X = data(family)
        model = mixture(family).fit(X)
        again = pickle.loads(pickle.dumps(model))
        np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
        np.testing.assert_array_equal(again.sample(5)[0], model.sample(5)[0])

    def test_a_clone_is_not_fitted(self) -> None:
        model = mixture(covariance_type="diag", tol=1e-4).fit(data())
        copy = clone(model)
        assert copy.get_params() == model.get_params()
        with pytest.raises(NotFittedError):
            copy.predict(data())

    def test_fit_predict_gives_the_labels_of_predict(self) -> None:
        X = data()
        model = mixture()
        np.testing.assert_array_equal(model.fit_predict(X), model.predict(X))

    def test_it_knows_the_names_of_the_features(self) -> None:
        frame = pd.DataFrame(data(), columns=["a", "b"])
        model = mixture().fit(frame)
        assert list(model.feature_names_in_) == ["a", "b"]
        assert model.n_features_in_ == 2
        with pytest.raises(ValueError, match="feature names"):
            model.predict(frame[["b", "a"]])


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_components": 0}, "n_components must be a whole number of at least 1"),
            ({"n_components": 2.5}, "n_components must be a whole number"),
            ({"n_components": True}, "n_components must be a whole number"),
            ({"n_components": 9}, "n_samples >= n_components"),
            ({"likelihood": "normal"}, "likelihood must be one of 'gaussian', 'student-t', 'poisson'"),
            ({"covariance_type": "diagonal"}, "covariance_type must be one of 'full', 'tied', 'diag'"),
            ({"init_params": "kmeans"}, "init_params must be one of 'k-means\\+\\+'"),
            ({"tol": -1.0}, "tol must be a finite number of at least 0"),
            ({"tol": "small"}, "tol must be a finite number"),
            ({"reg_covar": float("nan")}, "reg_covar must be a finite number"),
            ({"max_iter": 0}, "max_iter must be a whole number of at least 1"),
            ({"n_init": 0}, "n_init must be a whole number of at least 1"),
            ({"likelihood": "binomial"}, 'n_trials, which likelihood="binomial" needs, must be a whole number'),
            ({"likelihood": "categorical", "n_categories": 1}, "n_categories must be a whole number of at least 2"),
            ({"device": "tpu"}, "unknown device"),
        ],
    )
    def test_parameters_out_of_range(self, options: dict, message: str) -> None:
        with pytest.raises(PnemError, match=message):
            MixtureModel(**options).fit([[0.0], [1.0], [1.0]])

    @pytest.mark.parametrize(
        ("family", "X", "message"),
        [
            ("gaussian", [[1.0], [np.inf]], "infinity"),
            ("gaussian", [1.0, 2.0], "2D array"),
            ("gaussian", np.empty((0, 2)), "0 sample"),
            ("gaussian", [["a"], ["b"]], "could not convert"),
            ("poisson", [[1.0], [-1.0]], "Negative values in data"),
            ("poisson", [[1.0], [0.5]], "whole numbers"),
            ("bernoulli", [[0.0], [2.0]], r"must lie in \[0, 1\]"),
            ("binomial", [[1.0], [10.0]], "up to 9"),
            ("categorical", [[1.0], [4.0]], "up to 3"),
        ],
    )
    def test_data_outside_the_support(self, family: str, X: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mixture(family, K=1).fit(X)
        fitted = mixture(family, K=1).fit(data(family, C=1))
        with pytest.raises(ValueError, match=message):
            fitted.predict(X)

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            ([1.0, 1.0], "shape"),
            ([[1.0], [1.0], [1.0]], "shape"),
            ([1.0, -1.0, 1.0], "at least zero"),
            ([0.0, 0.0, 0.0], "not all of them zero"),
            ([1.0, np.nan, 1.0], "NaN"),
            ([1.0, 0.0, 0.0], "n_samples = 1 of weight above zero"),
        ],
    )
    def test_weights(self, weight: object, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            mixture(K=2).fit([[0.0], [1.0], [2.0]], sample_weight=weight)

    def test_samples_below_one(self) -> None:
        with pytest.raises(PnemError, match="n_samples must be a whole number of at least 1"):
            mixture().fit(data()).sample(0)


def test_a_refit_leaves_nothing_of_the_last_one():
    X = np.random.default_rng(0).normal(size=(60, 2))
    mixture = MixtureModel(2, likelihood="student-t", max_iter=300).fit(X)
    mixture.set_params(likelihood="gaussian").fit(X)
    assert hasattr(mixture, "covariances_")
    assert not hasattr(mixture, "degrees_of_freedom_")
    assert not hasattr(mixture, "scales_")
    bic = mixture.bic(X)
    assert mixture.set_params(n_components=7).bic(X) == bic


def test_numbers_that_are_no_codes_are_refused():
    with pytest.raises(ModelError, match="n_categories"):
        MixtureModel(2, likelihood="categorical").fit([[0.0], [1.0], [1e12]])
