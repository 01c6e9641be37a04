"""The scikit-learn estimator of factor analysis: scikit-learn's numbers, and what it adds to them."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import decomposition
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pnem.errors import DataError, PnemError
from pnem.estimators import FactorAnalysis, factor_analysis
from pnem.inference import ClassicalEM


class TestFactorAnalysis:
    @staticmethod
    def data(N: int = 300) -> np.ndarray:
        rng = np.random.default_rng(0)
        factors, noise = rng.normal(size=(N, 2)), rng.normal(size=(N, 6)) * np.linspace(0.4, 1.2, 6)
        return factors @ (3 * rng.normal(size=(2, 6))) + noise + 5

    def test_its_parameters_mean_what_scikit_learns_do(self) -> None:
        X, new = self.data(), self.data(50)[::-1] + 1
        ours = FactorAnalysis(2, random_state=0).fit(X)
        theirs = decomposition.FactorAnalysis(2).fit(X)
        for name in ("components_", "noise_variance_", "mean_"):
            assert getattr(ours, name).shape == getattr(theirs, name).shape
            setattr(theirs, name, getattr(ours, name))
        np.testing.assert_allclose(ours.transform(new), theirs.transform(new), rtol=1e-8)
        np.testing.assert_allclose(ours.score_samples(new), theirs.score_samples(new), rtol=1e-8)
        np.testing.assert_allclose(ours.get_covariance(), theirs.get_covariance(), rtol=1e-12)
        np.testing.assert_allclose(ours.get_precision(), theirs.get_precision(), rtol=1e-8)
        assert ours.score(new) == pytest.approx(theirs.score(new), rel=1e-8)

    def test_it_finds_the_likelihood_that_scikit_learn_finds(self) -> None:
        X = self.data()
        ours = FactorAnalysis(2, random_state=0).fit(X)
        theirs = decomposition.FactorAnalysis(2, tol=1e-8, max_iter=10_000).fit(X)
        assert ours.converged_
        assert ours.score(X) == pytest.approx(theirs.score(X), abs=1e-4)
        np.testing.assert_allclose(ours.get_covariance(), theirs.get_covariance(), rtol=0.02, atol=0.05)
        np.testing.assert_allclose(ours.mean_, X.mean(0), rtol=1e-10)

    @pytest.mark.parametrize("constant", [False, True])
    def test_isotropic_noise_makes_it_probabilistic_pca(self, constant: bool) -> None:
        X = self.data()
        if constant:
            X[:, 3] = 7
        ours = FactorAnalysis(2, noise="isotropic", tol=1e-12, random_state=0).fit(X)
        pca = decomposition.PCA(2).fit(X)
        # PCA divides by N − 1, maximum likelihood by N.
        pca.explained_variance_ *= (len(X) - 1) / len(X)
        pca.noise_variance_ *= (len(X) - 1) / len(X)
        assert ours.score(X) == pytest.approx(pca.score(X), abs=1e-9)
        np.testing.assert_allclose(ours.noise_variance_, pca.noise_variance_, rtol=1e-5)
        np.testing.assert_allclose(ours.get_covariance(), pca.get_covariance(), atol=1e-4)

    def test_the_log_likelihood_is_that_of_the_data_and_never_falls(self) -> None:
        X = self.data()
        model = FactorAnalysis(2, tol=1e-8, random_state=0, max_iter=5000).fit(X)
        assert model.n_iter_ == len(model.loglike_) > 1
        assert model.loglike_[-1] == pytest.approx(model.score_samples(X).sum(), rel=1e-7)
        assert (np.diff(model.loglike_) >= -1e-9 * abs(model.loglike_[-1])).all()

    def test_missing_values_are_marginalised(self) -> None:
        X, rng = self.data(200), np.random.default_rng(1)
        X[rng.random(X.shape) < 0.3] = np.nan
        X = X[~np.isnan(X).all(1)]
        model = FactorAnalysis(2, random_state=0).fit(X)
        assert model.loglike_[-1] == pytest.approx(model.score_samples(X).sum(), rel=1e-5)
        covariance = model.get_covariance()
        for x, factors, log_prob in zip(X, model.transform(X), model.score_samples(X), strict=True):
            there = ~np.isnan(x)
            of_there = covariance[np.ix_(there, there)]
            normal = stats.multivariate_normal(model.mean_[there], of_there)
            assert log_prob == pytest.approx(normal.logpdf(x[there]), rel=1e-9)
            expected = model.components_[:, there] @ np.linalg.solve(of_there, x[there] - model.mean_[there])
            np.testing.assert_allclose(factors, expected, rtol=1e-8, atol=1e-10)

    def test_long_tables_are_transformed_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        X = self.data()
        X[0, 0] = np.nan
        model = FactorAnalysis(2, random_state=0).fit(X)
        whole = model.transform(X), model.score_samples(X)
        monkeypatch.setattr(factor_analysis, "PIECE", 6 * 7)
        np.testing.assert_allclose(model.transform(X), whole[0], rtol=1e-12)
        np.testing.assert_allclose(model.score_samples(X), whole[1], rtol=1e-12)

    def test_a_seed_decides_the_fit_and_touches_no_other_random_state(self) -> None:
        X, before = self.data(), torch.get_rng_state()
        first = FactorAnalysis(2, random_state=0).fit(X).components_
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(5)
        np.testing.assert_array_equal(FactorAnalysis(2, random_state=0).fit(X).components_, first)

    def test_it_works_in_a_pipeline_and_a_grid_search(self) -> None:
        X = self.data()
        pipeline = make_pipeline(StandardScaler(), FactorAnalysis(random_state=0, tol=1e-4))
        search = GridSearchCV(pipeline, {"factoranalysis__n_components": [1, 2]}, cv=3).fit(X)
        assert search.best_params_ == {"factoranalysis__n_components": 2}
        names = list(search.best_estimator_.get_feature_names_out())
        assert names == ["factoranalysis0", "factoranalysis1"]
        again = pickle.loads(pickle.dumps(search.best_estimator_))
        np.testing.assert_array_equal(again.transform(X), search.best_estimator_.transform(X))

    def test_its_model_is_pnems(self) -> None:
        X = self.data()
        model = FactorAnalysis(2, random_state=0).fit(X)
        posterior = ClassicalEM(model.model_).infer(torch.from_numpy(X)[:, None])
        np.testing.assert_allclose(posterior.theta[:, 0], model.transform(X), rtol=1e-8, atol=1e-10)

    def test_it_warns_as_scikit_learn_does(self) -> None:
        with pytest.warns(ConvergenceWarning, match="raise max_iter or tol"):
            assert not FactorAnalysis(2, max_iter=3, random_state=0).fit(self.data()).converged_

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_components": 0}, "n_components must be a whole number of at least 1"),
            ({"noise": "spherical"}, "noise must be one of 'diagonal', 'isotropic'"),
            ({"max_iter": 0}, "max_iter must be a whole number of at least 1"),
            ({"tol": -1}, "tol must be a finite number of at least 0"),
            ({"device": "tpu"}, "unknown device"),
        ],
    )
    def test_parameters_out_of_range(self, options: dict, message: str) -> None:
        with pytest.raises(PnemError, match=message):
            FactorAnalysis(**options).fit(self.data())

    def test_features_without_variance_are_refused(self) -> None:
        X = self.data()
        X[:, 2] = 1
        with pytest.raises(DataError, match=r"features \[2\] hold a single value"):
            FactorAnalysis(2).fit(X)
        with pytest.raises(DataError, match=r"features \[0, 1\] hold a single value"):
            FactorAnalysis(1, noise="isotropic").fit(np.ones((5, 2)))
