"""A mixture fitted to a table by classical EM, its components in order."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.data import Table
from pnem.inference import ClassicalEM, ConvergenceWarning
from pnem.models import Likelihood, SpatialMixture, decoders

__all__ = ["FittedMixture", "fit_mixture"]

# Items whose responsibilities are computed at once.
PIECE = 2**14


class FittedMixture(NamedTuple):
    """A mixture fitted to a table, its components in the order of their weights, the largest first.

    Attributes:
        table: what it was fitted to.
        model: the mixture, its mixing weights the fitted ones.
        theta: (1, K, M).
        log_mixing: log π, (1, K).
        gamma: responsibilities, (K, N).
        bound: the log evidence that each E-step saw, with items counted by their weights, in nats per item: (T,).
        converged: whether EM stopped because the bound rose no more.
        warnings: if not, what there is to say about it.
    """

    table: Table
    model: SpatialMixture
    theta: Tensor
    log_mixing: Tensor
    gamma: Tensor
    bound: Tensor
    converged: bool
    warnings: tuple[str, ...]

    @property
    def num_items(self) -> float:
        """N, or the sum of the weights."""
        return float(len(self.table.values) if self.table.weight is None else self.table.weight.sum())


def fit_mixture(
    table: Table,
    likelihood: Likelihood,
    components: int,
    *,
    restarts: int,
    iterations: int,
    tol: float,
    initial: str,
    seed: int,
    device: torch.device,
) -> FittedMixture:
    """Fits a mixture with a constant decoder to the rows of a table, in double precision.

    Raises:
        ModelError: the data are outside the likelihood's support, components < 1, or every start collapsed.
        StrategyError: restarts, iterations, tol or initial are not possible.
    """
    C = table.values.shape[1]
    decoder = decoders.Constant(likelihood.num_parameters(C))
    model = SpatialMixture(decoder, likelihood, components, mixing="learned").double().to(device)
    strategy = ClassicalEM(model, iterations=iterations, tol=tol, initial=initial)
    x = torch.from_numpy(table.values).to(device).unsqueeze(0)
    weight = None if table.weight is None else torch.from_numpy(table.weight).to(device).unsqueeze(0)
    torch.manual_seed(seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fit = strategy.fit(x, restarts=restarts, weight=weight)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, ConvergenceWarning)]
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    order = fit.log_mixing[0].argsort(descending=True, stable=True)
    theta, log_mixing = fit.theta[:, order], fit.log_mixing[:, order]
    model.set_log_mixing(log_mixing)
    with torch.no_grad():
        gamma = torch.cat([model.responsibilities(piece, theta)[0] for piece in x.split(PIECE, 1)], -1)
    count = len(table.values) if weight is None else weight.sum()
    bound = fit.elbo_trace[:, 0] / count
    return FittedMixture(table, model, theta, log_mixing, gamma, bound, fit.converged, tuple(said))
