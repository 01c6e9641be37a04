"""`fit`: Lightning trains a strategy and its model end to end."""

import contextlib
import logging
import math
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from pnem.callbacks import BestCheckpoint, CollapseWatch, History, Patience, ProgressBar, SafeCheckpointIO
from pnem.compilation import should_compile
from pnem.data import ImageDataset
from pnem.devices import PRECISIONS, bfloat16_speed, forked_rng, resolve_devices
from pnem.distributed import TIMEOUT, check_processes, in_processes, is_first, started_by_torchrun
from pnem.errors import DataError, RunError
from pnem.inference import ELBO, NUTS, ClassicalEM, Objective, Strategy
from pnem.inference.collectives import of_first
from pnem.loading import Splits, batches, open_splits
from pnem.memory import check_memory
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

    With ``devices=N`` it trains by data parallelism: N processes, one per device, each take their share of every batch,
    and gradients are averaged, so that without randomness the result is that of one device, to rounding. (Noise, the
    initial γ and draws of θ are each process's own.) `fit` starts them, waits for them and returns one run; a script
    must call it under ``if __name__ == "__main__":``, and classes of its own must be in a module. Where torchrun has
    started the processes, as it must with ``nodes`` > 1, each calls `fit` and each gets the run, but the first alone
    writes it. Where one process fails, or at Ctrl-C, all end.

    Args:
        model: the generative model.
        strategy: the strategy, built on this very model.
        data: an HDF5 file, or datasets, with splits ``"training"`` and ``"validation"``.
        objective: what to minimise; ``ELBO("ramp")`` when None.
        out: the run directory, which must not exist unless `resume`; None keeps the run in memory only.
        resume: whether to continue the run in `out` exactly where its last finished epoch ended; the parts and the
            settings must be those it was started with, but for `epochs`, `patience`, `device`, `devices`, `nodes`,
            `compile` and `activation_checkpointing`. (Other `epochs` stretch a cosine schedule.)
        start_from: a run, or its directory, whose weights training begins with, as stages of a curriculum do: of a
            model and a strategy of the same parts, though K may differ.
        progress: whether to show a progress bar.
        **settings: see `TrainingSettings`.

    Raises:
        DataError: the data do not fit the model, or hold fewer images than a batch, or than processes.
        RunError: `out` exists (without `resume`), is corrupt, or belongs to another model; the weights of `start_from`
            do not fit; there is nothing to train; or the loss is not finite.
        DeviceError: no such device or precision, or fewer devices than asked for.
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
    check_processes(training.devices, training.nodes)
    devices = resolve_devices(training.device, training.devices)
    # Of processes started here, only the results come to this one, and they go to the first device.
    device = devices[int(os.environ["LOCAL_RANK"]) if started_by_torchrun() else 0]
    objective = ELBO("ramp") if objective is None else objective
    objective.step_weights(strategy.iterations)
    splits = open_splits(data, ("training", "validation"), strategy, steps=strategy.iterations)
    _check_enough(splits, training)
    _check_divisible(model, training)
    begun = {} if start_from is None else {"start_from": _name(start_from)}
    described = Settings.describe(model, strategy, objective, asdict(training) | begun, splits)
    with contextlib.ExitStack() as stack:
        if resume:
            check_resumable(out, described)
        first = is_first()
        if first and training.precision == "bfloat16":
            _warn_where_slower(device)
        if out is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            directory = Path(out) if resume or not first else reserve(out, described)
        files = RunFiles.of(directory)
        stack.enter_context(forked_rng(device))
        try:
            if start_from is not None and not resume:
                _take_weights(start_from, model, strategy)
            given = (model, strategy, objective, splits, training, devices, files, progress)
            if training.processes == 1 or started_by_torchrun():
                history = _train(*given)
            else:
                history = in_processes(devices, _train, *given)
        except BaseException as error:
            kept = out is not None and (resume or not first or not discard_unfinished(directory))
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(_interrupted(out, files, kept)) from None
            raise
        if first:
            load_weights(model, strategy, files.best)
        if training.processes > 1 and started_by_torchrun():
            history = _share_first(model, strategy, history)
        if out is not None and first:
            save_weights(model, strategy, files.weights)
    return Run(model.eval(), strategy.eval(), history, described, None if out is None else directory).to(str(device))


def _training_settings(given: Mapping[str, Any]) -> TrainingSettings:
    try:
        return TrainingSettings(**given)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(TrainingSettings))
        raise RunError(f"cannot train with these settings ({error}): choose from {known}") from error


