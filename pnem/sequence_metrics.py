"""How well sequences are grouped, followed and predicted: numbers per step and sequence.

S steps of B sequences come as (S, B, ...): `groups` (S, B, D) holds the object of each pixel of the frames that the
steps are scored on, from 1 on and 0 where it is not scored, and `labels` (S, B, D) the component it was given to, from
0 on. The first step has seen a single frame, from which nobody can tell where things move: it has values, but no
summary over steps counts it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pnem.errors import DataError
from pnem.metrics import adjusted_mutual_information, adjusted_rand_index, binary_cross_entropy

__all__ = [
    "IdentitySwitches",
    "SequenceGrouping",
    "frame_error",
    "grouping_over_time",
    "identity_switches",
    "over_steps",
]


class SequenceGrouping(NamedTuple):
    """Adjusted mutual information and adjusted Rand index of each frame: (S, B) each; NaN where nothing is scored."""

    ami: Tensor
    ari: Tensor


class IdentitySwitches(NamedTuple):
    """How often objects changed their component in each sequence, and how many objects were seen in it: (B,) int64."""

    switches: Tensor
    objects: Tensor

    @property
    def per_object(self) -> Tensor:
        """Switches of one object in the whole sequence, on average: (B,) float64; NaN where no object is seen."""
        return self.switches.double() / self.objects


def grouping_over_time(groups: Tensor, labels: Tensor) -> SequenceGrouping:
    """AMI and ARI of every frame by itself, over its pixels with group ≠ 0: groups, labels (S, B, D) -> two of (S, B).

    Whether components keep their objects from frame to frame does not matter here: `identity_switches` counts that.
    Raises `DataError` as `adjusted_rand_index` does.

    >>> groups = torch.tensor([[[1, 1, 2, 2]], [[0, 0, 0, 0]], [[1, 2, 2, 0]]])
    >>> labels = torch.tensor([[[0, 0, 1, 1]], [[0, 0, 1, 1]], [[1, 0, 0, 0]]])
    >>> grouping_over_time(groups, labels).ari.flatten().tolist()
    [1.0, nan, 1.0]
    """
    return SequenceGrouping(adjusted_mutual_information(groups, labels), adjusted_rand_index(groups, labels))


def over_steps(values: Tensor) -> Tensor:
    """The mean over all steps but the first, each counted equally: (S, B) -> (B,).

    Frames whose value is NaN, having nothing to score, are left out; NaN where none is left, as with a single step.

    >>> over_steps(torch.tensor([[0.0], [0.5], [float("nan")], [1.0]]))
    tensor([0.7500])
    """
    return values[1:].nanmean(0)


def identity_switches(groups: Tensor, labels: Tensor) -> IdentitySwitches:
    """How often the component that holds most of an object's visible pixels changes, over all steps but the first.

    An object keeps its component while it is hidden (has no pixel that is its own), so that coming back in another
    one is a switch. Of components that hold equally many of its pixels any one may be the object's, and the fewest
    switches are counted that this allows. Objects that share a component are followed as well as others, and a single
    component is never left: read this beside AMI and ARI.

    groups, labels (S, B, D) integers -> two of (B,) int64. An object that no step but the first shows is not counted
    among the objects, and with one step nothing is. Raises `DataError` where shapes differ, or values are not integers
    or are negative.

    >>> groups = torch.tensor([[[1, 1, 2, 2]]]).repeat(4, 1, 1)
    >>> labels = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 1, 1]], [[0, 0, 1, 1]], [[0, 0, 2, 2]]])
    >>> identity_switches(groups, labels)
    IdentitySwitches(switches=tensor([1]), objects=tensor([2]))
    """
    if groups.shape != labels.shape or groups.ndim != 3:
        raise DataError(
            f"groups and labels must both be (S, B, D), not {tuple(groups.shape)} and {tuple(labels.shape)}; flatten "
            "the pixels of a frame into D, and give one sequence as (S, 1, D)."
        )
    for name, values in (("groups", groups), ("labels", labels)):
        if values.is_floating_point() or values.is_complex():
            raise DataError(f"{name} must be integers, not {values.dtype}; use .long(), or argmax over K for gamma.")
        if values.numel() and values.min() < 0:
            raise DataError(f"{name} has the negative value {values.min().item()}; they are indices from 0 on.")
    B = groups.shape[1]
    if not groups.numel():
        return IdentitySwitches(*groups.new_zeros(2, B, dtype=torch.int64))
    groups, labels = torch.where(groups > 0, _small(groups) + 1, 0), _small(labels)
    G, K = int(groups.max()) + 1, int(labels.max()) + 1
    sequence = torch.arange(B, device=groups.device).unsqueeze(-1)
    # The components that can have held each object since its last switch; at first, and while hidden, all of them.
    candidates = torch.ones(B, G - 1, K, dtype=torch.bool, device=groups.device)
    switches = torch.zeros(B, G - 1, dtype=torch.int64, device=groups.device)
    seen = switches.bool()
    for group, label in zip(groups[1:], labels[1:], strict=True):
        cell = (sequence * G + group) * K + label
        pixels = cell.flatten().bincount(minlength=B * G * K).view(B, G, K)[:, 1:]
        most = pixels == pixels.amax(-1, keepdim=True)
        kept = candidates & most
        switched = ~kept.any(-1)
        switches += switched
        seen |= pixels.any(-1)
        candidates = torch.where(switched.unsqueeze(-1), most, kept)
    return IdentitySwitches(switches.sum(-1), seen.sum(-1))


def _small(values: Tensor) -> Tensor:
    """The indices, in place of large ones their ranks: tables of counts are as large as the largest."""
    return values.unique(return_inverse=True)[1] if values.max() >= 256 else values.long()


def frame_error(x: Tensor, prediction: Tensor, *, bernoulli: bool) -> Tensor:
    """How far predictions are from frames, summed over pixels and channels: x, prediction (..., D, C) -> (...,).

    `binary_cross_entropy` in nats per frame for Bernoulli pixels, whose predictions are probabilities, and for others
    the squared error Σ (x - μ)², in squared units of the pixels, in single precision at least. Raises `DataError`
    where shapes differ, and for Bernoulli pixels as `binary_cross_entropy` does.

    >>> frame_error(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [2.0]]), bernoulli=False)
    tensor(4.2500)
    """
    if bernoulli:
        return binary_cross_entropy(x, prediction)
    if x.shape != prediction.shape or x.ndim < 2:
        raise DataError(
            f"x and prediction must both be (..., D, C), not {tuple(x.shape)} and {tuple(prediction.shape)}; flatten "
            "the pixels of a frame into D."
        )
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    return (x.to(dtype) - prediction.to(dtype)).square().sum((-2, -1))
