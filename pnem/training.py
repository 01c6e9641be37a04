"""`fit`: Lightning trains a strategy and its model end to end."""

import contextlib
import logging
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor

from pnem.callbacks import History, SafeCheckpointIO
from pnem.data import Batch, ImageDataset
from pnem.devices import PRECISIONS, resolve_device
from pnem.errors import DataError, DeviceError, RunError
from pnem.inference import ELBO, Objective, State, Strategy
from pnem.loading import Splits, batches, open_splits
from pnem.metrics import adjusted_rand_index, mean_and_standard_error
from pnem.models import SpatialMixture
from pnem.run import Run, RunFiles, Settings, check_resumable, read_tensors, reserve

__all__ = ["TrainingSettings", "fit"]


@dataclass(frozen=True)
class TrainingSettings:
    """How `fit` trains.

    Attributes:
        epochs: at most this many passes over the training split.
        batch_size: images per step.
        learning_rate: Adam's, after warm-up.
        schedule: ``"cosine"``: down to 1 % over `epochs`; ``"constant"``.
        warmup_steps: steps over which the learning rate rises from zero.
        gradient_clip: largest norm of the gradient; None for no limit.
        patience: epochs without improvement of the validation loss before stopping early; None for never.
        train_limit: use only that many training images; None for all.
        valid_limit: validate on only that many images; None for all.
        seed: of shuffling, noise and initial γ. (Parameters are initialised before `fit`.)
        device: see `pnem.devices.resolve_device`.
        precision: ``"float32"``, ``"bfloat16"`` (autocast; log-probabilities stay in float32) or ``"float64"``.
        compile: whether to compile the unroll with its objective (``torch.compile``): a minute or two once, then
            faster steps.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    gradient_clip: float | None = None
    patience: int | None = 10
    train_limit: int | None = None
    valid_limit: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        """Raises `RunError` for settings that cannot work."""
        for name in ("epochs", "batch_size", "patience", "train_limit", "valid_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"{name} must be at least 1, but is {value}")
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"learning_rate must be positive and finite, but is {self.learning_rate}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise RunError(f"gradient_clip must be positive, but is {self.gradient_clip}: None means no limit")
        if self.schedule not in ("cosine", "constant"):
            raise RunError(f'schedule must be "cosine" or "constant", but is {self.schedule!r}')
        if self.seed < 0 or self.warmup_steps < 0:
            raise RunError(f"seed and warmup_steps must be at least 0, but are {self.seed} and {self.warmup_steps}")
        if self.precision not in PRECISIONS:
            raise DeviceError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")


def fit(
    model: SpatialMixture,
    strategy: Strategy,
    data: str | Path | Mapping[str, ImageDataset],
    *,
    objective: Objective | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Trains `model` and `strategy` together, and returns them as they were at their best validation loss.

    The model and the strategy are changed in place. Torch's global random state is left as it was.

    Args:
        model: the generative model.
        strategy: the strategy, built on this very model.
        data: an HDF5 file, or datasets, with splits ``"training"`` and ``"validation"``.
        objective: what to minimise; ``ELBO("ramp")`` when None.
        out: the run directory, which must not exist unless `resume`; None keeps the run in memory only.
        resume: whether to continue the run in `out` exactly where its last finished epoch ended; the training
            settings must be those it was started with, but for `epochs`, `patience` and `device`.
        progress: whether to show a progress bar.
        **settings: see `TrainingSettings`.

    Raises:
        DataError: the data do not fit the model, or hold fewer images than a batch.
        RunError: `out` exists (without `resume`), is corrupt, or belongs to another model; or the loss is not finite.
        DeviceError: no such device or precision.
        KeyboardInterrupt: with `out`, the message says how to resume; nothing up to the last epoch is lost.
    """
    if strategy.model is not model:
        raise RunError("the strategy was built on another model than the one given to fit: build it on this one")
    training = TrainingSettings(**settings)
    device = resolve_device(training.device)
    objective = ELBO("ramp") if objective is None else objective
    objective.step_weights(strategy.iterations)
    splits = open_splits(data, ("training", "validation"), model)
    described = Settings.describe(model, strategy, objective, asdict(training), splits)
    if resume:
        check_resumable(out, described)
    with contextlib.ExitStack() as stack:
        if out is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            directory = reserve(out, described, resume=resume)
        stack.enter_context(_quiet_lightning())
        stack.enter_context(torch.random.fork_rng(["cuda"] if device.type == "cuda" else []))
        history = _train(model, strategy, objective, splits, training, device, directory, resume, progress)
        run = Run(model, strategy, history, described, directory)
        best = RunFiles.of(directory).best
        run.load_weights(read_tensors(best), best)
        run.save_weights()
    if out is None:
        run.directory = None
    return run


