"""Timing functions alternately, so that all of them see the same machine."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Spread", "alternately", "timed"]


class Spread(NamedTuple):
    """The median and the quartiles of a number over repetitions.

    >>> Spread.of([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.5, high=2.5, repetitions=3)
    """

    median: float
    low: float
    high: float
    repetitions: int

    @classmethod
    def of(cls, values: "Sequence[float] | np.ndarray") -> "Spread":
        """Of these values."""
        low, median, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
        return cls(median, low, high, len(values))


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes, the device's work included."""
    _wait_for(device)
    start = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - start


def alternately(
    functions: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of each function in every one of so many rounds, (repetitions,), all of them called once in a round."""
    rounds = [[timed(function, device) for function in functions.values()] for _ in range(repetitions)]
    return dict(zip(functions, np.array(rounds).T, strict=True))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
