"""Presets for static images."""

from collections.abc import Sequence

from pnem.errors import StrategyError
from pnem.inference import ELBO, NEM, RNNEM, VAE, BitFlip, IterativeVI, NEMLoss, encoders
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.recipe import BEST, GREFF2017, Parts, Preset

__all__ = ["STATIC_PRESETS"]


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


STATIC_PRESETS: dict[str, Preset] = {
    "rnn-em": Preset(
        "rnn-em",
        "pnem's own best RNN-EM: the ownership model and its ELBO",
        _rnn_em,
        4,
        10,
        BEST | {"epochs": 24, "learning_rate": 2e-3},
    ),
    "n-em": Preset(
        "n-em",
        "pnem's own best N-EM: the consistent E-step, with N-EM's own loss",
        _n_em,
        4,
        10,
        BEST | {"epochs": 5, "learning_rate": 2e-3},
    ),
    "quick-rnn-em": Preset(
        "rnn-em",
        "an RNN-EM that groups within one epoch, and ends lower: the demo's",
        _rnn_em_quick,
        4,
        8,
        BEST | {"epochs": 1, "learning_rate": 4e-3, "warmup_steps": 0, "gradient_clip": 1.0, "valid_limit": 1_000},
    ),
    "iodine-static-shapes": Preset(
        "iterative-vi",
        "iterative amortised inference of normal q(θ), as IODINE does it, on static shapes (Greff et al. 2019)",
        _iodine_static_shapes,
        4,
        10,
        BEST | {"epochs": 24, "learning_rate": 2e-3},
    ),
    "greff2017-static-rnn-em": Preset(
        "rnn-em",
        "the original RNN-EM on static shapes (Greff et al. 2017)",
        _greff2017_static_rnn_em,
        4,
        15,
        GREFF2017,
    ),
    "greff2017-static-n-em": Preset(
        "n-em", "the original N-EM on static shapes (Greff et al. 2017)", _greff2017_static_n_em, 4, 15, GREFF2017
    ),
    "vae-mnist": Preset(
        "vae",
        "a VAE with one component: 784-512-512-20 and back",
        _vae_mnist,
        1,
        1,
        BEST | {"epochs": 40, "learning_rate": 2e-3, "valid_limit": None},
    ),
}
