"""What inference loses, and why: to the family of q(θ), and to one network for all images."""

import math
import warnings

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.checks import check_pair, check_posterior
from pnem.diagnostics.gap_result import InferenceGap
from pnem.diagnostics.local_optima import delta_optimum, is_normal, refined_normals
from pnem.errors import StrategyError
from pnem.inference import ConvergenceWarning, Posterior, Strategy, annealed_importance_sampling
from pnem.inference.checks import require_images
from pnem.inference.estimates import check_counts
from pnem.inference.proposals import proposal
from pnem.inference.svi import log_joint_of_theta
from pnem.models import SpatialMixture

__all__ = ["inference_gap"]


@torch.no_grad()
def inference_gap(
    model: SpatialMixture,
    strategy: Strategy,
    x: Tensor,
    *,
    samples: int = 1000,
    steps: int = 300,
    estimator: str = "importance",
    posterior: Posterior | None = None,
    chunk: int = 10,
) -> InferenceGap:
    r"""What inference on images `x` loses, and why: see `InferenceGap`.

    q* is found from the image's own q by the ascent of `SemiAmortised`, until the ELBO on its draws rises by less than
    0.001 nats in five trials, and is q itself where that is no better on other draws. It is a local optimum, found with
    64 draws of θ: where K·M is large it falls short of the best, by some 0.1 nats for K·M = 128, which counts as
    approximation. Draws that the search has not seen then give both ELBOs, with the same random numbers.

    log p(x) is estimated with proposal q*, which is better than q. Both estimators are lower bounds in expectation, so
    that the approximation gap is rather too small. With K > 1 components p(θ | x) has up to K! modes, of which q*
    covers one: log p̂(x) and the gap are then up to log K! too low. (Cremer et al. report the larger of the two
    estimators' means; here they are kept apart, since the largest of several noisy estimates is too high. Compare runs
    with the higher of their log p̂(x), which is the tighter bound.)

    Where q(θ) is not a product of normals (normals with a full covariance, flows, exact posteriors; the normal with the
    moments of a sampler's draws), it is its image's own, and q* is q.

    With a Delta, θ* is where the ascent of log p(x, θ) ends that starts at θ̂: a maximum next to it, and not the
    largest. Mixtures with a constant decoder go on with the strategy's own iterations instead, π included.

    Priors on π are left out, but with a Delta. Random numbers are torch's global generator's.

    Args:
        model: the generative model.
        strategy: a strategy of this model.
        x: the images (B, D, C), of which all are in memory at once: give some 100.
        samples: L draws of θ from q and from q* for each image; of a Delta none is needed.
        steps: at most so many trials of a step in the search for q* (θ*) of each image.
        estimator: of log p(x): ``"importance"``, the importance-weighted bound of the L draws from q*, which are those
            of its ELBO; or ``"annealed"``, annealed importance sampling from q*: tighter, and slower by an order of
            magnitude.
        posterior: what ``strategy.infer(x)`` gave before; inferred when None.
        chunk: how many draws of every image are decoded at once.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: samples, steps or chunk < 1, an unknown estimator, a strategy of another model, no images, a
            posterior of others, or a strategy that amortises a q(θ) that is neither a Delta nor a product of normals.

    Warns:
        ConvergenceWarning: some images were still getting better after the last step: gaps to them are too small.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.MLP(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> gap = inference_gap(model, VAE(model), torch.zeros(3, 16, 1), samples=100)
    >>> [name for name, *_ in gap.rows()][3:]
    ['approximation gap', 'amortisation gap', 'total gap']
    """
    check_counts(samples=samples, steps=steps, chunk=chunk)
    if estimator not in ("importance", "annealed"):
        raise StrategyError(f'estimator must be "importance" or "annealed", but is {estimator!r}')
    check_pair(model, strategy)
    model.check(x, missing=True, new=True)
    require_images(model, x)
    if posterior is None:
        posterior = strategy.infer(x, keep_trace=False)
    else:
        check_posterior(model, posterior, x)
    amortised = next(strategy.parameters(), None) is not None
    if isinstance(posterior.q, dist.Delta):
        gap = _of_delta(strategy, posterior, x, steps, amortised)
    else:
        gap = _of_density(strategy, posterior, x, samples, steps, estimator, amortised, chunk)
    if bool(gap.rising.any()):
        warnings.warn(
            f"the best q(θ) of {int(gap.rising.sum())} of {len(x)} images was still getting better after {steps} "
            "steps, so that its gap is too small: allow more steps",
            ConvergenceWarning,
            stacklevel=3,
        )
    return gap


