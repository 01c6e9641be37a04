"""Measures over time: equal to loops over frames and objects, and decided at the edges."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score
from torch import Tensor

from pnem.errors import DataError
from pnem.metrics import binary_cross_entropy
from pnem.sequence_metrics import (
    IdentitySwitches,
    frame_error,
    grouping_over_time,
    identity_switches,
    over_steps,
)


def random_sequences(
    steps: int, sequences: int, pixels: int, objects: int, components: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, objects + 1, (steps, sequences, pixels), generator=generator)
    return groups, torch.randint(0, components, groups.shape, generator=generator)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Few pixels, so that objects are often hidden and components often tie."""
    shape = draw(st.integers(1, 6)), draw(st.integers(0, 3)), draw(st.integers(0, 5))
    groups, labels = (
        draw(st.lists(st.integers(0, largest), min_size=math.prod(shape), max_size=math.prod(shape)))
        for largest in (draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([0, 1, 2, 3])))
    )
    return torch.tensor(groups, dtype=torch.int64).view(shape), torch.tensor(labels, dtype=torch.int64).view(shape)


def by_brute_force(groups: Tensor, labels: Tensor) -> IdentitySwitches:
    """Every way of giving each object, in each frame that shows it, a component that holds most of it."""
    totals = []
    for b in range(groups.shape[1]):
        switches = objects = 0
        for g in set(groups[1:, b].flatten().tolist()) - {0}:
            holders = []
            for frame, found in zip(groups[1:, b], labels[1:, b], strict=True):
                held = found[frame == g].tolist()
                if held:
                    most = max(map(held.count, held))
                    holders.append([k for k in set(held) if held.count(k) == most])
            ways = itertools.product(*holders)
            switches += min(sum(a != b for a, b in itertools.pairwise(way)) for way in ways)
            objects += 1
        totals.append((switches, objects))
    return IdentitySwitches(*torch.tensor(totals, dtype=torch.int64).view(-1, 2).unbind(-1))


def followed(*frames: tuple[list[int], list[int]]) -> tuple[int, int]:
    """Switches and objects of one sequence, given frame by frame after a first one that has all of it wrong."""
    groups, labels = torch.tensor(frames).transpose(0, 1)
    groups, labels = (torch.cat([values[:1], values]) for values in (groups, labels + 1))
    labels[0] = 0
    switches, objects = identity_switches(groups.unsqueeze(1), labels.unsqueeze(1))
    return switches.item(), objects.item()


def test_grouping_is_that_of_scikit_learn_frame_by_frame() -> None:
    groups, labels = random_sequences(5, 4, 60, objects=3, components=4)
    labels = torch.where(torch.rand(groups.shape, generator=torch.Generator().manual_seed(1)) < 0.6, groups, labels)
    groups[2, 1] = 0
    ami, ari = grouping_over_time(groups, labels)
    assert ami.shape == ari.shape == (5, 4)
    for found, reference in ((ami, adjusted_mutual_info_score), (ari, adjusted_rand_score)):
        for s, b in itertools.product(range(5), range(4)):
            g, k = groups[s, b], labels[s, b]
            expected = reference(g[g > 0], k[g > 0]) if (g > 0).any() else math.nan
            assert found[s, b].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)
        per_sequence = over_steps(found)
        for b in range(4):
            scored = [found[s, b].item() for s in range(1, 5) if (s, b) != (2, 1)]
            assert per_sequence[b].item() == pytest.approx(sum(scored) / len(scored), abs=1e-12)


def test_the_first_step_and_frames_with_nothing_to_score_do_not_count() -> None:
    values = torch.tensor([[0.1, math.nan, 0.3], [math.nan, math.nan, 0.5], [1.0, math.nan, 0.0]])
    torch.testing.assert_close(over_steps(values), torch.tensor([1.0, math.nan, 0.25]), equal_nan=True)
    assert over_steps(values[:1]).isnan().all()


@settings(max_examples=200, deadline=None)
@given(data=sequences())
def test_identity_switches_are_the_fewest_that_ties_allow(data: tuple[Tensor, Tensor]) -> None:
    found, expected = identity_switches(*data), by_brute_force(*data)
    assert found.switches.tolist() == expected.switches.tolist()
    assert found.objects.tolist() == expected.objects.tolist()
    assert found.switches.dtype == found.objects.dtype == torch.int64


def test_identity_switches_of_ordinary_sequences() -> None:
    groups, labels = random_sequences(20, 30, 200, objects=4, components=5)
    # Objects that keep their component but for chance: most of a frame's pixels are right three times in four.
    right = torch.rand(20, 30, 1, generator=torch.Generator().manual_seed(1)) < 0.75
    labels = torch.where(right & (torch.rand(groups.shape) < 0.6), groups, labels)
    # Ties are rare, so that the argmax of a frame is the holder.
    expected = by_brute_force(groups[:6], labels[:6])
    found = identity_switches(groups[:6], labels[:6])
    assert found.switches.tolist() == expected.switches.tolist()
    assert 0 < found.per_object.mean() < 4
    torch.testing.assert_close(found.per_object, expected.switches / expected.objects, check_dtype=False)


def test_the_most_pixels_decide_who_holds_an_object() -> None:
    assert followed(([1, 1, 1, 2], [0, 0, 1, 1]), ([1, 1, 1, 2], [0, 1, 0, 1])) == (0, 2)
    assert followed(([1, 1, 1, 2], [0, 0, 1, 1]), ([1, 1, 1, 2], [1, 1, 0, 1])) == (1, 2)
    both = ([1, 1, 2, 2], [0, 0, 1, 1]), ([1, 1, 2, 2], [1, 1, 0, 0]), ([1, 1, 2, 2], [0, 0, 1, 1])
    assert followed(*both) == (4, 2)


