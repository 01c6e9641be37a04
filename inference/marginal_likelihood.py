"""Estimates of log p(x), θ and z both integrated out, by which strategies with any q(θ) can be compared."""

import copy
import math
from collections.abc import Iterator

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pnem.inference.checks import require_images, require_proper_prior
from pnem.inference.errors import StrategyError
from pnem.inference.estimates import Estimate, check_counts, log_mean_weight
from pnem.inference.factor_analysis import posterior_of_factors
from pnem.inference.posterior import Posterior
from pnem.inference.proposals import prior_of_images, proposal
from pnem.inference.strategy import Strategy
from pnem.inference.svi import log_joint_of_theta
from pnem.models import DiagonalNormal, Normal, SpatialMixture, decoders

__all__ = [
    "evidence_lower_bound",
    "exact_log_marginal",
    "importance_weighted_bound",
    "log_weights",
    "prior_monte_carlo",
]


@torch.no_grad()
def importance_weighted_bound(
    model: SpatialMixture,
    strategy: Strategy,
    x: Tensor,
    *,
    samples: int = 500,
    chunk: int = 10,
    width: float | str | None = None,
    posterior: Posterior | None = None,
) -> Estimate:
    r"""The importance-weighted bound of Burda, Grosse & Salakhutdinov (2016), z summed out:

        log 1/L Σ_l p(x, θ_l) / q(θ_l | x),      θ_l ~ q

    whose expectation is at most log p(x), rises with L and tends to log p(x). The model's parameters, π among them, are
    given, and priors on them are left out; with ownership p is the declared joint density, which is not normalised over
    x. With K > 1 components p(θ | x) has up to K! modes, one for every order of the components, of which most q cover
    one: it stays a lower bound, by as much as log K! too low until L is very large.

    Args:
        model: the generative model, with a proper prior.
        strategy: a strategy of this model, in whose q(θ) θ is drawn.
        x: the images (B, D, C).
        samples: L.
        chunk: how many draws of every image are decoded at once. Memory grows with it, not with L; the value does not
            depend on it, but for which random numbers are drawn.
        width: for strategies whose q(θ) is a Delta: the standard deviation of a normal around its θ, or ``"laplace"``
            for one as wide as p(θ | x) is there; see `pnem.inference.proposals.laplace`. Rather too wide than too
            narrow: below 1/√2 of the deviation of p(θ | x), say, the weights have no variance, and no error is true.
        posterior: what ``strategy.infer(x)`` gave before; inferred when None.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: samples or chunk < 1, a flat prior, a strategy of another model, a posterior of other images, a
            Delta without a width or another q(θ) with one, or a width that is not positive.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.MLP(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> estimate = importance_weighted_bound(model, VAE(model), torch.zeros(3, 16, 1), samples=100)
    >>> estimate.log_marginal.shape, estimate.effective_sample_size.shape
    (torch.Size([3]), torch.Size([3]))
    """
    check_counts(samples=samples, chunk=chunk)
    q = proposal(model, strategy, x, width=width, posterior=posterior)
    return _importance_weighted(model, q, x, samples, chunk)


@torch.no_grad()
def evidence_lower_bound(
    model: SpatialMixture,
    strategy: Strategy,
    x: Tensor,
    *,
    samples: int = 500,
    chunk: int = 10,
    width: float | str | None = None,
    posterior: Posterior | None = None,
) -> Estimate:
    """The ELBO E_q[log p(x, θ) − log q(θ)], z summed out, as the mean over L draws of θ, of which it needs no more.

    It is the bound that `importance_weighted_bound` gives for L = 1, in expectation, and takes the same arguments: the
    two compare on equal terms also where q(θ) is a Delta, whose own "ELBO" is not a bound. The gap between them is at
    most KL(q(θ) ‖ p(θ | x)).

    Raises:
        ModelError, StrategyError: as `importance_weighted_bound`.
    """
    check_counts(samples=samples, chunk=chunk)
    q = proposal(model, strategy, x, width=width, posterior=posterior)
    count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
    for weights in log_weights(model, q, x, samples, chunk):
        n, shift = len(weights), weights.mean(0) - mean
        scatter = scatter + (weights - weights.mean(0)).square().sum(0) + shift.square() * count * n / (count + n)
        mean = mean + shift * n / (count + n)
        count += n
    error = (scatter / (count - 1) / count).sqrt() if count > 1 else torch.full_like(mean, math.nan)
    return Estimate(mean, error)


