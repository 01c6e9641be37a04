"""The gap between log p(x) and the ELBO of every image, and what it is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pnem.diagnostics.findings import Finding
from pnem.metrics import Estimate

__all__ = ["InferenceGap"]

# In nats per image, and how many standard errors a gap must be above them to be a finding.
LARGE, CERTAIN = 1.0, 3


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

    @property
    def findings(self) -> list[Finding]:
        """A gap of over one nat per image, by three standard errors: of a bound alone.

        How far a Delta is from its maximum is none: a θ without a price that is nearer to it may explain x and not the
        objects.
        """
        found = []
        advice = {
            self.second_title: 'SemiAmortised, which refines q for each image (run.using("semi-amortised")); in '
            "training a larger encoder or refinement network, more epochs or more iterations",
            "approximation gap": 'a q(θ) with correlations, run.using("auto-multivariate-normal") say, or a decoder '
            "that leaves less of them; with several components part of it may be their order, up to log K! nats",
        }
        for name, gap in ((self.second_title, self.amortisation), ("approximation gap", self.approximation)):
            if gap is not None and gap.mean - CERTAIN * gap.standard_error > LARGE:
                seen = f"the {name} is {gap.mean:.2f} ± {gap.standard_error:.2f} nats per image, of {gap.count} images"
                found.append(Finding(f"large {name}", seen, gap.mean, f"try {advice[name]}"))
        return found

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
