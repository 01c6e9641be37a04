"""What pnem adds to Lightning's callbacks: a history of epochs, and resuming that forgets nothing."""

import contextlib
import io
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pnem.diagnostics import CollapseWarning
from pnem.diagnostics.collapse import judge
from pnem.diagnostics.parting import parting
from pnem.files import write_atomically
from pnem.run_directory import HISTORY

__all__ = ["BestCheckpoint", "CollapseWatch", "History", "Patience", "ProgressBar", "SafeCheckpointIO"]


class History(Callback):
    """One row of metrics per epoch, in the checkpoint and as a CSV file.

    (Lightning's CSVLogger deletes the file of the run that is resumed.)
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._seconds_before = 0.0

    @property
    def table(self) -> pd.DataFrame:
        """One row per epoch."""
        return pd.DataFrame(self.rows, columns=HISTORY)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        seconds = self._seconds_before + time.perf_counter() - self._start
        row = {name: float(trainer.callback_metrics.get(name, float("nan"))) for name in HISTORY[1:-1]}
        self.rows.append({"epoch": trainer.current_epoch + 1, **row, "seconds": seconds})
        if trainer.is_global_zero:
            write_atomically(self.path, self.table.to_csv(index=False).encode())

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.rows = state_dict["rows"]
        self._seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0


class CollapseWatch(Callback):
    """Warns of collapse as it shows in the validations, once of each kind in a training, resumed ones included.

    A training that has just begun looks collapsed: components start alike, and latent dimensions have learned nothing.
    So the validations of the first 500 steps do not count, and of the others a finding must be there in three in a row.
    Latent dimensions that are not needed stay unused in good fits: only where all are does it warn.
    """

    FIRST_STEPS = 500
    VALIDATIONS = 3

    def __init__(self, history: History):
        self.history = history
        self._warned: list[str] = []
        self._in_a_row: dict[str, int] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if trainer.global_step < self.FIRST_STEPS:
            return
        strategy = pl_module.strategy
        found = {
            finding.name: finding
            for finding in [*judge(pl_module.symptoms(), strategy, inactive=1), *parting(self.history.table, strategy)]
            if finding.name not in self._warned
        }
        self._in_a_row = {name: self._in_a_row.get(name, 0) + 1 for name in found}
        lasting = [finding for name, finding in found.items() if self._in_a_row[name] >= self.VALIDATIONS]
        self._warned += [finding.name for finding in lasting]
        for finding in lasting if trainer.is_global_zero else []:
            with _beside(trainer.progress_bar_callback):
                warnings.warn(CollapseWarning(f"epoch {trainer.current_epoch + 1}: {finding}"), stacklevel=1)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"warned": self._warned, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self._warned, self._in_a_row = state_dict["warned"], state_dict["in_a_row"]


def _beside(bar: Callback | None) -> contextlib.AbstractContextManager[None]:
    """Takes a progress bar off its line while something else is written."""
    return bar.train_progress_bar.external_write_mode() if isinstance(bar, ProgressBar) else contextlib.nullcontext()


class Patience(EarlyStopping):
    """Early stopping on the validation loss that a resumed run takes up where it was, with the patience now given."""

    def __init__(self, patience: int):
        super().__init__("valid_loss", patience=patience, check_finite=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self.wait_count >= self.patience:
            trainer.should_stop = True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state_dict | {"patience": self.patience})


class BestCheckpoint(ModelCheckpoint):
    """The checkpoint of the epoch with the lowest validation loss, which a moved run directory still knows."""

    def __init__(self, path: Path):
        super().__init__(path.parent, path.stem, monitor="valid_loss", mode="min", enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state_dict | {"dirpath": self.dirpath})


class ProgressBar(TQDMProgressBar):
    """Lightning's progress bar with loss, ELBO and ARI."""

    def __init__(self) -> None:
        # Reading a metric makes a GPU wait.
        super().__init__(refresh_rate=10)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:  # noqa: D102
        loss = pl_module.mean_train_loss()
        shown: dict[str, Any] = {} if loss is None else {"loss": f"{loss:.2f}"}
        unit = "frame" if pl_module.strategy.is_sequential else "image"
        for name, title, form in (
            ("valid_elbo", "validation ELBO", f"{{:.2f}} nats/{unit}"),
            ("valid_ari", "ARI", "{:.3f}"),
        ):
            if name in trainer.callback_metrics:
                shown[title] = form.format(float(trainer.callback_metrics[name]))
        return shown


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside the old one and then put in its place, and read without running code from them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: D102
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> dict[str, Any]:  # noqa: D102
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint
