"""What classical EM costs beside scikit-learn: the same Gaussian mixture from the same start, run as a script.

Double precision, one thread unless told. Both fits are of the same number of iterations, their set-up included.
"""

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from pnem.inference import ClassicalEM
from pnem.models import MultivariateNormal, SpatialMixture, decoders

BARS = {"full": 4.0, "diagonal": 3.0}


def main() -> None:
    """Prints seconds, their ratio, and how far apart the evidence ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 200_000), ("columns", 16), ("components", 16), ("iterations", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    N, C, K = options.rows, options.columns, options.components
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, C)) + 3 * rng.normal(size=(K, C))[rng.integers(0, K, N)]
    gamma = np.eye(K)[rng.integers(0, K, N)]
    for covariance, bar in BARS.items():
        kind = {"diagonal": "diag"}.get(covariance, covariance)
        theirs = GaussianMixture(K, covariance_type=kind, max_iter=options.iterations, tol=0)
        theirs._initialize_parameters = lambda x, _, theirs=theirs, **given: theirs._initialize(x, gamma, **given)
        start = time.perf_counter()
        theirs.fit(x)
        their_seconds = time.perf_counter() - start
        likelihood = MultivariateNormal(covariance)
        decoder = decoders.Constant(likelihood.num_parameters(C))
        model = SpatialMixture(decoder, likelihood, K, mixing="learned").double()
        strategy = ClassicalEM(model, iterations=options.iterations, tol=0)
        start = time.perf_counter()
        ours = strategy.infer(torch.from_numpy(x)[None], gamma=torch.from_numpy(gamma.T.copy())[None])
        seconds = time.perf_counter() - start
        apart = abs(ours.elbo_trace[-1].item() / N - theirs.lower_bound_)
        print(
            f"{covariance}: scikit-learn {their_seconds:.2f} s, pnem {seconds:.2f} s, "
            f"ratio {their_seconds / seconds:.1f} (bar {bar:.0f}); evidence {apart:.1e} nats per item apart"
        )


if __name__ == "__main__":
    main()
