"""The conjugate prior of Gaussian and Student t components, in scikit-learn's terms."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from pnem.errors import ModelError
from pnem.models import Likelihood, MultivariateNormal, NormalInverseWishart, StudentT, decoders

__all__ = ["PRIORS", "declare_concentration", "declare_prior"]

# scikit-learn's names of a NormalInverseWishart's parameters.
PRIORS = {
    "mean_prior": "mean",
    "covariance_prior": "scale",
    "mean_precision_prior": "mean_precision",
    "degrees_of_freedom_prior": "degrees_of_freedom",
}


def declare_concentration(value: float | None) -> float:
    """α of the Dirichlet prior on mixing weights; 1, which is flat, for None.

    Raises:
        ModelError: it is no finite number of at least 1.
    """
    if value is None:
        return 1.0
    if not isinstance(value, int | float | np.number) or isinstance(value, bool) or not 1 <= value < np.inf:
        raise ModelError(
            "weight_concentration_prior must be a finite number of at least 1, for which EM finds the most probable "
            f"weights, but is {value!r}"
        )
    return float(value)


def declare_prior(
    likelihood: Likelihood, given: Mapping[str, ArrayLike | None], x: np.ndarray, weight: np.ndarray | None, K: int
) -> NormalInverseWishart | str:
    """The prior whose parameters `given` names as scikit-learn does; flat where all of them are None.

    What is left out is chosen as Fraley & Raftery (2007) do: m the mean of the data, κ = 0.01, ν = C + 2 (3 where
    features are independent), and Ψ = S / K^(2/C) from the covariance S of the data, with the likelihood's floor on its
    diagonal; where features are independent, from their variances; where one variance serves all, from its mean.

    Args:
        likelihood: of the components.
        given: by the names in `PRIORS`.
        x: the data (N, C), in which NaN is a missing value.
        weight: how often each sample counts, (N,).
        K: the number of components.

    Raises:
        ModelError: the likelihood is another than a Gaussian or a Student t, or a parameter is out of its range.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        return "flat"
    if not isinstance(likelihood, MultivariateNormal | StudentT):
        raise ModelError(
            f"{', '.join(values)}: a prior on components is there for gaussian and student-t ones, but these are of "
            f"{type(likelihood).__name__}: leave it out, or give weight_concentration_prior, which is for all"
        )
    normal = likelihood.normal if isinstance(likelihood, StudentT) else likelihood
    count = np.where(np.isnan(x), 0.0, 1.0 if weight is None else weight[:, None])
    mean = (count * np.nan_to_num(x)).sum(0) / count.sum(0)
    settings: dict[str, Any] = {"mean": mean.tolist()}
    if "covariance_prior" not in values:
        settings["scale"] = _default_scale(normal, np.where(np.isnan(x), 0.0, x - mean), count, K)
    for name, value in values.items():
        settings[PRIORS[name]] = _as_plain(name, value)
    try:
        prior = NormalInverseWishart(**settings)
        prior.check(decoders.Constant(likelihood.num_parameters(x.shape[1])), likelihood)
    except ModelError as error:
        raise ModelError(f"{', '.join(values)}: {error}") from error
    return prior


def _default_scale(normal: MultivariateNormal, centred: np.ndarray, count: np.ndarray, K: int) -> list[Any]:
    """Ψ from centred data (N, C), zero where missing, and how often each of its values counts."""
    C = centred.shape[1]
    # Every feature by its own count, so that its variance is that of its observed values.
    root = centred * np.sqrt(count / count.sum(0))
    covariance = np.diag((root**2).sum(0)) if normal.independent_channels else root.T @ root
    if normal.covariance == "spherical":
        covariance = np.eye(C) * covariance.diagonal().mean()
    scale = (covariance + normal.floor * np.eye(C)) / K ** (2 / C)
    scale = (scale + scale.T) / 2
    if int(torch.linalg.cholesky_ex(torch.from_numpy(scale)).info):
        raise ModelError(
            "covariance_prior is by default made from the covariance of the data, which is not positive definite, for "
            "features are constant or depend on one another: give covariance_prior, or a larger reg_covar"
        )
    return scale.tolist()


def _as_plain(name: str, value: ArrayLike) -> Any:
    """The value as floats, in lists as deep as it is."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name} must be a number or an array of them, but is {value!r}") from error
    if array.ndim and name not in ("mean_prior", "covariance_prior"):
        raise ModelError(f"{name} must be one number, but has shape {array.shape}")
    return array.tolist()
