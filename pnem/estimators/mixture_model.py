"""Mixtures of any of pnem's likelihoods, as a scikit-learn estimator."""

import copy
import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from pnem.devices import forked_rng, resolve_device
from pnem.errors import DataError
from pnem.estimators.checks import require_choice, require_integer, require_real, require_values, sample_weights
from pnem.estimators.families import FAMILY_ATTRIBUTES, NON_NEGATIVE, attributes, count_parameters, declare
from pnem.estimators.fitting import run_em, tensor
from pnem.estimators.priors import PRIORS, declare_concentration, declare_prior
from pnem.models import SpatialMixture, decoders

__all__ = ["MixtureModel"]

# scikit-learn's names for where to start, and ClassicalEM's.
INITS = {"k-means++": "k-means++", "random": "random", "random_from_data": "points"}
# Samples of which log p(x, z) is computed at once.
PIECE = 4096


class MixtureModel(DensityMixin, BaseEstimator):
    """A mixture of K components, fitted by classical EM with a closed-form M-step.

    As `sklearn.mixture.GaussianMixture`, of which it has the names, the shapes and the units, for more likelihoods:

        p(x_i) = Σ_k π_k p(x_i | θ_k)

    NaN in X is a missing value: fits, scores and labels are those of the observed values, exactly.

    A fit depends on `random_state` and the samples, but not on their order, and a sample of weight n counts as n equal
    ones; but for ``init_params="random"``, which draws numbers for every sample.

    **Priors.** With a prior EM climbs to a mode of log p(X, θ, π), maximum a posteriori. Their names and meanings are
    those of `sklearn.mixture.BayesianGaussianMixture`, their defaults are not. `mean_prior`, `mean_precision_prior`,
    `degrees_of_freedom_prior` or `covariance_prior`, any of them, gives Gaussian and Student t components a conjugate
    prior under which none collapses, μ | Σ ~ N(m, Σ/κ), Σ ~ InverseWishart(ν, Ψ) (`NormalInverseWishart`), whose other
    parameters are then chosen from X as by Fraley & Raftery (2007).

    Args:
        n_components: K.
        likelihood: ``"gaussian"``; ``"student-t"``, which outliers move little; ``"poisson"`` for counts;
            ``"bernoulli"`` for bits, or grey values in [0, 1]; ``"binomial"`` for counts among `n_trials`;
            ``"categorical"`` for codes 0, 1, ... of categories. Features are independent within a component, but for
            Gaussian and Student t ones as `covariance_type` says.
        covariance_type: of a Gaussian, or of a Student t's scale matrix: ``"full"``, ``"tied"``, ``"diag"`` or
            ``"spherical"``.
        n_trials: of the binomial, n.
        n_categories: of the categorical; None for one more than the largest code in the data.
        tol: stop when the lower bound rises by less than this, in nats per sample.
        reg_covar: added to the variances of a Gaussian or a scale matrix, so that no component collapses onto a point.
        max_iter: at most this many iterations.
        n_init: so many starts, computed as one batch; the best is kept.
        weight_concentration_prior: α of a Dirichlet prior on the weights, the same for all components, at least 1; None
            for 1, which is flat.
        mean_prior: m, a number or (C,); the mean of X.
        mean_precision_prior: κ, how many samples m counts as; 0.01.
        degrees_of_freedom_prior: ν, more than C − 1; C + 2, or 3 where the features are independent.
        covariance_prior: Ψ, a number (times the identity), (C,) (a diagonal) or (C, C), of which only the diagonal
            counts where the features are independent; the covariance of X over K^(2/C).
        init_params: where to start: ``"k-means++"`` or ``"random_from_data"``, each sample at the nearest of K seeds
            that are far from one another or random; ``"random"``, random responsibilities.
        random_state: seeds the starts and `sample`.
        device: where to compute: ``"cpu"``, ``"cuda"``, ``"cuda:N"``, or ``"auto"``, a GPU if there is one.
        verbose: above 0, a progress bar.

    Attributes:
        weights_: π, (K,).
        means_: the means of the components, (K, C), of Student t ones their locations. Not of categorical ones.
        covariances_: the covariances of Gaussian components: (K, C, C) if full, (C, C) if tied, (K, C) if diagonal,
            (K,) if spherical.
        precisions_: their inverses, in the same shapes.
        scales_: the scale matrices of Student t components, in the same shapes; the covariance is ν / (ν − 2) times
            this where ν > 2, and infinite where not.
        degrees_of_freedom_: ν of Student t components, (K,).
        probabilities_: of Bernoulli and binomial components (K, C), of categorical ones (K, C, categories).
        converged_: whether the lower bound came to rest within `tol`.
        n_iter_: the number of iterations.
        lower_bound_: what EM climbs, at the last E-step, in nats per sample: the log-likelihood, and with priors
            log p(X, θ, π); scores and criteria are of the log-likelihood alone.
        lower_bounds_: those of all iterations, (n_iter_,).
        n_features_in_: C.
        feature_names_in_: the names of the features, where X has them.
        model_: the fitted `SpatialMixture`, in double precision, to use with the rest of pnem.
        theta_: the fitted θ of its components, a tensor (K, M).

    >>> rng = np.random.default_rng(0)
    >>> X = np.concatenate([rng.normal(-3, 1, (100, 2)), rng.normal(3, 1, (100, 2))])
    >>> mixture = MixtureModel(2, covariance_type="diag", random_state=0).fit(X)
    >>> mixture.predict_proba(X).shape, mixture.covariances_.shape
    ((200, 2), (2, 2))
    >>> bool(mixture.bic(X) < MixtureModel().fit(X).bic(X))
    True
    """

    def __init__(
        self,
        n_components: int = 1,
        *,
        likelihood: str = "gaussian",
        covariance_type: str = "full",
        n_trials: int | None = None,
        n_categories: int | None = None,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        max_iter: int = 100,
        n_init: int = 1,
        weight_concentration_prior: float | None = None,
        mean_prior: ArrayLike | None = None,
        mean_precision_prior: float | None = None,
        degrees_of_freedom_prior: float | None = None,
        covariance_prior: ArrayLike | None = None,
        init_params: str = "k-means++",
        random_state: int | np.random.RandomState | None = None,
        device: str = "cpu",
        verbose: int = 0,
    ):
        self.n_components = n_components
        self.likelihood = likelihood
        self.covariance_type = covariance_type
        self.n_trials = n_trials
        self.n_categories = n_categories
        self.tol = tol
        self.reg_covar = reg_covar
        self.max_iter = max_iter
        self.n_init = n_init
        self.weight_concentration_prior = weight_concentration_prior
        self.mean_prior = mean_prior
        self.mean_precision_prior = mean_precision_prior
        self.degrees_of_freedom_prior = degrees_of_freedom_prior
        self.covariance_prior = covariance_prior
        self.init_params = init_params
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> "MixtureModel":
        """Fits the mixture to data X (N, C).

        Args:
            X: the data.
            y: ignored.
            sample_weight: how often each sample counts, (N,); once when None.

        Raises:
            ValueError: X is no table of numbers that are finite or NaN, or not of the likelihood's support; a sample
                or a feature has no value at all; there are fewer samples than components; the weights do not fit; or a
                parameter is out of its range.

        Warns:
            sklearn.exceptions.ConvergenceWarning: the lower bound still changed by more than `tol`.
        """
        self._check_parameters()
        x = self._validate(X, reset=True)
        weight = sample_weights(sample_weight, len(x))
        if weight is not None:
            x, weight = x[weight > 0], weight[weight > 0]
            require_values(x, features=True)
        if len(x) < self.n_components:
            raise DataError(
                f"n_components={self.n_components} needs n_samples >= n_components, but got n_samples = {len(x)}"
                + ("" if weight is None else " of weight above zero")
            )
        likelihood = declare(
            self.likelihood,
            x,
            covariance_type=self.covariance_type,
            reg_covar=self.reg_covar,
            n_trials=self.n_trials,
            n_categories=self.n_categories,
        )
        K, decoder = int(self.n_components), decoders.Constant(likelihood.num_parameters(x.shape[1]))
        concentration = declare_concentration(self.weight_concentration_prior)
        prior = declare_prior(likelihood, {name: getattr(self, name) for name in PRIORS}, x, weight, K)
        if K > 1 and self.init_params != "random":
            order = _order(x)
            x, weight = x[order], None if weight is None else weight[order]
        fitted = run_em(
            lambda: SpatialMixture(
                decoder, likelihood, K, prior=prior, mixing="learned", mixing_concentration=concentration
            ),
            x[None],
            None if weight is None else weight[None],
            max_iter=int(self.max_iter),
            tol=float(self.tol),
            initial=INITS[self.init_params],
            n_init=int(self.n_init),
            random_state=self.random_state,
            device=self.device,
            progress=self.verbose > 0,
        )
        self.model_ = fitted.model
        self.theta_ = fitted.theta[0]
        for name in FAMILY_ATTRIBUTES & vars(self).keys():
            # Of another likelihood, fitted before.
            delattr(self, name)
        self.weights_ = self.model_.mixing.detach().numpy()
        for name, value in attributes(self.model_.likelihood, self.theta_).items():
            setattr(self, name, value)
        self.converged_ = fitted.converged
        self.lower_bounds_ = fitted.evidence / (len(x) if weight is None else weight.sum())
        self.lower_bound_ = float(self.lower_bounds_[-1])
        self.n_iter_ = len(self.lower_bounds_)
        return self

    def fit_predict(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> np.ndarray:
        """Fits the mixture, and returns the label of each sample, (N,)."""
        return self.fit(X, y, sample_weight).predict(X)

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The most probable component of each sample: (N, C) -> (N,)."""
        return self._log_joint(X).argmax(-1).numpy()

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """p(z_i = k | x_i): (N, C) -> (N, K)."""
        return self._log_joint(X).softmax(-1).numpy()

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """log p(x_i) in nats: (N, C) -> (N,)."""
        return self._log_joint(X).logsumexp(-1).numpy()

    def score(self, X: ArrayLike, y: object = None) -> float:
        """The mean of log p(x_i), in nats per sample."""
        return float(self.score_samples(X).mean())

    def bic(self, X: ArrayLike) -> float:
        """The Bayesian information criterion on X, in twice nats; lower is better (Schwarz 1978)."""
        log_likelihood = self.score_samples(X)
        return -2 * float(log_likelihood.sum()) + self._count_parameters() * math.log(len(log_likelihood))

    def aic(self, X: ArrayLike) -> float:
        """Akaike's information criterion on X, in twice nats; lower is better."""
        return -2 * float(self.score_samples(X).sum()) + 2 * self._count_parameters()

    def sample(self, n_samples: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Draws samples X (N, C) and their components y (N,), in the order of these."""
        check_is_fitted(self)
        require_integer("n_samples", n_samples, 1)
        random_state = check_random_state(self.random_state)
        counts = random_state.multinomial(int(n_samples), self.weights_)
        y = np.repeat(np.arange(len(counts)), counts)
        with forked_rng(torch.device("cpu")), torch.no_grad():
            torch.manual_seed(random_state.randint(np.iinfo(np.int32).max))
            X = self.model_.likelihood.distribution(self.theta_[y]).sample()
        return X.numpy(), y

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.positive_only = self.likelihood in NON_NEGATIVE
        tags.input_tags.categorical = self.likelihood == "categorical"
        return tags

    def _check_parameters(self) -> None:
        for name, least in {"n_components": 1, "max_iter": 1, "n_init": 1, "verbose": 0}.items():
            require_integer(name, getattr(self, name), least)
        require_real("tol", self.tol)
        require_choice("init_params", self.init_params, INITS)

    def _validate(self, X: ArrayLike, *, reset: bool) -> np.ndarray:
        positive = self.__sklearn_tags__().input_tags.positive_only
        x = validate_data(
            self, X, reset=reset, dtype=np.float64, ensure_all_finite="allow-nan", ensure_non_negative=positive
        )
        require_values(x, features=reset)
        return x

    def _log_joint(self, X: ArrayLike) -> Tensor:
        """log p(x_i, z_i = k): (N, K)."""
        check_is_fitted(self)
        where = resolve_device(self.device)
        x = tensor(self._validate(X, reset=False), where)
        model, theta = copy.deepcopy(self.model_).to(where), self.theta_.to(where)
        with torch.no_grad():
            pieces = [model.log_joint(piece[None], theta[None])[0].mT.cpu() for piece in x.split(PIECE)]
        return torch.cat(pieces)

    def _count_parameters(self) -> int:
        K = len(self.weights_)
        return count_parameters(self.model_.likelihood, K, self.n_features_in_) + K - 1


def _order(X: np.ndarray) -> np.ndarray:
    """An order of the samples (N,) that equal data in another order share, so that the seeds drawn from it are equal.

    That of a projection, where a missing value is a number that no data hold: sorting by all features takes far longer.
    """
    direction = np.random.default_rng(0).normal(size=X.shape[1])
    return np.argsort(np.where(np.isnan(X), math.pi, X) @ direction)
