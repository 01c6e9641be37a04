"""What inference loses, and why: the gap between log p(x) and the ELBO, and what it is made of."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.checks import check_pair, check_posterior
from pnem.diagnostics.local_optima import delta_optimum, is_normal, refined_normals
from pnem.errors import StrategyError
from pnem.inference import ConvergenceWarning, Posterior, Strategy, annealed_importance_sampling
from pnem.inference.checks import require_images
from pnem.inference.estimates import check_counts
from pnem.inference.proposals import proposal
from pnem.inference.svi import log_joint_of_theta
from pnem.metrics import Estimate
from pnem.models import SpatialMixture

__all__ = ["InferenceGap", "inference_gap"]


@dataclass(frozen=True)
class InferenceGap:
    r"""The gap between log p(x) and the ELBO taken apart (Cremer, Li & Duvenaud 2018), in nats per image:

        log p(x) − L[q]  =  (log p(x) − L[q*])  +  (L[q*] − L[q])
             total       =    approximation     +   amortisation

    L[q] = E_q[log p(x, θ) − log q(θ)], and q* is the best q of its family for the image at hand. The first gap is
    what the family cannot express, the second what is lost because one network serves all images. Where the strategy
    has no parameters that images share, each image's q is its own, and the second is called the optimisation gap.

    Of a Delta there is no bound, and no gap to log p(x): there is only how much log p(x, θ) rises from θ̂ to the local
    maximum θ* next to it, the optimality gap.

    Attributes:
        elbo: (B,), L[q]; of a Delta log p(x, θ̂).
        best: (B,), L[q*]; of a Delta log p(x, θ*).
        log_marginal: (B,), log p̂(x), in expectation a lower bound on log p(x); None of a Delta.
        amortisation_error, approximation_error, total_error: (B,), the Monte Carlo standard errors of each image's
            gaps; zero of a Delta, NaN for a single draw.
        rising: (B,), whether the search for q* (θ*) was still getting better when it ended.
        amortised: whether images share the strategy's parameters.
        refined: whether there was such a search. There is none where q(θ) is neither a product of normals nor a Delta:
            q* is q then, and the approximation gap all there is.
        estimator: what log_marginal is.
    """

    elbo: Tensor
    best: Tensor
    log_marginal: Tensor | None
    amortisation_error: Tensor
    approximation_error: Tensor
    total_error: Tensor
    rising: Tensor
    amortised: bool
    refined: bool
    estimator: str

    @property
    def is_bound(self) -> bool:
        """Whether the ELBO is a lower bound on log p(x): not with a Delta, whose log p(x, θ) compares with nothing."""
        return self.log_marginal is not None

    @property
    def amortisation(self) -> Estimate | None:
        """L[q*] − L[q]: mean over images, standard error over images and draws (NaN for one image); None of a Delta."""
        return _over_images(self.best - self.elbo) if self.is_bound else None

    @property
    def approximation(self) -> Estimate | None:
        """log p̂(x) − L[q*], likewise."""
        return None if self.log_marginal is None else _over_images(self.log_marginal - self.best)

    @property
    def total(self) -> Estimate | None:
        """log p̂(x) − L[q], likewise."""
        return None if self.log_marginal is None else _over_images(self.log_marginal - self.elbo)

    @property
    def optimality(self) -> Estimate | None:
        """log p(x, θ*) − log p(x, θ̂) of a Delta, likewise; None of others."""
        return None if self.is_bound else _over_images(self.best - self.elbo)

    @property
    def second_title(self) -> str:
        """What L[q*] − L[q] is to be called."""
        return "amortisation gap" if self.amortised else "optimisation gap"

    def rows(self) -> list[tuple[str, str, str]]:
        """What each number is, its mean and its standard error, as a table shows them: a dash for NaN."""
        named: dict[str, Estimate | None]
        if self.log_marginal is None:
            named = {
                "log p(x, θ) at θ found, no bound on log p(x)": _over_images(self.elbo),
                "log p(x, θ) at the maximum next to it": _over_images(self.best),
                "optimality gap": self.optimality,
            }
        else:
            named = {f"log p(x), {self.estimator}": _over_images(self.log_marginal)}
            if self.refined:
                named |= {"ELBO of q*, the best q of its family": _over_images(self.best)}
            named |= {"ELBO": _over_images(self.elbo), "approximation gap": self.approximation}
            if self.refined:
                named |= {self.second_title: self.amortisation, "total gap": self.total}
        return [(name, _number(e.mean), _number(e.standard_error)) for name, e in named.items() if e is not None]

    @classmethod
    def concatenate(cls, parts: Sequence["InferenceGap"]) -> "InferenceGap":
        """The gaps of the images of several, in their order, of one strategy by one estimator."""
        of_images: dict[str, Any] = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in fields(cls)
            if isinstance(getattr(parts[0], field.name), Tensor)
        }
        return replace(parts[0], **of_images)


def _over_images(values: Tensor) -> Estimate:
    """A value that is NaN makes the mean NaN: it is not left out."""
    count = len(values)
    error = math.sqrt(values.var().item() / count) if count > 1 else math.nan
    return Estimate(values.mean().item(), error, count)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


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
