"""Probabilistic modelling of images made of parts: one generative model, interchangeable inference strategies.

>>> import pnem
>>> from pnem.models import Bernoulli, SpatialMixture, decoders
>>> from pnem.inference import RNNEM
>>> model = SpatialMixture(decoders.Linear(20, (28, 28, 1)), Bernoulli(), num_components=4, pixel_prior=0.0)
>>> strategy = RNNEM(model, iterations=15)
>>> run = pnem.fit(model, strategy, "shapes.h5")  # doctest: +SKIP
>>> posterior = run.infer(x)  # doctest: +SKIP
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnem.run import Run as Run
    from pnem.run import load as load
    from pnem.training import fit as fit

__all__ = ["Run", "__version__", "fit", "load"]

__version__ = version("pnem")

# Lightning, Matplotlib and ArviZ load when what needs them is first used.
_HOMES = {"fit": "pnem.training", "Run": "pnem.run", "load": "pnem.run"}
_MODULES = (
    "bench",
    "data",
    "diagnostics",
    "errors",
    "estimators",
    "inference",
    "metrics",
    "models",
    "plots",
    "presets",
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"pnem.{name}")
    raise AttributeError(f"module 'pnem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
