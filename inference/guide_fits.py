"""A Pyro guide's q(θ) of given images: made, checked, fitted by SVI, and read off as a distribution."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.util import detach
from pyro.infer import autoguide
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pnem.inference.distributions import Concatenated, OfAllComponents
from pnem.inference.errors import StrategyError
from pnem.inference.guide_sites import check_sites, sites_of
from pnem.inference.posterior import extended
from pnem.inference.svi import Climb, climb, collapsed, curvature, isolated
from pnem.models import SpatialMixture

__all__ = ["AUTO_GUIDES", "Fitted", "Options", "fit_auto", "fit_callable", "mean_of"]

AUTO_GUIDES = ("AutoDelta", "AutoNormal", "AutoMultivariateNormal", "AutoLaplaceApproximation", "AutoIAFNormal")
MEAN_DRAWS = 1000


class Options(NamedTuple):
    """How the guides of an image are optimised: see `PyroGuide`."""

    learning_rate: float
    steps: int
    particles: int
    init_scale: float


class Fitted(NamedTuple):
    """q(θ) of B images, and how they were found.

    Attributes:
        climb: the optimisation; its snapshots are the means of q, if they were asked for.
        location: (B, K, M), of a Delta or a product of normals; else None.
        scale: (B, K, M), of a product of normals; else None.
        distribution: q(θ) where it is neither.
    """

    climb: Climb
    location: Tensor | None = None
    scale: Tensor | None = None
    distribution: dist.TorchDistribution | None = None

    def select(self, images: Tensor) -> "Fitted":
        """That of some of the images."""
        trace, converged, snapshots = self.climb
        chosen = Climb(trace[:, images], converged[images], [value[images] for value in snapshots])
        location, scale = (None if value is None else value[images] for value in (self.location, self.scale))
        q = self.distribution
        if isinstance(q, Concatenated):
            q = Concatenated([q.parts[i] for i in images.tolist()])
        elif isinstance(q, OfAllComponents) and isinstance(q.flat, dist.MultivariateNormal):
            normal = dist.MultivariateNormal(q.flat.loc[images], scale_tril=q.flat.scale_tril[images])
            q = OfAllComponents(normal, q.event_shape[0])
        return Fitted(chosen, location, scale, q)


def fit_auto(name: str, model: SpatialMixture, x: Tensor, options: Options, *, keep_means: bool) -> Fitted:
    """q(θ) of images `x` (B, D, C) by one of Pyro's autoguides.

    All images are one problem to Pyro; but flows, which are networks, are fitted to one image after another.
    """
    if name != "AutoIAFNormal":
        return _fit_auto(name, model, x, options, keep_means)
    fits = [_fit_auto(name, model, x[b : b + 1], options, keep_means) for b in range(len(x))]
    longest = max(len(fit.climb.elbo_trace) for fit in fits)
    trace = torch.cat([extended(fit.climb.elbo_trace, longest) for fit in fits], 1)
    snapshots: list[Tensor] = []
    if keep_means:
        snapshots = list(torch.cat([extended(torch.stack(fit.climb.snapshots), longest) for fit in fits], 1))
    whole = Climb(trace, torch.cat([fit.climb.converged for fit in fits]), snapshots)
    return Fitted(whole, distribution=Concatenated([fit.distribution for fit in fits if fit.distribution is not None]))


def fit_callable(
    guide: Callable[[Tensor], Any], model: SpatialMixture, x: Tensor, options: Options, *, keep_means: bool
) -> Fitted:
    """q(θ) of images `x` (B, D, C) by a guide of the user's own, which sees all of them.

    Raises:
        StrategyError: it samples other sites or shapes than the model's, or has no parameters.
    """
    # A module would go on from where the last images left it.
    guide = copy.deepcopy(guide) if isinstance(guide, nn.Module) else guide
    with isolated(model, x) as images:
        with pyro.validation_enabled(True):
            check_sites(guide, model, images)

        def read() -> dist.TorchDistribution:
            with torch.no_grad():
                q = sites_of(guide, images)["theta"]["fn"]
                return dist.Delta(q.v, event_dim=2) if isinstance(q, dist.Delta) else q.to_event(1)

        found = climb(
            collapsed(model),
            guide,
            images,
            separate=False,
            learning_rate=options.learning_rate,
            steps=options.steps,
            particles=options.particles,
            watch=(lambda: mean_of(read())) if keep_means else None,
        )
        # The guide may hold its parameters beyond this fit.
        q = copy.deepcopy(detach(read()))
    if isinstance(q, dist.Delta):
        return Fitted(found, q.v)
    if isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):
        return Fitted(found, q.mean, q.stddev)
    return Fitted(found, distribution=q)


def mean_of(q: dist.TorchDistribution) -> Tensor:
    """The mean of q(θ), (B, K, M), from draws where it has no closed form."""
    try:
        return q.mean
    except NotImplementedError:
        with torch.no_grad():
            return q.sample(torch.Size([MEAN_DRAWS])).mean(0)


def _fit_auto(name: str, model: SpatialMixture, x: Tensor, options: Options, keep_means: bool) -> Fitted:
    program = collapsed(model)
    with isolated(model, x) as images:
        guide = _make(name, program, model, images, options.init_scale)

        def means() -> Tensor:
            return mean_of(_flow(guide, model)) if name == "AutoIAFNormal" else guide.median(images)["theta"]

        found = climb(
            program,
            guide,
            images,
            separate=True,
            learning_rate=options.learning_rate,
            steps=options.steps,
            # Without a distribution to draw from there is nothing to average over.
            particles=1 if name in ("AutoDelta", "AutoLaplaceApproximation") else options.particles,
            watch=means if keep_means else None,
        )
        guide.requires_grad_(False)
        if name == "AutoDelta":
            return Fitted(found, means())
        if name == "AutoNormal":
            return Fitted(found, means(), guide.scales.theta.detach())
        if name == "AutoLaplaceApproximation":
            return Fitted(found, distribution=laplace_approximation(model, images, means()))
        if name == "AutoIAFNormal":
            return Fitted(found, distribution=_flow(guide, model))
        normal = guide.posterior()
        return Fitted(found, distribution=_normal(normal.loc.squeeze(1), normal.scale_tril.squeeze(1), model))


def laplace_approximation(model: SpatialMixture, x: Tensor, theta: Tensor) -> OfAllComponents:
    """The normal around a mode θ (B, K, M) of p(θ | x), with the covariance of minus the inverse Hessian there.

    Raises:
        StrategyError: a Hessian that is not negative definite.
    """
    factor, failed = torch.linalg.cholesky_ex(curvature(model, x, theta))
    if bool(failed.any()):
        raise StrategyError(
            f"in {int((failed > 0).sum())} of {len(x)} images AutoLaplaceApproximation did not end at a mode: "
            "−log p(x, θ) is not convex there, so there is no normal approximation; allow more steps, or use "
            "AutoMultivariateNormal"
        )
    return _normal(theta.flatten(1), torch.linalg.cholesky(torch.cholesky_inverse(factor)), model)


def _make(name: str, program: Callable[[Tensor], None], model: SpatialMixture, x: Tensor, scale: float) -> Any:
    start = autoguide.init_to_sample
    guide: Any
    if name in ("AutoDelta", "AutoLaplaceApproximation"):
        guide = autoguide.AutoDelta(program, init_loc_fn=start)
    elif name == "AutoNormal":
        guide = autoguide.AutoNormal(program, init_loc_fn=start, init_scale=scale)
    elif name == "AutoMultivariateNormal":
        return MultivariateNormals(model, x, scale)
    else:
        guide = autoguide.AutoIAFNormal(program)
    with _defaults_of(x):
        guide(x)
    return guide


class MultivariateNormals(PyroModule):
    """Pyro's `AutoMultivariateNormal`, one for each image: a normal with full covariance over all components."""

    def __init__(self, model: SpatialMixture, x: Tensor, scale: float):
        super().__init__()
        B, K = len(x), model.num_components
        self.num_components = K
        L = K * model.latent_features
        location = torch.randn(B, 1, L, dtype=x.dtype, device=x.device)
        self.loc = nn.Parameter(location)
        self.scale = PyroParam(torch.full_like(location, scale), constraints.softplus_positive)
        factor = torch.eye(L, dtype=x.dtype, device=x.device).repeat(B, 1, 1, 1)
        self.scale_tril = PyroParam(factor, constraints.unit_lower_cholesky)

    def posterior(self) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale.unsqueeze(-1) * self.scale_tril)

    def median(self, x: Tensor) -> dict[str, Tensor]:
        return {"theta": self.loc.detach().unflatten(-1, (self.num_components, -1)).squeeze(1)}

    def forward(self, x: Tensor) -> None:
        with pyro.plate("images", len(x), dim=-2):
            theta = pyro.sample("theta_of_all", self.posterior(), infer={"is_auxiliary": True})
            theta = theta.unflatten(-1, (self.num_components, -1)).squeeze(-3)
            with pyro.plate("components", self.num_components, dim=-1):
                pyro.sample("theta", dist.Delta(theta, event_dim=1))


def _normal(location: Tensor, factor: Tensor, model: SpatialMixture) -> OfAllComponents:
    """N(location, factor factorᵀ) of θ: (B, K·M) and (B, K·M, K·M)."""
    normal = dist.MultivariateNormal(location.detach(), scale_tril=factor.detach(), validate_args=False)
    return OfAllComponents(normal, model.num_components)


def _flow(guide: Any, model: SpatialMixture) -> OfAllComponents:
    base = guide.get_base_dist().expand([1])
    flow = dist.TransformedDistribution(base, guide.get_transform(), validate_args=False)
    return OfAllComponents(flow, model.num_components)


@contextlib.contextmanager
def _defaults_of(x: Tensor) -> Iterator[None]:
    """What is made within has the dtype and device of `x`."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(x.dtype)
    try:
        with torch.device(x.device):
            yield
    finally:
        torch.set_default_dtype(dtype)
