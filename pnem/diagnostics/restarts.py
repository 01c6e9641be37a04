"""How much of what inference finds depends on where it starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.diagnostics.checks import check_strategy
from pnem.diagnostics.findings import Finding
from pnem.diagnostics.terms import elbo_terms
from pnem.errors import StrategyError
from pnem.inference import Posterior, Strategy
from pnem.inference.estimates import check_counts
from pnem.metrics import adjusted_rand_index, mean_and_standard_error
from pnem.models import SpatialMixture

__all__ = ["RestartSpread", "restart_spread", "same_mixing"]

# Restarts agree where segmentations are at least so alike, and ELBOs differ by at most so many nats.
ALIKE, SAME_ELBO = 0.9, 1.0
# Of θ, by which the ELBO of each restart is estimated where q(θ) is a distribution.
DRAWS = 20


class RestartSpread(NamedTuple):
    """How R fits of the same images, each from a start of its own, differ.

    Attributes:
        elbo: (B,), the standard deviation of the ELBO over restarts, in nats; of a Delta, of the plug-in log p(x, θ).
        pairwise_ari: (B,), the mean over pairs of restarts of the adjusted Rand index between their segmentations, over
            the pixels that both give to one component by a majority, γ > ½: which one has the largest γ of a background
            that all explain means nothing. 1 where all divide the image alike; NaN where no pixel is decided. None
            where the model has one component.
        is_bound: whether the ELBO is one; of a Delta it is not.
    """

    elbo: Tensor
    pairwise_ari: Tensor | None
    is_bound: bool

    @property
    def title(self) -> str:
        """What the ELBO is to be called."""
        return "ELBO" if self.is_bound else "plug-in log p(x, θ)"

    @property
    def findings(self) -> list[Finding]:
        """Whether on average over images restarts disagree."""
        spread = mean_and_standard_error(self.elbo).mean
        ari = 1.0 if self.pairwise_ari is None else mean_and_standard_error(self.pairwise_ari).mean
        if spread <= SAME_ELBO and not ari < ALIKE:
            return []
        alike = (
            "" if self.pairwise_ari is None else f", and their segmentations have an ARI of {ari:.2f} with one another"
        )
        return [
            Finding(
                "restarts disagree",
                f"over starts an image's {self.title} has a standard deviation of {spread:.2g} nats{alike}",
                spread,
                "infer with restarts=8, say, of which the best is kept for each image; differences between strategies "
                "that are no larger than this say little",
            )
        ]


@torch.no_grad()
def restart_spread(
    strategy: Strategy, x: Tensor, restarts: int = 4, *, posterior: Posterior | None = None
) -> RestartSpread:
    """Fits the images R times from random starts, one by one, and compares what is found.

    Where q(θ) is a distribution the ELBO is estimated by 20 draws, and the variance of the estimate is taken off: what
    is left of a spread that it hides is 0. The model's mixing weights, which classical EM fits, are left as they were.

    Args:
        strategy: the strategy; the model is its own.
        x: the images (B, D, C).
        restarts: R, at least 2.
        posterior: the result of one of the fits, from a single random start, so as to save it.

    Raises:
        StrategyError: restarts < 2, or a strategy that has one start only; as `Strategy.infer`.

    >>> from pnem.inference import RNNEM
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3)
    >>> spread = restart_spread(RNNEM(model, iterations=2), torch.ones(2, 16, 1))
    >>> spread.elbo.shape, spread.pairwise_ari.shape
    (torch.Size([2]), torch.Size([2]))
    """
    check_counts(restarts=restarts)
    if restarts < 2:
        raise StrategyError("restarts must be at least 2: of a single one there is no spread")
    check_strategy(strategy)
    strategy.check_infer(restarts, strategy.iterations, None)
    model = strategy.model
    elbos, errors, labels, decided = [], [], [], []
    for r in range(restarts):
        if r > 0 or posterior is None:
            with same_mixing(model):
                posterior = strategy.infer(x, keep_trace=False)
        terms = elbo_terms(model, strategy, x, draws=DRAWS, posterior=posterior._replace(trace=None))
        elbos.append(terms.elbo[-1])
        errors.append(terms.monte_carlo_error[-1])
        labels.append(posterior.labels)
        decided.append(posterior.gamma.amax(-2) > 0.5)
    variance = torch.stack(elbos).var(0) - torch.stack(errors).square().mean(0)
    deviation = variance.clamp_min(0).sqrt()
    if model.num_components == 1:
        return RestartSpread(deviation, None, terms.is_bound)
    # Group 0 is not scored.
    pairs = [
        adjusted_rand_index((labels[i] + 1) * (decided[i] & decided[j]), labels[j])
        for i, j in combinations(range(restarts), 2)
    ]
    return RestartSpread(deviation, torch.stack(pairs).nanmean(0), terms.is_bound)


@contextmanager
def same_mixing(model: SpatialMixture) -> Iterator[None]:
    """Afterwards the model has the mixing weights that it had before, whatever classical EM fitted."""
    logits = model.mixing_logits
    before = logits.detach().clone()
    try:
        yield
    finally:
        if model.mixing_logits is not logits:
            model.mixing_logits = before
        elif not torch.equal(logits, before):
            with torch.no_grad():
                logits.copy_(before)