def test_a_hidden_object_keeps_its_component() -> None:
    shown, hidden = ([1, 1, 2], [0, 0, 1]), ([0, 0, 2], [1, 1, 1])
    assert followed(shown, hidden, hidden, shown) == (0, 2)
    assert followed(shown, hidden, hidden, ([1, 1, 2], [2, 2, 1])) == (1, 2)
    assert followed(hidden, hidden, shown) == (0, 2)


def test_an_object_that_never_shows_is_not_counted() -> None:
    assert followed(([2, 2, 0], [0, 0, 1]), ([2, 0, 2], [0, 1, 0])) == (0, 1)
    assert followed(([0, 0, 0], [0, 0, 1]), ([0, 0, 0], [1, 1, 1])) == (0, 0)
    nobody = identity_switches(torch.zeros(4, 2, 5).long(), torch.zeros(4, 2, 5).long())
    assert nobody.per_object.isnan().all()
    # Object 3 is in the first frame only.
    groups = torch.tensor([[[3, 1]], [[0, 1]], [[0, 1]]])
    assert identity_switches(groups, torch.zeros(3, 1, 2).long()).objects.tolist() == [1]


def test_a_tie_is_no_switch_until_it_is_resolved_against_the_component() -> None:
    tie, zero, one = ([1, 1], [0, 1]), ([1, 1], [0, 0]), ([1, 1], [1, 1])
    assert followed(tie, zero) == followed(tie, one) == followed(zero, tie, tie) == (0, 1)
    assert followed(zero, tie, zero) == (0, 1)
    assert followed(zero, tie, one) == followed(one, tie, zero) == (1, 1)
    assert followed(tie, zero, one) == (1, 1)


def test_one_component_and_one_frame_have_no_switches() -> None:
    groups, labels = random_sequences(6, 3, 30, objects=3, components=4)
    one = identity_switches(groups, torch.zeros_like(labels))
    assert (one.switches.tolist(), one.objects.tolist()) == ([0, 0, 0], [3, 3, 3])
    single = identity_switches(groups[:1], labels[:1])
    assert (single.switches.tolist(), single.objects.tolist()) == ([0, 0, 0], [0, 0, 0])
    # The change from the first step to the second is not one.
    first_only = identity_switches(groups[:2], labels[:2])
    assert first_only.switches.tolist() == [0, 0, 0]


def test_names_of_objects_and_components_do_not_matter() -> None:
    groups, labels = random_sequences(8, 5, 20, objects=3, components=4)
    found = identity_switches(groups, labels)
    renamed = identity_switches(torch.tensor([0, 3, 1, 2])[groups], torch.tensor([2, 0, 3, 1])[labels])
    sparse = identity_switches((groups * 2**40).transpose(0, 2).contiguous().transpose(0, 2), labels * 2**50 + 7)
    small = identity_switches(groups.to(torch.uint8), labels.to(torch.int16))
    for other in (renamed, sparse, small):
        assert other.switches.tolist() == found.switches.tolist()
        assert other.objects.tolist() == found.objects.tolist()
    assert found.switches.min() > 0


@pytest.mark.parametrize(
    ("groups", "labels", "message"),
    [
        (torch.ones(3, 2, 5).long(), torch.ones(3, 2, 4).long(), r"\(S, B, D\), not \(3, 2, 5\) and \(3, 2, 4\)"),
        (torch.ones(2, 5).long(), torch.ones(2, 5).long(), r"give one sequence as \(S, 1, D\)"),
        (torch.ones(3, 2, 5), torch.ones(3, 2, 5).long(), r"groups must be integers, not torch\.float32"),
        (torch.ones(3, 2, 5).long(), torch.ones(3, 2, 5).double(), r"labels must be integers, not torch\.float64"),
        (torch.full((3, 2, 5), -1), torch.ones(3, 2, 5).long(), "groups has the negative value -1"),
        (torch.ones(3, 2, 5).long(), torch.full((3, 2, 5), -4), "labels has the negative value -4"),
    ],
)
def test_bad_groups_and_labels_are_refused(groups: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        identity_switches(groups, labels)


def test_frame_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    x, prediction = torch.rand(2, 3, 4, 10, 2, generator=generator, dtype=torch.float64)
    squared = frame_error(x, prediction, bernoulli=False)
    crossed = frame_error(x, prediction, bernoulli=True)
    assert squared.shape == crossed.shape == (3, 4)
    for s, b in itertools.product(range(3), range(4)):
        pairs = list(zip(x[s, b].flatten().tolist(), prediction[s, b].flatten().tolist(), strict=True))
        assert squared[s, b].item() == pytest.approx(sum((v - p) ** 2 for v, p in pairs), rel=1e-12)
        nats = -sum(v * math.log(p) + (1 - v) * math.log(1 - p) for v, p in pairs)
        assert crossed[s, b].item() == pytest.approx(nats, rel=1e-12)
    assert torch.equal(crossed, binary_cross_entropy(x, prediction))
    assert frame_error(x.float(), prediction.bfloat16(), bernoulli=False).dtype == torch.float32


def test_frame_errors_refuse_shapes_that_do_not_fit() -> None:
    for bernoulli in (False, True):
        with pytest.raises(DataError, match=r"\(\.\.\., D, C\), not \(5, 1\) and \(5,\)"):
            frame_error(torch.zeros(5, 1), torch.zeros(5), bernoulli=bernoulli)


@pytest.mark.gpu
def test_gpu_agrees() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    groups, labels = random_sequences(8, 5, 40, objects=3, components=4)
    found = identity_switches(groups.cuda(), labels.cuda())
    assert found.switches.device.type == "cuda"
    assert found.switches.tolist() == identity_switches(groups, labels).switches.tolist()
