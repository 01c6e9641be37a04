"""A fitted (model, strategy) pair: use it, score it, save it, load it."""

import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from pnem.data import Batch, ImageDataset
from pnem.devices import resolve_device
from pnem.errors import ModelError, RunError
from pnem.files import write_atomically
from pnem.inference import Objective, Posterior, Strategy
from pnem.loading import Splits, batches, open_split
from pnem.metrics import (
    adjusted_mutual_information,
    adjusted_rand_index,
    binary_cross_entropy,
    mean_and_standard_error,
)
from pnem.models import Bernoulli, SpatialMixture
from pnem.models.config import build, describe

__all__ = ["Run", "RunFiles", "Scores", "Settings", "load"]

FORMAT = 1


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


@dataclass(frozen=True)
class Settings:
    """All that is needed to build a run's model and strategy again, and to know how they were trained.

    Attributes:
        image_shape: (H, W, C).
        model, strategy, objective: descriptions, as `pnem.models.config.describe` gives them.
        training: the fields of `pnem.training.TrainingSettings`.
        data: the source and the number of images in each split.
        versions: of pnem and the packages that the numbers depend on.
        format: of the run directory.
    """

    image_shape: tuple[int, int, int]
    model: dict[str, Any]
    strategy: dict[str, Any]
    objective: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def describe(
        cls,
        model: SpatialMixture,
        strategy: Strategy,
        objective: Objective,
        training: Mapping[str, Any],
        splits: Splits,
    ) -> "Settings":
        """The settings of a training that is about to start.

        Raises:
            ModelError: the model or the strategy has a part that cannot be described.
        """
        versions = {name: version(name) for name in ("pnem", "torch", "pyro-ppl", "lightning", "numpy")}
        return cls(
            model.decoder.image_shape,
            describe(model),
            describe(strategy),
            describe(objective),
            dict(training),
            {"source": splits.source} | {name: len(dataset) for name, dataset in splits.datasets.items()},
            versions | {"python": platform.python_version()},
        )

    @classmethod
    def read(cls, directory: Path) -> "Settings":
        """The settings of the run in `directory`.

        Raises:
            RunError: the directory does not exist, is not a run, or its settings cannot be read.
        """
        path = RunFiles.of(directory).settings
        if not directory.is_dir():
            raise RunError(f"there is no run directory {directory}: give one that pnem train or fit(..., out=) wrote")
        if not path.exists():
            raise RunError(f"{directory} has no {path.name}: it was not written by pnem")
        try:
            raw = json.loads(path.read_text())
            settings = cls(**raw | {"image_shape": tuple(raw["image_shape"])})
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise RunError(f"{path} is corrupt, or was not written by pnem: {error}") from error
        if settings.format != FORMAT:
            raise RunError(
                f"{path} has format {settings.format}, but this pnem reads {FORMAT}: use the pnem that wrote it"
            )
        return settings

    def write(self, directory: Path) -> None:
        """Writes the settings into a run directory."""
        write_atomically(RunFiles.of(directory).settings, (json.dumps(asdict(self), indent=2) + "\n").encode())


class Scores(NamedTuple):
    """How well a run groups and explains images; a mean over images and its standard error, nats per image.

    ``ami`` and ``ari`` are over pixels that belong to exactly one object, NaN without true groups. ``log_evidence``
    is log p(x | θ), and ``bce`` the binary cross-entropy between the images and their reconstructions (NaN
    for pixels that are not Bernoulli), both summed over pixels.
    """

    ami: float
    ami_se: float
    ari: float
    ari_se: float
    log_evidence: float
    bce: float
    images: int


