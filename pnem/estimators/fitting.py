"""Classical EM as the estimators run it: seeded, in double precision, with scikit-learn's warning."""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from torch import Tensor

import pnem.inference
from pnem.devices import forked_rng, resolve_device
from pnem.inference import ClassicalEM
from pnem.models import SpatialMixture

__all__ = ["Fitted", "run_em", "tensor"]


class Fitted(NamedTuple):
    """The model and θ, on the CPU; the evidence of the whole at each iteration, in nats, (T,); and if it converged."""

    model: SpatialMixture
    theta: Tensor
    evidence: np.ndarray
    converged: bool


def tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor, which shares its memory where it can."""
    # As joblib's workers get large arrays: PyTorch warns of what cannot be written to.
    return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device)


def run_em(
    declare: Callable[[], SpatialMixture],
    x: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    max_iter: int,
    tol: float,
    initial: str = "k-means++",
    n_init: int = 1,
    random_state: int | np.random.RandomState | None = None,
    device: str = "cpu",
    progress: bool = False,
) -> Fitted:
    """Fits a model in double precision, and leaves torch's random state as it was.

    Args:
        declare: gives the generative model.
        x: the data, (B, D, C).
        weight: how often each item counts, (B, D).
        max_iter: at most this many iterations.
        tol: as of `ClassicalEM`, in nats per item.
        initial: where `ClassicalEM` starts.
        n_init: so many starts, of which the best is kept.
        random_state: as everywhere in scikit-learn.
        device: where to compute, as of `resolve_device`.
        progress: whether to show a progress bar.

    Warns:
        sklearn.exceptions.ConvergenceWarning: the evidence still changed by more than tol.
    """
    where = resolve_device(device)
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max)
    x_there = tensor(x, where)
    weight_there = None if weight is None else tensor(weight, where)
    with forked_rng(where), warnings.catch_warnings():
        # In its place comes scikit-learn's, which is what scikit-learn's users filter.
        warnings.simplefilter("ignore", pnem.inference.ConvergenceWarning)
        torch.manual_seed(seed)
        model = declare().to(where, torch.float64)
        strategy = ClassicalEM(model, iterations=max_iter, tol=tol, initial=initial)
        fit = strategy.fit(x_there, restarts=n_init, weight=weight_there, progress=progress)
    if not fit.converged:
        warnings.warn(
            f"EM did not converge within tol={tol:g} in {len(fit.elbo_trace)} iterations: raise max_iter or tol, or "
            "try other starts",
            ConvergenceWarning,
            stacklevel=3,
        )
    return Fitted(model.cpu(), fit.theta.cpu(), fit.elbo_trace.sum(-1).cpu().numpy(), fit.converged)
