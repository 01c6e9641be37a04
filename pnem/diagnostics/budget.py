"""A bound on the time that the parts of a job take together."""

import math
import time
from collections.abc import Iterator

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

    >>> list(Budget(60).pieces(65, 40))
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

    def pieces(self, count: int, size: int, *, until: float = 1.0) -> Iterator[slice]:
        """Slices of `count` images: 10, then twice as many each time up to `size`, as long as they should end in time.

        The first comes in any case. Without a bound all have `size`.

        Args:
            count: of images.
            size: the most of a piece.
            until: the share of the budget by whose end to stop; what earlier parts left unused is used.
        """
        first, length = 0, size if self.seconds is None else min(size, FEW)
        per_image = 0.0
        while first < count:
            last, before = min(first + length, count), time.monotonic()
            if first and self.seconds is not None:
                left = self._start + until * self.seconds - before
                if per_image * (last - first) > left:
                    return
            yield slice(first, last)
            per_image = (time.monotonic() - before) / (last - first)
            first, length = last, min(size, 2 * length)
