"""Arguments of diagnostics, checked."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from pnem.errors import RunError, StrategyError
from pnem.inference import Posterior, Strategy
from pnem.models import SpatialMixture

if TYPE_CHECKING:
    from pnem.run import Run

__all__ = ["check_pair", "check_posterior", "check_run", "check_strategy"]


def check_strategy(strategy: Strategy) -> None:
    """Raises `StrategyError` unless it is one, and of images."""
    if not isinstance(strategy, Strategy):
        raise StrategyError(
            f"strategy must be a Strategy, but is {_kind(strategy)}: give one such as VAE(model), or the strategy of a "
            "run, run.strategy"
        )
    _require_static(strategy)


def check_pair(model: SpatialMixture, strategy: Strategy) -> None:
    """Raises `StrategyError` unless the strategy is one of this model."""
    check_strategy(strategy)
    if strategy.model is not model:
        raise StrategyError(
            f"this {type(strategy).__name__} is a strategy of another model than the one given: build it as "
            f"{type(strategy).__name__}(model, ...), or give strategy.model"
        )


def check_posterior(model: SpatialMixture, posterior: Posterior, x: Tensor) -> None:
    """Raises `StrategyError` unless the posterior can be one of the images `x` (B, D, C) in this model."""
    if not isinstance(posterior, Posterior):
        raise StrategyError(f"posterior must be what strategy.infer(x) gives, but is {_kind(posterior)}")
    if len(posterior.theta) != len(x):
        raise StrategyError(
            f"the posterior is of {len(posterior.theta)} images, but x holds {len(x)}: give the same images"
        )
    shape = (len(x), model.num_components, model.latent_features)
    if tuple(posterior.theta.shape) != shape:
        raise StrategyError(
            f"the posterior's theta has shape {tuple(posterior.theta.shape)}, but x and this model need (B, K, M) = "
            f"{shape}: give what one of its strategies inferred"
        )


def check_run(run: "Run", name: str = "run") -> None:
    """Raises `RunError` unless it is one, and `StrategyError` unless it is of images."""
    from pnem.run import Run

    if not isinstance(run, Run):
        raise RunError(
            f"{name} must be a Run, but is {_kind(run)}: give what pnem.fit returned, or pnem.load(path) of a run "
            "directory"
        )
    _require_static(run.strategy)


def _require_static(strategy: Strategy) -> None:
    if strategy.is_sequential:
        raise StrategyError(
            f"diagnostics are of images, but this {type(strategy).__name__} takes sequences (task={strategy.task!r}): "
            "run.evaluate(data) measures it over time"
        )


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
