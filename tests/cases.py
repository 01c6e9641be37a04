"""The strategies and models that the conformance suite runs on: a new strategy joins by adding one line."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnem.inference import (
    NEM,
    RNEM,
    RNNEM,
    VAE,
    BitFlip,
    GradientEM,
    IterativeVI,
    MaskedUniform,
    PyroGuide,
    SemiAmortised,
    Strategy,
    encoders,
)
from pnem.models import (
    Bernoulli,
    Binomial,
    Categorical,
    DiagonalNormal,
    Likelihood,
    MixtureOfNormals,
    MultivariateNormal,
    Normal,
    NormalInverseWishart,
    Poisson,
    SpatialMixture,
    StudentT,
    decoders,
)

STRATEGIES: dict[str, Callable[[SpatialMixture], Strategy]] = {
    "rnn-em": lambda model: RNNEM(model, iterations=4),
    "rnn-em, noise": lambda model: RNNEM(model, iterations=3, noise=BitFlip(0.1)),
    "rnn-em, gated, k-means": lambda model: RNNEM(
        model,
        encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        initial="k-means",
        iterations=3,
        gamma_gradient=False,
    ),
    "rnn-em, greff2017": lambda model: RNNEM(model, iterations=3, layer_norm=True, e_step="greff2017"),
    "r-nem": lambda model: RNEM(model, interaction_features=7, iterations=3, noise=BitFlip(0.1)),
    "r-nem, gated, no attention": lambda model: RNEM(
        model,
        encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        interaction_features=8,
        attention=False,
        iterations=3,
        gamma_gradient=False,
    ),
    "n-em": lambda model: NEM(model, step_size=0.3, iterations=4, noise=MaskedUniform(0.1)),
    "n-em, greff2017": lambda model: NEM(model, step_size=0.3, iterations=3, e_step="greff2017"),
    "gradient em": lambda model: GradientEM(model, iterations=3, steps=3),
    "vae": lambda model: VAE(model, encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,)), noise=BitFlip(0.1)),
    "iterative vi": lambda model: IterativeVI(model, hidden=6, iterations=3),
    "iterative vi, gated": lambda model: IterativeVI(
        model,
        hidden=6,
        encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        iterations=3,
        noise=BitFlip(0.1),
        gamma_gradient=False,
    ),
    "iterative vi, delta": lambda model: IterativeVI(model, posterior="delta", iterations=3),
    "semi-amortised vae": lambda model: SemiAmortised(
        VAE(model, encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,)), noise=BitFlip(0.1)), steps=3, draws=8
    ),
    "semi-amortised rnn-em": lambda model: SemiAmortised(RNNEM(model, iterations=2), steps=3),
    "auto-delta": lambda model: PyroGuide(model, "AutoDelta", steps=3, learning_rate=0.1),
    "auto-normal": lambda model: PyroGuide(model, "AutoNormal", steps=3, learning_rate=0.1),
    "auto-multivariate-normal": lambda model: PyroGuide(model, "AutoMultivariateNormal", steps=3, learning_rate=0.1),
}
PROPER = {
    "vae",
    "iterative vi",
    "iterative vi, gated",
    "semi-amortised vae",
    "auto-normal",
    "auto-multivariate-normal",
}
"""Strategies whose q(θ) is a distribution, so that they need a proper prior."""
BY_SVI = {"auto-delta", "auto-normal", "auto-multivariate-normal"}
"""Strategies that optimise from random θ by random steps, so that only equal batches give equal results."""
ONE_START = {"vae", "semi-amortised vae"} | BY_SVI
"""Strategies that do not start from a γ: q(θ) is a function of the image, or found from random θ."""

MODELS: dict[str, Callable[..., SpatialMixture]] = {
    "owned Bernoulli": lambda shape=(3, 4, 1), K=3, proper=False: SpatialMixture(
        decoders.Linear(5, shape), Bernoulli(), K, pixel_prior=0.0, prior=MixtureOfNormals(5, 2) if proper else "flat"
    ),
    "plain Bernoulli": lambda shape=(3, 4, 1), K=3, proper=False: SpatialMixture(
        decoders.MLP(5, shape, hidden=(7,), layer_norm=True),
        Bernoulli(),
        K,
        mixing="learned",
        prior=DiagonalNormal(5) if proper else "flat",
    ),
    "tied Bernoulli": lambda shape=(3, 4, 1), K=3, proper=False: SpatialMixture(
        decoders.Linear(5, shape, bias=False, input_activation="sigmoid"),
        Bernoulli(),
        K,
        pixel_prior=0.1,
        ownership=0.5,
        prior="standard_normal",
    ),
    "owned Normal": lambda shape=(3, 4, 1), K=3, proper=False: SpatialMixture(
        decoders.MLP(5, shape, hidden=(7,)),
        Normal(0.5, learn_sigma=True),
        K,
        pixel_prior=0.2,
        mixing="learned",
        prior="standard_normal" if proper else "flat",
    ),
}
"""Models, with a proper prior on request."""


def pair(model_name: str, strategy_name: str, *shape_and_k: Any) -> tuple[SpatialMixture, Strategy]:
    """A model and a strategy for it."""
    model = MODELS[model_name](*shape_and_k, proper=strategy_name in PROPER)
    return model, STRATEGIES[strategy_name](model)


def images(count: int, shape: tuple[int, int, int] = (3, 4, 1)) -> Tensor:
    """Random binary images in the default dtype: (count, D, C)."""
    return (torch.rand(count, shape[0] * shape[1], shape[2]) < 0.5).to(torch.get_default_dtype())


SEQUENTIAL: dict[str, Callable[..., Strategy]] = {
    "rnn-em": lambda model, **options: RNNEM(model, **options),
    "rnn-em, gated, k-means": lambda model, **options: RNNEM(
        model,
        encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        initial="k-means",
        gamma_gradient=False,
        noise=BitFlip(0.1),
        **options,
    ),
    "rnn-em, greff2017": lambda model, **options: RNNEM(model, layer_norm=True, e_step="greff2017", **options),
    "r-nem": lambda model, **options: RNEM(model, interaction_features=7, **options),
    "r-nem, gated, no attention": lambda model, **options: RNEM(
        model,
        encoder=encoders.MLP(model.decoder.image_shape, hidden=(9,), layer_norm=True),
        recurrence="gated",
        layer_norm=True,
        interaction_features=8,
        attention=False,
        gamma_gradient=False,
        noise=BitFlip(0.1),
        **options,
    ),
    "n-em": lambda model, **options: NEM(model, step_size=0.3, **options),
    "iterative vi": lambda model, **options: IterativeVI(model, hidden=6, **options),
    "iterative vi, delta": lambda model, **options: IterativeVI(model, posterior="delta", **options),
}
"""Strategies on sequences, to be given iterations and a task."""


def sequences(frames: int, count: int, shape: tuple[int, int, int] = (3, 4, 1)) -> Tensor:
    """Random binary sequences in the default dtype: (frames, count, D, C)."""
    return images(frames * count, shape).unflatten(0, (frames, count))


def snapshot(*modules: torch.nn.Module) -> list[Tensor]:
    """Copies of all parameters."""
    return [p.detach().clone() for module in modules for p in module.parameters()]


def assert_all_moved(before: list[Tensor], *modules: torch.nn.Module) -> None:
    """Fails, naming them, where parameters are what `snapshot` found before."""
    names = [name for module in modules for name, _ in module.named_parameters()]
    stuck = [n for n, old, new in zip(names, before, snapshot(*modules), strict=True) if torch.equal(old, new)]
    assert not stuck, f"never trained: {stuck}"


COVARIANCES = {"spherical": "spherical", "diagonal": "diag", "full": "full", "tied": "tied"}
FAMILIES: dict[str, Callable[[], Likelihood]] = {
    **{name: functools.partial(MultivariateNormal, name, floor=0.0) for name in COVARIANCES},
    "poisson": Poisson,
    "bernoulli": Bernoulli,
    "binomial": lambda: Binomial(5),
    "categorical": lambda: Categorical(3),
    **{f"student-t, {name}": functools.partial(StudentT, name, floor=0.0) for name in COVARIANCES},
    "student-t, shared": lambda: StudentT(shared=True, floor=0.0),
    "student-t, given": lambda: StudentT("tied", degrees_of_freedom=3.0, floor=0.0),
}


def mixture(likelihood: Likelihood, K: int = 3, C: int = 2, mixing: str = "learned", **options: Any) -> SpatialMixture:
    """A classical mixture of items with C channels."""
    return SpatialMixture(decoders.Constant(likelihood.num_parameters(C)), likelihood, K, mixing=mixing, **options)


def items(family: str, B: int = 1, D: int = 60, C: int = 2, seed: int = 0) -> Tensor:
    """Items (B, D, C) of three levels, in the support of a family."""
    rng = np.random.default_rng(seed)
    level = rng.integers(0, 3, (B, D, 1))
    draw = {
        "poisson": lambda: rng.poisson(1 + 3 * level, (B, D, C)),
        "bernoulli": lambda: rng.random((B, D, C)) < 0.2 + 0.3 * level,
        "binomial": lambda: rng.binomial(5, 0.2 + 0.3 * level, (B, D, C)),
        "categorical": lambda: (rng.integers(0, 3, (B, D, C)) + level) // 2,
    }.get(family, lambda: rng.normal(size=(B, D, C)) @ rng.normal(size=(C, C)) + 3 * level)
    return torch.from_numpy(np.asarray(draw(), dtype=float))


def _classical(family: str, *, prior: bool = False) -> Callable[..., SpatialMixture]:
    given = {"prior": NormalInverseWishart(0.0, 1.0), "mixing_concentration": 2.0} if prior else {}
    return lambda **options: mixture(FAMILIES[family](), **given, **options)


CLASSICAL: dict[str, Callable[..., SpatialMixture]] = {
    **{family: _classical(family) for family in FAMILIES},
    **{
        f"{family}, prior": _classical(family, prior=True)
        for family in (*COVARIANCES, "student-t, full", "student-t, diagonal")
    },
}
"""Every rule of classical EM for a constant decoder."""


def factors(
    C: int = 6, M: int = 2, *, isotropic: bool = False, bias: bool = True, D: int = 1, learn_sigma: bool = True
):
    """Factor analysis, or with isotropic noise probabilistic PCA, of D·C features."""
    return SpatialMixture(
        decoders.Linear(M, (1, D, C), bias=bias),
        Normal(1.0 if isotropic else (1.0,) * C, learn_sigma=learn_sigma),
        1,
        prior="standard_normal",
    )
