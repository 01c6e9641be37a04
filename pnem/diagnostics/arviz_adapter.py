"""What inference found, for ArviZ: draws of θ and all that follows from them, with named dimensions."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.inference_data import Variable, inference_data
from pnem.diagnostics.terms import Terms, check_pair, elbo_terms, state_at, state_of, terms_at
from pnem.errors import RunError, StrategyError
from pnem.inference import Posterior, State, Strategy
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
SAMPLE = ("chain", "draw")
# Terms that are log q(θ) or made of it, which draws of a sampler have none of.
OF_DENSITY = {"theta_entropy", "divergence", "elbo"}
TITLES = {
    "expected_log_joint": "Q = E[log p(x, z | θ)] over q(z)",
    "assignment_entropy": "H[q(z)]",
    "log_prior": "log p(θ)",
    "theta_entropy": "−log q(θ)",
    "reconstruction": "log p(x | θ)",
    "divergence": "log q(θ) − log p(θ)",
    "assignment_divergence": "KL(q(z) ‖ p(z | x, θ))",
    "log_mixing_prior": "log p(π)",
    "log_evidence": "log p(x | θ)",
    "elbo": "log p(x, θ) − log q(θ)",
    "lp": "log p(x, θ)",
}
TERMS = tuple(field.name for field in fields(Terms) if field.type is Tensor) + ("elbo",)


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

    S draws of B images take about S·B·D·(1 + C) numbers of memory, so give it a few images, or few draws.

    Args:
        source: a `Run`, whose strategy infers `x`; or the `Posterior` that a strategy gave for `x`.
        x: the images, (B, D, C); for a run also (B, H, W, C).
        strategy: of the posterior; leave it out for a run.
        chains: into how many chains independent draws are divided, 4 by default. A sampler has its own: leave it out.
        draws: how many in each chain, 250 by default; likewise.
        width: where q(θ) is a Delta: of the normal to draw from instead; see `pnem.inference.proposals.proposal`.
        responsibilities: ``"mean"`` over the draws, E_q[γ] = q(z); or ``"draws"``, every draw's own, at S·B·K·D numbers.

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
        "posterior": {"theta": ((*SAMPLE, "image", "component", "latent"), _numpy(theta))},
        **_at_draws(strategy, posterior, images, theta, density, keep_gamma=responsibilities == "draws"),
        "observed_data": {"x": (("image", "pixel", "channel"), _numpy(images))},
    }
    sampler = _sampler(posterior.q)
    if sampler is not None and sampler.diverging is not None:
        groups["sample_stats"]["diverging"] = (SAMPLE, _numpy(sampler.diverging))
    coords = {}
    trace = posterior.trace
    if trace is not None and (trace.location is not None or isinstance(posterior.q, dist.Delta)):
        terms = elbo_terms(model, strategy, images, posterior=posterior)
        groups["iterations"] = _iterations(terms)
        coords["iteration"] = np.arange(1, len(terms.elbo) + 1)
    return inference_data(groups, coords=coords, attrs=_attributes(strategy, posterior, density, width))


def _resolved(
    source: "Posterior | Run", x: Tensor | np.ndarray, strategy: Strategy | None
) -> tuple[Posterior, Tensor, Strategy]:
    """The posterior, its images (B, D, C) and its strategy."""
    from pnem.run import Run

    if isinstance(source, Run):
        if strategy is not None:
            raise RunError("a run has a strategy: leave strategy out, or give run.using(strategy)")
        images = source.images(x)
        return source.infer(images), images, source.strategy
    if not isinstance(source, Posterior):
        raise StrategyError(f"source must be a Run or a Posterior, but is of type {type(source).__name__}")
    if strategy is None:
        raise StrategyError("a posterior does not know how it was inferred: give strategy, the one that inferred it")
    images = torch.as_tensor(x)
    strategy.model.check(images, missing=True)
    require_images(strategy.model, images)
    if len(posterior_theta := source.theta) != len(images):
        raise StrategyError(
            f"the posterior is of {len(posterior_theta)} images, but x holds {len(images)}: give the same images"
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
    q = proposal(model, strategy, x, width=width, posterior=posterior)
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
    # Batches are sampled one by one, so that no transition is of all of them.
    diverging = parts[0].diverging if len(parts) == 1 else None
    return Draws(torch.cat([part.draws for part in parts], 2), diverging)


def _at_draws(
    strategy: Strategy,
    posterior: Posterior,
    x: Tensor,
    theta: Tensor,
    density: dist.TorchDistribution | None,
    *,
    keep_gamma: bool,
) -> dict[str, dict[str, Variable]]:
    """What follows from every draw of θ, as groups."""
    values: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    start = state_of(strategy.model, posterior, x)._replace(distribution=density)
    mean_gamma = torch.zeros_like(start.gamma, dtype=torch.float64)
    every = theta.flatten(0, 1)
    for draw in every:
        state = state_at(strategy, start, draw, x)
        terms = terms_at(strategy, state)
        for name in TERMS:
            values[name].append(_numpy(getattr(terms, name)))
        values["lp"].append(_numpy(terms.reconstruction + terms.log_prior + terms.log_mixing_prior))
        values["log_likelihood"].append(_numpy(state.log_joint.logsumexp(-2)))
        values["predictive"].append(_numpy(_predictive(strategy.model, state, x)))
        mean_gamma += state.gamma / len(every)
        if keep_gamma:
            values["gamma"].append(_numpy(state.gamma))

    def stacked(name: str) -> np.ndarray:
        array = np.stack(values.pop(name))
        return array.reshape(*theta.shape[:2], *array.shape[1:])

    gamma: Variable = (("image", "component", "pixel"), _numpy(mean_gamma.to(start.gamma.dtype)))
    if keep_gamma:
        gamma = ((*SAMPLE, "image", "component", "pixel"), stacked("gamma"))
    names = [name for name in (*TERMS, "lp") if name in TITLES and (density is not None or name not in OF_DENSITY)]
    return {
        "log_likelihood": {"x": ((*SAMPLE, "image", "pixel"), stacked("log_likelihood"), _nats("log p(x_i | θ)"))},
        "posterior_predictive": {"x": ((*SAMPLE, "image", "pixel", "channel"), stacked("predictive"))},
        "sample_stats": {name: ((*SAMPLE, "image"), stacked(name), _nats(TITLES[name])) for name in names},
        "responsibilities": {"gamma": gamma},
    }


def _predictive(model: SpatialMixture, state: State, x: Tensor) -> Tensor:
    """Images drawn at a state's θ, z and all: (B, D, C)."""
    D = x.shape[-2]
    psi = state.psi.expand(*state.psi.shape[:-2], D, -1)
    log_weights = state.log_mixing.unsqueeze(-1).expand(psi.shape[:-1])
    if model.owned:
        log_weights = log_weights - model.ownership * model.log_unowned(psi)
    z = dist.Categorical(logits=log_weights.mT, validate_args=False).sample()
    chosen = z[:, None, :, None].expand(-1, 1, -1, psi.shape[-1])
    return model.likelihood.distribution(psi.gather(-3, chosen).squeeze(-3)).sample().to(x.dtype)


