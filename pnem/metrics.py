"""How well an image is divided into its objects, and how well it is predicted: one number per image.

Groupings are scored on the pixels with group ≠ 0 only (0 marks background and overlaps), one image at a time, and then
averaged over images: `groups` (..., D) holds the object of each pixel, from 1 on, and `labels` (..., D) the component
it was given to, from 0 on. At the edges both indices are what scikit-learn says, where it says anything:

| the scored pixels of an image | ARI and AMI |
|---|---|
| none | NaN: nothing to score, left out by `mean_and_standard_error` |
| divided exactly as the objects divide them (a single pixel always is) | 1 |
| of several objects, all in one component | 0 |
| of one object, in several components | 0 |

A component without scored pixels changes nothing.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pnem.errors import DataError

__all__ = [
    "Estimate",
    "adjusted_mutual_information",
    "adjusted_rand_index",
    "binary_cross_entropy",
    "mean_and_standard_error",
    "mean_prediction",
    "segmentation_labels",
]

# Some 50 MB of intermediate values, which fits a cache better than all terms at once would.
_TERMS_AT_ONCE = 2**18


class Estimate(NamedTuple):
    """A mean over images, its standard error, and the number of images that had a value."""

    mean: float
    standard_error: float
    count: int  # type: ignore[assignment]  # hides tuple.count, which no one needs of three different numbers


def adjusted_rand_index(groups: Tensor, labels: Tensor, *, num_groups: int | None = None) -> Tensor:
    """Adjusted Rand index of each image: 1 is a perfect grouping, chance scores 0 on average, -0.5 is the least.

    With n_gk the number of scored pixels of object g in component k, N their sum, and pairs of pixels counted as

        both = Σ n_gk² - N    only_g = Σ n_g.² - Σ n_gk²    only_k = Σ n_.k² - Σ n_gk²    neither = the rest of N² - N
        ARI  = 2 (both · neither - only_g · only_k)
               / ((both + only_g)(only_g + neither) + (both + only_k)(only_k + neither))

    Hubert & Arabie (1985), "Comparing partitions".

    groups (..., D) integers, labels (..., D) integers -> (...,) float64 on the device of the data. `num_groups` is the
    most objects that an image has, where it is known: a larger index is then an error. Raises `DataError` where shapes
    differ, or values are not integers, are negative, or exceed `num_groups`.

    >>> groups = torch.tensor([[1, 1, 2, 2, 0], [1, 1, 2, 2, 0]])
    >>> labels = torch.tensor([[3, 3, 0, 0, 0], [0, 1, 0, 1, 0]])
    >>> adjusted_rand_index(groups, labels).tolist()
    [1.0, -0.5]
    """
    table = _contingency(groups, labels, num_groups)
    pixels = table.sum((-2, -1))
    squares = table.square().sum((-2, -1))
    both = squares - pixels
    only_group = table.sum(-1).square().sum(-1) - squares
    only_label = table.sum(-2).square().sum(-1) - squares
    neither = pixels.square() - pixels - both - only_group - only_label
    # In float64 from here on: products of pair counts grow as D⁴ and overflow int64.
    tp, fn, fp, tn = (pairs.double() for pairs in (both, only_group, only_label, neither))
    index = 2 * (tp * tn - fn * fp) / ((tp + fn) * (fn + tn) + (tp + fp) * (fp + tn))
    return _with_edges(index, table).view(groups.shape[:-1])


def adjusted_mutual_information(groups: Tensor, labels: Tensor) -> Tensor:
    """Adjusted mutual information of each image: 1 is a perfect grouping, chance scores 0 on average.

        AMI = (I(g; k) - E[I]) / ((H(g) + H(k)) / 2 - E[I])

    over the scored pixels, E[I] the mean over all permutations of them: Vinh, Epps & Bailey (2010), "Information
    theoretic measures for clusterings comparison". It is scikit-learn's `adjusted_mutual_info_score` with the default
    average, image by image.

    groups (..., D) integers, labels (..., D) integers -> (...,) float64 on the device of the data. All images are
    computed together. Raises `DataError` where shapes differ, or values are not integers or are negative.

    >>> groups = torch.tensor([[1, 1, 2, 2, 0], [0, 0, 0, 0, 0]])
    >>> labels = torch.tensor([[3, 3, 0, 0, 0], [0, 1, 0, 1, 0]])
    >>> adjusted_mutual_information(groups, labels).tolist()
    [1.0, nan]
    """
    table = _contingency(groups, labels)
    by_group, by_label = table.sum(-1), table.sum(-2)
    mutual = _mutual_information(table, by_group, by_label)
    expected = _expected_mutual_information(by_group, by_label)
    divided = (by_group.count_nonzero(-1) > 1) & (by_label.count_nonzero(-1) > 1)
    index = (mutual - expected) / ((_entropy(by_group) + _entropy(by_label)) / 2 - expected)
    return _with_edges(torch.where(divided, index, 0.0), table).view(groups.shape[:-1])


def mean_and_standard_error(values: Tensor) -> Estimate:
    """Mean over images and its standard error (the sample standard deviation over √count), in the units of `values`.

    Images whose value is NaN, having nothing to score, are left out and not counted. One image has no standard error
    and no image has no mean: these are NaN. Values of one sequence are not independent: average over its frames first
    (`values.nanmean(0)` for (T, B)), or the standard error will be too small.

    >>> mean_and_standard_error(torch.tensor([1.0, float("nan"), 0.0]))
    Estimate(mean=0.5, standard_error=0.5, count=2)
    """
    values = values.detach().double().flatten()
    values = values[~values.isnan()]
    count = len(values)
    error = math.sqrt(values.var().item() / count) if count > 1 else math.nan
    return Estimate(values.mean().item(), error, count)


def binary_cross_entropy(x: Tensor, mean: Tensor) -> Tensor:
    """Cross-entropy of each image, -Σ [x log μ + (1 - x) log(1 - μ)] over pixels and channels, in nats per image.

    As in `torch.nn.functional.binary_cross_entropy` no logarithm is below -100, so that a certain prediction costs 0
    where it is right and 100 nats, not infinitely many, where it is wrong.

    x (..., D, C) in [0, 1], mean (..., D, C) probabilities -> (...,) in the precision of `mean`, at least float32, also
    under autocast. Raises `DataError` where shapes differ, values are NaN or outside [0, 1], or `mean` is not floating.

    >>> binary_cross_entropy(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.5], [0.0]]))
    tensor(0.6931)
    """
    if not mean.is_floating_point():
        raise DataError(f"mean must be floating-point probabilities, not {mean.dtype}; use .float().")
    if x.shape != mean.shape or x.ndim < 2:
        raise DataError(
            f"x and mean must both be (..., D, C), not {tuple(x.shape)} and {tuple(mean.shape)}; flatten the pixels of "
            "an image into D, and combine components with mean_prediction first."
        )
    # Responsibilities sum to 1 only up to rounding, and so a mean over components can exceed 1 by a few units of it.
    rounding = 8 * torch.finfo(mean.dtype).eps
    for name, value, largest in (("x", x, 1), ("mean", mean, 1 + rounding)):
        if not ((value >= 0) & (value <= largest)).all():
            raise DataError(
                f"{name} has values from {value.min().item()} to {value.max().item()}; a binary cross-entropy needs "
                "them in [0, 1]: scale the pixels, or apply a sigmoid to logits."
            )
    dtype = torch.promote_types(mean.dtype, torch.float32)
    with torch.autocast(mean.device.type, enabled=False):
        return functional.binary_cross_entropy(mean.to(dtype).clamp(max=1), x.to(dtype), reduction="none").sum((-2, -1))


def mean_prediction(gamma: Tensor, component_means: Tensor) -> Tensor:
    """The image that the components predict together, Σ_k γ_k μ_k, in the units of `component_means`.

    gamma (..., K, D), which sums to 1 over K, component_means (..., K, D, C) -> (..., D, C). Raises `DataError` where
    the shapes do not fit.

    >>> mean_prediction(torch.tensor([[0.25], [0.75]]), torch.tensor([[[0.0]], [[1.0]]]))
    tensor([[0.7500]])
    """
    if gamma.ndim < 2 or component_means.shape[:-1] != gamma.shape:
        raise DataError(
            "gamma must be (..., K, D) and component_means (..., K, D, C), with the same leading dimensions, not "
            f"{tuple(gamma.shape)} and {tuple(component_means.shape)}; add a last dimension of size 1 for one channel."
        )
    return (gamma.unsqueeze(-1) * component_means).sum(-3)


def segmentation_labels(gamma: Tensor) -> Tensor:
    """The component that most likely made each pixel, argmax_k γ_k: gamma (..., K, D) -> (..., D) int64.

    Raises `DataError` where `gamma` has no component dimension or is NaN, which argmax would take for the largest.

    >>> segmentation_labels(torch.tensor([[0.9, 0.2], [0.1, 0.8]]))
    tensor([0, 1])
    """
    if gamma.ndim < 2:
        raise DataError(f"gamma must be (..., K, D), not {tuple(gamma.shape)}; add a dimension for the components.")
    if gamma.isnan().any():
        raise DataError(
            f"gamma has NaN in {gamma.isnan().sum().item()} of {gamma.numel()} places; find where they begin."
        )
    return gamma.argmax(-2)


def _contingency(groups: Tensor, labels: Tensor, num_groups: int | None = None) -> Tensor:
    """n (N, G, K) int64, the number of pixels of object g in component k of each of N images; group 0 left out."""
    if groups.shape != labels.shape or groups.ndim == 0:
        raise DataError(
            f"groups and labels must both be (..., D), not {tuple(groups.shape)} and {tuple(labels.shape)}; flatten "
            "the pixels of an image into D, and turn gamma into labels with segmentation_labels."
        )
    images, pixels = groups.shape[:-1].numel(), groups.shape[-1]
    groups = _indices("groups", groups, num_groups).reshape(images, pixels)
    labels = _indices("labels", labels).reshape(images, pixels)
    if groups.numel() == 0:
        return groups.new_zeros(images, 1, 1)
    if groups.max() > pixels:
        groups = torch.where(groups > 0, _ranks(groups) + 1, 0)
    if labels.max() >= pixels:
        labels = _ranks(labels)
    G, K = int(groups.max()) + 1, int(labels.max()) + 1
    cell = torch.arange(images, device=groups.device).unsqueeze(-1) * (G * K) + groups * K + labels
    return cell.flatten().bincount(minlength=images * G * K).view(images, G, K)[:, 1:]


def _indices(name: str, values: Tensor, largest: int | None = None) -> Tensor:
    """The values as int64, once they are known to be indices."""
    if values.is_floating_point() or values.is_complex():
        raise DataError(f"{name} must be integers, not {values.dtype}; use .long(), or segmentation_labels for gamma.")
    values = values.long()
    if values.numel() and values.min() < 0:
        raise DataError(f"{name} has the negative value {values.min().item()}; groups that are not scored are 0.")
    if values.numel() and largest is not None and values.max() > largest:
        raise DataError(f"{name} has the value {values.max().item()}, but num_groups is {largest}; raise it.")
    return values


def _ranks(values: Tensor) -> Tensor:
    """The rank of each value among the distinct values of its row, which keeps tables small when labels are sparse."""
    ordered, order = values.sort(-1)
    rank = ordered.diff(dim=-1, prepend=ordered[:, :1]).ne(0).cumsum(-1)
    return torch.empty_like(values).scatter_(-1, order, rank)


def _identical(table: Tensor) -> Tensor:
    """Whether components and objects divide the scored pixels alike: no row or column has two entries."""
    return (table.count_nonzero(-1) <= 1).all(-1) & (table.count_nonzero(-2) <= 1).all(-1)


def _with_edges(index: Tensor, table: Tensor) -> Tensor:
    index = index.masked_fill(_identical(table), 1.0)
    return index.masked_fill(table.sum((-2, -1)) == 0, math.nan)


def _entropy(counts: Tensor) -> Tensor:
    return torch.special.entr(counts.double() / counts.sum(-1, keepdim=True)).sum(-1)


def _mutual_information(table: Tensor, by_group: Tensor, by_label: Tensor) -> Tensor:
    """I(g; k) = Σ_gk n_gk/N log(N n_gk / (n_g. n_.k)), in nats: tables (N, G, K) -> (N,)."""
    pixels = by_group.sum(-1)[:, None, None]
    # Marginals are 0 only where n_gk is, which xlogy makes 0.
    ratio = table.double() * pixels / (by_group.unsqueeze(-1) * by_label.unsqueeze(-2)).clamp_min(1)
    return (torch.xlogy(table, ratio) / pixels).sum((-2, -1))


def _expected_mutual_information(by_group: Tensor, by_label: Tensor) -> Tensor:
    """E[I(g; k)] over all tables with these marginals (N, G) and (N, K), in nats: (N,).

        E[I] = Σ_gk Σ_n  n/N log(N n / (a b)) · a! b! (N−a)! (N−b)! / (N! n! (a−n)! (b−n)! (N−a−b+n)!)

    with a = n_g. and b = n_.k, and n from max(1, a + b − N) to min(a, b): eq. 24a of Vinh, Epps & Bailey (2010).
    """
    images, G, K = len(by_group), by_group.shape[-1], by_label.shape[-1]
    if not images * G:
        return by_group.new_zeros(images, dtype=torch.float64)
    a = by_group.unsqueeze(-1).expand(images, G, K).flatten()
    b = by_label.unsqueeze(-2).expand(images, G, K).flatten()
    total = by_group.sum(-1).repeat_interleave(G * K)
    first = (a + b - total).clamp_min(1)
    terms = (torch.minimum(a, b) - first + 1).clamp_min(0)
    log_factorial = torch.lgamma(torch.arange(1, int(total.max()) + 2, dtype=torch.float64, device=a.device))
    sizes = (terms.cumsum(0) // _TERMS_AT_ONCE).unique_consecutive(return_counts=True)[1].tolist()
    cells = torch.stack((a, b, total, first, terms))
    expected = torch.cat([_expected_terms(chunk, log_factorial) for chunk in cells.split(sizes, -1)])
    return expected.view(images, G * K).sum(-1)


def _expected_terms(cells: Tensor, log_factorial: Tensor) -> Tensor:
    """The sum over n of each cell, given by its a, b, N, first n and number of terms: (5, cells) -> (cells,)."""
    a, b, total, first, terms = cells
    cell = torch.arange(len(a), device=a.device).repeat_interleave(terms)
    begins = terms.cumsum(0) - terms
    n = torch.arange(len(cell), device=a.device) - (begins - first)[cell]
    log_ways = log_factorial[a] + log_factorial[b] + log_factorial[total - a] + log_factorial[total - b]
    scale = total.double().log() - a.double().log() - b.double().log()
    log_p = (log_ways - log_factorial[total])[cell] - (
        log_factorial[n]
        + log_factorial[a[cell] - n]
        + log_factorial[b[cell] - n]
        + log_factorial[(total - a - b)[cell] + n]
    )
    values = n * (n.double().log() + scale[cell]) * log_p.exp()
    return torch.zeros_like(scale).index_add_(0, cell, values) / total
