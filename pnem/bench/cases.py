"""What is timed: every trainable strategy with its model, and images for them, of any size."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pnem.bench.references import HandWrittenNEM, HandWrittenRNNEM
from pnem.inference import ELBO, NEM, RNEM, RNNEM, VAE, BitFlip, SemiAmortised
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.presets import PRESETS, Parts

__all__ = ["CASES", "HAND_WRITTEN", "Size", "build", "hand_written", "images"]


@dataclass(frozen=True)
class Size:
    """Images of height × width pixels, K components, T iterations (or steps through a sequence), B images a batch."""

    height: int = 28
    width: int = 28
    K: int = 4
    T: int = 15
    batch: int = 64

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.height, self.width, 1


def _preset(name: str) -> Callable[[Size], Parts]:
    return lambda size: PRESETS[name].build(size.image_shape, components=size.K, iterations=size.T)


def _r_nem(size: Size) -> Parts:
    decoder = decoders.Linear(250, size.image_shape)
    model = SpatialMixture(decoder, Bernoulli(), size.K, pixel_prior=0.0, ownership=0.5)
    return Parts(model, RNEM(model, iterations=size.T, noise=BitFlip(0.1)), ELBO("ramp"))


def _vae(size: Size) -> Parts:
    return PRESETS["vae-mnist"].build(size.image_shape, components=size.K)


def _semi_amortised(size: Size) -> Parts:
    model, strategy, _ = _vae(size)
    assert isinstance(strategy, VAE)
    return Parts(model, SemiAmortised(strategy, steps=3, draws=8), ELBO("last"))


CASES: dict[str, Callable[[Size], Parts]] = {
    "rnn-em": _preset("rnn-em"),
    "n-em": _preset("n-em"),
    "r-nem": _r_nem,
    "iterative-vi": _preset("iodine-static-shapes"),
    "vae": _vae,
    "semi-amortised vae": _semi_amortised,
    "rnn-em, sequences": _preset("flying-shapes"),
}
"""The presets for static shapes, and for a sequence pnem's own of flying shapes. (A VAE has T = 1, refined T = 3.)"""


def build(name: str, size: Size, device: torch.device, seed: int) -> Parts:
    """The parts of a case, with the initial weights of a seed."""
    torch.manual_seed(seed)
    model, strategy, objective = CASES[name](size)
    return Parts(model.to(device), strategy.to(device), objective)


def images(parts: Parts, size: Size, device: torch.device) -> Tensor:
    """Binary images (B, D, 1), one pixel in ten on; sequences (T + 1, B, D, 1) for a strategy that predicts frames."""
    strategy = parts.strategy
    frames = (strategy.iterations + strategy.steps_ahead,) if strategy.is_sequential else ()
    return (torch.rand(*frames, size.batch, size.height * size.width, 1, device=device) < 0.1).float()


HAND_WRITTEN = ("rnn-em", "n-em")
"""The cases that have a hand-written reference."""


def hand_written(parts: Parts) -> HandWrittenRNNEM | HandWrittenNEM:
    """The reference of a case with the same weights.

    Raises:
        TypeError: it has none.
    """
    model, strategy, _ = parts
    decoder, noise = model.decoder, strategy.noise
    if not isinstance(decoder, decoders.Linear) or not isinstance(noise, BitFlip) or model.num_pixels is None:
        raise TypeError(f"no reference is written for a {type(strategy).__name__} on {type(decoder).__name__}")
    D, K, M, T = model.num_pixels, model.num_components, model.latent_features, strategy.iterations
    network: HandWrittenRNNEM | HandWrittenNEM
    if isinstance(strategy, RNNEM):
        network = HandWrittenRNNEM(D, K, M, T, flip=noise.probability, ownership=model.ownership)
        for layer in ("inputs", "recurrent"):
            getattr(network, layer).load_state_dict(getattr(strategy.cell, layer).state_dict())
    elif isinstance(strategy, NEM):
        network = HandWrittenNEM(D, K, M, T, flip=noise.probability, ownership=model.ownership)
        network.log_step_size.data.copy_(strategy.log_step_size.data)
    else:
        raise TypeError(f"no reference is written for {type(strategy).__name__}")
    network.decoder.load_state_dict(decoder.linear.state_dict())
    return network.to(decoder.linear.weight)
