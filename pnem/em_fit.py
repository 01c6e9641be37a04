"""A mixture fitted to a table by classical EM, its components in order."""

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.data import Rows, Table
from pnem.inference import ClassicalEM, ConvergenceWarning, OnlineEM
from pnem.models import Likelihood, SpatialMixture, decoders

__all__ = ["FittedMixture", "fit_mixture"]

# Items whose responsibilities are computed at once.
PIECE = 2**14


class FittedMixture(NamedTuple):
    """A mixture fitted to a table, its components in the order of their weights, the largest first.

    Attributes:
        data: what it was fitted to.
        model: the mixture, its mixing weights the fitted ones.
        theta: (1, K, M).
        log_mixing: log π, (1, K).
        bound: the log evidence that each E-step saw, with items counted by their weights, in nats per item: (T,).
        converged: whether EM stopped because the bound rose no more.
        warnings: if not, what there is to say about it.
    """

    data: Table | Rows
    model: SpatialMixture
    theta: Tensor
    log_mixing: Tensor
    bound: Tensor
    converged: bool
    warnings: tuple[str, ...]

    @property
    def total_weight(self) -> float:
        """N, or the sum of the weights."""
        return float(self.data.num_items if self.data.weight is None else self.data.weight.sum())

    def responsibilities(self) -> Iterator[Tensor]:
        """γ of the items in their order, in pieces (K, n) on the CPU, so that those of all need not fit into memory."""
        for chunk in self.data.in_order():
            for piece in chunk.split(PIECE):
                with torch.no_grad():
                    gamma = self.model.responsibilities(piece.to(self.theta.device).unsqueeze(0), self.theta)
                yield gamma[0].cpu()


def fit_mixture(
    data: Table | Rows,
    likelihood: Likelihood,
    components: int,
    *,
    restarts: int,
    iterations: int,
    tol: float,
    initial: str,
    seed: int,
    device: torch.device,
    online: bool = False,
    progress: bool = False,
) -> FittedMixture:
    """Fits a mixture with a constant decoder to the rows of a table, in memory or not, in double precision.

    Args:
        online: whether by `OnlineEM`, whose iterations are passes.
        progress: whether to show a progress bar.
        data, likelihood, components, restarts, iterations, tol, initial, seed, device: as of the command.

    Raises:
        DataError: a stream's file cannot be read.
        ModelError: the data are outside the likelihood's support, components < 1, or every start collapsed.
        StrategyError: restarts, iterations, tol or initial are not possible.
    """
    decoder = decoders.Constant(likelihood.num_parameters(len(data.names)))
    model = SpatialMixture(decoder, likelihood, components, mixing="learned").double().to(device)
    strategy = (OnlineEM if online else ClassicalEM)(model, iterations=iterations, tol=tol, initial=initial)
    x = data if isinstance(data, Rows) else torch.from_numpy(data.values).to(device).unsqueeze(0)
    weight = None if data.weight is None else torch.from_numpy(data.weight).to(device).unsqueeze(0)
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fit = strategy.fit(x, restarts=restarts, weight=weight, progress=progress)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    order = fit.log_mixing[0].argsort(descending=True, stable=True)
    theta, log_mixing = fit.theta[:, order], fit.log_mixing[:, order]
    model.set_log_mixing(log_mixing)
    fitted = FittedMixture(data, model, theta, log_mixing, fit.elbo_trace[:, 0], fit.converged, tuple(said))
    return fitted._replace(bound=fitted.bound / fitted.total_weight)
