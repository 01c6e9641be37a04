"""`fit`: Lightning trains a strategy and its model end to end."""

import contextlib
import logging
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from pnem.callbacks import BestCheckpoint, CollapseWatch, History, Patience, ProgressBar, SafeCheckpointIO
from pnem.data import ImageDataset
from pnem.devices import PRECISIONS, forked_rng, resolve_device
from pnem.errors import DataError, RunError
from pnem.inference import ELBO, NUTS, ClassicalEM, Objective, Strategy
from pnem.loading import Splits, batches, open_splits
from pnem.models import SpatialMixture
from pnem.resident import resident
from pnem.run import Run
from pnem.run_directory import (
    RunFiles,
    check_resumable,
    discard_unfinished,
    load_weights,
    reserve,
    save_weights,
    weights_of,
)
from pnem.settings import Settings, TrainingSettings
from pnem.training_module import TrainingModule

__all__ = ["TrainingSettings", "fit"]


def fit(
    model: SpatialMixture,
    strategy: Strategy,
    data: str | Path | Mapping[str, ImageDataset],
    *,
    objective: Objective | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    start_from: str | Path | Run | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Trains `model` and `strategy` together, and returns them as they were at their best validation loss.

    Warns with a `pnem.diagnostics.CollapseWarning`, once of each kind, of what `pnem.diagnostics.collapse` finds in
    the validations: where it lasts for three in a row, and not in the first 500 steps; of latent dimensions, where all
    are inactive.

    The model and the strategy are changed in place. Torch's global random state is left as it was.

    Args:
        model: the generative model.
        strategy: the strategy, built on this very model.
        data: an HDF5 file, or datasets, with splits ``"training"`` and ``"validation"``.
        objective: what to minimise; ``ELBO("ramp")`` when None.
        out: the run directory, which must not exist unless `resume`; None keeps the run in memory only.
        resume: whether to continue the run in `out` exactly where its last finished epoch ended; the parts and the
            settings must be those it was started with, but for `epochs`, `patience`, `device` and `compile`. (Other
            `epochs` stretch a cosine schedule.)
        start_from: a run, or its directory, whose weights training begins with, as stages of a curriculum do: of a
            model and a strategy of the same parts, though K may differ.
        progress: whether to show a progress bar.
        **settings: see `TrainingSettings`.

    Raises:
        DataError: the data do not fit the model, or hold fewer images than a batch.
        RunError: `out` exists (without `resume`), is corrupt, or belongs to another model; the weights of `start_from`
            do not fit; there is nothing to train; or the loss is not finite.
        DeviceError: no such device or precision.
        KeyboardInterrupt: with `out`, the message says how to resume; nothing up to the last epoch is lost.
    """
    if strategy.model is not model:
        raise RunError("the strategy was built on another model than the one given to fit: build it on this one")
    if isinstance(strategy, ClassicalEM):
        raise RunError("classical EM trains nothing by gradients: strategy.fit(x) or strategy.infer(x) fits the items")
    if isinstance(strategy, NUTS):
        raise RunError(
            "NUTS trains nothing: train the model with another strategy, VAE or PyroGuide say, and then give the "
            "images to NUTS(model).infer(x)"
        )
    if not any(parameter.requires_grad for part in (model, strategy) for parameter in part.parameters()):
        raise RunError(
            "neither the model nor the strategy has a parameter, so there is nothing to train: "
            "give the images to strategy.infer(x)"
        )
    training = _training_settings(settings)
    device = resolve_device(training.device)
    objective = ELBO("ramp") if objective is None else objective
    objective.step_weights(strategy.iterations)
    splits = open_splits(data, ("training", "validation"), strategy, steps=strategy.iterations)
    _check_enough(splits, training)
    begun = {} if start_from is None else {"start_from": _name(start_from)}
    described = Settings.describe(model, strategy, objective, asdict(training) | begun, splits)
    with contextlib.ExitStack() as stack:
        if resume:
            check_resumable(out, described)
        if out is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            directory = Path(out) if resume else reserve(out, described)
        files = RunFiles.of(directory)
        stack.enter_context(_quiet_lightning())
        stack.enter_context(forked_rng(device))
        try:
            if start_from is not None and not resume:
                _take_weights(start_from, model, strategy)
            history = _train(model, strategy, objective, splits, training, device, files, progress)
        except BaseException as error:
            kept = out is not None and (resume or not discard_unfinished(directory))
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(_interrupted(out, files, kept)) from None
            raise
        load_weights(model, strategy, files.best)
        if out is not None:
            save_weights(model, strategy, files.weights)
    return Run(model.eval(), strategy.eval(), history, described, None if out is None else directory).to(str(device))


def _training_settings(given: Mapping[str, Any]) -> TrainingSettings:
    try:
        return TrainingSettings(**given)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(TrainingSettings))
        raise RunError(f"cannot train with these settings ({error}): choose from {known}") from error


def _name(start: str | Path | Run) -> str:
    if isinstance(start, Run):
        return "memory" if start.directory is None else str(start.directory)
    return str(start)


def _take_weights(start: str | Path | Run, model: SpatialMixture, strategy: Strategy) -> None:
    """Gives the model and the strategy the weights of a run."""
    if not isinstance(start, Run):
        load_weights(model, strategy, weights_of(Path(start)))
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights.safetensors"
        save_weights(start.model, start.strategy, path)
        load_weights(model, strategy, path)


def _check_enough(splits: Splits, training: TrainingSettings) -> None:
    size = len(splits.limited("training", training.train_limit))
    if size < training.batch_size:
        raise DataError(
            f"the training split has {size} images, fewer than a batch of {training.batch_size}: "
            "use a smaller batch_size"
        )


def _train(
    model: SpatialMixture,
    strategy: Strategy,
    objective: Objective,
    splits: Splits,
    training: TrainingSettings,
    device: torch.device,
    files: RunFiles,
    progress: bool,
) -> pd.DataFrame:
    precision = torch.float64 if training.precision == "float64" else torch.float32
    model.to(precision).train()
    strategy.to(precision).train()
    resumed = files.last.exists()
    if resumed:
        load_weights(model, strategy, files.last)
        # Until this training ends, the best checkpoint is newer.
        files.weights.unlink(missing_ok=True)
    train = splits.limited("training", training.train_limit)
    valid = splits.limited("validation", training.valid_limit)
    history = History(files.history)
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        precision=PRECISIONS[training.precision],
        max_epochs=training.epochs,
        gradient_clip_val=training.gradient_clip,
        callbacks=_callbacks(history, training, files, progress),
        plugins=[SafeCheckpointIO()],
        logger=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    module = TrainingModule(model, strategy, objective, training, training.epochs * (len(train) // training.batch_size))
    loaders = (
        batches(resident(train, device, model, "the training split"), training.batch_size, shuffle_seed=training.seed),
        batches(resident(valid, device, model, "the validation split"), training.batch_size),
    )
    with _plain_interrupts():
        trainer.fit(module, *loaders, ckpt_path=files.last if resumed else None)
    return history.table


def _callbacks(
    history: History, training: TrainingSettings, files: RunFiles, progress: bool
) -> list[lightning.Callback]:
    # The watch reads the history's row of its epoch.
    callbacks: list[lightning.Callback] = [history, CollapseWatch(history)]
    if progress:
        callbacks.append(ProgressBar())
    if training.patience is not None:
        callbacks.append(Patience(training.patience))
    callbacks.append(BestCheckpoint(files.best))
    # Last of all, so that it holds what the other callbacks have come to know in its epoch.
    callbacks.append(
        ModelCheckpoint(files.last.parent, files.last.stem, enable_version_counter=False, save_on_train_epoch_end=True)
    )
    return callbacks


@contextlib.contextmanager
def _plain_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, where Lightning would exit and leave the signal ignored."""
    try:
        handler = signal.getsignal(signal.SIGINT)
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's advice on loaders and devices is about choices that pnem has made for its user."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)


def _interrupted(out: str | Path | None, files: RunFiles, kept: bool) -> str:
    if out is None:
        return "interrupted: nothing is kept without a run directory; name one with out="
    if not kept:
        return f"interrupted before the first epoch ended: nothing was kept in {out}"
    return (
        f"interrupted: {files.last} holds the last finished epoch; "
        "continue with the same command and --resume, or fit(..., resume=True)"
    )
