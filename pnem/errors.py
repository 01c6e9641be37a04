"""Errors that pnem raises on purpose: what was given, what was expected, what to do.

All derive from `PnemError`, so that ``except pnem.errors.PnemError`` catches exactly these.
"""

from pnem.inference.errors import StrategyError
from pnem.models.errors import ModelError, PnemError

__all__ = ["DataError", "DeviceError", "ModelError", "PnemError", "RunError", "StrategyError"]


class DataError(PnemError, ValueError):
    """Data are missing, malformed, or do not fit what they are used for."""


class RunError(PnemError, ValueError):
    """A run directory cannot be used as asked: it exists, is corrupt, or belongs to something else."""


class DeviceError(PnemError, RuntimeError):
    """A device or precision is unknown, or not available on this machine."""