def _train(
    model: SpatialMixture,
    strategy: Strategy,
    objective: Objective,
    splits: Splits,
    training: TrainingSettings,
    device: torch.device,
    directory: Path,
    resume: bool,
    progress: bool,
) -> pd.DataFrame:
    files = RunFiles.of(directory)
    train = splits.limited("training", training.train_limit)
    if len(train) < training.batch_size:
        raise DataError(
            f"the training split has {len(train)} images, fewer than a batch of {training.batch_size}: "
            "use a smaller batch_size"
        )
    history = History(files.history)
    best = ModelCheckpoint(
        files.best.parent, files.best.stem, monitor="valid_loss", mode="min", enable_version_counter=False
    )
    # Last of all, so that it holds what the other callbacks have come to know in its epoch.
    last = ModelCheckpoint(
        files.last.parent, files.last.stem, enable_version_counter=False, save_on_train_epoch_end=True
    )
    callbacks: list[lightning.Callback] = [history, best, last]
    if training.patience is not None:
        callbacks.insert(1, EarlyStopping("valid_loss", patience=training.patience, check_finite=False))
    trainer = lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.type == "cuda" else 1,
        precision=PRECISIONS[training.precision],  # type: ignore[arg-type]
        max_epochs=training.epochs,
        gradient_clip_val=training.gradient_clip,
        callbacks=callbacks,
        plugins=[SafeCheckpointIO()],
        logger=False,
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    steps = training.epochs * (len(train) // training.batch_size)
    module = _Module(model, strategy, objective, training, steps)
    loaders = (
        batches(train, training.batch_size, shuffle_seed=training.seed),
        batches(splits.limited("validation", training.valid_limit), training.batch_size),
    )
    try:
        trainer.fit(
            module, *loaders, ckpt_path=files.last if resume and files.last.exists() else None, weights_only=True
        )
    except SystemExit as error:
        # How Lightning ends a training that Ctrl-C interrupted.
        raise KeyboardInterrupt(_interrupted_message(files.last)) from error
    return history.table


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


def _interrupted_message(last: Path) -> str:
    if not last.exists():
        return "interrupted before the first epoch ended: there is nothing to resume"
    return f"interrupted: {last} holds the last finished epoch; continue with --resume, or fit(..., resume=True)"


class _Module(lightning.LightningModule):
    """One training step of a (model, strategy) pair."""

    def __init__(
        self,
        model: SpatialMixture,
        strategy: Strategy,
        objective: Objective,
        training: TrainingSettings,
        steps: int,
    ):
        super().__init__()
        self.model = model
        self.strategy = strategy
        self.objective = objective
        self.training_settings = training
        self.steps = steps
        losses: Callable[[State, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = self._losses
        self.losses = torch.compile(losses, fullgraph=True) if training.compile else losses

    def _losses(self, state: State, x_in: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = self.strategy.rollout(state, x_in, x)
        loss, elbo = self.objective(self.strategy, states, x)
        return loss, elbo.mean(), states[-1].gamma

    # A resumed run repeats no random number and skips none, because every epoch starts its own stream.
    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.training_settings.seed * 1_000_003 + self.current_epoch)

    # Every validation draws the same initial γ, so that epochs are compared on equal terms.
    def on_validation_epoch_start(self) -> None:
        self._train_state = torch.get_rng_state()
        torch.manual_seed(self.training_settings.seed)
        self.ari: list[Tensor] = []

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        self.model.check(batch.x)
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x = batch.x.to(self.dtype)
        loss, elbo, _ = self.losses(*self.strategy.start(x), x)
        if batch_idx % 50 == 0 and not bool(loss.isfinite()):
            raise RunError(
                f"the loss is {loss.item()} in epoch {self.current_epoch}, step {batch_idx}: try a smaller "
                "learning_rate, a gradient_clip, or float32 in place of bfloat16"
            )
        self._log({"train_loss": loss, "train_elbo": elbo}, len(x), on_step=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        x = batch.x.to(self.dtype)
        loss, elbo, gamma = self._losses(*self.strategy.start(x), x)
        self._log({"valid_loss": loss, "valid_elbo": elbo}, len(x))
        if batch.groups is not None:
            self.ari.append(adjusted_rand_index(batch.groups, gamma.argmax(-2)))

    def on_validation_epoch_end(self) -> None:
        if self.ari:
            self.log("valid_ari", mean_and_standard_error(torch.cat(self.ari)).mean, prog_bar=True)
        torch.set_rng_state(self._train_state)

    def _log(self, values: dict[str, Tensor], count: int, *, on_step: bool = False) -> None:
        for name, value in values.items():
            self.log(name, value, prog_bar=True, on_step=on_step, on_epoch=True, batch_size=count)

    def configure_optimizers(self) -> Any:
        settings = self.training_settings
        optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
            if settings.schedule == "constant":
                return warm
            return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
