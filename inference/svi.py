"""Pyro's SVI on θ of given images, z summed out, until it converges."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.models import SpatialMixture

__all__ = ["Climb", "climb", "collapsed", "curvature", "isolated", "log_joint_of_theta"]

# Converged after so many windows of so many steps without improvement (Cremer, Li & Duvenaud 2018).
PATIENCE = 10
WINDOW = 100


class Climb(NamedTuple):
    """How an optimisation went.

    Attributes:
        elbo_trace: (T, B): the mean over the steps of each window, in nats per image.
        converged: (B,), whether each image stopped improving.
        snapshots: what `watch` returned after each window.
    """

    elbo_trace: Tensor
    converged: Tensor
    snapshots: list[Tensor]


class PerImageELBO(Trace_ELBO):
    """Pyro's `Trace_ELBO` of all images, which remembers that of each."""

    def __init__(self, particles: int):
        super().__init__(num_particles=particles, max_plate_nesting=2, vectorize_particles=particles > 1)
        self.total: Tensor | float = 0.0
        self.count = 0

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        traces = super()._get_trace(model, guide, args, kwargs)
        for trace, sign in zip(traces, (1, -1), strict=True):
            for site in trace.nodes.values():
                if site["type"] == "sample":
                    log_prob = sign * site["log_prob"].detach().sum(-1)
                    self.total = self.total + (log_prob.flatten(0, -2).mean(0) if log_prob.dim() > 1 else log_prob)
        self.count += 1
        return traces

    def pop(self) -> Tensor:
        """The mean since the last pop: (B,), in nats per image."""
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        assert isinstance(mean, Tensor)
        return mean


def log_joint_of_theta(model: SpatialMixture, x: Tensor, theta: Tensor) -> Tensor:
    """log p(x, θ) in nats per image, z summed out: x (B, D, C), θ (..., B, K, M) -> (..., B)."""
    return model.log_joint_at(x, model.decode(theta)).logsumexp(-2).sum(-1) + model.log_prior(theta)


def curvature(model: SpatialMixture, x: Tensor, theta: Tensor, *, diagonal: bool = False) -> Tensor:
    """−∂² log p(x, θ) / ∂θ² at θ (B, K, M), over an image's K·M dimensions: (B, K·M, K·M), or its diagonal (B, K·M).

    K·M products of the Hessian with a vector.
    """
    flat = theta.detach().flatten(1)
    gradient = torch.func.grad(lambda flat: -log_joint_of_theta(model, x, flat.view(theta.shape)).sum())
    _, pull_back, *_ = torch.func.vjp(gradient, flat)
    columns = []
    for j, direction in enumerate(torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)):
        column = pull_back(direction.expand_as(flat))[0].detach()
        columns.append(column[:, j] if diagonal else column)
    return torch.stack(columns, -1)


def collapsed(model: SpatialMixture) -> Callable[[Tensor], None]:
    """The model as a Pyro program of θ alone, which z is summed out of: log p(x, θ) is a factor."""

    def program(x: Tensor) -> None:
        # The site of a flat prior: autoguides start from its draws, N(0, I), whatever p(θ) is.
        site = dist.Normal(x.new_zeros(model.latent_features), 1.0).to_event(1).mask(False)
        with pyro.plate("images", len(x), dim=-2):
            with pyro.plate("components", model.num_components, dim=-1):
                theta = pyro.sample("theta", site)
            log_p = log_joint_of_theta(model, x, theta)
            pyro.factor("log_joint", log_p.unsqueeze(-1))

    return program


@contextlib.contextmanager
def isolated(model: SpatialMixture, x: Tensor) -> Iterator[Tensor]:
    """Images for an inner inference that no outer trace, parameter store or gradient sees.

    Within, the model's parameters count as constants.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with (
        poutine.block(),
        pyro.settings.context(module_local_params=False),
        pyro.get_param_store().scope(),
        torch.inference_mode(False),
        torch.enable_grad(),
        # An ELBO that is not finite is found after each window; looking for it at every site takes time.
        pyro.validation_enabled(False),
    ):
        for parameter in learned:
            parameter.requires_grad_(False)
        try:
            yield x.detach().clone()
        finally:
            for parameter in learned:
                parameter.requires_grad_(True)


def climb(
    program: Callable[[Tensor], None],
    guide: Callable[[Tensor], Any],
    x: Tensor,
    *,
    separate: bool,
    learning_rate: float,
    steps: int,
    particles: int,
    watch: Callable[[], Tensor] | None = None,
) -> Climb:
    """Optimises the guide's parameters, and leaves them at their mean since the best window.

    The average of the iterates of a plateau is nearer to the optimum than any of them (Polyak & Juditsky 1992; Dhaka
    et al. 2020).

    Args:
        program: the model.
        guide: the guide.
        x: the images (B, D, C).
        separate: whether all parameters have a leading axis B, so that every image is a problem of its own and ends
            when it has converged by itself.
        learning_rate: Adam's.
        steps: at most this many.
        particles: draws of θ in each step, in one call.
        watch: what to keep after each window, with a leading axis B.

    Raises:
        StrategyError: the guide has no parameters, or the ELBO is not finite.
    """
    elbo = PerImageELBO(particles)
    svi = SVI(program, guide, Adam({"lr": learning_rate}), elbo)
    groups = len(x) if separate else 1
    best = x.new_full((groups,), -torch.inf)
    waited = torch.zeros_like(best)
    averages: list[Tensor] = []
    trace: list[Tensor] = []
    snapshots: list[Tensor] = []
    for begun in range(0, steps, WINDOW):
        sums: list[Tensor] = []
        size = min(WINDOW, steps - begun)
        for _ in range(size):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Encountered NaN")
                svi.step(x)
            values = _parameters(groups)
            sums = [total + value for total, value in zip(sums, values, strict=True)] if sums else values
        value = elbo.pop().expand(len(x))
        if not bool(value.isfinite().all()):
            raise StrategyError(
                f"the guide's ELBO is not finite after {begun + size} steps: lower learning_rate, or init_scale"
            )
        judged = value if separate else value.sum(0, keepdim=True)
        active, better = waited < PATIENCE, judged > best
        # A running mean over the windows since the best one; that of an image that has ended stays.
        share = torch.where(better, 1.0, 1 / (waited + 2)).where(active, 0.0).unsqueeze(-1)
        means = [total / size for total in sums]
        averages = averages or means
        averages = [average + share * (mean - average) for average, mean in zip(averages, means, strict=True)]
        best = torch.where(active & better, judged, best)
        waited = torch.where(active & better, 0.0, waited + active)
        trace.append(torch.where(active, value, trace[-1]) if trace else value)
        if watch is not None:
            # It may be a view of the parameters, which the next step changes.
            now = watch().detach().clone()
            seen = active.reshape(-1, *[1] * (now.dim() - 1))
            snapshots.append(torch.where(seen, now, snapshots[-1]) if snapshots else now)
        if bool((waited >= PATIENCE).all()):
            break
    with torch.no_grad():
        for (_, parameter), average in zip(pyro.get_param_store().named_parameters(), averages, strict=True):
            parameter.copy_(average.reshape(parameter.shape))
    return Climb(torch.stack(trace), (waited >= PATIENCE).expand(len(x)), snapshots)


def _parameters(groups: int) -> list[Tensor]:
    values = [value.detach().clone().reshape(groups, -1) for _, value in pyro.get_param_store().named_parameters()]
    if not values:
        raise StrategyError("the guide has no parameters to optimise: declare them by pyro.param or pyro.module")
    return values
