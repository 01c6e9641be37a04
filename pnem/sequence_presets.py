"""Presets for sequences."""

from collections.abc import Sequence
from typing import Any

from pnem.inference import ELBO, RNEM, RNNEM, BitFlip, MaskedUniform, NEMLoss, encoders
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.recipe import BEST, GREFF2017, Parts, Preset

__all__ = ["SEQUENCE_PRESETS"]

SIGMA = 0.25


def _predictor(
    image_shape: Sequence[int],
    components: int,
    iterations: int,
    *,
    strategy: type[RNNEM | RNEM] = RNNEM,
    latent_features: int = 64,
    hidden: int = 256,
    ownership: float = 0.5,
    **options: Any,
) -> Parts:
    """pnem's own: the ownership model and its ELBO over all frames, gated recurrence, fully connected networks.

    Without input noise: what is to be predicted is not what is seen, and noise blurs where things are.
    """
    model = SpatialMixture(
        decoders.MLP(latent_features, image_shape, hidden=(hidden,), layer_norm=True),
        Bernoulli(),
        components,
        pixel_prior=0.0,
        ownership=ownership,
    )
    return Parts(
        model,
        strategy(
            model,
            encoder=encoders.MLP(image_shape, hidden=(hidden,), layer_norm=True),
            recurrence="gated",
            layer_norm=True,
            iterations=iterations,
            task="prediction",
            **options,
        ),
        ELBO("all"),
    )


def _flying_shapes(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    """`_predictor` from clusters of nearby pixels, which are objects but where these overlap."""
    return _predictor(image_shape, components, iterations, initial="k-means")


def _flying_mnist(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    """`_predictor` for digits, which it takes full ownership, noise and clusters of nearby pixels to part.

    Grey levels are taken for probabilities, as VAEs of digits do: with Normal pixels one component takes all digits.
    """
    return _predictor(image_shape, components, iterations, initial="k-means", ownership=1.0, noise=MaskedUniform(0.2))


def _relational_bouncing_balls(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    return _predictor(image_shape, components, iterations, strategy=RNEM, interaction_features=64)


def _greff2017_flying_shapes(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    model = SpatialMixture(decoders.Convolutional(100, image_shape), Bernoulli(), components, pixel_prior=0.0)
    strategy = RNNEM(
        model,
        encoder=encoders.Convolutional(image_shape),
        layer_norm=True,
        iterations=iterations,
        noise=BitFlip(0.2),
        e_step="greff2017",
        gamma_gradient=False,
        task="prediction",
    )
    return Parts(model, strategy, NEMLoss("all"))


def _greff2017_flying_mnist(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    # Their loss has σ = 1, and so is 1/16 of this one up to constants: to Adam the same.
    model = SpatialMixture(
        decoders.Convolutional(250, image_shape, channels=(128, 64, 32)),
        Normal(SIGMA),
        components,
        pixel_prior=0.0,
        ownership=0.2,
    )
    strategy = RNNEM(
        model,
        encoder=encoders.Convolutional(image_shape, channels=(32, 64, 128), input_norm=True),
        layer_norm=True,
        iterations=iterations,
        noise=MaskedUniform(0.2),
        e_step="greff2017",
        gamma_gradient=False,
        task="prediction",
    )
    return Parts(model, strategy, NEMLoss("all"))


# Through γ of many frames gradients are at times steep: without a limit they undo what was learned.
_OURS = {**BEST, "batch_size": 32, "epochs": 20, "learning_rate": 1e-3, "gradient_clip": 1.0, "valid_limit": 500}

SEQUENCE_PRESETS: dict[str, Preset] = {
    "flying-shapes": Preset(
        "rnn-em",
        "pnem's own RNN-EM on flying shapes: predicts the next frame; with one component a recurrent autoencoder",
        _flying_shapes,
        3,
        20,
        _OURS | {"learning_rate": 2e-3},
    ),
    "flying-mnist": Preset("rnn-em", "pnem's own RNN-EM on flying MNIST digits", _flying_mnist, 2, 20, _OURS),
    "bouncing-balls": Preset("rnn-em", "pnem's own RNN-EM on bouncing balls", _predictor, 5, 20, _OURS),
    "relational-bouncing-balls": Preset(
        "r-nem",
        "the same with components that interact (van Steenkiste et al. 2018)",
        _relational_bouncing_balls,
        5,
        20,
        _OURS,
    ),
    "greff2017-flying-shapes": Preset(
        "rnn-em",
        "the original RNN-EM on flying shapes (Greff et al. 2017); with one component the recurrent autoencoder",
        _greff2017_flying_shapes,
        3,
        20,
        GREFF2017,
    ),
    "greff2017-flying-mnist": Preset(
        "rnn-em",
        "the original RNN-EM on flying MNIST, its first stage: 20 variations of digits (Greff et al. 2017)",
        _greff2017_flying_mnist,
        2,
        20,
        GREFF2017,
    ),
    "greff2017-flying-mnist-later": Preset(
        "rnn-em",
        "the same for its later stages, 500 variations and then all: give --start-from the stage before",
        _greff2017_flying_mnist,
        2,
        20,
        {**GREFF2017, "learning_rate": 5e-4},
    ),
}
