"""The small networks that decoders and encoders share."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from pnem.models.errors import ModelError

__all__ = ["ACTIVATIONS", "activation", "mlp"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(name: str) -> nn.Module:
    """The activation of that name.

    Raises:
        ModelError: there is none; the message lists those there are.
    """
    if name not in ACTIVATIONS:
        raise ModelError(f"unknown activation {name!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def mlp(features: Sequence[int], *, activation_name: str, layer_norm: bool) -> nn.Sequential:
    """Fully connected layers of the given widths, each followed by layer norm (if asked) and the activation."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(features):
        layers.append(nn.Linear(width_in, width_out))
        if layer_norm:
            layers.append(nn.LayerNorm(width_out))
        layers.append(activation(activation_name))
    return nn.Sequential(*layers)


def flat_call(network: Callable[[Tensor], Tensor], x: Tensor, event_dims: int) -> Tensor:
    """Applies a network that takes one batch axis to `x` with any number of them."""
    batch_shape = x.shape[: x.dim() - event_dims]
    y = network(x.reshape(-1, *x.shape[x.dim() - event_dims :]))
    return y.reshape(*batch_shape, *y.shape[1:])
