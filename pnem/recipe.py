"""What a preset is: a recipe for a model, a strategy and an objective, with the settings to train them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pnem.inference import Objective, Strategy
from pnem.models import SpatialMixture

__all__ = ["BEST", "GREFF2017", "Parts", "Preset"]

BEST: dict[str, Any] = {
    "batch_size": 64,
    "schedule": "cosine",
    "warmup_steps": 100,
    "patience": None,
    "valid_limit": 2_000,
}
"""How pnem's own presets train, but for what each of them changes."""
GREFF2017: dict[str, Any] = {"epochs": 500, "batch_size": 64, "learning_rate": 1e-3, "patience": 10}
"""How the experiments of Greff et al. (2017) trained."""


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

        >>> from pnem.presets import PRESETS
        >>> model, strategy, objective = PRESETS["rnn-em"].build((28, 28, 1), components=3)
        >>> strategy.iterations
        10
        """
        return self.parts(
            image_shape,
            self.components if components is None else components,
            self.iterations if iterations is None else iterations,
        )
