"""The likelihoods in scikit-learn's terms: their parameters' names and shapes."""

from functools import singledispatch

import numpy as np
import torch
from torch import Tensor

from pnem.errors import ModelError
from pnem.estimators.checks import require_choice, require_integer, require_real
from pnem.models import Bernoulli, Binomial, Categorical, Likelihood, MultivariateNormal, Poisson, StudentT

__all__ = [
    "COVARIANCES",
    "FAMILY_ATTRIBUTES",
    "LIKELIHOODS",
    "NON_NEGATIVE",
    "attributes",
    "count_parameters",
    "declare",
]

LIKELIHOODS = ("gaussian", "student-t", "poisson", "bernoulli", "binomial", "categorical")
NON_NEGATIVE = ("poisson", "bernoulli", "binomial", "categorical")
FAMILY_ATTRIBUTES = {
    "means_",
    "covariances_",
    "precisions_",
    "scales_",
    "degrees_of_freedom_",
    "probabilities_",
}
# A larger code is rather a number or a date than that of a category.
LARGEST_CODE = 10_000
COVARIANCES = {"full": "full", "tied": "tied", "diag": "diagonal", "spherical": "spherical"}


def declare(
    likelihood: str,
    x: np.ndarray,
    *,
    covariance_type: str,
    reg_covar: float,
    n_trials: int | None,
    n_categories: int | None,
) -> Likelihood:
    """The likelihood of this name for data x (N, C).

    Raises:
        ModelError: an unknown name or a parameter out of its range.
    """
    require_choice("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "poisson":
        return Poisson()
    if likelihood == "bernoulli":
        return Bernoulli()
    if likelihood == "binomial":
        require_integer('n_trials, which likelihood="binomial" needs,', n_trials, 1)
        return Binomial(int(n_trials or 0))
    if likelihood == "categorical":
        if n_categories is None:
            largest = np.nanmax(x, initial=1)
            if largest > LARGEST_CODE:
                raise ModelError(
                    f"the largest category code is {largest:g}: give n_categories if there are that many, or codes 0, "
                    "1, ... of fewer"
                )
            n_categories = max(2, int(largest) + 1)
        require_integer("n_categories", n_categories, 2)
        return Categorical(int(n_categories))
    require_choice("covariance_type", covariance_type, COVARIANCES)
    require_real("reg_covar", reg_covar)
    family = MultivariateNormal if likelihood == "gaussian" else StudentT
    return family(COVARIANCES[covariance_type], floor=float(reg_covar))


@singledispatch
def attributes(likelihood: Likelihood, theta: Tensor) -> dict[str, np.ndarray]:
    """The fitted attributes of the components, by name, from θ (K, M)."""
    raise NotImplementedError(type(likelihood).__name__)


@attributes.register
def _(likelihood: MultivariateNormal, theta: Tensor) -> dict[str, np.ndarray]:
    mean, lower = likelihood.moments(theta)
    return {
        "means_": mean.numpy(),
        "covariances_": _in_its_shape(likelihood.covariance, lower @ lower.mT),
        "precisions_": _in_its_shape(likelihood.covariance, torch.cholesky_inverse(lower)),
    }


@attributes.register
def _(likelihood: StudentT, theta: Tensor) -> dict[str, np.ndarray]:
    location, lower = likelihood.moments(theta)
    return {
        "means_": location.numpy(),
        "scales_": _in_its_shape(likelihood.normal.covariance, lower @ lower.mT),
        "degrees_of_freedom_": likelihood.degrees_of_freedom(theta).numpy(),
    }


def _in_its_shape(covariance: str, matrix: Tensor) -> np.ndarray:
    """Of matrices (K, C, C), what scikit-learn keeps: (K, C, C), (C, C), (K, C) or (K,)."""
    if covariance == "diagonal":
        matrix = matrix.diagonal(dim1=-2, dim2=-1)
    elif covariance == "spherical":
        matrix = matrix[:, 0, 0]
    elif covariance == "tied":
        matrix = matrix[0]
    return matrix.numpy().copy()


@attributes.register
def _(likelihood: Poisson, theta: Tensor) -> dict[str, np.ndarray]:
    return {"means_": likelihood.mean(theta).numpy()}


@attributes.register
def _(likelihood: Bernoulli, theta: Tensor) -> dict[str, np.ndarray]:
    mean = likelihood.mean(theta).numpy()
    return {"means_": mean, "probabilities_": mean.copy()}


@attributes.register
def _(likelihood: Binomial, theta: Tensor) -> dict[str, np.ndarray]:
    mean = likelihood.mean(theta).numpy()
    return {"means_": mean, "probabilities_": mean / likelihood.trials}


@attributes.register
def _(likelihood: Categorical, theta: Tensor) -> dict[str, np.ndarray]:
    return {"probabilities_": theta.unflatten(-1, (-1, likelihood.categories)).softmax(-1).numpy()}


def count_parameters(likelihood: Likelihood, K: int, C: int) -> int:
    """The number of free parameters of K components of C features, mixing weights not included."""
    if isinstance(likelihood, Categorical):
        return K * C * (likelihood.categories - 1)
    if isinstance(likelihood, StudentT):
        return count_parameters(likelihood.normal, K, C) + K
    if isinstance(likelihood, MultivariateNormal) and likelihood.covariance == "tied":
        return K * C + C * (C + 1) // 2
    return K * likelihood.num_parameters(C)
