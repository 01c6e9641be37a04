"""Likelihoods by name, and the parameters of fitted components in readable form."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from pnem.errors import ModelError
from pnem.models import Bernoulli, Binomial, Categorical, MultivariateNormal, Poisson, StudentT
from pnem.models.likelihoods import Likelihood

__all__ = ["LIKELIHOODS", "Described", "describe_component", "find_kind", "make_likelihood"]

# Up to so many categories all probabilities are listed; of more, only the likeliest.
MOST_LISTED = 4


class Described(NamedTuple):
    """A component in readable form.

    Attributes:
        parameters: what JSON can hold, by the parameter's usual name.
        cells: one short text for each column of the data.
        others: short texts, by their names, of what belongs to no column.
    """

    parameters: dict[str, Any]
    cells: list[str]
    others: Mapping[str, str] = MappingProxyType({})


class Kind(NamedTuple):
    """A likelihood that can be asked for by name.

    Attributes:
        make: its class.
        options: which of the options that not all likelihoods have it takes.
        required: which of them it cannot do without.
        cell: what the cells of its table say.
        describe: from the likelihood, one component's ψ (P,) and the names of the columns to its description.
    """

    make: Callable[..., Likelihood]
    options: tuple[str, ...]
    required: tuple[str, ...]
    cell: str
    describe: Callable[[Any, Tensor, Sequence[str]], Described]


def make_likelihood(name: str, **options: Any) -> Likelihood:
    """The likelihood of this name; options that are None are left at their defaults.

    Raises:
        ModelError: an unknown name, an option that this likelihood does not have or misses, or a bad value for one.

    >>> make_likelihood("binomial", trials=3, covariance=None).trials
    3
    """
    if name not in LIKELIHOODS:
        raise ModelError(f"unknown likelihood {name!r}: choose one of {', '.join(LIKELIHOODS)}")
    kind = LIKELIHOODS[name]
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in kind.options:
            owners = ", ".join(other for other, its in LIKELIHOODS.items() if option in its.options)
            raise ModelError(f"a {name} likelihood has no {option}, which is for {owners}: leave it out")
    for option in kind.required:
        if option not in given:
            raise ModelError(f"a {name} likelihood needs its number of {option}: give {option} (--{option})")
    return kind.make(**given)


def find_kind(likelihood: Likelihood) -> Kind:
    """What is known of a likelihood that `make_likelihood` made."""
    return next(kind for kind in LIKELIHOODS.values() if type(likelihood) is kind.make)


def describe_component(likelihood: Likelihood, psi: Tensor, names: Sequence[str]) -> Described:
    """One component's parameters ψ (P,), the columns called by their names.

    >>> import torch
    >>> describe_component(Poisson(), torch.tensor([0.0, 1.0]), ["a", "b"])
    Described(parameters={'rate': {'a': 1.0, 'b': 2.7182817459106445}}, cells=['1', '2.718'], others=mappingproxy({}))
    """
    return find_kind(likelihood).describe(likelihood, psi.detach().cpu(), names)


def _describe_normal(likelihood: MultivariateNormal, psi: Tensor, names: Sequence[str]) -> Described:
    mean, lower = likelihood.moments(psi)
    matrix = lower @ lower.mT
    return Described({"mean": _by_name(names, mean), "covariance": matrix.tolist()}, _plus_minus(mean, matrix))


def _describe_student(likelihood: StudentT, psi: Tensor, names: Sequence[str]) -> Described:
    location, lower = likelihood.moments(psi)
    matrix = lower @ lower.mT
    df = likelihood.degrees_of_freedom(psi).item()
    parameters = {
        "location": _by_name(names, location),
        "scale_matrix": matrix.tolist(),
        "degrees_of_freedom": df,
    }
    return Described(parameters, _plus_minus(location, matrix), {"ν": f"{df:.4g}"})


def _plus_minus(centre: Tensor, matrix: Tensor) -> list[str]:
    scale = matrix.diagonal().sqrt().tolist()
    return [f"{_short(c, s)} ± {_short(s, s)}" for c, s in zip(centre.tolist(), scale, strict=True)]


def _describe_rates(likelihood: Poisson, psi: Tensor, names: Sequence[str]) -> Described:
    return _numbers("rate", likelihood.mean(psi), names)


def _describe_probabilities(likelihood: Bernoulli | Binomial, psi: Tensor, names: Sequence[str]) -> Described:
    return _numbers("probability", psi.sigmoid(), names)


def _numbers(parameter: str, values: Tensor, names: Sequence[str]) -> Described:
    return Described({parameter: _by_name(names, values)}, [f"{value:.4g}" for value in values.tolist()])


def _describe_categorical(likelihood: Categorical, psi: Tensor, names: Sequence[str]) -> Described:
    probability = psi.unflatten(-1, (-1, likelihood.categories)).softmax(-1)
    cells = []
    for row in probability.tolist():
        likeliest = max(range(len(row)), key=row.__getitem__)
        listed = " ".join(f"{p:.2f}" for p in row)
        cells.append(listed if len(row) <= MOST_LISTED else f"{likeliest} ({row[likeliest]:.2f})")
    return Described({"probabilities": _by_name(names, probability)}, cells)


def _by_name(names: Sequence[str], values: Tensor) -> dict[str, Any]:
    return dict(zip(names, values.tolist(), strict=True))


def _short(value: float, scale: float) -> str:
    """A number to three digits of its scale: 12.35 at a scale of 1.2."""
    digits = 2 - math.floor(math.log10(scale)) if scale > 0 and math.isfinite(value) else 2
    return f"{value:.{digits}f}" if 0 <= digits <= 6 and abs(value) < 1e7 else f"{value:.4g}"


LIKELIHOODS: dict[str, Kind] = {
    "gaussian": Kind(MultivariateNormal, ("covariance", "floor"), (), "mean ± σ", _describe_normal),
    "student-t": Kind(StudentT, ("covariance", "floor"), (), "location ± scale", _describe_student),
    "poisson": Kind(Poisson, (), (), "rate", _describe_rates),
    "bernoulli": Kind(Bernoulli, (), (), "probability", _describe_probabilities),
    "binomial": Kind(Binomial, ("trials",), ("trials",), "probability", _describe_probabilities),
    "categorical": Kind(Categorical, ("categories",), ("categories",), "probabilities", _describe_categorical),
}
