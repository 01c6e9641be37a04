"""Ready-made (model, strategy, objective) triples with the settings to train them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pnem.errors import RunError, StrategyError
from pnem.inference import (
    ELBO,
    NEM,
    RNNEM,
    VAE,
    BitFlip,
    IterativeVI,
    NEMLoss,
    Objective,
    Strategy,
    encoders,
)
from pnem.models import Bernoulli, SpatialMixture, decoders

__all__ = ["PRESETS", "STRATEGIES", "Parts", "Preset", "find_preset"]


class Parts(NamedTuple):
    """What `pnem.fit` takes: ``fit(model, strategy, data, objective=objective)``."""

    model: SpatialMixture
    strategy: Strategy
    objective: Objective


@dataclass(frozen=True)
class Preset:
    """A named recipe.

    Attributes:
        strategy: the strategy's name at the command line; its first preset is its default.
        summary: one line on what it is.
        parts: builds the parts for images of shape (H, W, C), K components and T iterations.
        components: the default K.
        iterations: the default T.
        training: the fields of `pnem.training.TrainingSettings` that it sets.
    """

    strategy: str
    summary: str
    parts: Callable[[Sequence[int], int, int], Parts]
    components: int
    iterations: int
    training: Mapping[str, Any]

    def build(
        self, image_shape: Sequence[int], *, components: int | None = None, iterations: int | None = None
    ) -> Parts:
        """The parts, with freshly initialised parameters (torch's global generator).

        Raises:
            ModelError, StrategyError: the recipe cannot serve these images, components or iterations.

        >>> model, strategy, objective = PRESETS["rnn-em"].build((28, 28, 1), components=3)
        >>> strategy.iterations
        10
        """
        return self.parts(
            image_shape,
            self.components if components is None else components,
            self.iterations if iterations is None else iterations,
        )


def _rnn_em(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    model = SpatialMixture(decoders.Linear(250, image_shape), Bernoulli(), components, pixel_prior=0.0, ownership=0.5)
    strategy = RNNEM(model, iterations=iterations, noise=BitFlip(0.1))
    return Parts(model, strategy, ELBO("ramp"))


def _rnn_em_quick(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    decoder = decoders.MLP(64, image_shape, hidden=(256,), layer_norm=True)
    encoder = encoders.MLP(image_shape, hidden=(256,), layer_norm=True)
    model = SpatialMixture(decoder, Bernoulli(), components, pixel_prior=0.0, ownership=0.5)
    strategy = RNNEM(
        model, encoder=encoder, recurrence="gated", layer_norm=True, iterations=iterations, noise=BitFlip(0.1)
    )
    return Parts(model, strategy, ELBO("ramp"))


def _n_em(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    model = SpatialMixture(_tied(image_shape), Bernoulli(), components, pixel_prior=0.0)
    strategy = NEM(model, step_size=5.0, iterations=iterations, noise=BitFlip(0.1))
    return Parts(model, strategy, NEMLoss("ramp"))


def _iodine_static_shapes(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    decoder = decoders.MLP(32, image_shape, hidden=(256,))
    model = SpatialMixture(decoder, Bernoulli(), components, prior="standard_normal", pixel_prior=0.0, ownership=0.5)
    strategy = IterativeVI(model, hidden=256, iterations=iterations, noise=BitFlip(0.1))
    return Parts(model, strategy, ELBO("ramp"))


def _greff2017_static_rnn_em(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    model = SpatialMixture(decoders.Linear(250, image_shape), Bernoulli(), components, pixel_prior=0.0)
    strategy = RNNEM(model, iterations=iterations, noise=BitFlip(0.1), e_step="greff2017")
    return Parts(model, strategy, NEMLoss("last"))


def _greff2017_static_n_em(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    model = SpatialMixture(_tied(image_shape), Bernoulli(), components, pixel_prior=0.0)
    strategy = NEM(model, iterations=iterations, noise=BitFlip(0.1), e_step="greff2017")
    return Parts(model, strategy, NEMLoss("last"))


def _tied(image_shape: Sequence[int]) -> decoders.Linear:
    return decoders.Linear(250, image_shape, bias=False, input_activation="sigmoid")


def _vae_mnist(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    if iterations != 1:
        raise StrategyError(f"a VAE finds its q(θ) in one iteration, not {iterations}: leave the iterations out")
    model = SpatialMixture(
        decoders.MLP(20, image_shape, hidden=(512, 512)),
        Bernoulli(),
        components,
        prior="standard_normal",
        pixel_prior=None if components == 1 else 0.0,
    )
    return Parts(model, VAE(model, encoder=encoders.MLP(image_shape, hidden=(512, 512))), ELBO("last"))


def _flying_shapes(image_shape: Sequence[int], components: int, iterations: int) -> Parts:
    model = SpatialMixture(
        decoders.MLP(64, image_shape, hidden=(256,), layer_norm=True),
        Bernoulli(),
        components,
        pixel_prior=0.0,
        ownership=0.5,
    )
    strategy = RNNEM(
        model,
        encoder=encoders.MLP(image_shape, hidden=(256,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        iterations=iterations,
        noise=BitFlip(0.2),
        task="prediction",
    )
    return Parts(model, strategy, ELBO("all"))


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


_BEST = {"batch_size": 64, "schedule": "cosine", "warmup_steps": 100, "patience": None, "valid_limit": 2_000}
_GREFF2017 = {"epochs": 500, "batch_size": 64, "learning_rate": 1e-3, "patience": 10}

PRESETS: dict[str, Preset] = {
    "rnn-em": Preset(
        "rnn-em",
        "pnem's own best RNN-EM: the ownership model and its ELBO",
        _rnn_em,
        4,
        10,
        _BEST | {"epochs": 24, "learning_rate": 2e-3},
    ),
    "n-em": Preset(
        "n-em",
        "pnem's own best N-EM: the consistent E-step, with N-EM's own loss",
        _n_em,
        4,
        10,
        _BEST | {"epochs": 5, "learning_rate": 2e-3},
    ),
    "quick-rnn-em": Preset(
        "rnn-em",
        "an RNN-EM that groups within its first epoch, and ends lower: the demo's",
        _rnn_em_quick,
        4,
        8,
        _BEST | {"epochs": 2, "learning_rate": 2e-3},
    ),
    "iodine-static-shapes": Preset(
        "iterative-vi",
        "iterative amortised inference of normal q(θ), as IODINE does it, on static shapes (Greff et al. 2019)",
        _iodine_static_shapes,
        4,
        10,
        _BEST | {"epochs": 24, "learning_rate": 2e-3},
    ),
    "greff2017-static-rnn-em": Preset(
        "rnn-em",
        "the original RNN-EM on static shapes (Greff et al. 2017)",
        _greff2017_static_rnn_em,
        4,
        15,
        _GREFF2017,
    ),
    "greff2017-static-n-em": Preset(
        "n-em", "the original N-EM on static shapes (Greff et al. 2017)", _greff2017_static_n_em, 4, 15, _GREFF2017
    ),
    "flying-shapes": Preset(
        "rnn-em",
        "pnem's own RNN-EM on flying shapes: predicts the next frame, by the ownership model and its ELBO",
        _flying_shapes,
        3,
        20,
        _BEST | {"epochs": 20, "learning_rate": 2e-3, "valid_limit": 500},
    ),
    "greff2017-flying-shapes": Preset(
        "rnn-em",
        "the original RNN-EM on flying shapes (Greff et al. 2017); with one component the recurrent autoencoder",
        _greff2017_flying_shapes,
        3,
        20,
        _GREFF2017,
    ),
    "vae-mnist": Preset(
        "vae",
        "a VAE with one component: 784-512-512-20 and back",
        _vae_mnist,
        1,
        1,
        _BEST | {"epochs": 40, "learning_rate": 2e-3, "valid_limit": None},
    ),
}

STRATEGIES = tuple(dict.fromkeys(preset.strategy for preset in PRESETS.values()))


def find_preset(strategy: str, preset: str | None = None) -> Preset:
    """The preset of that name, or the strategy's default: the first in `PRESETS`.

    Raises:
        StrategyError: an unknown strategy.
        RunError: an unknown preset, or one for another strategy.
    """
    if strategy not in STRATEGIES:
        raise StrategyError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    if preset is None:
        return next(found for found in PRESETS.values() if found.strategy == strategy)
    if preset not in PRESETS:
        raise RunError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
    found = PRESETS[preset]
    if found.strategy != strategy:
        raise RunError(f"preset {preset!r} is for the strategy {found.strategy!r}, not {strategy!r}")
    return found
