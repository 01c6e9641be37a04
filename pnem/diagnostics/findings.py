"""What a diagnostic found to be wrong."""

from typing import NamedTuple

__all__ = ["Finding"]


class Finding(NamedTuple):
    """Something that goes wrong in practice, seen in a fit.

    Attributes:
        name: what it is called, such as "dead components".
        seen: what was seen, as a sentence with its numbers.
        value: the number that it is about.
        advice: what to try.

    >>> print(Finding("dead components", "1 of 4 components is never used", 1, "use fewer components"))
    dead components: 1 of 4 components is never used; use fewer components
    """

    name: str
    seen: str
    value: float
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.seen}; {self.advice}"
