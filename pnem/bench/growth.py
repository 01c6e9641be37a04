"""How the time of a training step grows with the sizes of the problem."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from pnem.bench.cases import Size, build, images
from pnem.bench.clock import Spread, alternately
from pnem.bench.report import Row
from pnem.bench.steps import WARM_UP, training_step

__all__ = ["bends", "exponents", "growth_row", "time_growth"]


def exponents(sizes: Sequence[int], seconds: np.ndarray) -> np.ndarray:
    """The exponent p of time ~ size^p in every round: the slope of the logarithms, by least squares.

    Args:
        sizes: n of them.
        seconds: (rounds, n).

    Returns:
        (rounds,)

    >>> exponents([10, 20, 40], np.array([[1.0, 2.0, 4.0], [1.0, 1.0, 1.0]])).round(6).tolist()
    [1.0, 0.0]
    """
    logs = np.log(sizes)
    centred = logs - logs.mean()
    slopes: np.ndarray = np.log(seconds) @ centred / (centred @ centred)
    return slopes


def bends(sizes: Sequence[int], seconds: np.ndarray) -> np.ndarray:
    """What the last of three sizes takes more than the second, over what it would by the line through the first two.

    It is 1 where time grows linearly, on top of whatever a step takes at any size.

    Args:
        sizes: three of them.
        seconds: (rounds, 3).

    Returns:
        (rounds,)

    >>> bends([10, 20, 40], np.array([[3.0, 4.0, 6.0], [1.0, 4.0, 16.0]])).tolist()
    [1.0, 2.0]
    """
    slopes = np.diff(seconds) / np.diff(sizes)
    bend: np.ndarray = slopes[:, 1] / slopes[:, 0]
    return bend


def growth_row(section: str, name: str, sizes: Sequence[int], seconds: np.ndarray) -> Row:
    """The exponent over rounds, the times that it is of, and the bend of their medians."""
    found, medians = Spread.of(exponents(sizes, seconds)), np.median(seconds, axis=0)
    times, shown = ", ".join(f"{1000 * value:,.0f}" for value in medians), ", ".join(map(str, sizes))
    note = f"{name} = {shown}: {times} ms"
    if sizes[0] < sizes[1] < sizes[2] and medians[0] < medians[1]:
        note += f"; second increase {bends(sizes, medians[None]).item():.2f} × linear"
    return Row(section, f"in {name}", found, "exponent", note=note)


def time_growth(size: Size, *, repetitions: int, device: torch.device, seed: int) -> Iterator[Row]:
    """A row each for K, T, D and the batch: at half, once and twice the size, for RNN-EM, eager."""
    sizes = {
        "K": [replace(size, K=max(1, round(size.K * factor))) for factor in (0.5, 1, 2)],
        "T": [replace(size, T=max(1, round(size.T * factor))) for factor in (0.5, 1, 2)],
        "D": [replace(size, height=size.height // 2), size, replace(size, height=2 * size.height)],
        "batch": [replace(size, batch=size.batch // 2), size, replace(size, batch=2 * size.batch)],
    }
    measured = {
        "K": lambda size: size.K,
        "T": lambda size: size.T,
        "D": lambda size: size.height * size.width,
        "batch": lambda size: size.batch,
    }
    section = f"growth of a step of rnn-em, eager\nround K {size.K}, T {size.T}, batch {size.batch}"
    for name, cases in sizes.items():
        steps = {}
        for case in cases:
            parts = build("rnn-em", case, device, seed)
            label = str(measured[name](case))
            steps[label] = training_step(parts, images(parts, case, device), precision="float32", compile=False)
        alternately(steps, WARM_UP, device)
        seconds = alternately(steps, repetitions, device)
        yield growth_row(section, name, [int(label) for label in steps], np.stack(list(seconds.values()), 1))
