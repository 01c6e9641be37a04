"""The memory of a training step: checkpointed, estimated, and refused where it will not fit."""

import functools
import itertools
from collections.abc import Callable

import psutil
import pytest
import torch
from fitting import arrays, splits, train, weights

from pnem.data import ImageDataset
from pnem.errors import RunError
from pnem.inference import ELBO, RNNEM, IterativeVI
from pnem.memory import estimate_memory
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.settings import TrainingSettings
from pnem.training_module import TrainingModule

SHAPE = (32, 32, 1)
BATCH = 16


def pair(T: int, strategy: str = "rnn-em"):
    torch.manual_seed(0)
    proper = strategy == "iterative-vi"
    model = SpatialMixture(
        decoders.MLP(8, SHAPE, hidden=(16,)), Bernoulli(), 3, prior="standard_normal" if proper else "flat"
    )
    return model, (IterativeVI if proper else RNNEM)(model, iterations=T)


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(BATCH, 1024, 1, generator=torch.Generator().manual_seed(0)).round().to(dtype)


def module(T: int, strategy: str = "rnn-em", **settings) -> TrainingModule:
    return TrainingModule(*pair(T, strategy), ELBO("all"), TrainingSettings(batch_size=BATCH, **settings), 10)


def peak(function: Callable[[], object]) -> int:
    """The largest sum of bytes that a call allocates, by the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def peak_of_step(step: TrainingModule, x: torch.Tensor) -> int:
    return peak(lambda: step.unroll(x).loss.backward())


@pytest.mark.parametrize("strategy", ["rnn-em", "iterative-vi"])
@pytest.mark.parametrize("T", [1, 7, 9])
def test_checkpointing_changes_no_gradient(strategy, T):
    """Also where a step draws random numbers, which are drawn again alike."""
    found = []
    for checkpointing in (False, True):
        step = module(T, strategy, activation_checkpointing=checkpointing).double()
        torch.manual_seed(1)
        outcome = step.unroll.in_pieces(images(torch.float64))
        outcome.loss.backward()
        found.append([*outcome, *(p.grad for p in step.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-12)


def test_checkpointed_memory_grows_as_the_root_of_the_iterations():
    x = images()
    plain, checkpointed = (
        [peak_of_step(module(T, activation_checkpointing=flag), x) for T in (36, 144)] for flag in (False, True)
    )
    assert plain[1] / plain[0] == pytest.approx(4, rel=0.1)
    assert checkpointed[1] / checkpointed[0] == pytest.approx(2, rel=0.15)
    assert checkpointed[1] < 0.5 * plain[1]


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"truncation": 4}], ids=str)
def test_the_estimate_is_within_a_quarter_of_what_a_step_takes(settings):
    step = module(12, **settings)
    estimate = estimate_memory(step.strategy, step.objective, images(), step.training_settings)
    assert estimate.activations == pytest.approx(peak_of_step(step, images()), rel=0.25)
    assert estimate.parameters == 4 * 4 * sum(p.numel() for p in step.parameters())


@pytest.mark.slow
def test_truncated_and_compiled_checkpointing_train_alike():
    for settings in ({"truncation": 2}, {"compile": True}):
        plain, checkpointed = (
            train(epochs=1, precision="float64", activation_checkpointing=flag, **settings) for flag in (False, True)
        )
        for a, b in zip(weights(plain), weights(checkpointed), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_checkpointing_in_several_processes_is_refused():
    with pytest.raises(RunError, match="activation_checkpointing is for a single process, but devices=2"):
        TrainingSettings(activation_checkpointing=True, devices=2)


def test_a_training_that_will_not_fit_is_refused_with_what_to_change(tmp_path, monkeypatch):
    monkeypatch.setattr("pnem.memory._free", lambda device: 10_000)
    with pytest.raises(
        RunError,
        match=r"a training step takes about 0\.\d GiB, but cpu has 0\.0 GiB free: use activation_checkpointing=True, a "
        r'smaller batch_size \(now 8\), fewer iterations \(now 3\) or precision="bfloat16"',
    ):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_memory_does_not_grow_with_the_frames():
    """States are let go of one by one."""
    largest = []
    for T in (5, 20):
        torch.manual_seed(0)
        model = SpatialMixture(decoders.MLP(8, SHAPE, hidden=(16,)), Bernoulli(), 3)
        strategy = RNNEM(model, iterations=T, task="prediction")
        x = images().repeat(T + 1, 1, 1, 1)
        step = TrainingModule(model, strategy, ELBO("all"), TrainingSettings(batch_size=BATCH), 10)
        batch = ImageDataset(x.unflatten(2, SHAPE[:2]))[:BATCH]
        with torch.no_grad():
            largest.append(peak(functools.partial(step.validation_step, batch, 0)))
    assert largest[1] == pytest.approx(largest[0], rel=0.25)


class Watched(ImageDataset):
    """Images that note the memory of this process whenever a batch is asked for."""

    def __init__(self, count):
        super().__init__(*arrays(count))
        self.resident: list[int] = []

    def __getitems__(self, indices):
        self.resident.append(psutil.Process().memory_info().rss)
        return super().__getitems__(indices)


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "compile"), [(10, False), (1, True)])
def test_memory_does_not_grow_over_ten_thousand_steps(epochs, compile):  # noqa: A002
    data = Watched(80_000 // epochs)
    train(data=splits() | {"training": data}, epochs=epochs, patience=None, compile=compile)
    steps = data.resident[-10_000:]
    # A number kept of every step would be 4 MiB, as an object of torch's.
    assert max(steps[9_000:]) - max(steps[1_000:2_000]) < 2 * 2**20
