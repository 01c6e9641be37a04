"""What pnem adds to Lightning's training loop: a history of epochs, and checkpoints that a full disk cannot spoil."""

import io
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pnem.files import write_atomically

__all__ = ["History", "SafeCheckpointIO"]

COLUMNS = ("train_loss", "train_elbo", "valid_loss", "valid_elbo", "valid_ari")


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
        return pd.DataFrame(self.rows, columns=["epoch", *COLUMNS, "seconds"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        # The epoch's means replace those of its last step under the plain names.
        metrics = trainer.callback_metrics
        values = {name: metrics.get(f"{name}_epoch", metrics.get(name)) for name in COLUMNS}
        seconds = self._seconds_before + time.perf_counter() - self._start
        row = {name: float("nan") if value is None else float(value) for name, value in values.items()}
        self.rows.append({"epoch": trainer.current_epoch + 1, **row, "seconds": seconds})
        write_atomically(self.path, self.table.to_csv(index=False).encode())

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: D102
        self.rows = state_dict["rows"]
        self._seconds_before = self.rows[-1]["seconds"] if self.rows else 0.0


class SafeCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside the old one and then put in its place."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:  # noqa: D102
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())
