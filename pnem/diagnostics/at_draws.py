"""What follows from draws of θ: the terms of the ELBO, γ, log-likelihoods and predictions, as named arrays."""

from collections import defaultdict

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.inference_data import Variable
from pnem.diagnostics.terms import elbo_terms, state_at, state_of, terms_at
from pnem.inference import Posterior, State, Strategy
from pnem.models import SpatialMixture

__all__ = ["IMAGE", "SAMPLE", "after_iterations", "as_numpy", "at_draws"]

SAMPLE = ("chain", "draw")
IMAGE = ("image", "pixel", "channel")
# Draws decoded at once.
CHUNK = 10
# What each term is at a draw of θ.
TERMS = {
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
}
# Those that draws without a density do not have.
OF_DENSITY = ("theta_entropy", "divergence", "elbo")


def at_draws(
    strategy: Strategy,
    posterior: Posterior,
    x: Tensor,
    theta: Tensor,
    density: dist.TorchDistribution | None,
    *,
    keep_gamma: bool,
) -> dict[str, dict[str, Variable]]:
    """What follows from every draw of θ, as groups of named arrays.

    Args:
        strategy: whose E-step gives γ.
        posterior: what it found for the images, for all but θ.
        x: the images (B, D, C).
        theta: (chains, draws, B, K, M).
        density: what θ was drawn from; None where it has no density.
        keep_gamma: whether to keep γ of every draw, and not only the mean.
    """
    values: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    start = state_of(strategy.model, posterior, x)._replace(distribution=density)
    mean_gamma = torch.zeros_like(start.gamma, dtype=torch.float64)
    every = theta.flatten(0, 1)
    for part in every.split(CHUNK):
        state = state_at(strategy, start, part, x)
        terms = terms_at(strategy, state)
        for name in TERMS:
            values[name].append(as_numpy(getattr(terms, name)))
        values["lp"].append(as_numpy(terms.reconstruction + terms.log_prior + terms.log_mixing_prior))
        values["log_likelihood"].append(as_numpy(state.log_joint.logsumexp(-2)))
        values["predictive"].append(as_numpy(_predictive(strategy.model, state, x)))
        mean_gamma += state.gamma.sum(0) / len(every)
        if keep_gamma:
            values["gamma"].append(as_numpy(state.gamma))

    def stacked(name: str) -> np.ndarray:
        array = np.concatenate(values.pop(name))
        return array.reshape(*theta.shape[:2], *array.shape[1:])

    gamma: Variable = (("image", "component", "pixel"), as_numpy(mean_gamma.to(start.gamma.dtype)))
    if keep_gamma:
        gamma = ((*SAMPLE, "image", "component", "pixel"), stacked("gamma"))
    titles = TERMS | {"lp": "log p(x, θ)"}
    stats = [name for name in titles if density is not None or name not in OF_DENSITY]
    return {
        "log_likelihood": {"x": ((*SAMPLE, "image", "pixel"), stacked("log_likelihood"), _nats("log p(x_i | θ)"))},
        "posterior_predictive": {"x": ((*SAMPLE, *IMAGE), stacked("predictive"))},
        "sample_stats": {name: ((*SAMPLE, "image"), stacked(name), _nats(titles[name])) for name in stats},
        "responsibilities": {"gamma": gamma},
    }


def _predictive(model: SpatialMixture, state: State, x: Tensor) -> Tensor:
    """Images drawn at a state's θ, z and all: (..., B, D, C)."""
    D = x.shape[-2]
    psi = state.psi.expand(*state.psi.shape[:-2], D, -1)
    log_weights = state.log_mixing.unsqueeze(-1).expand(psi.shape[:-1])
    if model.owned:
        log_weights = log_weights - model.ownership * model.log_unowned(psi)
    # Gumbel's way of drawing from softmax(log weights).
    z = (log_weights - torch.empty_like(log_weights).exponential_().log()).argmax(-2)
    chosen = z[..., None, :, None].expand(*psi.shape[:-3], 1, *psi.shape[-2:])
    return model.likelihood.distribution(psi.gather(-3, chosen).squeeze(-3)).sample().to(x.dtype)


def after_iterations(strategy: Strategy, posterior: Posterior, x: Tensor) -> dict[str, Variable]:
    """The terms of the ELBO after each iteration of a posterior's trace, (T, B)."""
    terms = elbo_terms(strategy.model, strategy, x, posterior=posterior)
    titles = {"elbo": terms.title, "monte_carlo_error": "standard error of the ELBO from the draws of θ"}
    return {
        name: (("iteration", "image"), as_numpy(getattr(terms, name)), _nats(titles.get(name, name.replace("_", " "))))
        for name in (*TERMS, "monte_carlo_error")
    }


def _nats(title: str) -> dict[str, str]:
    return {"long_name": title, "units": "nats"}


def as_numpy(values: Tensor) -> np.ndarray:
    """A tensor's values, wherever it is."""
    return values.detach().cpu().numpy()
