"""A tiny training for the tests of `fit`, of run directories and of the command line."""

from pathlib import Path
from typing import Any

import torch

import pnem
from pnem.data import ImageDataset, write_hdf5
from pnem.inference import ELBO, RNNEM, BitFlip
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.run import Run

SHAPE = (3, 4, 1)
SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 0.02,
    "schedule": "cosine",
    "warmup_steps": 2,
    "gradient_clip": 5.0,
    "patience": 3,
    "seed": 3,
    "device": "cpu",
    "progress": False,
}


def parts(*, seed: int = 0, shape: tuple[int, int, int] = SHAPE, features: int = 5) -> tuple[SpatialMixture, RNNEM]:
    """A small model and strategy, the same for the same seed."""
    torch.manual_seed(seed)
    model = SpatialMixture(decoders.Linear(features, shape), Bernoulli(), 3, pixel_prior=0.0)
    return model, RNNEM(model, iterations=3, noise=BitFlip(0.1))


def arrays(count: int = 28, shape: tuple[int, int, int] = SHAPE, frames: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary images and groups (T, N, H, W, C), always the same."""
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(frames, count, *shape, generator=generator).round()
    return features, torch.randint(0, 3, (frames, count, *shape[:2], 1), generator=generator)


def splits(**kwargs: Any) -> dict[str, ImageDataset]:
    """Data sets of `arrays`."""
    return {name: ImageDataset(*arrays(**kwargs)) for name in ("training", "validation", "test")}


def data_file(path: Path, **kwargs: Any) -> Path:
    """A file of `arrays`."""
    write_hdf5(path, {name: arrays(**kwargs) for name in ("training", "validation", "test")})
    return path


def train(out: Path | None = None, *, data: Any = None, **settings: Any) -> Run:
    """One training, the same for the same settings."""
    model, strategy = parts()
    return pnem.fit(
        model, strategy, splits() if data is None else data, objective=ELBO("ramp"), out=out, **SETTINGS | settings
    )


def weights(run: Run) -> list[torch.Tensor]:
    """All that was learned."""
    return [*run.model.state_dict().values(), *run.strategy.state_dict().values()]
