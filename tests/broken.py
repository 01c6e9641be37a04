"""Fits whose components are painted by hand, so that what is wrong with them is known."""

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from pnem.data import ImageDataset
from pnem.inference import ELBO, Strategy
from pnem.loading import Splits
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.run import Run
from pnem.run_directory import HISTORY
from pnem.settings import Settings

SIZE = 8
"""Images are SIZE × SIZE pixels, with one object in the left half and one in the right."""


def two_bars(count: int, size: int = SIZE, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Binary images and groups (1, N, H, W, 1): a horizontal bar on the left, a vertical one on the right."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.zeros(count, size, size, dtype=torch.long)
    rows = torch.randint(size, (count,), generator=generator)
    columns = torch.randint(size // 2, size, (count,), generator=generator)
    for image, row, column in zip(groups, rows, columns, strict=True):
        image[row, :3] = 1
        image[1:5, column] = 2
    groups = groups[None, ..., None]
    return (groups > 0).float(), groups


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    size = round(x.shape[-2] ** 0.5)
    left = (torch.arange(size) < size // 2).repeat(size)
    return x[..., 0] * left, x[..., 0] * ~left


def _stack(*canvases: Tensor, K: int) -> Tensor:
    blank = torch.zeros_like(canvases[0])
    return torch.stack([*canvases, *[blank] * (K - len(canvases))], 1)


def _with_background(x: Tensor, K: int) -> Tensor:
    objects = [torch.where(half > 0, 1.0, 0.5) for half in _halves(x)]
    return torch.stack([torch.zeros_like(objects[0]), *objects], 1)


def _flipped(x: Tensor, K: int) -> Tensor:
    canvas = x[..., 0].clone()
    canvas[:, :2] = 1 - canvas[:, :2]
    return _stack(*[canvas] * K, K=K)


PAINTINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "an object each": lambda x, K: _stack(*_halves(x), K=K),
    "background and objects": _with_background,
    "one for all": lambda x, K: _stack(x[..., 0], K=K),
    "twice the same": lambda x, K: _stack(x[..., 0], x[..., 0], K=K),
    "two pixels wrong": _flipped,
}
"""What each component predicts, (B, K, D) probabilities of images x (B, D, 1)."""


class Painter(Strategy):
    """θ_k are the logits of a painting of the image itself; in random order unless `fixed`."""

    def __init__(self, model: SpatialMixture, painting: str, *, logit: float = 8.0, fixed: bool = False):
        super().__init__(model, iterations=1)
        self.painting = painting
        self.logit = logit
        self.fixed = fixed

    def m_step(self, state, x_in):
        logits = self.logit * (2 * PAINTINGS[self.painting](x_in, self.model.num_components) - 1)
        if self.fixed:
            return logits
        order = torch.rand(logits.shape[:2]).argsort(-1)
        return logits.gather(1, order.unsqueeze(-1).expand_as(logits))


def painted(painting: str, K: int = 3, *, size: int = SIZE, pixel_prior: float | None = 0.0, **options) -> Run:
    """A run whose inference is a painting."""
    model = SpatialMixture(
        decoders.Linear(size**2, (size, size, 1), bias=False), Bernoulli(), K, pixel_prior=pixel_prior
    )
    with torch.no_grad():
        model.decoder.linear.weight.copy_(torch.eye(size**2))
    return as_run(model, Painter(model, painting, **options))


def as_run(model: SpatialMixture, strategy: Strategy, history: pd.DataFrame | None = None) -> Run:
    """A run of parts that were not trained, of data in memory."""
    history = pd.DataFrame(columns=HISTORY, dtype=float) if history is None else history
    splits = Splits({"training": dataset(2)}, "memory")
    return Run(model, strategy, history, Settings.describe(model, strategy, ELBO(), {}, splits))


def dataset(count: int = 40, size: int = SIZE) -> ImageDataset:
    """`two_bars` as a data set."""
    return ImageDataset(*two_bars(count, size))
