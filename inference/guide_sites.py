"""What a guide of the user's own must sample."""

from collections.abc import Callable
from typing import Any

from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.models import SpatialMixture

__all__ = ["check_sites", "sites_of"]


def sites_of(guide: Callable[[Tensor], Any], x: Tensor) -> dict[str, Any]:
    """What a guide samples for images `x`, by name."""
    nodes = poutine.trace(guide).get_trace(x).nodes
    return {name: site for name, site in nodes.items() if site["type"] == "sample" and not site_is_subsample(site)}


def check_sites(guide: Callable[[Tensor], Any], model: SpatialMixture, x: Tensor) -> None:
    """Raises `StrategyError` unless the guide samples the model's θ for images `x`, and nothing else."""
    B, K, M = len(x), model.num_components, model.latent_features
    expected = (
        f'a guide for this model samples one site, "theta", of shape (B, K, M) = {(B, K, M)} with event dim 1, in '
        f'plates "images" (size {B}, dim -2) and "components" (size {K}, dim -1)'
    )
    remedy = (
        'write it as `with pyro.plate("images", len(x), dim=-2), pyro.plate("components", K, dim=-1): '
        'pyro.sample("theta", q.to_event(1))`'
    )
    try:
        sites = sites_of(guide, x)
    except ValueError as error:
        raise StrategyError(f"{expected}, but this one fails: {error}; {remedy}") from error
    found = {
        name: (
            tuple(site["value"].shape),
            site["fn"].event_dim,
            {(frame.name, frame.size, frame.dim) for frame in site["cond_indep_stack"] if frame.vectorized},
        )
        for name, site in sites.items()
    }
    if found == {"theta": ((B, K, M), 1, {("images", B, -2), ("components", K, -1)})}:
        return
    described = "; ".join(
        f'"{name}" of shape {shape} with event dim {event_dim} in '
        + (", ".join(f'"{plate}" (size {size}, dim {dim})' for plate, size, dim in sorted(plates)) or "no plate")
        for name, (shape, event_dim, plates) in found.items()
    )
    raise StrategyError(f"{expected}, but this one samples {described or 'nothing'}: {remedy}")
