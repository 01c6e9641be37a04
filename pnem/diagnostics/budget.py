"""A bound on the time that the parts of a job take together."""

import math
import time
from collections.abc import Iterator, Sequence

from pnem.errors import DataError

__all__ = ["Budget", "check_budget"]

# Images of the first piece, by whose time the next ones are judged.
FEW = 10


def check_budget(seconds: float | None) -> None:
    """Raises `DataError` unless the seconds are positive and finite, or None."""
    if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise DataError(f"budget={seconds!r}: give a positive number of seconds, or None for no bound")


class Budget:
    """So many seconds from now on; without them, all the time there is.

    Args:
        seconds: how many; None for no bound.

    Raises:
        DataError: the seconds are not positive and finite.

    >>> budget = Budget(60)
    >>> list(budget.in_time(budget.pieces(65, 40)))
    [slice(0, 10, None), slice(10, 30, None), slice(30, 65, None)]
    """

    def __init__(self, seconds: float | None = None):
        check_budget(seconds)
        self.seconds = seconds
        self._start = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether all of the time is spent."""
        return self.seconds is not None and time.monotonic() > self._start + self.seconds

    def pieces(self, count: int, size: int) -> list[slice]:
        """Slices of `count` images: 10, then twice as many each time up to `size`; all of `size` without a bound."""
        found: list[slice] = []
        first, length = 0, size if self.seconds is None else min(size, FEW)
        while first < count:
            found.append(slice(first, min(first + length, count)))
            first, length = first + length, min(size, 2 * length)
        return found

    def in_time(self, pieces: Sequence[slice], *, until: float = 1.0) -> Iterator[slice]:
        """The first of the pieces in any case, and then as many as should end in time.

        Args:
            pieces: of the images.
            until: the share of the budget by whose end to stop; what earlier parts left unused is used.
        """
        per_image = 0.0
        for i, piece in enumerate(pieces):
            images, before = piece.stop - piece.start, time.monotonic()
            if i and self.seconds is not None and before + per_image * images > self._start + until * self.seconds:
                return
            yield piece
            per_image = (time.monotonic() - before) / images
