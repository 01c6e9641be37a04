"""A training step of every strategy: as `fit` takes it, eager, compiled and in bfloat16, and written by hand."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pnem.bench.cases import HAND_WRITTEN, Size, build, hand_written, images
from pnem.bench.clock import Spread, alternately, timed
from pnem.bench.memory import peak_memory
from pnem.bench.peaks import Peaks
from pnem.bench.references import HandWrittenNEM, HandWrittenRNNEM
from pnem.bench.report import Row
from pnem.bench.work import Work, count_work
from pnem.compilation import missing_compiler
from pnem.data import Batch
from pnem.recipe import Parts
from pnem.settings import TrainingSettings
from pnem.training_module import TrainingModule

__all__ = ["VARIANTS", "hand_written_step", "time_case", "training_step"]

VARIANTS: dict[str, dict[str, Any]] = {
    "eager": {"precision": "float32", "compile": False},
    "compiled": {"precision": "float32", "compile": True},
    "compiled, bfloat16": {"precision": "bfloat16", "compile": True},
}
"""Settings of `pnem.fit` that steps are timed under: a new way of compiling is one more line here."""
BY_HAND = "by hand"
# A precision in which products are so much slower than in float32 is not timed: its steps would take minutes.
FAR_SLOWER = 10.0
# Rounds, beside the first.
WARM_UP = 1


def training_step(parts: Parts, x: Tensor, **settings: Any) -> Callable[[], None]:
    """A step of training as `fit` takes it, on the same images every time.

    The training module computes the loss, in the precision's autocast; then backwards, clipping, Adam and its schedule:
    all of a step but Lightning.

    Args:
        parts: the model, the strategy and the objective; they are trained.
        x: images (B, D, C) or sequences (T, B, D, C).
        **settings: see `TrainingSettings`.
    """
    training = TrainingSettings(**settings)
    compile_on = x.device if training.compile is True else None
    module = TrainingModule(*parts, training, 1_000_000, compile_on=compile_on).train().to(x.device)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batch, numbers = Batch(x, None), itertools.count(1)
    reduced = training.precision == "bfloat16"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if reduced else contextlib.nullcontext():
            loss = module.training_step(batch, next(numbers))
        loss.backward()
        module.configure_gradient_clipping()
        optimizer.step()
        scheduler.step()

    return step


def hand_written_step(network: HandWrittenRNNEM | HandWrittenNEM, x: Tensor) -> Callable[[], None]:
    """A step of training of a reference on images (B, D, 1), eager, with the same Adam."""
    optimizer, x = torch.optim.Adam(network.parameters(), fused=True), x.squeeze(-1)

    def step() -> None:
        optimizer.zero_grad()
        network.loss(x).backward()
        optimizer.step()

    return step


def time_case(
    name: str, size: Size, peaks: Peaks, *, compiled: bool, repetitions: int, device: torch.device, seed: int
) -> Iterator[Row]:
    """A row for each variant of a case, and for the reference where it has one."""
    parts = build(name, size, device, seed)
    x, T = images(parts, size, device), parts.strategy.iterations
    section = f"step of {name}\nK {size.K}, T {T}, batch {size.batch}"
    count = size.batch * (T if parts.strategy.is_sequential else 1)
    clip = 1.0 if parts.strategy.is_sequential else None
    asked = {variant: settings for variant, settings in VARIANTS.items() if compiled or not settings["compile"]}
    lacking = {variant: _lacking(settings, peaks, device) for variant, settings in asked.items()}
    variants = {variant: settings for variant, settings in asked.items() if lacking[variant] is None}
    # All are built before any is compiled, for to build one discards what was compiled.
    steps = {
        variant: training_step(copy.deepcopy(parts), x, gradient_clip=clip, **settings)
        for variant, settings in variants.items()
    }
    if name in HAND_WRITTEN:
        steps[BY_HAND] = hand_written_step(hand_written(parts), x)
    first = {variant: timed(step, device) for variant, step in steps.items()}
    alternately(steps, WARM_UP, device)
    seconds = alternately(steps, repetitions, device)
    precisions = {settings["precision"] for settings in [VARIANTS["eager"], *variants.values()]}
    work = {precision: _work(parts, x, precision, clip) for precision in precisions}
    for variant, step in steps.items():
        settings = VARIANTS.get(variant, VARIANTS["eager"])
        done, median = work[settings["precision"]], Spread.of(seconds[variant]).median
        share, binds = done.share(median, peaks, settings["precision"])
        yield Row(
            section,
            variant,
            Spread.of(1000 * seconds[variant]),
            speeds={
                other: Spread.of(seconds[other] / seconds[variant])
                for other in ("eager", BY_HAND)
                if variant in VARIANTS and other in steps and other != variant
            },
            images_per_second=count / median,
            share=share,
            binds=binds,
            gflops=done.flops / 1e9,
            megabytes=done.bytes / 1e6,
            memory=peak_memory(step, device),
            first_seconds=first[variant] if settings["compile"] else None,
        )
    for variant, reason in lacking.items():
        if reason is not None:
            yield Row(section, variant, None, note=reason)


def _lacking(settings: dict[str, Any], peaks: Peaks, device: torch.device) -> str | None:
    """Why a variant cannot be timed on this machine; None where it can."""
    slower = peaks.products["float32"] / peaks.products[settings["precision"]]
    if slower > FAR_SLOWER:
        return f"no instructions for {settings['precision']}: its products are {slower:.0f} times slower than float32's"
    return missing_compiler(device) if settings["compile"] else None


def _work(parts: Parts, x: Tensor, precision: str, clip: float | None) -> Work:
    """What an eager step computes and moves."""
    return count_work(training_step(copy.deepcopy(parts), x, precision=precision, compile=False, gradient_clip=clip))
