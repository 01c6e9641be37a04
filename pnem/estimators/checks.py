"""What an estimator checks of its parameters and weights before it is fitted."""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import check_array

from pnem.errors import DataError, ModelError

__all__ = ["require_choice", "require_integer", "require_real", "require_values", "sample_weights"]


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raises `ModelError` unless the parameter is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ModelError(f"{name} must be one of {', '.join(map(repr, choices))}, but is {value!r}")


def require_integer(name: str, value: object, least: int) -> None:
    """Raises `ModelError` unless the parameter is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ModelError(f"{name} must be a whole number of at least {least}, but is {value!r}")


def require_real(name: str, value: object) -> None:
    """Raises `ModelError` unless the parameter is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 <= float(value) < math.inf:
        raise ModelError(f"{name} must be a finite number of at least 0, but is {value!r}")


def require_values(x: np.ndarray, *, features: bool) -> None:
    """Raises `DataError` unless every sample of x (N, C), and with `features` every feature, has a value."""
    missing = np.isnan(x)
    for name, empty in (("samples", missing.all(1)), ("features", missing.all(0) & features)):
        if empty.any():
            raise DataError(
                f"{empty.sum()} {name} have no value at all, only NaN, the first at index {empty.argmax()}: leave them "
                "out"
            )


def sample_weights(sample_weight: ArrayLike | None, n_samples: int) -> np.ndarray | None:
    """The weights of the samples in double precision, (N,); None for None.

    Raises:
        ValueError: there is not one for every sample; some are negative, NaN or infinite; or all are zero.
    """
    if sample_weight is None:
        return None
    weight = check_array(sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight")
    if weight.shape != (n_samples,):
        raise DataError(f"sample_weight has shape {weight.shape}, but X has {n_samples} samples: give one for each")
    if (weight < 0).any() or not weight.any():
        raise DataError("each sample_weight must be at least zero, and not all of them zero")
    return weight
