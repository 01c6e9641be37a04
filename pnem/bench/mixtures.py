"""Classical EM of a Gaussian mixture: the same start and iterations in pnem, scikit-learn and pomegranate."""

import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning as TheirConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits
from torch import Tensor

from pnem.bench.clock import Spread, alternately
from pnem.bench.report import Row
from pnem.inference import ClassicalEM, ConvergenceWarning
from pnem.models import MultivariateNormal, SpatialMixture, decoders

__all__ = ["MixtureSize", "classical_em", "items", "scikit_learn", "time_mixtures"]


class MixtureSize(NamedTuple):
    """Items, their features C, components K, iterations, and starts run as one batch on a twentieth of the items."""

    items: int = 50_000
    C: int = 16
    K: int = 16
    iterations: int = 10
    restarts: int = 10


def time_mixtures(size: MixtureSize, *, repetitions: int, device: torch.device, seed: int) -> Iterator[Row]:
    """Rows for full and diagonal covariances, in double precision; every fit includes its set-up."""
    x, gamma = items(size, seed)
    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        # All do so many iterations, converged or not.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", TheirConvergenceWarning)
        for covariance in ("full", "diagonal"):
            yield from _time(covariance, x, gamma, size, repetitions, device)


def items(size: MixtureSize, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items (N, C) around K centres, and random responsibilities (N, K) of one component each to start from."""
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(size.K, size.C))
    x = rng.normal(size=(size.items, size.C)) + centres[rng.integers(0, size.K, size.items)]
    return x, np.eye(size.K)[rng.integers(0, size.K, size.items)]


def _time(
    covariance: str, x: np.ndarray, gamma: np.ndarray, size: MixtureSize, repetitions: int, device: torch.device
) -> Iterator[Row]:
    section = (
        f"classical EM, {covariance} covariances\n{size.items:,} × {size.C}, K {size.K}, {size.iterations} iterations"
    )
    em = classical_em(covariance, size, device)
    given, start = (torch.from_numpy(value).to(device) for value in (x, gamma))
    fits: dict[str, Callable[[], object]] = {
        "pnem": lambda: em.fit(given[None], gamma=start.T[None]).elbo_trace.cpu(),
        "scikit-learn": lambda: scikit_learn(covariance, gamma, size).fit(x),
    }
    theirs = _pomegranate(covariance, torch.from_numpy(x), torch.from_numpy(gamma), size)
    if theirs is not None:
        fits["pomegranate"] = theirs
    few = given[None, : max(size.items // 20, size.K + 1)]
    starts: dict[str, Callable[[], object]] = {
        "batch": lambda: em.fit(few, restarts=size.restarts).elbo_trace.cpu(),
        "one by one": lambda: [em.fit(few).elbo_trace.cpu() for _ in range(size.restarts)],
    }
    for each in (fits, starts):
        alternately(each, 1, device)
    seconds, several = (alternately(each, repetitions, device) for each in (fits, starts))
    for name in ("pnem", "scikit-learn", "pomegranate"):
        if name not in fits:
            yield Row(section, name, None, note="not installed: pip install pomegranate")
            continue
        speeds = {other: Spread.of(seconds[other] / seconds["pnem"]) for other in fits if name == "pnem" != other}
        yield Row(section, name, Spread.of(1000 * seconds[name]), speeds=speeds)
    speeds = {"one by one": Spread.of(several["one by one"] / several["batch"])}
    note = f"{few.shape[1]:,} items"
    yield Row(
        section, f"pnem, {size.restarts} starts at once", Spread.of(1000 * several["batch"]), speeds=speeds, note=note
    )


def classical_em(covariance: str, size: MixtureSize, device: torch.device) -> ClassicalEM:
    """pnem's, in double precision."""
    likelihood = MultivariateNormal(covariance)
    decoder = decoders.Constant(likelihood.num_parameters(size.C))
    model = SpatialMixture(decoder, likelihood, size.K, mixing="learned").double().to(device)
    return ClassicalEM(model, iterations=size.iterations, tol=0)


def scikit_learn(covariance: str, gamma: np.ndarray, size: MixtureSize) -> GaussianMixture:
    """scikit-learn's, from responsibilities (N, K)."""
    kind = {"diagonal": "diag"}.get(covariance, covariance)
    mixture = GaussianMixture(size.K, covariance_type=kind, max_iter=size.iterations, tol=0)
    # It has no public way to start from responsibilities.
    mixture._initialize_parameters = lambda x, _, **given: mixture._initialize(x, gamma, **given)
    return mixture


def _pomegranate(covariance: str, x: Tensor, gamma: Tensor, size: MixtureSize) -> Callable[[], object] | None:
    """A fit from the moments of the same responsibilities; None where pomegranate is not installed."""
    try:
        from pomegranate.distributions import Normal
        from pomegranate.gmm import GeneralMixtureModel
    except ImportError:
        return None

    def fit() -> object:
        weight = gamma.sum(0)
        means = gamma.T @ x / weight[:, None]
        parts = []
        for k, mean in enumerate(means):
            scatter = (gamma[:, k, None] * (x - mean)).T @ (x - mean) / weight[k]
            given = (scatter.diagonal().clone(), "diag") if covariance == "diagonal" else (scatter, "full")
            parts.append(Normal(mean, given[0], covariance_type=given[1]))
        priors, iterations = weight / weight.sum(), size.iterations
        return GeneralMixtureModel(parts, priors=priors, max_iter=iterations, tol=-np.inf).fit(x)

    return fit
