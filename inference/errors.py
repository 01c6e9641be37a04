"""The error of the inference layer."""

from pnem.models.errors import PnemError

__all__ = ["StrategyError"]


class StrategyError(PnemError, ValueError):
    """A strategy or objective was configured, or called, in a way that cannot work."""
