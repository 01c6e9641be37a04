"""Strategies that need no training: the model of a fitted run is inferred with them in place of its own strategy."""

from collections.abc import Callable

from pnem.errors import StrategyError
from pnem.inference import NUTS, GradientEM, PyroGuide, SemiAmortised, Strategy

__all__ = ["ALTERNATIVES", "find_alternative"]

ALTERNATIVES: dict[str, Callable[[Strategy], Strategy]] = {
    "semi-amortised": SemiAmortised,
    "gradient-em": lambda strategy: GradientEM(strategy.model),
    "auto-delta": lambda strategy: PyroGuide(strategy.model, "AutoDelta"),
    "auto-normal": lambda strategy: PyroGuide(strategy.model, "AutoNormal"),
    "auto-multivariate-normal": lambda strategy: PyroGuide(strategy.model, "AutoMultivariateNormal"),
    "auto-laplace": lambda strategy: PyroGuide(strategy.model, "AutoLaplaceApproximation"),
    "auto-iaf-normal": lambda strategy: PyroGuide(strategy.model, "AutoIAFNormal"),
    "nuts": lambda strategy: NUTS(strategy.model),
}


def find_alternative(name: str, strategy: Strategy) -> Strategy:
    """The strategy of that name, on the same model; ``"semi-amortised"`` refines the given one.

    Raises:
        StrategyError: an unknown name, or a strategy that cannot serve this model.
    """
    if name not in ALTERNATIVES:
        raise StrategyError(f"unknown strategy {name!r} to infer with: choose one of {', '.join(ALTERNATIVES)}")
    if strategy.is_sequential:
        raise StrategyError(
            f"{name} infers images, but this {type(strategy).__name__} takes sequences (task={strategy.task!r}): infer "
            "with the run's own strategy"
        )
    return ALTERNATIVES[name](strategy)
