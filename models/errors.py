"""Errors that pnem raises on purpose; ``pnem.errors`` offers them all."""

__all__ = ["ModelError", "PnemError"]


class PnemError(Exception):
    """Base of every error that pnem raises on purpose: what was given, what was expected, what to do."""


class ModelError(PnemError, ValueError):
    """A model, or the shapes given to it, cannot work."""
