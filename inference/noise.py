"""Input noise for training: what a denoising strategy sees in place of the clean image."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pnem.inference.errors import StrategyError
from pnem.models.config import Configured

__all__ = ["BitFlip", "MaskedUniform", "Noise"]


class Noise(Configured, nn.Module, ABC):
    """A corruption of images that hits each pixel, all its channels apart, with probability `probability`.

    Raises:
        StrategyError: the probability is not in [0, 1].
    """

    def __init__(self, probability: float):
        super().__init__()
        if not 0 <= probability <= 1:
            raise StrategyError(f"the probability of noise must lie in [0, 1], but is {probability}")
        self.probability = float(probability)

    @abstractmethod
    def corrupt(self, x: Tensor) -> Tensor:
        """What takes the place of each pixel that noise hits: same shape as `x`."""

    def forward(self, x: Tensor) -> Tensor:
        """A noisy copy of `x`, drawn with torch's global generator."""
        return torch.where(torch.rand_like(x) < self.probability, self.corrupt(x), x)


class BitFlip(Noise):
    """Turns x into 1 − x: the noise of the original experiments on binary images.

    >>> BitFlip(1.0)(torch.tensor([0.0, 1.0]))
    tensor([1., 0.])
    """

    def corrupt(self, x: Tensor) -> Tensor:  # noqa: D102
        return 1 - x


class MaskedUniform(Noise):
    """Replaces x by a number drawn uniformly from [0, 1): the noise of the original experiments on grey images."""

    def corrupt(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.rand_like(x)
