"""Decoders f_φ: from what a component knows, θ_k (..., M), to the parameters of every pixel, ψ_k (..., D, P).

``image_shape`` is (H, W, P), where P is the number of likelihood parameters per pixel: the number of channels for
Bernoulli and Normal pixels. Pixels are in row-major order, D = H·W.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pnem.models.config import Configured
from pnem.models.errors import ModelError
from pnem.models.networks import activation, flat_call, mlp

__all__ = ["MLP", "Constant", "Convolutional", "Decoder", "Linear"]


class Decoder(Configured, nn.Module, ABC):
    """A network from θ (..., M) to ψ (..., D, P).

    Args:
        latent_features: M, the size of θ_k.
        image_shape: (H, W, P).

    Raises:
        ModelError: a size is not a positive integer.
    """

    def __init__(self, latent_features: int, image_shape: Sequence[int]):
        super().__init__()
        if len(image_shape) != 3 or min(*image_shape, latent_features) < 1:
            raise ModelError(
                "a decoder needs at least one latent feature and an image shape (H, W, P) of positive sizes, "
                f"but was given latent_features={latent_features}, image_shape={tuple(image_shape)}"
            )
        self.latent_features = latent_features
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])

    @property
    def num_pixels(self) -> int | None:
        """D = H·W; None where the decoder serves any number of pixels."""
        return self.image_shape[0] * self.image_shape[1]

    @abstractmethod
    def forward(self, theta: Tensor) -> Tensor:
        """(..., M) -> (..., D, P)."""

    def pull_back(self, theta: Tensor, by_psi: Tensor) -> Tensor:
        """The gradient by θ of what has the gradient `by_psi` by ψ: (..., M), (..., D, P) -> (..., M).

        It can be differentiated in turn: by both, and by the network's weights.
        """
        psi, pull_back, *_ = torch.func.vjp(self, theta)
        return pull_back(by_psi.to(psi.dtype))[0]

    def _to_pixels(self, y: Tensor) -> Tensor:
        H, W, P = self.image_shape
        return y.reshape(*y.shape[:-1], H * W, P)


class Constant(Decoder):
    """ψ_{k,i} = θ_k: the same in every pixel, however many there are. The decoder of classical mixtures.

    Its output has a pixel axis of size one, which broadcasts.

    >>> import torch
    >>> Constant(5)(torch.zeros(2, 4, 5)).shape
    torch.Size([2, 4, 1, 5])
    """

    def __init__(self, num_parameters: int):
        super().__init__(num_parameters, (1, 1, num_parameters))

    @property
    def num_pixels(self) -> None:  # noqa: D102
        return None

    def forward(self, theta: Tensor) -> Tensor:  # noqa: D102
        return theta.unsqueeze(-2)


class Linear(Decoder):
    """ψ = W a(θ) + b, with an optional activation a on θ.

    With ``input_activation="sigmoid"`` and ``bias=False`` it is the decoder of the original N-EM (Greff et al. 2017).

    >>> import torch
    >>> Linear(5, (28, 28, 1))(torch.zeros(64, 4, 5)).shape
    torch.Size([64, 4, 784, 1])
    """

    def __init__(
        self, latent_features: int, image_shape: Sequence[int], *, bias: bool = True, input_activation: str = "identity"
    ):
        super().__init__(latent_features, image_shape)
        self.activation = activation(input_activation)
        self.linear = nn.Linear(latent_features, math.prod(self.image_shape), bias=bias)

    def forward(self, theta: Tensor) -> Tensor:  # noqa: D102
        return self._to_pixels(self.linear(self.activation(theta)))

    def pull_back(self, theta: Tensor, by_psi: Tensor) -> Tensor:  # noqa: D102
        if type(self).forward is not Linear.forward:
            return super().pull_back(theta, by_psi)
        # Without ψ, which the general way computes again.
        by_activation = by_psi.flatten(-2) @ self.linear.weight
        return torch.func.vjp(self.activation, theta)[1](by_activation.to(theta.dtype))[0]


class MLP(Decoder):
    """Fully connected hidden layers, then a linear layer to the pixels.

    >>> import torch
    >>> MLP(5, (8, 9, 3), hidden=(16,))(torch.zeros(2, 4, 5)).shape
    torch.Size([2, 4, 72, 3])
    """

    def __init__(
        self,
        latent_features: int,
        image_shape: Sequence[int],
        *,
        hidden: Sequence[int] = (512,),
        activation: str = "elu",
        layer_norm: bool = False,
    ):
        super().__init__(latent_features, image_shape)
        widths = (latent_features, *hidden)
        self.hidden = mlp(widths, activation_name=activation, layer_norm=layer_norm)
        self.output = nn.Linear(widths[-1], math.prod(self.image_shape))

    def forward(self, theta: Tensor) -> Tensor:  # noqa: D102
        return self._to_pixels(self.output(self.hidden(theta)))


class Convolutional(Decoder):
    """Fully connected layers to a coarse grid, then (upsample ×2, convolve) once per entry of `channels` but the first.

    The defaults are the network of the original flying-shapes experiment: FC 512, FC 7·7·64, upsample and convolve to
    32 and to P channels, 4×4 kernels, ReLU and layer norm (over channels and pixels jointly) on all but the output.
    That of flying MNIST has ``channels=(128, 64, 32)``, that of 64×64 bouncing balls (van Steenkiste et al. 2018)
    ``channels=(64, 32, 16)``.

    Raises:
        ModelError: H or W is not divisible by 2 to the number of upsamplings.

    >>> import torch
    >>> Convolutional(100, (28, 28, 1))(torch.zeros(2, 3, 100)).shape
    torch.Size([2, 3, 784, 1])
    """

    def __init__(
        self,
        latent_features: int,
        image_shape: Sequence[int],
        *,
        hidden: Sequence[int] = (512,),
        channels: Sequence[int] = (64, 32),
        kernel_size: int = 4,
        activation: str = "relu",
        layer_norm: bool = True,
    ):
        super().__init__(latent_features, image_shape)
        height, width, parameters = self.image_shape
        factor = 2 ** len(channels)
        if not channels or height % factor or width % factor:
            raise ModelError(
                f"a convolutional decoder with {len(channels)} upsamplings serves images whose height and width are "
                f"multiples of {factor}, not {height}×{width}: change `channels`, pad the images, or use decoders.MLP"
            )
        self.grid = (channels[0], height // factor, width // factor)
        grid_size = self.grid[0] * self.grid[1] * self.grid[2]
        self.hidden = mlp((latent_features, *hidden, grid_size), activation_name=activation, layer_norm=layer_norm)
        widths = (*channels, parameters)
        self.blocks = nn.ModuleList(
            _UpsampleConvolve(
                widths[i], widths[i + 1], kernel_size, activation, layer_norm=layer_norm, last=i == len(channels) - 1
            )
            for i in range(len(channels))
        )

    def forward(self, theta: Tensor) -> Tensor:  # noqa: D102
        return flat_call(self._decode, theta, event_dims=1)

    def _decode(self, theta: Tensor) -> Tensor:
        y = self.hidden(theta).reshape(-1, *self.grid)
        for block in self.blocks:
            y = block(y)
        return y.flatten(2).transpose(1, 2)


class _UpsampleConvolve(nn.Module):
    """Upsampling ×2 to the nearest neighbour, a convolution that keeps the size, layer norm and the activation."""

    def __init__(self, width_in: int, width_out: int, kernel: int, name: str, *, layer_norm: bool, last: bool):
        super().__init__()
        self.convolution = nn.Conv2d(width_in, width_out, kernel)
        # One group over all channels and pixels is layer norm with one gain and offset per channel.
        self.norm = nn.GroupNorm(1, width_out) if layer_norm and not last else nn.Identity()
        self.activation = nn.Identity() if last else activation(name)

    def forward(self, y: Tensor) -> Tensor:
        return self.activation(self.norm(upsample_convolve(y, self.convolution.weight, self.convolution.bias)))


def upsample_convolve(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolves y (N, C, H, W), each pixel repeated 2×2, with zeros around it: -> (N, C', 2H, 2W).

    Of the k − 1 zeros in a row, the larger half comes after it.

    As a pixel and its copies share a weight, it is one transposed convolution of y itself, whose kernel of size k + 1
    holds the sums of neighbouring weights: for k = 4 2.6 times fewer products, and no enlarged y in memory.
    """
    k = weight.shape[-1]
    sums = F.avg_pool2d(weight.flip(2, 3), 2, stride=1, padding=1, divisor_override=1)
    return F.conv_transpose2d(y, sums.transpose(0, 1), bias, stride=2, padding=k // 2, output_padding=(k + 1) % 2)
