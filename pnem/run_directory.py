"""A run's directory: which files it has, and whether a run may be written to or continued in it."""

import json
import pickle
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from pnem.errors import RunError
from pnem.files import write_atomically
from pnem.inference import Strategy
from pnem.models import SpatialMixture
from pnem.models.config import completed
from pnem.settings import Settings

__all__ = [
    "HISTORY",
    "TERMS",
    "RunFiles",
    "check_resumable",
    "discard_unfinished",
    "load_weights",
    "read_history",
    "reserve",
    "save_weights",
    "weights_of",
]

# Of the ELBO after the last iteration on the validation split, as in `pnem.diagnostics.Terms`.
TERMS = ["expected_log_joint", "assignment_entropy", "log_prior", "theta_entropy", "reconstruction", "divergence"]
_WITHOUT_TERMS = ["epoch", "train_loss", "train_elbo", "valid_loss", "valid_elbo", "valid_ari", "seconds"]
HISTORY = [*_WITHOUT_TERMS[:-1], *(f"valid_{term}" for term in TERMS), "seconds"]


class RunFiles(NamedTuple):
    """Where a run directory keeps what."""

    settings: Path
    history: Path
    weights: Path
    best: Path
    last: Path

    @classmethod
    def of(cls, directory: Path) -> "RunFiles":
        """The files of a run directory."""
        checkpoints = directory / "checkpoints"
        return cls(
            directory / "settings.json",
            directory / "history.csv",
            directory / "weights.safetensors",
            checkpoints / "best.ckpt",
            checkpoints / "last.ckpt",
        )


def read_history(path: Path) -> pd.DataFrame:
    """The table of epochs, exactly as it was written; terms of the ELBO that an older pnem did not write are NaN.

    Raises:
        RunError: the file is missing or corrupt.
    """
    try:
        table = pd.read_csv(path, dtype=str)
        if list(table.columns) not in (HISTORY, _WITHOUT_TERMS):
            raise ValueError(f"it has columns {list(table.columns)}")
        # By Python's own float: the parser's may differ in the last digit.
        return table.reindex(columns=HISTORY).map(float).astype({"epoch": int})
    except (ValueError, OSError) as error:
        raise RunError(f"{path} is missing or corrupt, or was not written by pnem: {error}") from error


def weights_of(directory: Path) -> Path:
    """Where the best weights of a run are.

    Raises:
        RunError: there is no such run.
    """
    Settings.read(directory)
    files = RunFiles.of(directory)
    # A training that was cut off has checkpoints, but its best weights were not written out yet.
    return files.weights if files.weights.exists() else files.best


def load_weights(model: SpatialMixture, strategy: Strategy, path: Path) -> None:
    """Puts the weights in a weights file or a checkpoint into model and strategy, and these into its precision.

    Raises:
        RunError: the file is missing or corrupt, or belongs to another model or strategy.
    """
    tensors = _read_tensors(path)
    for part, module in _parts(model, strategy).items():
        prefix = f"{part}."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for value in state.values():
            if value.is_floating_point():
                module.to(value.dtype)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            # Its heading, and then a line for each kind of misfit.
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise RunError(f"the weights in {path} do not belong to this run's {part}: {reason}") from error


def save_weights(model: SpatialMixture, strategy: Strategy, path: Path) -> None:
    """Writes the weights of model and strategy.

    Raises:
        RunError: the disk is full, or the directory cannot be written to.
    """
    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, module in _parts(model, strategy).items()
        for name, value in module.state_dict().items()
    }
    write_atomically(path, to_safetensors(tensors))


def _parts(model: SpatialMixture, strategy: Strategy) -> dict[str, nn.Module]:
    return {"model": model, "strategy": strategy}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a weights file or a checkpoint; reading one cannot run code.

    Raises:
        RunError: the file is missing or corrupt.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            # About how foreign files were pickled; whether they hold tensors is all that matters.
            warnings.simplefilter("ignore")
            tensors = dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
        if not all(isinstance(value, Tensor) for value in tensors.values()):
            raise TypeError("it holds other things than tensors")
        return tensors
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: the run has no weights; train it, or resume its training") from error
    except (pickle.UnpicklingError, AttributeError) as error:
        # Not the unpickler's own words: they advise to load the file in a way that may run code from it.
        raise RunError(f"{path} is corrupt, or was not written by pnem: it does not hold plain tensors") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError) as error:
        raise RunError(f"{path} is corrupt, or was not written by pnem: {error}") from error


def reserve(directory: str | Path, settings: Settings) -> Path:
    """Makes a run directory with its settings.

    Raises:
        RunError: it exists and is not empty, or it cannot be written.
    """
    directory = Path(directory)
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise RunError(f"{directory} exists already: choose another name, or resume the run in it with --resume")
        RunFiles.of(directory).best.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {directory}: {error}") from error
    try:
        settings.write(directory)
    except BaseException:
        discard_unfinished(directory)
        raise
    return directory


def discard_unfinished(directory: Path) -> bool:
    """Removes a run that `reserve` made but that has no checkpoint yet; returns whether it did."""
    files = RunFiles.of(directory)
    if files.last.exists() or files.best.exists():
        return False
    shutil.rmtree(directory)
    return True


# What may differ between a run and its continuation: how long to train, and where.
_FREE = ("epochs", "patience", "device", "devices", "nodes", "compile", "activation_checkpointing")


def check_resumable(directory: str | Path | None, settings: Settings) -> None:
    """Raises `RunError` unless the run in `directory` was started with these settings and can be continued."""
    if directory is None:
        raise RunError("there is nothing to resume: name the run's directory with out=")
    stored = Settings.read(Path(directory))
    now, then = (json.loads(json.dumps(asdict(s))) for s in (settings, stored))
    for part in ("image_shape", "model", "strategy", "objective", "training", "data"):
        a, b = now[part], completed(then[part])
        if isinstance(a, dict):
            ignored = _FREE if part == "training" else ("source",) if part == "data" else ()
            if part == "data" and "fingerprint" not in b:
                # The run is older than fingerprints are.
                ignored = (*ignored, "fingerprint")
            different = sorted(k for k in {*a, *b} if k not in ignored and a.get(k) != b.get(k))
            if different == ["fingerprint"]:
                raise RunError(
                    f"{directory} was started with other training images than those given now: resume with the same "
                    "data, or choose another name"
                )
            if different:
                key = next(k for k in different if k != "fingerprint")
                raise RunError(
                    f"{directory} was started with {part} {key} = {b.get(key)}, but now it is {a.get(key)}: "
                    "resume with the same settings, or choose another name"
                )
        elif a != b:
            raise RunError(f"{directory} belongs to images of shape {b}, not {a}: choose another name")
    files = RunFiles.of(Path(directory))
    if files.weights.exists() and not files.last.exists():
        raise RunError(
            f"{directory} was saved without {files.last.name}, so its training cannot be resumed: train anew"
        )