@dataclass
class Run:
    """A fitted (model, strategy) pair.

    Attributes:
        model: as it was at the best validation loss.
        strategy: the same.
        history: one row per epoch: ``epoch, train_loss, train_elbo, valid_loss, valid_elbo, valid_ari, seconds``.
        settings: how it was built and trained.
        directory: where it is stored; None if it is not.
    """

    model: SpatialMixture
    strategy: Strategy
    history: pd.DataFrame
    settings: Settings
    directory: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.mixing_logits.device

    def to(self, device: str) -> "Run":
        """Moves model and strategy.

        Raises:
            DeviceError: there is no such device.
        """
        target = resolve_device(device)
        self.model.to(target)
        self.strategy.to(target)
        return self

    def infer(self, x: Tensor | np.ndarray, *, restarts: int = 1, keep_trace: bool = True) -> Posterior:
        """The posterior for images `x`, (B, D, C) or (B, H, W, C), in one batch; see `Strategy.infer`."""
        images = torch.as_tensor(x)
        if images.dim() == 4 and tuple(images.shape[1:]) == self.settings.image_shape:
            images = images.flatten(1, 2)
        images = images.to(self.device, self.model.mixing_logits.dtype)
        return self.strategy.infer(images, restarts=restarts, keep_trace=keep_trace)

    def infer_batches(
        self,
        data: str | Path | ImageDataset | Mapping[str, ImageDataset],
        *,
        split: str = "test",
        limit: int | None = None,
        restarts: int = 1,
        batch_size: int = 100,
        seed: int = 0,
        progress: bool = False,
    ) -> Iterator[tuple[Batch, Posterior]]:
        """Batches of a split in order, each with its posterior (without trace), in memory that does not grow with it.

        The initial γ follow from `seed`, and torch's global random state is left as it was.

        Raises:
            DataError: the split is missing or does not fit the model.
        """
        dataset = open_split(data, split, self.model)
        loader = batches(dataset if limit is None else dataset.limited(limit), batch_size)
        devices = ["cuda"] if self.device.type == "cuda" else []
        for i, batch in enumerate(track(loader, "inferring", disable=not progress, transient=True)):
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed * 1_000_003 + i)
                yield batch, self.infer(batch.x, restarts=restarts, keep_trace=False)

    def evaluate(
        self,
        data: str | Path | ImageDataset | Mapping[str, ImageDataset],
        *,
        split: str = "test",
        limit: int | None = None,
        restarts: int = 1,
        batch_size: int = 100,
        seed: int = 0,
        progress: bool = False,
    ) -> Scores:
        """Scores on a split; the arguments and errors are those of `infer_batches`."""
        groups, labels, evidence, bce = [], [], [], []
        for batch, posterior in self.infer_batches(
            data,
            split=split,
            limit=limit,
            restarts=restarts,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        ):
            if batch.groups is not None:
                groups.append(batch.groups)
                labels.append(posterior.labels.cpu())
            evidence.append(posterior.log_evidence.cpu())
            if isinstance(self.model.likelihood, Bernoulli):
                bce.append(binary_cross_entropy(batch.x, posterior.reconstruction.cpu()))
            else:
                bce.append(torch.full((len(batch.x),), torch.nan))
        nan = torch.full((1,), torch.nan)
        true, found = (torch.cat(groups), torch.cat(labels)) if groups else (None, None)
        ari = mean_and_standard_error(nan if true is None or found is None else adjusted_rand_index(true, found))
        ami = mean_and_standard_error(
            nan if true is None or found is None else adjusted_mutual_information(true, found)
        )
        log_evidence = torch.cat(evidence)
        return Scores(
            ami.mean,
            ami.standard_error,
            ari.mean,
            ari.standard_error,
            log_evidence.double().mean().item(),
            torch.cat(bce).double().mean().item(),
            len(log_evidence),
        )

    def save(self, directory: str | Path) -> None:
        """Stores the run in a new directory.

        Raises:
            RunError: the directory exists and is not empty, or the disk is full.
        """
        self.directory = reserve(directory, self.settings)
        files = RunFiles.of(self.directory)
        write_atomically(files.history, self.history.to_csv(index=False).encode())
        self.save_weights()

    def save_weights(self) -> None:
        """Writes the weights into the run's directory."""
        if self.directory is None:
            raise RunError("this run has no directory: use save(directory)")
        tensors = {
            f"{part}.{name}": value.detach().cpu().contiguous()
            for part, module in (("model", self.model), ("strategy", self.strategy))
            for name, value in module.state_dict().items()
        }
        write_atomically(RunFiles.of(self.directory).weights, to_safetensors(tensors))

    def load_weights(self, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Puts stored weights into model and strategy.

        Raises:
            RunError: they belong to another model or strategy.
        """
        for part, module in (("model", self.model), ("strategy", self.strategy)):
            prefix = f"{part}."
            state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            try:
                module.load_state_dict(state)
            except RuntimeError as error:
                raise RunError(f"the weights in {source} do not belong to this run's {part}: {error}") from error


def load(directory: str | Path, *, device: str = "cpu") -> Run:
    """The run that `fit(..., out=directory)`, ``pnem train`` or `Run.save` wrote.

    Nothing in the directory is executed: settings are JSON, weights are plain tensors.

    Raises:
        RunError: the directory is missing, corrupt, or was written by something else.
        DeviceError: there is no such device.
    """
    directory = Path(directory)
    settings = Settings.read(directory)
    files = RunFiles.of(directory)
    try:
        model = build(settings.model)
        strategy = build(settings.strategy, model)
        history = pd.read_csv(files.history) if files.history.exists() else pd.DataFrame()
    except (ModelError, ValueError) as error:
        raise RunError(f"{directory} cannot be built again: {error}") from error
    run = Run(model, strategy, history, settings, directory)
    # A training that was cut off has checkpoints, but its best weights were not written out yet.
    source = files.weights if files.weights.exists() else files.best
    run.load_weights(read_tensors(source), source)
    return run.to(device)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a weights file or a checkpoint; reading one cannot run code.

    Raises:
        RunError: the file is missing or corrupt.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: the run has no weights; train it, or resume its training") from error
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError) as error:
        raise RunError(f"{path} is corrupt, or was not written by pnem: {error}") from error
    except Exception as error:
        # What an unpickler raises on foreign bytes has no common base class.
        if type(error).__name__ == "UnpicklingError":
            raise RunError(f"{path} is corrupt, or was not written by pnem: {error}") from error
        raise


def reserve(directory: str | Path, settings: Settings, *, resume: bool = False) -> Path:
    """Makes a run directory with its settings.

    Raises:
        RunError: it exists and is not empty, and the run is not to be resumed; or it cannot be written.
    """
    directory = Path(directory)
    if resume:
        return directory
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RunError(f"{directory} exists already: choose another name, or resume the run in it with --resume")
    try:
        RunFiles.of(directory).best.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {directory}: {error}") from error
    settings.write(directory)
    return directory


# What may differ between a run and its continuation: how long to train, and where.
_FREE = ("epochs", "patience", "device", "compile")


def check_resumable(directory: str | Path | None, settings: Settings) -> None:
    """Raises `RunError` unless the run in `directory` was started with these settings and can be continued."""
    if directory is None:
        raise RunError("there is nothing to resume: name the run's directory with out=")
    stored = Settings.read(Path(directory))
    now, then = (json.loads(json.dumps(asdict(s))) for s in (settings, stored))
    for part in ("image_shape", "model", "strategy", "objective", "training", "data"):
        a, b = now[part], then[part]
        if isinstance(a, dict):
            ignored = _FREE if part == "training" else ("source",) if part == "data" else ()
            different = sorted(k for k in {*a, *b} if k not in ignored and a.get(k) != b.get(k))
            if different:
                key = different[0]
                raise RunError(
                    f"{directory} was started with {part} {key} = {b.get(key)}, but now it is {a.get(key)}: "
                    "resume with the same settings, or choose another name"
                )
        elif a != b:
            raise RunError(f"{directory} belongs to images of shape {b}, not {a}: choose another name")
    last = RunFiles.of(Path(directory)).last
    if last.exists():
        read_tensors(last)
