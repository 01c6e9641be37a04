"""What a run was made of and how it was trained: the arguments of `fit`, and ``settings.json``."""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pnem.data import fingerprint
from pnem.devices import PRECISIONS
from pnem.errors import DeviceError, RunError
from pnem.files import write_atomically
from pnem.inference import Objective, Strategy
from pnem.loading import Splits
from pnem.models import SpatialMixture
from pnem.models.config import describe

__all__ = ["Settings", "TrainingSettings"]

FILE = "settings.json"
FORMAT = 1


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
        devices: how many of them on every machine train together, a process on each: a batch is divided among them, so
            that loss, steps and schedule are as with one.
        nodes: how many machines do, with torchrun running on each, and a file system for the run directory in common.
        precision: ``"float32"``, ``"bfloat16"`` (autocast; log-probabilities stay in float32) or ``"float64"``.
        compile: whether to compile the unroll with its loss (``torch.compile``): a slow start, then faster steps.
            ``"auto"``: where the training is long enough for that to pay, and there is a compiler.
        truncation: the frames of sequences, or iterations on images, over which gradients flow back: after so many the
            state is taken as given, and what led to it is freed (truncated backpropagation through time); None for all.
        activation_checkpointing: whether to keep only every √T-th of the T iterations, and compute those between again
            on the way back: the same gradients and memory that grows as √T, for one more pass forwards.
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
    devices: int = 1
    nodes: int = 1
    precision: str = "float32"
    compile: bool | str = "auto"
    truncation: int | None = None
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Raises `RunError` for settings that cannot work."""
        for name in (
            "epochs",
            "batch_size",
            "patience",
            "train_limit",
            "valid_limit",
            "truncation",
            "devices",
            "nodes",
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RunError(f"{name} must be a whole number of at least 1, but is {value!r}")
        if self.batch_size % self.processes:
            raise RunError(
                f"a batch of {self.batch_size} cannot be divided among {self.processes} processes "
                f"(devices={self.devices}, nodes={self.nodes}): choose a multiple of {self.processes}"
            )
        if self.activation_checkpointing and self.processes > 1:
            raise RunError(
                f"activation_checkpointing is for a single process, but devices={self.devices}, nodes={self.nodes}: a "
                "batch divided among them takes less memory as it is; or use truncation"
            )
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"learning_rate must be positive and finite, but is {self.learning_rate}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise RunError(f"gradient_clip must be positive, but is {self.gradient_clip}: None means no limit")
        if self.schedule not in ("cosine", "constant"):
            raise RunError(f'schedule must be "cosine" or "constant", but is {self.schedule!r}')
        if self.warmup_steps < 0:
            raise RunError(f"warmup_steps must be at least 0, but is {self.warmup_steps}")
        if not 0 <= self.seed < 2**32:
            raise RunError(f"seed must be at least 0 and below 2**32, but is {self.seed}")
        if self.precision not in PRECISIONS:
            raise DeviceError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        if self.compile not in (True, False, "auto"):
            raise RunError(f'compile must be True, False or "auto", but is {self.compile!r}')

    @property
    def processes(self) -> int:
        """On how many devices together a batch is divided."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class Settings:
    """All that is needed to build a run's model and strategy again, and to know how they were trained.

    Attributes:
        image_shape: (H, W, C).
        model, strategy, objective: descriptions, as `pnem.models.config.describe` gives them.
        training: the fields of `pnem.training.TrainingSettings`.
        data: the source, the number of images in each split, and the fingerprint of the training split, which runs of
            earlier versions lack; see `pnem.data.fingerprint`.
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
            DataError: training images cannot be read.
        """
        versions = {name: version(name) for name in ("pnem", "torch", "pyro-ppl", "lightning", "numpy")}
        return cls(
            model.decoder.image_shape,
            describe(model),
            describe(strategy),
            describe(objective),
            dict(training),
            {"source": splits.source}
            | {name: len(dataset) for name, dataset in splits.datasets.items()}
            | {"fingerprint": fingerprint(splits.datasets["training"])},
            versions | {"python": platform.python_version()},
        )

    @classmethod
    def read(cls, directory: Path) -> "Settings":
        """The settings of the run in `directory`.

        Raises:
            RunError: the directory does not exist, is not a run, or its settings cannot be read.
        """
        path = directory / FILE
        if not directory.is_dir():
            raise RunError(f"there is no run directory {directory}: give one that pnem train or fit(..., out=) wrote")
        if not path.exists():
            raise RunError(f"{directory} has no {path.name}: it was not written by pnem")
        try:
            raw = json.loads(path.read_text())
            H, W, C = (int(size) for size in raw["image_shape"])
            settings = cls(**raw | {"image_shape": (H, W, C)})
            for name in ("model", "strategy", "objective", "training", "data", "versions"):
                if not isinstance(getattr(settings, name), dict):
                    raise TypeError(f"{name} is not an object with named entries")
        except (ValueError, TypeError, KeyError, RecursionError, OSError) as error:
            raise RunError(f"{path} is corrupt, or was not written by pnem: {error}") from error
        if settings.format != FORMAT:
            raise RunError(
                f"{path} has format {settings.format}, but this pnem reads {FORMAT}: use the pnem that wrote it"
            )
        return settings

    def write(self, directory: Path) -> None:
        """Writes the settings into a run directory."""
        write_atomically(directory / FILE, (json.dumps(asdict(self), indent=2) + "\n").encode())
