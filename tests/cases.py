"""The strategies and models that the conformance suite runs on: a new strategy joins by adding one line."""

from collections.abc import Callable

import torch
from torch import Tensor

from pnem.inference import NEM, RNNEM, BitFlip, GradientEM, MaskedUniform, Strategy, encoders
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders

STRATEGIES: dict[str, Callable[[SpatialMixture], Strategy]] = {
    "rnn-em": lambda model: RNNEM(model, iterations=4),
    "rnn-em, noise": lambda model: RNNEM(model, iterations=3, noise=BitFlip(0.1)),
    "rnn-em, gated": lambda model: RNNEM(
        model,
        encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        iterations=3,
        gamma_gradient=False,
    ),
    "rnn-em, greff2017": lambda model: RNNEM(model, iterations=3, layer_norm=True, e_step="greff2017"),
    "n-em": lambda model: NEM(model, step_size=0.3, iterations=4, noise=MaskedUniform(0.1)),
    "n-em, greff2017": lambda model: NEM(model, step_size=0.3, iterations=3, e_step="greff2017"),
    "gradient em": lambda model: GradientEM(model, iterations=3, steps=3),
}

MODELS: dict[str, Callable[..., SpatialMixture]] = {
    "owned Bernoulli": lambda shape=(3, 4, 1), K=3: SpatialMixture(
        decoders.Linear(5, shape), Bernoulli(), K, pixel_prior=0.0
    ),
    "plain Bernoulli": lambda shape=(3, 4, 1), K=3: SpatialMixture(
        decoders.MLP(5, shape, hidden=(7,), layer_norm=True), Bernoulli(), K, mixing="learned"
    ),
    "tied Bernoulli": lambda shape=(3, 4, 1), K=3: SpatialMixture(
        decoders.Linear(5, shape, bias=False, input_activation="sigmoid"),
        Bernoulli(),
        K,
        pixel_prior=0.1,
        ownership=0.5,
        prior="standard_normal",
    ),
    "owned Normal": lambda shape=(3, 4, 1), K=3: SpatialMixture(
        decoders.MLP(5, shape, hidden=(7,)), Normal(0.5, learn_sigma=True), K, pixel_prior=0.2, mixing="learned"
    ),
}


def images(count: int, shape: tuple[int, int, int] = (3, 4, 1)) -> Tensor:
    """Random binary images in the default dtype: (count, D, C)."""
    return (torch.rand(count, shape[0] * shape[1], shape[2]) < 0.5).to(torch.get_default_dtype())
