"""How well a run groups and explains images, in numbers."""

import math
from collections.abc import Iterable
from typing import NamedTuple

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
    """How well a run groups and explains images; a mean over images and its standard error, nats per image.

    ``ami`` and ``ari`` are over pixels that belong to exactly one object, NaN without true groups. ``log_evidence``
    is log p(x | θ), and ``bce`` the binary cross-entropy between the images and their reconstructions (NaN
    for pixels that are not Bernoulli), both summed over pixels.
    """

    ami: float
    ami_se: float
    ari: float
    ari_se: float
    log_evidence: float
    bce: float
    images: int

    def rows(self) -> list[tuple[str, str, str]]:
        """What each score is, its mean and its standard error, as a table shows them: a dash for NaN."""
        return [
            ("AMI", _number(self.ami, 4), _number(self.ami_se, 4)),
            ("ARI", _number(self.ari, 4), _number(self.ari_se, 4)),
            ("log evidence at θ, nats per image", _number(self.log_evidence, 2), ""),
            ("BCE of the reconstruction, nats per image", _number(self.bce, 2), ""),
        ]


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def score(results: Iterable[tuple[Batch, Posterior]], *, bernoulli: bool) -> Scores:
    """The scores of images and their posteriors, batch by batch.

    Args:
        results: what `pnem.run.Run.infer_batches` yields.
        bernoulli: whether the pixels are Bernoulli, so that they have a binary cross-entropy.
    """
    groups: list[Tensor] = []
    labels: list[Tensor] = []
    evidence: list[Tensor] = []
    bce: list[Tensor] = []
    for batch, posterior in results:
        if batch.groups is not None:
            groups.append(batch.groups)
            labels.append(posterior.labels.cpu())
        evidence.append(posterior.log_evidence.cpu())
        if bernoulli:
            bce.append(binary_cross_entropy(batch.x, posterior.reconstruction.cpu()))
    unknown = torch.full((1,), torch.nan)
    ari = ami = unknown
    if groups:
        true, found = torch.cat(groups), torch.cat(labels)
        ari, ami = adjusted_rand_index(true, found), adjusted_mutual_information(true, found)
    log_evidence = torch.cat(evidence)
    ari_estimate, ami_estimate = mean_and_standard_error(ari), mean_and_standard_error(ami)
    return Scores(
        ami_estimate.mean,
        ami_estimate.standard_error,
        ari_estimate.mean,
        ari_estimate.standard_error,
        log_evidence.double().mean().item(),
        torch.cat(bce or [unknown]).double().mean().item(),
        len(log_evidence),
    )
