"""What classical EM costs: the same Gaussian mixture from the same start in scikit-learn, pnem and pomegranate.

Run as a script. Double precision, one thread unless told. All fits are of the same number of iterations, their set-up
included. pomegranate is compared where it is installed. Then twenty starts as one batch against twenty fits.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from pnem.inference import ClassicalEM, Fit
from pnem.models import MultivariateNormal, SpatialMixture, decoders

BARS = {"full": 4.0, "diagonal": 3.0}
RESTARTS = 20


def timed(fit: Callable[[], object]) -> tuple[object, float]:
    """What it returns, and seconds."""
    start = time.perf_counter()
    result = fit()
    return result, time.perf_counter() - start


def strategy(covariance: str, C: int, K: int, **options: object) -> ClassicalEM:
    """pnem's, in double precision."""
    likelihood = MultivariateNormal(covariance)
    decoder = decoders.Constant(likelihood.num_parameters(C))
    return ClassicalEM(SpatialMixture(decoder, likelihood, K, mixing="learned").double(), **options)  # type: ignore[arg-type]


def scikit_learn(covariance: str, gamma: np.ndarray, iterations: int) -> GaussianMixture:
    """scikit-learn's, from responsibilities (N, K)."""
    kind = {"diagonal": "diag"}.get(covariance, covariance)
    mixture = GaussianMixture(gamma.shape[1], covariance_type=kind, max_iter=iterations, tol=0)
    mixture._initialize_parameters = lambda x, _, **given: mixture._initialize(x, gamma, **given)
    return mixture


def pomegranate(covariance: str, x: torch.Tensor, gamma: torch.Tensor, iterations: int) -> float | None:
    """Seconds of pomegranate's, from the moments of the same responsibilities; None where it is not installed."""
    try:
        from pomegranate.distributions import Normal
        from pomegranate.gmm import GeneralMixtureModel
    except ImportError:
        return None
    weight = gamma.sum(0)
    means = gamma.T @ x / weight[:, None]
    parts = []
    for k, mean in enumerate(means):
        scatter = (gamma[:, k, None] * (x - mean)).T @ (x - mean) / weight[k]
        diagonal = covariance == "diagonal"
        kind = "diag" if diagonal else "full"
        parts.append(Normal(mean, scatter.diagonal().clone() if diagonal else scatter, covariance_type=kind))
    mixture = GeneralMixtureModel(parts, priors=weight / weight.sum(), max_iter=iterations, tol=-np.inf)
    return timed(lambda: mixture.fit(x))[1]


def main() -> None:
    """Prints seconds, their ratio, and how far apart the evidence ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 200_000), ("columns", 16), ("components", 16), ("iterations", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    N, C, K = options.rows, options.columns, options.components
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, C)) + 3 * rng.normal(size=(K, C))[rng.integers(0, K, N)]
    gamma = np.eye(K)[rng.integers(0, K, N)]
    items, start = (torch.from_numpy(value).to(options.device) for value in (x, gamma))
    for covariance, bar in BARS.items():
        theirs = scikit_learn(covariance, gamma, options.iterations)
        _, their_seconds = timed(lambda: theirs.fit(x))  # noqa: B023
        em = strategy(covariance, C, K, iterations=options.iterations, tol=0)
        em.model.to(options.device)

        def fit(em: ClassicalEM = em) -> Fit:
            found = em.fit(items[None], gamma=start.T[None])
            # Waits for a GPU.
            found.elbo_trace.cpu()
            return found

        if options.device != "cpu":
            fit()
        ours, seconds = timed(fit)
        apart = abs(ours.elbo_trace[-1].item() / N - theirs.lower_bound_)
        print(
            f"{covariance}: scikit-learn {their_seconds:.2f} s, pnem {seconds:.2f} s, "
            f"ratio {their_seconds / seconds:.1f} (bar {bar:.0f}); evidence {apart:.1e} nats per item apart"
        )
        theirs_too = pomegranate(covariance, torch.from_numpy(x), torch.from_numpy(gamma), options.iterations)
        if theirs_too is not None:
            print(f"{covariance}: pomegranate {theirs_too:.2f} s, ratio {theirs_too / seconds:.1f}")
    few = items[None, : N // 20]
    for covariance in BARS:
        em = strategy(covariance, C, K, iterations=options.iterations, tol=0)
        em.model.to(options.device)
        _, batch = timed(lambda: em.fit(few, restarts=RESTARTS))  # noqa: B023
        _, runs = timed(lambda: [em.fit(few) for _ in range(RESTARTS)])  # noqa: B023
        print(
            f"{covariance}: {RESTARTS} starts on {few.shape[1]} rows, one batch {batch:.2f} s, "
            f"one by one {runs:.2f} s, ratio {runs / batch:.1f}"
        )


if __name__ == "__main__":
    main()
