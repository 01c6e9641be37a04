"""All diagnostics of one run, in a given time."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from pnem.data import ImageDataset
from pnem.data.arrays import check_whole
from pnem.devices import forked_rng
from pnem.diagnostics.budget import Budget
from pnem.diagnostics.checks import check_run
from pnem.diagnostics.collapse import MINIMUM, judge
from pnem.diagnostics.diagnosis_result import Diagnosis
from pnem.diagnostics.gap_result import InferenceGap
from pnem.diagnostics.gaps import inference_gap
from pnem.diagnostics.parting import parting
from pnem.diagnostics.reliability import Reliability, reliability
from pnem.diagnostics.symptoms import Symptoms, symptoms
from pnem.diagnostics.tracing import Trace, trace
from pnem.errors import DataError, StrategyError
from pnem.inference import NUTS, ConvergenceWarning, Posterior, PyroGuide, Strategy
from pnem.loading import check_images, open_split

if TYPE_CHECKING:
    from pnem.run import Run

__all__ = ["diagnose"]

# By when each part is to end, as a share of the budget.
TRACE_UNTIL, GAP_UNTIL = 0.4, 0.7
# Draws for the gap of an image, whose standard error is that over images.
GAP_SAMPLES = 400
# Images that gradients are of.
MINIBATCH = 64
# Of calibration, where inference is one pass through a network.
SIMULATIONS = 200


def diagnose(
    run: "Run",
    data: str | Path | ImageDataset | Mapping[str, ImageDataset],
    *,
    split: str = "test",
    limit: int = 1000,
    budget: float | None = 150.0,
    batch_size: int = 50,
    seed: int = 0,
    progress: bool = False,
) -> Diagnosis:
    """All diagnostics of a run, within a budget of time.

    `trace` comes first, on as many images as there is time for; then on these what `collapse` looks for, and
    `inference_gap` and `reliability` of what was inferred. Each begins with ten images, which it gets in any case:
    for strategies that fit each image by itself (guides, NUTS) these alone can take longer than the budget.
    Calibration and gradients are left out for those; `pnem.diagnostics.reliability` has them.

    Args:
        run: the fitted run.
        data: a file or datasets, as `Run.evaluate` takes them.
        split: which split.
        limit: use only the first so many images.
        budget: seconds; None for everything on all images.
        batch_size: images at once.
        seed: of the initial γ and all draws; torch's global random state is left as it was.
        progress: whether to show progress bars.

    Raises:
        RunError: no run.
        DataError: the split is missing, empty, or does not fit the model; limit or batch_size is below 1, or budget
            not positive.
    """
    check_run(run)
    check_whole(batch_size, "batch_size")
    time = Budget(budget)
    dataset = open_split(data, split, run.strategy).limited(limit)
    batch = dataset[:]
    if not len(batch.x):
        raise DataError(f"split {split!r} is empty: there is nothing to diagnose")
    check_images(run.model, batch.x, f"split {split!r}")
    x = batch.x.to(run.device, run.model.mixing_logits.dtype)
    groups = None if batch.groups is None else batch.groups.to(run.device)
    model, strategy = run.model, run.strategy
    absent: dict[str, str] = {}
    if len(x) == 1:
        absent["standard_errors"] = "there is one image: give at least two, better a hundred"
    with forked_rng(run.device), _progress_bar(progress) as bar, warnings.catch_warnings():
        # What has not converged is in `InferenceGap.rising`.
        warnings.simplefilter("ignore", ConvergenceWarning)
        torch.manual_seed(seed)

        def in_time(name: str, pieces: Sequence[slice], until: float) -> Iterator[slice]:
            task = bar.add_task(name, total=len(x))
            for piece in time.in_time(pieces, until=until):
                yield piece
                bar.update(task, completed=piece.stop)
            bar.remove_task(task)

        pieces = time.pieces(len(x), batch_size)
        courses: list[Trace] = []
        posteriors: dict[int, Posterior] = {}
        for piece in in_time("trace", pieces, TRACE_UNTIL):
            posterior = strategy.infer(x[piece])
            its_groups = None if groups is None else groups[piece]
            courses.append(trace(strategy, x[piece], its_groups, posterior=posterior))
            posteriors[piece.start] = posterior._replace(trace=None)
        pieces = pieces[: len(courses)]
        course = Trace.concatenate(courses)
        findings, why = course.findings, _too_few(pieces[-1].stop, len(x))
        if why is None:
            seen = [symptoms(model, posteriors[piece.start], x[piece]) for piece in pieces]
            findings += judge(Symptoms.concatenate(seen), strategy) + parting(run.history, strategy)
        else:
            absent["collapse"] = why
        gap = None
        try:
            gaps = [
                inference_gap(model, strategy, x[piece], samples=GAP_SAMPLES, posterior=posteriors[piece.start])
                for piece in in_time("inference gap", pieces, GAP_UNTIL)
            ]
            gap = InferenceGap.concatenate(gaps)
            findings += gap.findings
        except StrategyError as error:
            absent["inference gap"] = str(error)
        once = _once(strategy, x[:MINIBATCH], time, absent)
        parts = [
            reliability(model, strategy, x[piece], repetitions=0, simulations=0, posterior=posteriors[piece.start])
            for piece in in_time("reliability", pieces, 1.0)
        ]
        reliable = Reliability.concatenate(parts if once is None else [*parts, once])
    return Diagnosis(
        name=type(strategy).__name__ if run.directory is None else run.directory.name,
        split=split,
        trace=course,
        gap=gap,
        reliability=reliable,
        findings=[*findings, *reliable.findings],
        absent=reliable.absent | absent,
        image_shape=run.settings.image_shape,
        x=x[pieces[0]],
        posterior=posteriors[0],
    )


def _too_few(images: int, available: int) -> str | None:
    """Why so many images are too few for findings of collapse, if they are."""
    if images >= MINIMUM:
        return None
    if available >= MINIMUM:
        return f"the budget allowed {images} images, but it needs {MINIMUM}: raise the budget"
    return f"it needs at least {MINIMUM} images, but there are {images}: raise limit, or give a larger split"


def _once(strategy: Strategy, x: Tensor, time: Budget, absent: dict[str, str]) -> Reliability | None:
    """Gradients and calibration, which are not by image; None where `absent` says why."""
    if isinstance(strategy, NUTS | PyroGuide):
        why = "it takes tens of fits of all images: pnem.diagnostics has it as a function of its own"
    elif time.is_over:
        why = "the budget left no time for it: raise the budget"
    else:
        simulations = SIMULATIONS if next(strategy.parameters(), None) is not None else 0
        return reliability(strategy.model, strategy, x, samples=0, restarts=0, simulations=simulations)
    absent |= dict.fromkeys(("gradient_snr", "calibration"), why)
    return None


def _progress_bar(wanted: bool) -> Progress:
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, transient=True, disable=not wanted)
