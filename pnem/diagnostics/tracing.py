"""Inference watched as it runs: the ELBO, γ and θ after each iteration, and whether any made it worse."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from pnem.diagnostics.checks import check_posterior, check_strategy
from pnem.diagnostics.findings import Finding
from pnem.diagnostics.symptoms import foreground
from pnem.diagnostics.terms import Terms, elbo_terms, images_at_once
from pnem.errors import DataError, StrategyError
from pnem.inference import Posterior, Strategy
from pnem.inference.estimates import check_counts
from pnem.inference.posterior import extended
from pnem.metrics import adjusted_mutual_information, adjusted_rand_index, segmentation_labels
from pnem.models import SpatialMixture

__all__ = ["Trace", "trace"]

# Units of rounding of an ELBO, relative to its size; up to 10 are seen, of nearly singular covariances.
ROUNDING = 64
# Monte Carlo errors of the difference by which a noisy ELBO must have fallen.
CERTAIN = 3


@dataclass(frozen=True)
class Trace:
    """How inference went, image by image and iteration by iteration; in double precision.

    All but `terms` are (T, B), T the iterations of inference, and NaN where the strategy kept nothing: of classical EM
    and samplers θ and γ are known at the end alone. Images that converge before others repeat what they reached.

    Attributes:
        terms: the terms of the ELBO, of all iterations or, where q(θ) is known only at the end, of the last: (T, B) or
            (1, B).
        elbo: in nats per image. Where there are terms of all iterations, theirs; else the strategy's own
            `Posterior.elbo_trace`: of classical EM what each iteration started from, of guides fitted by SVI the mean
            over each window of steps.
        confidence: mean over pixels of max_k γ_k, from 1/K to 1. With ownership pixels count by how far they are from
            the pixel prior, squared: those at it all components explain alike, and an image of nothing else has NaN.
            Without, all count the same.
        components_used: exp of the entropy of the mean of γ over these pixels, from 1 to K: how many components share
            them, counted by how much they take.
        change: root mean square over K and M of what the mean of q(θ) moved by; NaN at the first iteration.
        decreased: whether the ELBO fell, against the iteration before, by more than rounding and three Monte Carlo
            errors of the difference; or became NaN. False where its error is not known, as for guides fitted by SVI
            and for a single draw; and where classical EM fits a π that images share and their sum did not fall.
        monotone: whether the strategy promises that it never does.
        ami, ari: adjusted mutual information and adjusted Rand index of argmax_k γ_k against the true groups, NaN also
            where an image has none; None without groups.
    """

    terms: Terms
    elbo: Tensor
    confidence: Tensor
    components_used: Tensor
    change: Tensor
    decreased: Tensor
    monotone: bool
    ami: Tensor | None = None
    ari: Tensor | None = None

    @property
    def title(self) -> str:
        """What the ELBO is to be called wherever it is shown."""
        return self.terms.title

    @property
    def findings(self) -> list[Finding]:
        """A strategy that promises never to lower the ELBO, and did."""
        if not self.monotone or not bool(self.decreased.any()):
            return []
        fall = -self.elbo.diff(dim=0)[self.decreased[1:]]
        largest = fall.max().item()
        images = int(self.decreased.any(0).sum())
        first = int(self.decreased.any(1).nonzero()[0]) + 1
        how_far = "became NaN" if math.isnan(largest) else f"fell by up to {largest:.3g} nats"
        seen = (
            f"the {self.title} of {images} of {self.elbo.shape[1]} images {how_far}, first in iteration {first}, "
            "though this strategy never lowers it"
        )
        advice = (
            "infer in double precision; if it still falls, a floor of the likelihood takes over (lower it, or give "
            "parameters a prior), or the strategy's M-step is wrong"
        )
        return [Finding("monotone method decreased", seen, largest, advice)]

    def table(self) -> pd.DataFrame:
        """The means over images, without those that are NaN: one row for each iteration, from 1.

        `decreased` is the share of images; the terms of the ELBO follow, NaN in iterations they are not known of.
        """
        T, B = self.elbo.shape
        error = self.elbo.std(1) / math.sqrt(B) if B > 1 else self.elbo[:, 0] * math.nan
        columns = {"elbo": self.elbo.mean(1), "elbo_se": error}
        for name in ("confidence", "components_used", "change", "decreased", "ami", "ari"):
            values = getattr(self, name)
            if values is not None:
                columns[name] = values.double().nanmean(1)
        index = pd.RangeIndex(1, T + 1, name="iteration")
        table = pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()}, index=index)
        terms = self.terms.table().drop(columns=["elbo", "elbo_se"])
        return table.join(terms.set_axis(index[-len(terms) :]))

    @classmethod
    def concatenate(cls, parts: Sequence["Trace"]) -> "Trace":
        """The trace of more images; of those that took fewer iterations the last one is repeated."""
        T = max(len(part.elbo) for part in parts)

        moved = any(bool(part.change.isfinite().any()) for part in parts)
        still = {"change": 0.0 if moved else math.nan, "decreased": False}

        def joined(name: str) -> Tensor:
            pieces = [extended(getattr(part, name), T) for part in parts]
            for part, piece in zip(parts, pieces, strict=True):
                if name in still:
                    piece[len(part.elbo) :] = still[name]
            return torch.cat(pieces, 1)

        grouped = all(part.ami is not None for part in parts)
        return cls(
            terms=Terms.concatenate([part.terms for part in parts]),
            elbo=joined("elbo"),
            confidence=joined("confidence"),
            components_used=joined("components_used"),
            change=joined("change"),
            decreased=joined("decreased"),
            monotone=all(part.monotone for part in parts),
            ami=joined("ami") if grouped else None,
            ari=joined("ari") if grouped else None,
        )


@torch.no_grad()
def trace(
    strategy: Strategy,
    x: Tensor,
    groups: Tensor | None = None,
    *,
    draws: int = 10,
    batch_size: int = 100,
    restarts: int = 1,
    posterior: Posterior | None = None,
) -> Trace:
    """How inference of images `x` goes, iteration by iteration.

    Args:
        strategy: the strategy.
        x: the images (B, D, C).
        groups: the true group of each pixel, (B, D) integers, 0 where it is not scored; without them there is neither
            AMI nor ARI.
        draws: of θ for each image and iteration, over which the ELBO is averaged where q(θ) is a distribution; at least
            two for `Trace.decreased`.
        batch_size: images at once. Classical EM, whose images may share π, takes all of them at once.
        restarts: R starts, of which the best is kept for each image, see `Strategy.infer`.
        posterior: what ``strategy.infer(x)`` gave before, with whatever options; inferred when None.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: draws, batch_size or restarts < 1, restarts of a strategy that has none or beside a posterior, no
            images, or a posterior of other images.
        DataError: groups that are not integers (B, D), or negative.

    >>> from pnem.inference import GradientEM
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3)
    >>> course = trace(GradientEM(model, iterations=6), torch.ones(2, 16, 1))
    >>> course.elbo.shape, course.monotone, course.findings
    (torch.Size([6, 2]), True, [])
    """
    check_counts(draws=draws, batch_size=batch_size, restarts=restarts)
    check_strategy(strategy)
    model = strategy.model
    model.check(x, missing=True, new=True)
    if groups is not None:
        groups = _checked(groups, x)
    if posterior is not None:
        if restarts > 1:
            raise StrategyError(
                f"restarts={restarts} change nothing of a posterior that is given: leave one of them out"
            )
        check_posterior(model, posterior, x)
        return _trace_of(strategy, posterior, x, groups, draws)
    size = images_at_once(strategy, x, batch_size)
    parts = []
    for i in range(0, max(1, len(x)), size):
        piece = x[i : i + size]
        its_groups = None if groups is None else groups[i : i + size]
        parts.append(_trace_of(strategy, strategy.infer(piece, restarts=restarts), piece, its_groups, draws))
    return Trace.concatenate(parts)


def _checked(groups: Tensor, x: Tensor) -> Tensor:
    groups = torch.as_tensor(groups, device=x.device)
    countable = not groups.is_floating_point() and groups.dtype != torch.bool
    if groups.shape != x.shape[:2] or not countable or bool((groups < 0).any()):
        raise DataError(
            f"groups are {groups.dtype} of shape {tuple(groups.shape)}, but these images need integers from 0 on, "
            f"(B, D) = {tuple(x.shape[:2])}: the true group of each pixel"
        )
    return groups


def _trace_of(strategy: Strategy, posterior: Posterior, x: Tensor, groups: Tensor | None, draws: int) -> Trace:
    terms = elbo_terms(strategy.model, strategy, x, draws=draws, posterior=posterior)
    T = len(posterior.elbo_trace)
    elbo = terms.elbo if len(terms.elbo) == T else posterior.elbo_trace.double()
    if posterior.trace is None:
        gamma, theta = posterior.gamma.unsqueeze(0), posterior.theta.unsqueeze(0)
    else:
        gamma, theta = posterior.trace.gamma, posterior.trace.theta

    def from_the_end(values: Tensor) -> Tensor:
        return torch.cat([values.new_full((T - len(values), len(x)), math.nan), values])

    weights = _weights(strategy.model, x)
    ami = ari = None
    if groups is not None:
        labels = segmentation_labels(gamma)
        truth = groups.expand_as(labels)
        ami = from_the_end(adjusted_mutual_information(truth, labels))
        ari = from_the_end(adjusted_rand_index(truth, labels))
    eps = torch.finfo(posterior.gamma.dtype).eps
    decreased = _decreased(elbo, _error(terms, T), x[0].numel(), eps)
    if strategy.model.mixing_kind == "learned" and posterior.trace is None:
        # π was fitted to all images, whose ELBO together is what rises.
        total, error = elbo.sum(1, keepdim=True), _error(terms, T).square().sum(1, keepdim=True).sqrt()
        decreased = decreased & _decreased(total, error, x.numel(), eps)
    return Trace(
        terms=terms,
        elbo=elbo,
        confidence=from_the_end((weights * gamma.double().amax(-2)).sum(-1)),
        components_used=from_the_end(
            torch.special.entr((weights.unsqueeze(-2) * gamma.double()).sum(-1)).sum(-1).exp()
        ),
        change=from_the_end(theta.double().diff(dim=0).square().mean((-2, -1)).sqrt()),
        decreased=decreased,
        monotone=strategy.monotone and not terms.is_bound,
        ami=ami,
        ari=ari,
    )


def _weights(model: SpatialMixture, x: Tensor) -> Tensor:
    """How much each pixel counts, (B, D), with a sum of 1 for each image; NaN where there is nothing to divide."""
    weights = (
        foreground(x.double(), model.pixel_prior) if model.owned else torch.ones_like(x[..., 0], dtype=torch.double)
    )
    return weights / weights.sum(-1, keepdim=True)


def _error(terms: Terms, T: int) -> Tensor:
    """The Monte Carlo error of the ELBO of T iterations, (T, B); infinite where it is not known."""
    error = terms.monte_carlo_error
    if len(error) < T:
        error = torch.full_like(terms.elbo, math.inf if terms.is_bound else 0.0).expand(T, -1)
    return error.where(~error.isnan(), math.inf)


def _decreased(elbo: Tensor, error: Tensor, size: int, eps: float) -> Tensor:
    """Where the ELBO (T, B) of so many numbers fell by more than its rounding and its errors, or became NaN."""
    before, after = elbo[:-1], elbo[1:]
    rounding = ROUNDING * eps * (before.abs() + size)
    fell = after < before - rounding - CERTAIN * torch.hypot(error[:-1], error[1:])
    became_nan = after.isnan() & ~before.isnan()
    return torch.cat([torch.zeros_like(elbo[:1], dtype=torch.bool), fell | became_nan])
