"""How well a run groups and explains images, in numbers."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.data import Batch
from pnem.inference import Posterior
from pnem.metrics import (
    adjusted_mutual_information,
    adjusted_rand_index,
    binary_cross_entropy,
    mean_and_standard_error,
)

__all__ = ["Scores", "score"]


class Scores(NamedTuple):
    """How well a run groups and explains images: means over images, and their standard errors over images.

    Attributes:
        ami, ami_se, ari, ari_se: over pixels that belong to exactly one object; NaN without true groups.
        log_evidence: log p(x | θ) at the θ found, the mean of q(θ), in nats per image: no bound on log p(x).
        elbo, elbo_se: a lower bound on log p(x), estimated by one draw of θ for each image, in nats per image; NaN
            where q(θ) is a Delta, which gives none.
        log_marginal, log_marginal_se: log p(x) estimated by importance weighting, in nats per image: on average a lower
            bound, tighter than the ELBO; NaN where it was not asked for.
        importance_samples: how many draws of θ for each image that took; 0 where it was not asked for.
        bce: binary cross-entropy between images and their reconstructions, in nats per image; NaN for pixels that are
            not Bernoulli.
        images: how many images there were.
    """

    ami: float
    ami_se: float
    ari: float
    ari_se: float
    log_evidence: float
    elbo: float
    elbo_se: float
    log_marginal: float
    log_marginal_se: float
    importance_samples: int
    bce: float
    images: int

    def rows(self) -> list[tuple[str, str, str]]:
        """What each score is, its mean and its standard error, as a table shows them: a dash for NaN.

        All but AMI and ARI are in nats per image.
        """
        rows = [
            ("AMI", _number(self.ami, 4), _number(self.ami_se, 4)),
            ("ARI", _number(self.ari, 4), _number(self.ari_se, 4)),
        ]
        if self.importance_samples:
            title = f"log p(x), importance-weighted bound, L = {self.importance_samples}"
            rows.append((title, _number(self.log_marginal, 2), _number(self.log_marginal_se, 2)))
        if not math.isnan(self.elbo):
            rows.append(("ELBO", _number(self.elbo, 2), _number(self.elbo_se, 2)))
        return [
            *rows,
            ("log evidence at θ, no bound on log p(x)", _number(self.log_evidence, 2), ""),
            ("BCE of the reconstruction", _number(self.bce, 2), ""),
        ]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def score(
    results: Iterable[tuple[Batch, Posterior]],
    *,
    bernoulli: bool,
    log_marginal: Callable[[Batch, Posterior], Tensor] | None = None,
    importance_samples: int = 0,
) -> Scores:
    """The scores of images and their posteriors, batch by batch.

    Args:
        results: what `pnem.run.Run.infer_batches` yields.
        bernoulli: whether the pixels are Bernoulli, so that they have a binary cross-entropy.
        log_marginal: estimates log p(x) for a batch: (B,).
        importance_samples: the number of draws by which it does.
    """
    groups: list[Tensor] = []
    labels: list[Tensor] = []
    evidence: list[Tensor] = []
    elbo: list[Tensor] = []
    marginal: list[Tensor] = []
    bce: list[Tensor] = []
    for batch, posterior in results:
        if batch.groups is not None:
            groups.append(batch.groups)
            labels.append(posterior.labels.cpu())
        evidence.append(posterior.log_evidence.cpu())
        if not isinstance(posterior.q, dist.Delta):
            elbo.append(posterior.elbo_trace[-1].cpu())
        if log_marginal is not None:
            marginal.append(log_marginal(batch, posterior).cpu())
        if bernoulli:
            bce.append(binary_cross_entropy(batch.x, posterior.reconstruction.cpu()))
    ami = ari = (math.nan, math.nan)
    if groups:
        true, found = torch.cat(groups), torch.cat(labels)
        # These leave out images in which there is nothing to group.
        ami, ari = (
            mean_and_standard_error(index(true, found))[:2]
            for index in (adjusted_mutual_information, adjusted_rand_index)
        )
    return Scores(
        *ami,
        *ari,
        _over_images(evidence)[0],
        *_over_images(elbo),
        *_over_images(marginal),
        importance_samples,
        _over_images(bce)[0],
        sum(map(len, evidence)),
    )


def _over_images(values: list[Tensor]) -> tuple[float, float]:
    """Mean and standard error over the images of all batches; NaN where there are none."""
    if not values:
        return math.nan, math.nan
    all_values = torch.cat(values).double()
    count = len(all_values)
    error = math.sqrt(all_values.var().item() / count) if count > 1 else math.nan
    return all_values.mean().item(), error