def _warn_where_slower(device: torch.device) -> None:
    speed = bfloat16_speed(device)
    if speed < 0.5:
        warnings.warn(
            f"bfloat16 is slower than float32 here: {device} multiplies matrices {1 / speed:.0f} times as slowly, as "
            "processors without instructions for it do; leave the precision at float32",
            stacklevel=3,
        )


def _name(start: str | Path | Run) -> str:
    if isinstance(start, Run):
        return "memory" if start.directory is None else str(start.directory)
    return str(start)


def _take_weights(start: str | Path | Run, model: SpatialMixture, strategy: Strategy) -> None:
    """Gives the model and the strategy the weights of a run."""
    settings = start.settings if isinstance(start, Run) else Settings.read(Path(start))
    theirs, ours = settings.strategy.get("type", "").rpartition(".")[2], type(strategy).__name__
    if theirs != ours:
        raise RunError(f"{_name(start)} was trained with {theirs}, not {ours}: start from a run of the same strategy")
    if settings.image_shape != (shape := model.decoder.image_shape):
        raise RunError(
            f"{_name(start)} is for images of shape (H, W, C) = {settings.image_shape}, not {shape}: start from a run "
            "on images of that shape"
        )
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
    size = len(splits.limited("validation", training.valid_limit))
    if size < training.processes:
        raise DataError(
            f"the validation split has {size} images, fewer than the {training.processes} processes that are to share "
            "them: use fewer devices, or a larger split"
        )


def _check_divisible(model: SpatialMixture, training: TrainingSettings) -> None:
    if training.processes > 1 and model.mixing_kind == "learned" and model.mixing_concentration != 1:
        raise RunError(
            "a prior on the mixing weights is shared among the images of a batch, and cannot be divided among "
            f"{training.processes} processes: train on one device, or with mixing_concentration=1"
        )


def _share_first(model: SpatialMixture, strategy: Strategy, history: pd.DataFrame) -> pd.DataFrame:
    """Gives model and strategy the weights of torchrun's first process, and returns its history."""
    *states, history = of_first((model.state_dict(), strategy.state_dict(), history))
    model.load_state_dict(states[0])
    strategy.load_state_dict(states[1])
    return history


def _train(
    model: SpatialMixture,
    strategy: Strategy,
    objective: Objective,
    splits: Splits,
    training: TrainingSettings,
    devices: list[torch.device],
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
    cuda = devices[0].type == "cuda"
    # Processes on a CPU share its memory.
    share_of_batch = training.batch_size // (training.processes if cuda else training.nodes)
    history = History(files.history)
    plugins: list[Any] = [SafeCheckpointIO()]
    if training.processes > 1:
        plugins.append(TorchElasticEnvironment() if started_by_torchrun() else LightningEnvironment())
    with _plain_interrupts(), _quiet_lightning():
        trainer = lightning.Trainer(
            accelerator="gpu" if cuda else "cpu",
            devices=[device.index for device in devices] if cuda else len(devices),
            num_nodes=training.nodes,
            strategy=DDPStrategy(timeout=TIMEOUT, broadcast_buffers=False) if training.processes > 1 else "auto",
            precision=PRECISIONS[training.precision],
            max_epochs=training.epochs,
            callbacks=_callbacks(history, training, files, progress),
            plugins=plugins,
            logger=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        steps = training.epochs * (len(train) // training.batch_size)
        images = steps * training.batch_size
        pixels = images * model.num_components * math.prod(model.decoder.image_shape[:2])
        compiles = should_compile(training.compile, devices[0], iterations=steps * strategy.iterations, pixels=pixels)
        compile_on = devices[0] if compiles else None
        module = TrainingModule(model, strategy, objective, training, steps, compile_on=compile_on)
        share = trainer.global_rank, trainer.world_size
        place = trainer.strategy.root_device
        check_memory(strategy, objective, train, replace(training, batch_size=share_of_batch), place)
        train_data, valid_data = (
            resident(part, place, model, f"the {name} split")
            for part, name in ((train, "training"), (valid, "validation"))
        )
        loaders = (
            batches(train_data, training.batch_size, shuffle_seed=training.seed, share=share),
            batches(valid_data, training.batch_size, share=share),
        )
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
