"""Encoders: what a learned strategy makes of an image-shaped input before it reaches the recurrence or q(θ)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnem.inference.errors import StrategyError
from pnem.models.config import Configured
from pnem.models.networks import activation, flat_call, mlp

__all__ = ["MLP", "Convolutional", "Encoder", "Identity", "check_encoder"]


class Encoder(Configured, nn.Module, ABC):
    """A network from an image-shaped input (..., D, C) to features (..., E).

    Args:
        image_shape: (H, W, C) of the input, C counting all its channels.
    """

    out_features: int

    def __init__(self, image_shape: Sequence[int]):
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise StrategyError(f"image_shape must be (H, W, C) of positive sizes, but is {tuple(image_shape)}")
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])

    @property
    def in_features(self) -> int:
        """H·W·C."""
        return self.image_shape[0] * self.image_shape[1] * self.image_shape[2]

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(..., D, C) -> (..., E)."""


class Identity(Encoder):
    """No encoder: the pixels themselves, flattened."""

    def __init__(self, image_shape: Sequence[int]):
        super().__init__(image_shape)
        self.out_features = self.in_features

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.flatten(-2)


class MLP(Encoder):
    """Fully connected layers.

    >>> MLP((28, 28, 1), hidden=(64, 32))(torch.zeros(2, 4, 784, 1)).shape
    torch.Size([2, 4, 32])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        hidden: Sequence[int] = (512,),
        activation: str = "elu",
        layer_norm: bool = False,
    ):
        super().__init__(image_shape)
        if not hidden or min(hidden) < 1:
            raise StrategyError(f"hidden must name the width of at least one layer, but is {tuple(hidden)}")
        self.hidden = mlp((self.in_features, *hidden), activation_name=activation, layer_norm=layer_norm)
        self.out_features = hidden[-1]

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.hidden(x.flatten(-2))


class Convolutional(Encoder):
    """Strided convolutions, then fully connected layers.

    The defaults are the network of the original flying-shapes experiment: 4×4 convolutions with stride 2 to 32 and 64
    channels, FC 512, ELU and layer norm (over channels and pixels jointly). That of flying MNIST has
    ``channels=(32, 64, 128), input_norm=True``, that of 64×64 bouncing balls (van Steenkiste et al. 2018)
    ``channels=(16, 32, 64)``.

    Args:
        image_shape: (H, W, C) of the input.
        channels: of each convolution.
        hidden: the width of each fully connected layer; the last is E.
        kernel_size: of the convolutions.
        activation: after every layer.
        layer_norm: whether every layer is layer-normalised.
        input_norm: whether the input is first shifted and scaled to mean 0 and variance 1 over its pixels and channels
            (10⁻⁵ is added to the variance, so that a constant input becomes 0).

    Raises:
        StrategyError: the image is too small for that many halvings.

    >>> Convolutional((28, 28, 1))(torch.zeros(2, 4, 784, 1)).shape
    torch.Size([2, 4, 512])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (512,),
        kernel_size: int = 4,
        activation: str = "elu",
        layer_norm: bool = True,
        input_norm: bool = False,
    ):
        super().__init__(image_shape)
        self.input_norm = input_norm
        height, width, channels_in = self.image_shape
        if min(height, width) < 2 ** len(channels):
            raise StrategyError(
                f"{len(channels)} convolutions of stride 2 need images of at least {2 ** len(channels)} pixels a side, "
                f"not {height}×{width}: use fewer `channels`, or encoders.MLP"
            )
        blocks = [
            _convolution(width_in, width_out, kernel_size, activation, layer_norm=layer_norm)
            for width_in, width_out in pairwise((channels_in, *channels))
        ]
        self.convolutions = nn.Sequential(*blocks)
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, channels_in, height, width)).numel()
        self.hidden = mlp((flat, *hidden), activation_name=activation, layer_norm=layer_norm)
        self.out_features = hidden[-1] if hidden else flat

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return flat_call(self._encode, x, event_dims=2)

    def _encode(self, x: Tensor) -> Tensor:
        height, width, channels = self.image_shape
        if self.input_norm:
            x = F.layer_norm(x, x.shape[1:])
        image = x.transpose(1, 2).reshape(-1, channels, height, width)
        return self.hidden(self.convolutions(image).flatten(1))


def _convolution(width_in: int, width_out: int, kernel: int, name: str, *, layer_norm: bool) -> nn.Sequential:
    padding = nn.ZeroPad2d(((kernel - 2) // 2, (kernel - 1) // 2) * 2)
    norm = nn.GroupNorm(1, width_out) if layer_norm else nn.Identity()
    return nn.Sequential(padding, nn.Conv2d(width_in, width_out, kernel, stride=2), norm, activation(name))


def check_encoder(encoder: Encoder, image_shape: tuple[int, int, int]) -> None:
    """Raises `StrategyError` unless it is an encoder of images of that shape."""
    if not isinstance(encoder, Encoder):
        raise StrategyError(
            f"encoder must be one of pnem.inference.encoders, or a subclass of its Encoder, but is a "
            f"{type(encoder).__name__}"
        )
    if encoder.image_shape != image_shape:
        raise StrategyError(f"the encoder is for images of shape {encoder.image_shape}, the model for {image_shape}")
