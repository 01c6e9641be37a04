"""Metrics: equal to scikit-learn image by image on the scored pixels, consistent at the edges, exact in nats."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from pnem.errors import DataError
from pnem.metrics import (
    Estimate,
    adjusted_mutual_information,
    adjusted_rand_index,
    binary_cross_entropy,
    mean_and_standard_error,
    mean_prediction,
    segmentation_labels,
)

INDICES = [
    pytest.param(adjusted_rand_index, adjusted_rand_score, id="ARI"),
    pytest.param(adjusted_mutual_information, adjusted_mutual_info_score, id="AMI"),
]
Index = Callable[[Tensor, Tensor], Tensor]
Reference = Callable[[np.ndarray, np.ndarray], float]


def one_by_one(reference: Reference, groups: Tensor, labels: Tensor) -> Tensor:
    flat = math.prod(groups.shape[:-1]), groups.shape[-1]
    scores = [
        reference(g[g != 0], k[g != 0]) if (g != 0).any() else math.nan
        for g, k in zip(groups.view(flat).numpy(), labels.view(flat).numpy(), strict=True)
    ]
    return torch.tensor(scores, dtype=torch.float64).view(groups.shape[:-1])


def random_images(images: int, pixels: int, objects: int, components: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, objects + 1, (images, pixels), generator=generator)
    return groups, torch.randint(0, components, (images, pixels), generator=generator)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    images, pixels = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    # Beyond the number of pixels, so that sparse labels are drawn too.
    objects, components = draw(st.sampled_from([1, 2, 4, 40])), draw(st.sampled_from([1, 2, 4, 40]))

    def indices(largest: int) -> Tensor:
        values = st.lists(st.integers(0, largest), min_size=images * pixels, max_size=images * pixels)
        return torch.tensor(draw(values), dtype=torch.int64).view(images, pixels)

    return indices(objects), indices(components - 1)


@pytest.mark.parametrize(("index", "reference"), INDICES)
@settings(max_examples=200, deadline=None)
@given(data=partitions())
def test_equals_scikit_learn_on_the_scored_pixels(
    index: Index, reference: Reference, data: tuple[Tensor, Tensor]
) -> None:
    torch.testing.assert_close(index(*data), one_by_one(reference, *data), rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_equals_scikit_learn_on_images_of_ordinary_size(index: Index, reference: Reference) -> None:
    groups, labels = random_images(50, 784, objects=3, components=4)
    labels = torch.where(torch.rand(groups.shape, generator=torch.Generator().manual_seed(1)) < 0.7, groups, labels)
    torch.testing.assert_close(index(groups, labels), one_by_one(reference, groups, labels), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_does_not_overflow_on_large_images(index: Index, reference: Reference) -> None:
    groups, labels = random_images(1, 300_000, objects=2, components=2)
    labels = torch.where(torch.arange(300_000) % 3 == 0, groups, labels)
    torch.testing.assert_close(index(groups, labels), one_by_one(reference, groups, labels), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_sparse_labels_need_no_large_table(index: Index, reference: Reference) -> None:
    groups, labels = random_images(5, 30, objects=3, components=4)
    expected = one_by_one(reference, groups, labels)
    torch.testing.assert_close(index(groups * 2**40, labels * 2**50 + 7), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_background_is_not_scored(index: Index, reference: Reference) -> None:
    groups, labels = random_images(20, 60, objects=3, components=4)
    elsewhere = torch.where(groups == 0, torch.randint(0, 9, groups.shape), labels)
    torch.testing.assert_close(index(groups, elsewhere), index(groups, labels), rtol=0, atol=1e-12)
    with_background = one_by_one(reference, groups + 1, labels)
    assert not torch.allclose(index(groups, labels), with_background, atol=1e-3)


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_permuting_components_or_objects_changes_nothing(index: Index, reference: Reference) -> None:
    groups, labels = random_images(20, 60, objects=3, components=4)
    score = index(groups, labels)
    torch.testing.assert_close(index(groups, torch.tensor([2, 0, 3, 1])[labels]), score, rtol=0, atol=1e-12)
    torch.testing.assert_close(index(torch.tensor([0, 3, 1, 2])[groups], labels), score, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_perfect_is_one_and_random_is_zero_on_average(index: Index, reference: Reference) -> None:
    groups, labels = random_images(400, 100, objects=3, components=4)
    assert (index(groups, 7 - groups) == 1).all()
    chance = mean_and_standard_error(index(groups, labels))
    assert abs(chance.mean) < 4 * chance.standard_error
    assert chance.standard_error < 0.01


@pytest.mark.parametrize(("index", "reference"), INDICES)
def test_edges(index: Index, reference: Reference) -> None:
    images = {
        "nothing scored": ([0, 0, 0, 0], [0, 1, 2, 1], math.nan),
        "one scored pixel": ([0, 2, 0, 0], [0, 1, 2, 1], 1.0),
        "one object in one component": ([1, 1, 1, 0], [2, 2, 2, 0], 1.0),
        "one object in two components": ([1, 1, 1, 0], [2, 0, 2, 0], 0.0),
        "one object, every pixel alone": ([1, 1, 1, 1], [0, 1, 2, 3], 0.0),
        "all in one component": ([1, 1, 2, 3], [2, 2, 2, 2], 0.0),
        "every pixel its own object and component": ([1, 2, 3, 4], [3, 1, 2, 0], 1.0),
        "an empty component": ([1, 1, 2, 2], [0, 0, 3, 3], 1.0),
    }
    groups, labels, expected = (torch.tensor(column) for column in zip(*images.values(), strict=True))
    score = index(groups, labels)
    torch.testing.assert_close(score, expected.double(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(score, one_by_one(reference, groups, labels), rtol=0, atol=1e-12, equal_nan=True)
    assert mean_and_standard_error(score).count == len(images) - 1


@pytest.mark.parametrize(("index", "reference"), INDICES)
@pytest.mark.parametrize("batch", [(), (0,), (1,), (5,), (3, 4), (2, 3, 2)])
def test_batch_shapes(index: Index, reference: Reference, batch: tuple[int, ...]) -> None:
    groups, labels = random_images(math.prod(batch), 20, objects=3, components=2)
    score = index(groups.view(*batch, 20), labels.view(*batch, 20))
    assert score.shape == batch
    assert score.dtype == torch.float64
    torch.testing.assert_close(score.flatten(), index(groups, labels), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("index", "reference"), INDICES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integers_in_any_layout(index: Index, reference: Reference, dtype: torch.dtype) -> None:
    groups, labels = random_images(6, 20, objects=3, components=4)
    score = index(groups.to(dtype).T.contiguous().T, labels.to(dtype))
    torch.testing.assert_close(score, index(groups, labels), rtol=0, atol=0)


@pytest.mark.parametrize(("index", "reference"), INDICES)
@pytest.mark.parametrize(
    ("groups", "labels", "message"),
    [
        (torch.ones(2, 5).long(), torch.ones(2, 4).long(), r"\(\.\.\., D\), not \(2, 5\) and \(2, 4\)"),
        (torch.ones(2, 5).long(), torch.ones(2, 3, 5).long(), "segmentation_labels"),
        (torch.tensor(1), torch.tensor(1), r"not \(\) and \(\)"),
        (torch.ones(2, 5), torch.ones(2, 5).long(), r"groups must be integers, not torch\.float32"),
        (torch.ones(2, 5).long(), torch.ones(2, 5).double(), r"labels must be integers, not torch\.float64"),
        (torch.tensor([1, -3]), torch.tensor([1, 0]), "groups has the negative value -3"),
        (torch.tensor([1, 3]), torch.tensor([-1, 0]), "labels has the negative value -1"),
    ],
)
def test_bad_partitions_are_refused(
    index: Index, reference: Reference, groups: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        index(groups, labels)


def test_num_groups_bounds_the_groups_and_leaves_the_score() -> None:
    groups, labels = random_images(10, 40, objects=3, components=4)
    torch.testing.assert_close(
        adjusted_rand_index(groups, labels, num_groups=8), adjusted_rand_index(groups, labels), rtol=0, atol=0
    )
    with pytest.raises(DataError, match="value 3, but num_groups is 2"):
        adjusted_rand_index(groups, labels, num_groups=2)


def test_ami_of_many_images_in_chunks_is_that_of_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, labels = random_images(30, 60, objects=3, components=4)
    together = adjusted_mutual_information(groups, labels)
    monkeypatch.setattr("pnem.metrics._TERMS_AT_ONCE", 50)
    torch.testing.assert_close(adjusted_mutual_information(groups, labels), together, rtol=0, atol=0)
    alone = torch.cat([adjusted_mutual_information(g, k).view(1) for g, k in zip(groups, labels, strict=True)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_ami_of_a_large_partition_is_exact() -> None:
    """Factorials of 10⁵ are summed as logarithms; nothing overflows."""
    groups, labels = random_images(1, 100_000, objects=16, components=12)
    labels = torch.where(torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < 0.3, groups, labels)
    scored = groups[0] > 0
    expected = adjusted_mutual_info_score(groups[0][scored], labels[0][scored])
    assert adjusted_mutual_information(groups, labels).item() == pytest.approx(expected, abs=1e-9)


def test_mean_and_standard_error() -> None:
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = mean_and_standard_error(values)
    assert estimate.mean == pytest.approx(np.mean(values.numpy()), abs=1e-12)
    assert estimate.standard_error == pytest.approx(np.std(values.numpy(), ddof=1) / np.sqrt(21), abs=1e-12)
    assert estimate.count == 21
    with_nan = torch.cat([values.flatten(), torch.full((4,), math.nan, dtype=torch.float64)])
    assert mean_and_standard_error(with_nan) == estimate


def test_one_image_has_no_standard_error_and_none_has_no_mean() -> None:
    assert mean_and_standard_error(torch.tensor([math.nan, 0.5])) == pytest.approx(
        Estimate(0.5, math.nan, 1), nan_ok=True
    )
    for values in (torch.tensor([]), torch.tensor([math.nan])):
        assert mean_and_standard_error(values) == pytest.approx(Estimate(math.nan, math.nan, 0), nan_ok=True)


def test_binary_cross_entropy_is_the_bernoulli_log_likelihood() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(4, 3, 10, 2, generator=generator, dtype=torch.float64)
    x = torch.rand(mean.shape, generator=generator).round().double()
    expected = -torch.distributions.Bernoulli(mean).log_prob(x).sum((-2, -1))
    torch.testing.assert_close(binary_cross_entropy(x, mean), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(binary_cross_entropy(x.bool(), mean), expected, rtol=1e-12, atol=0)


def test_binary_cross_entropy_of_certain_predictions() -> None:
    certain = torch.tensor([[0.0], [1.0], [1.0]])
    assert binary_cross_entropy(certain, certain) == 0
    assert binary_cross_entropy(1 - certain, certain) == 300


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_binary_cross_entropy_takes_a_mean_that_rounding_puts_above_one(dtype: torch.dtype) -> None:
    gamma = torch.randn(5, 4, 784, generator=torch.Generator().manual_seed(0), dtype=dtype).softmax(-2)
    mean = mean_prediction(gamma, torch.ones(5, 4, 784, 1, dtype=dtype))
    assert mean.max() > 1
    nats = binary_cross_entropy(torch.ones_like(mean), mean)
    assert (nats >= 0).all()
    assert (nats / 784 < 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("enabled", [False, True])
def test_binary_cross_entropy_is_not_reduced_in_low_precision(enabled: bool) -> None:
    mean = torch.full((5000, 1), 0.25, dtype=torch.bfloat16)
    with torch.autocast("cpu", enabled=enabled):
        nats = binary_cross_entropy(torch.ones(5000, 1), mean)
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(5000 * math.log(4), rel=1e-5)


@pytest.mark.parametrize(
    ("x", "mean", "message"),
    [
        (torch.zeros(2, 5, 1), torch.zeros(2, 5), r"\(\.\.\., D, C\), not \(2, 5, 1\) and \(2, 5\)"),
        (torch.zeros(2, 5, 1), torch.zeros(2, 3, 5, 1), "mean_prediction"),
        (torch.zeros(5), torch.zeros(5), r"not \(5,\) and \(5,\)"),
        (torch.zeros(5, 1), torch.zeros(5, 1).long(), r"floating-point probabilities, not torch\.int64"),
        (torch.zeros(5, 1), torch.full((5, 1), 1.001), "mean has values from 1.00"),
        (torch.zeros(5, 1), torch.full((5, 1), 3.0), "mean has values from 3.0 to 3.0"),
        (torch.zeros(5, 1), torch.full((5, 1), math.nan), "mean has values from nan"),
        (torch.full((5, 1), -2.0), torch.zeros(5, 1), "x has values from -2.0"),
    ],
)
def test_bad_predictions_are_refused(x: Tensor, mean: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        binary_cross_entropy(x, mean)


@pytest.mark.parametrize("batch", [(), (4,), (3, 4)])
def test_mean_prediction_is_the_weighted_sum(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    gamma = torch.rand(*batch, 3, 5, generator=generator, dtype=torch.float64).softmax(-2)
    means = torch.rand(*batch, 3, 5, 2, generator=generator, dtype=torch.float64)
    expected = torch.einsum("...kd,...kdc->...dc", gamma, means)
    torch.testing.assert_close(mean_prediction(gamma, means), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("gamma", "means"), [((2, 3, 5), (2, 3, 5)), ((2, 3, 5), (2, 4, 5, 1)), ((5,), (5, 1))])
def test_mean_prediction_refuses_shapes_that_do_not_fit(gamma: tuple[int, ...], means: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"gamma must be \(\.\.\., K, D\) and component_means"):
        mean_prediction(torch.zeros(gamma), torch.zeros(means))


def test_segmentation_labels() -> None:
    gamma = torch.tensor([[[0.2, 0.5], [0.7, 0.1], [0.1, 0.4]]])
    assert segmentation_labels(gamma).tolist() == [[1, 0]]
    with pytest.raises(DataError, match=r"not \(3,\)"):
        segmentation_labels(torch.zeros(3))
    with pytest.raises(DataError, match="NaN in 1 of 6"):
        segmentation_labels(gamma.masked_fill(gamma == 0.7, math.nan))


@pytest.mark.gpu
def test_gpu_agrees_and_keeps_the_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    groups, labels = random_images(64, 784, objects=3, components=4)
    groups[0] = 0
    for index in (adjusted_rand_index, adjusted_mutual_information):
        score = index(groups.cuda(), labels.cuda())
        assert score.device.type == "cuda"
        torch.testing.assert_close(score.cpu(), index(groups, labels), rtol=0, atol=1e-12, equal_nan=True)
    mean = torch.rand(4, 50, 1, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cuda", torch.float16):
        nats = binary_cross_entropy(mean.round().cuda(), mean.cuda())
    torch.testing.assert_close(nats.cpu(), binary_cross_entropy(mean.round(), mean))
