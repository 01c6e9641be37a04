"""What inference found, for ArviZ: draws of θ and all that follows from them, with named dimensions."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.at_draws import IMAGE, SAMPLE, after_iterations, as_numpy, at_draws
from pnem.diagnostics.checks import check_strategy
from pnem.diagnostics.inference_data import Variable, inference_data
from pnem.errors import RunError, StrategyError
from pnem.inference import Posterior, Strategy
from pnem.inference.checks import require_images, require_proper_prior
from pnem.inference.distributions import Concatenated, Draws, OfAllComponents
from pnem.inference.estimates import check_counts
from pnem.inference.proposals import proposal
from pnem.models import SpatialMixture

if TYPE_CHECKING:
    from pnem.run import Run

__all__ = ["to_arviz"]

CHAINS = 4
DRAWS = 250


@torch.no_grad()
def to_arviz(
    source: "Posterior | Run",
    x: Tensor | np.ndarray,
    *,
    strategy: Strategy | None = None,
    chains: int | None = None,
    draws: int | None = None,
    width: float | str | None = None,
    responsibilities: str = "mean",
) -> Any:
    """Draws of θ from q(θ) and what follows from each, as ArviZ takes them.

    Where q(θ) has a density the draws are independent. What ArviZ says of the chains is then true by construction: it
    tells nothing of how near q(θ) is to p(θ | x); the Pareto k̂ of `sample_stats.elbo`, the log importance weights,
    does. Draws of a sampler are its own, components matched where they are exchangeable.

    ======================  ===================================================  =======================================
    group                   variable                                             dimensions after chain and draw
    ======================  ===================================================  =======================================
    `posterior`             `theta`                                              image, component, latent
    `log_likelihood`        `x`: log p(x_i | θ), z summed out, in nats           image, pixel
    `posterior_predictive`  `x`: images drawn at each θ                          image, pixel, channel
    `sample_stats`          the terms of the ELBO at each θ (see `Terms`), and   image
                            `lp`, log p(x, θ); of NUTS `diverging` (no image)
    `responsibilities`      `gamma`, by default the mean over draws              image, component, pixel
    `iterations`            the terms after each iteration, where there is a     iteration, image (no chain and draw)
                            trace with its q(θ): see `elbo_terms`
    `observed_data`         `x`                                                  image, pixel, channel (no chain, draw)
    ======================  ===================================================  =======================================

    The log-likelihood of whole images is `sample_stats.log_evidence`. With ownership both are of the declared joint
    density, which is not normalised over x: nats of models with different ownership do not compare.

    S draws of B images take S·B·D·(1 + C) numbers of memory: give it a few images, or few draws.

    Args:
        source: a `Run`, whose strategy infers `x`; or the `Posterior` that a strategy gave for `x`.
        x: the images, (B, D, C); for a run also (B, H, W, C).
        strategy: of the posterior; leave it out for a run.
        chains: into how many chains independent draws are divided, 4 by default. A sampler has its own: leave it out.
        draws: how many in each chain, 250 by default; likewise.
        width: where q(θ) is a Delta: of the normal to draw from instead; see `pnem.inference.proposals.proposal`.
        responsibilities: ``"mean"`` over the draws, q(z) = E_q[γ]; or ``"draws"``: γ of each, another S·B·K·D numbers.

    Returns:
        ``arviz.InferenceData`` with ArviZ below version 1, else ``xarray.DataTree``: both go through ``az.summary``,
        ``az.loo``, ``az.compare`` and ``az.plot_trace``, and are saved by ``.to_netcdf(path)``.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: q(θ) is a Delta and no width is given, or has a density and one is given; the prior is flat; a
            posterior without its strategy or of other images; or chains, draws or responsibilities that cannot be.
        RunError: a strategy is given with a run.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.MLP(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> strategy, x = VAE(model), torch.ones(3, 16, 1)
    >>> data = to_arviz(strategy.infer(x), x, strategy=strategy, draws=10)
    >>> dict(data["posterior"].sizes)
    {'chain': 4, 'draw': 10, 'image': 3, 'component': 1, 'latent': 2}
    """
    if responsibilities not in ("mean", "draws"):
        raise StrategyError(f'responsibilities must be "mean" or "draws", but is {responsibilities!r}')
    check_counts(chains=CHAINS if chains is None else chains, draws=DRAWS if draws is None else draws)
    posterior, images, strategy = _resolved(source, x, strategy)
    model = strategy.model
    theta, density = _draws(model, strategy, posterior, images, chains, draws, width)
    groups: dict[str, dict[str, Variable]] = {
        "posterior": {"theta": ((*SAMPLE, "image", "component", "latent"), as_numpy(theta))},
        **at_draws(strategy, posterior, images, theta, density, keep_gamma=responsibilities == "draws"),
        "observed_data": {"x": (IMAGE, as_numpy(images))},
    }
    sampler = _sampler(posterior.q)
    if sampler is not None and sampler.diverging is not None:
        groups["sample_stats"]["diverging"] = (SAMPLE, as_numpy(sampler.diverging))
    coords = {}
    trace = posterior.trace
    if trace is not None and (trace.location is not None or isinstance(posterior.q, dist.Delta)):
        groups["iterations"] = after_iterations(strategy, posterior, images)
        coords["iteration"] = np.arange(1, len(trace.theta) + 1)
    return inference_data(groups, coords=coords, attrs=_attributes(strategy, posterior, density, width))


def _resolved(
    source: "Posterior | Run", x: Tensor | np.ndarray, strategy: Strategy | None
) -> tuple[Posterior, Tensor, Strategy]:
    """The posterior, its images (B, D, C) and its strategy."""
    from pnem.run import Run

    if isinstance(source, Run):
        check_strategy(source.strategy)
        if strategy is not None:
            raise RunError("a run has a strategy: leave strategy out, or give run.using(strategy)")
        images = source.images(x)
        return source.infer(images), images, source.strategy
    if not isinstance(source, Posterior):
        raise StrategyError(f"source must be a Run or a Posterior, but is of type {type(source).__name__}")
    if strategy is None:
        raise StrategyError("a posterior does not know how it was inferred: give strategy, the one that inferred it")
    images = torch.as_tensor(x)
    check_strategy(strategy)
    strategy.model.check(images, missing=True)
    require_images(strategy.model, images)
    shape = (len(images), strategy.model.num_components, strategy.model.latent_features)
    if tuple(source.theta.shape) != shape:
        raise StrategyError(
            f"the posterior's theta has shape {tuple(source.theta.shape)}, but these images and this strategy's model "
            f"need (B, K, M) = {shape}: give the same images and the strategy that inferred them"
        )
    return source, images, strategy


def _draws(
    model: SpatialMixture,
    strategy: Strategy,
    posterior: Posterior,
    x: Tensor,
    chains: int | None,
    draws: int | None,
    width: float | str | None,
) -> tuple[Tensor, dist.TorchDistribution | None]:
    """Draws of θ, (chains, draws, B, K, M), and the density that they are from; None where they are a sampler's."""
    sampler = _sampler(posterior.q)
    if sampler is not None:
        if chains is not None or draws is not None or width is not None:
            raise StrategyError(
                f"{type(strategy).__name__} has chains and draws of its own, {tuple(sampler.draws.shape[:2])}: leave "
                "chains, draws and width out; data.sel(draw=slice(None, None, 10)) has every tenth draw"
            )
        return sampler.draws, None
    if width is None and any(isinstance(part, dist.Delta) for part in _parts(posterior.q)):
        raise StrategyError(
            "q(θ) is a Delta, a single θ of which there are no draws. What is known there is in the posterior itself "
            "(theta, gamma, log_evidence) and in pnem.diagnostics.elbo_terms. Where p(θ) is proper, give width, the "
            'standard deviation of a normal around θ such as width=0.1, or width="laplace"'
        )
    require_proper_prior(model, "drawing θ")
    q = posterior.q if width is None else proposal(model, strategy, x, width=width, posterior=posterior)
    shape = torch.Size([CHAINS if chains is None else chains, DRAWS if draws is None else draws])
    return q.sample(shape), q


def _parts(q: dist.TorchDistribution) -> list[dist.TorchDistribution]:
    return q.parts if isinstance(q, Concatenated) else [q]


def _sampler(q: dist.TorchDistribution) -> Draws | None:
    """The draws of all images where q(θ) is those of a sampler, also batch by batch; else None."""
    parts = [part for part in _parts(q) if isinstance(part, Draws)]
    if not parts or len(parts) < len(_parts(q)):
        return None
    lengths = {tuple(part.draws.shape[:2]) for part in parts}
    if len(lengths) > 1:
        raise StrategyError(
            f"the batches of this posterior have different numbers of chains and draws, {sorted(lengths)}: convert "
            "them one by one"
        )
    diverging = [part.diverging for part in parts if part.diverging is not None]
    # A transition of several batches diverged where that of any did.
    failed = torch.stack(diverging).any(0) if len(diverging) == len(parts) else None
    return Draws(torch.cat([part.draws for part in parts], 2), failed)


def _attributes(
    strategy: Strategy, posterior: Posterior, density: dist.TorchDistribution | None, width: float | str | None
) -> Mapping[str, Any]:
    draws = "chains of a sampler" if density is None else "independent, of q"
    if width is not None:
        draws = f"independent, of a normal around q with width {width}"
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pnem",
        "creation_library_version": version("pnem"),
        "creation_library_language": "Python",
        "inference_library": "pnem",
        "inference_library_version": version("pnem"),
        "strategy": type(strategy).__name__,
        "q": " and ".join(sorted({_family(part) for part in _parts(posterior.q)})),
        "draws": draws,
        "image_shape": list(strategy.model.decoder.image_shape),
    }


def _family(q: dist.TorchDistribution) -> str:
    if isinstance(q, OfAllComponents):
        return _family(q.flat)
    return _family(q.base_dist) if isinstance(q, dist.Independent) else type(q).__name__