def _iterations(terms: Terms) -> dict[str, Variable]:
    """The terms after each iteration; what ArviZ has no name for yet."""
    dims = ("iteration", "image")
    titles = dict.fromkeys(TERMS, "") | {"elbo": terms.title}
    return {name: (dims, _numpy(getattr(terms, name)), _nats(titles[name] or name)) for name in TERMS}


def _nats(title: str) -> dict[str, str]:
    return {"long_name": title, "units": "nats"}


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().numpy()


def _attributes(
    strategy: Strategy, posterior: Posterior, density: dist.TorchDistribution | None, width: float | str | None
) -> Mapping[str, Any]:
    return {
        "created_at": datetime.now(UTC).isoformat(),
        "creation_library": "pnem",
        "creation_library_version": version("pnem"),
        "creation_library_language": "Python",
        "inference_library": "pnem",
        "inference_library_version": version("pnem"),
        "strategy": type(strategy).__name__,
        "q": " and ".join(sorted({_family(part) for part in _parts(posterior.q)})),
        "draws_from": "a sampler's chains" if density is None else "independent draws of q",
        **({} if width is None else {"width": width}),
        "image_shape": list(strategy.model.decoder.image_shape),
    }


def _family(q: dist.TorchDistribution) -> str:
    if isinstance(q, OfAllComponents):
        return _family(q.flat)
    return _family(q.base_dist) if isinstance(q, dist.Independent) else type(q).__name__