@torch.no_grad()
def prior_monte_carlo(model: SpatialMixture, x: Tensor, *, samples: int = 500, chunk: int = 10) -> Estimate:
    """log 1/L Σ_l p(x | θ_l) with θ_l ~ p(θ): simple Monte Carlo, right for L large enough and hopeless before.

    A draw from the prior hardly ever explains an image. The sum then hangs on its largest term: the estimate is far too
    low, and its error, which sees only what was drawn, far too small. `effective_sample_size` near 1 is the sign of it.

    Args:
        model: the generative model, with a proper prior.
        x: the images (B, D, C).
        samples: L, for every image its own.
        chunk: how many draws of every image are decoded at once.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: samples or chunk < 1, or a flat prior.
    """
    check_counts(samples=samples, chunk=chunk)
    require_proper_prior(model, "an estimate of log p(x)")
    model.check(x)
    require_images(model, x)
    return _importance_weighted(model, prior_of_images(model, len(x)), x, samples, chunk)


def log_weights(
    model: SpatialMixture, q: dist.TorchDistribution, x: Tensor, samples: int, chunk: int
) -> Iterator[Tensor]:
    """log p(x, θ_l) − log q(θ_l) of L draws θ_l ~ q, chunk by chunk: (n, B), in double precision."""
    for first in range(0, samples, chunk):
        theta = q.sample(torch.Size([min(chunk, samples - first)]))
        yield log_joint_of_theta(model, x, theta).double() - q.log_prob(theta).double()


def _importance_weighted(
    model: SpatialMixture, q: dist.TorchDistribution, x: Tensor, samples: int, chunk: int
) -> Estimate:
    total = squares = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for weights in log_weights(model, q, x, samples, chunk):
        total, squares = total.logaddexp(weights.logsumexp(0)), squares.logaddexp((2 * weights).logsumexp(0))
    return log_mean_weight(total, squares, samples)


@torch.no_grad()
def exact_log_marginal(model: SpatialMixture, x: Tensor) -> Estimate:
    """log p(x) = log N(x; W m + b, W diag(s²) Wᵀ + Σ) in closed form, with no Monte Carlo error.

    It exists for the linear-Gaussian model (factor analysis, probabilistic PCA): one component, ``decoders.Linear``
    without an activation, Normal pixels, and p(θ) = N(0, I) or a `DiagonalNormal`. Channels of x that are NaN are
    missing, and integrated out.

    Args:
        model: the generative model.
        x: the images (B, D, C).

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: another model.

    >>> model = SpatialMixture(decoders.Linear(2, (1, 5, 1)), Normal(), 1, prior="standard_normal")
    >>> exact_log_marginal(model, torch.zeros(3, 5, 1)).monte_carlo_error
    tensor([0., 0., 0.], dtype=torch.float64)
    """
    prior = model.prior
    linear = isinstance(model.decoder, decoders.Linear) and isinstance(model.decoder.activation, nn.Identity)
    normal = isinstance(model.likelihood, Normal) and (isinstance(prior, DiagonalNormal) or prior == "standard_normal")
    if model.num_components != 1 or not linear or not normal:
        raise StrategyError(
            "log p(x) has a closed form only for one component, decoders.Linear without an activation, Normal pixels, "
            "and a standard-normal or DiagonalNormal prior: estimate it by importance_weighted_bound or "
            "annealed_importance_sampling"
        )
    if isinstance(prior, DiagonalNormal):
        model = _standardised(model)
    log_evidence = posterior_of_factors(model, x)[2].double()
    return Estimate(log_evidence, torch.zeros_like(log_evidence))


def _standardised(model: SpatialMixture) -> SpatialMixture:
    """The same density of x, with the prior N(m, diag(s²)) taken into W and b, and N(0, I) in its place."""
    model = copy.deepcopy(model)
    prior = model.prior
    assert isinstance(prior, DiagonalNormal)
    assert isinstance(model.decoder, decoders.Linear)
    linear = model.decoder.linear
    bias = linear.weight @ prior.location
    linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
    linear.weight = nn.Parameter(linear.weight * prior.log_scale.exp())
    del model.prior
    model.prior = "standard_normal"
    return model
