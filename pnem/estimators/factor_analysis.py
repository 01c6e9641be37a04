"""Factor analysis and probabilistic principal components, as a scikit-learn estimator."""

import math

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, validate_data

from pnem.errors import DataError
from pnem.estimators.checks import require_choice, require_integer, require_real, require_values
from pnem.estimators.fitting import run_em
from pnem.models import Normal, SpatialMixture, decoders

__all__ = ["FactorAnalysis"]

# Numbers of one piece of samples: their posterior precisions, where values are missing.
PIECE = 2**22


class FactorAnalysis(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Factor analysis: features that M factors have in common, and noise of their own, fitted by EM.

        θ ~ Normal(0, I)          x | θ ~ Normal(μ + W θ, Ψ)

    As `sklearn.decomposition.FactorAnalysis`, of which it has the names, shapes and units, and by the EM of Rubin &
    Thayer (1982); with the same noise in all features, probabilistic PCA (Tipping & Bishop 1999). NaN in X is a missing
    value: fit, scores and factors are those of the observed values, exactly.

    Args:
        n_components: M; None for as many as there are features.
        noise: Ψ: ``"diagonal"``, or ``"isotropic"`` for probabilistic PCA.
        tol: stop when the log-likelihood rises by less than this, in nats per sample.
        max_iter: at most this many iterations.
        random_state: seeds the start.
        device: where to compute: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``, a GPU if there is one.
        verbose: above 0, a progress bar.

    Attributes:
        components_: Wᵀ, (M, C).
        noise_variance_: the diagonal of Ψ, (C,).
        mean_: μ, (C,).
        loglike_: the log-likelihood in nats at each iteration, a list.
        n_iter_: the number of iterations.
        converged_: whether the log-likelihood came to rest within `tol`.
        n_features_in_: C.
        feature_names_in_: the names of the features, where X has them.
        model_: the fitted `SpatialMixture`, in double precision, to use with the rest of pnem.

    >>> X = np.random.default_rng(0).normal(size=(200, 2)) @ np.ones((2, 5)) + np.arange(5)
    >>> factors = FactorAnalysis(1, random_state=0).fit_transform(X)
    >>> factors.shape
    (200, 1)
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        noise: str = "diagonal",
        tol: float = 1e-6,
        max_iter: int = 1000,
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
        verbose: int = 0,
    ):
        self.n_components = n_components
        self.noise = noise
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None) -> "FactorAnalysis":
        """Fits the model to data X (N, C), in which NaN is a missing value.

        Raises:
            ValueError: X is no table of numbers that are finite or NaN; a sample or a feature has no value; a feature
                is constant, or with isotropic noise all of them are; or a parameter is out of its range.

        Warns:
            sklearn.exceptions.ConvergenceWarning: the log-likelihood still changed by more than `tol`.
        """
        require_choice("noise", self.noise, ("diagonal", "isotropic"))
        require_integer("max_iter", self.max_iter, 1)
        require_integer("verbose", self.verbose, 0)
        require_real("tol", self.tol)
        x = self._validate(X, reset=True, ensure_min_samples=2)
        C = x.shape[1]
        self._check_spread(x)
        if self.n_components is not None:
            require_integer("n_components", self.n_components, 1)
        M = C if self.n_components is None else int(self.n_components)
        fitted = run_em(
            lambda: SpatialMixture(
                decoders.Linear(M, (1, 1, C)),
                Normal((1.0,) * C if self.noise == "diagonal" else 1.0, learn_sigma=True),
                1,
                prior="standard_normal",
            ),
            x[:, None],
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            random_state=self.random_state,
            device=self.device,
            progress=self.verbose > 0,
        )
        self.model_ = fitted.model
        decoder, likelihood = self.model_.decoder, self.model_.likelihood
        assert isinstance(decoder, decoders.Linear)
        assert isinstance(likelihood, Normal)
        self.components_ = decoder.linear.weight.detach().numpy().T.copy()
        self.mean_ = decoder.linear.bias.detach().numpy().copy()
        self.noise_variance_ = np.broadcast_to(likelihood.sigma.detach().numpy() ** 2, (C,)).copy()
        self.loglike_ = fitted.evidence.tolist()
        self.n_iter_ = len(self.loglike_)
        self.converged_ = fitted.converged
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """E[θ | x], from what is observed of x: (N, C) -> (N, M)."""
        return self._posterior(X)[0]

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """log p(x) of what is observed of x, in nats: (N, C) -> (N,)."""
        return self._posterior(X)[1]

    def score(self, X: ArrayLike, y: object = None) -> float:
        """The mean of log p(x), in nats per sample."""
        return float(self.score_samples(X).mean())

    def get_covariance(self) -> np.ndarray:
        """The covariance of x, W Wᵀ + Ψ: (C, C)."""
        check_is_fitted(self)
        return self.components_.T @ self.components_ + np.diag(self.noise_variance_)

    def get_precision(self) -> np.ndarray:
        """Its inverse, Ψ⁻¹ − Ψ⁻¹ W (I + Wᵀ Ψ⁻¹ W)⁻¹ Wᵀ Ψ⁻¹: (C, C)."""
        check_is_fitted(self)
        scaled = self.components_ / self.noise_variance_
        inner = np.eye(len(scaled)) + scaled @ self.components_.T
        return np.diag(1 / self.noise_variance_) - scaled.T @ np.linalg.solve(inner, scaled)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    def _validate(self, X: ArrayLike, *, reset: bool, ensure_min_samples: int = 1) -> np.ndarray:
        x = validate_data(
            self,
            X,
            reset=reset,
            dtype=np.float64,
            ensure_all_finite="allow-nan",
            ensure_min_samples=ensure_min_samples,
        )
        require_values(x, features=reset)
        return x

    def _check_spread(self, x: np.ndarray) -> None:
        """Raises `DataError` where the likelihood has no maximum, because a variance of zero would explain all."""
        constant = np.nanmin(x, 0) == np.nanmax(x, 0)
        if constant.all() or (self.noise == "diagonal" and constant.any()):
            raise DataError(
                f"features {np.flatnonzero(constant).tolist()} hold a single value, whose noise has no variance: leave "
                "them out, as by sklearn.feature_selection.VarianceThreshold"
            )

    def _posterior(self, X: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """E[θ | x] (N, M) and log p(x) (N,)."""
        check_is_fitted(self)
        x = self._validate(X, reset=False)
        rows = max(1, PIECE // max(len(self.components_) ** 2, x.shape[1]))
        pieces = [self._posterior_of(x[start : start + rows]) for start in range(0, len(x), rows)]
        means, log_probs = zip(*pieces, strict=True)
        return np.concatenate(means), np.concatenate(log_probs)

    def _posterior_of(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        W, variance = self.components_.T, self.noise_variance_
        observed = ~np.isnan(x)
        difference = np.where(observed, x - self.mean_, 0.0)
        # Where all is observed, one precision I + Wᵀ Ψ⁻¹ W serves all samples.
        patterns = observed[:1] if observed.all() else observed
        products = (W[:, :, None] * W[:, None, :]).reshape(len(W), -1) / variance[:, None]
        precision = np.eye(W.shape[1]) + (patterns @ products).reshape(-1, W.shape[1], W.shape[1])
        projected = difference / variance @ W
        mean = (np.linalg.inv(precision) @ projected[..., None])[..., 0]
        residual = np.where(observed, difference - mean @ W.T, 0.0)
        # (x − μ)ᵀ (W Wᵀ + Ψ)⁻¹ (x − μ), as a sum of squares.
        distance = (residual**2 / variance).sum(-1) + (mean**2).sum(-1)
        log_determinant = np.linalg.slogdet(precision)[1] + observed @ np.log(2 * math.pi * variance)
        return mean, -0.5 * (distance + log_determinant)