def _of_delta(strategy: Strategy, posterior: Posterior, x: Tensor, steps: int, amortised: bool) -> InferenceGap:
    found, best, rising = delta_optimum(strategy, posterior, x, steps)
    none = torch.zeros_like(found)
    return InferenceGap(found, best, None, none, none, none, rising, amortised, refined=True, estimator="none")


def _of_density(
    strategy: Strategy,
    posterior: Posterior,
    x: Tensor,
    samples: int,
    steps: int,
    estimator: str,
    amortised: bool,
    chunk: int,
) -> InferenceGap:
    q = best = proposal(strategy.model, strategy, x, posterior=posterior)
    rising = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    refinable = is_normal(posterior.q)
    if refinable:
        best, rising = refined_normals(strategy, posterior, x, steps)
    elif amortised:
        raise StrategyError(
            f"{type(strategy).__name__} amortises a q(θ) of type {type(posterior.q).__name__}, but the best one of an "
            "image is found for products of normals and Deltas only: importance_weighted_bound and "
            "evidence_lower_bound give the total gap"
        )
    ours, its = _log_weights(strategy.model, x, q, best, samples, chunk)
    if estimator == "importance":
        title = f"importance-weighted bound from q*, L = {samples}"
        log_marginal = its.logsumexp(0) - math.log(samples)
        # By the delta method log p̂ errs as the mean of these does, which are of the same draws as the ELBO.
        relative, error = (its - log_marginal).exp(), torch.zeros_like(log_marginal)
    else:
        title = "annealed importance sampling from q*"
        estimate = annealed_importance_sampling(strategy.model, strategy, x, posterior=posterior._replace(q=best))
        log_marginal, error = estimate.log_marginal, estimate.monte_carlo_error
        relative = torch.zeros_like(its)
    return InferenceGap(
        elbo=ours.mean(0),
        best=its.mean(0),
        log_marginal=log_marginal,
        amortisation_error=_error(its - ours),
        approximation_error=_error(relative - its).hypot(error),
        total_error=_error(relative - ours).hypot(error),
        rising=rising,
        amortised=amortised,
        refined=refinable,
        estimator=title,
    )


def _log_weights(
    model: SpatialMixture,
    x: Tensor,
    q: dist.TorchDistribution,
    best: dist.TorchDistribution,
    samples: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """log p(x, θ) − log q(θ) at draws from q, and the same of q*, (L, B) each; with the same random numbers."""
    ours, its = [], []
    for first in range(0, samples, chunk):
        theta = best.sample(torch.Size([min(chunk, samples - first)]))
        its.append(_log_weight(model, x, best, theta))
        if q is not best:
            theta = q.mean + q.stddev * ((theta - best.mean) / best.stddev)
            ours.append(_log_weight(model, x, q, theta))
    of_best = torch.cat(its)
    return torch.cat(ours) if ours else of_best, of_best


def _log_weight(model: SpatialMixture, x: Tensor, q: dist.TorchDistribution, theta: Tensor) -> Tensor:
    return log_joint_of_theta(model, x, theta).double() - q.log_prob(theta).double()


def _error(values: Tensor) -> Tensor:
    """The standard error of the mean over draws (L, B): (B,)."""
    count = len(values)
    return values.std(0) / math.sqrt(count) if count > 1 else torch.full_like(values[0], math.nan)
