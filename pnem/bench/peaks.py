"""What the machine can do at best: matrix products and memory bandwidth, measured."""

import functools
from typing import NamedTuple

import torch

from pnem.bench.clock import Spread, alternately, timed
from pnem.bench.report import Row

__all__ = ["Peaks", "measure_peaks"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Seconds. Smaller matrices serve where a product would take longer: a CPU without instructions for a precision may do
# 1 GFLOP/s in it.
LONGEST = 0.5


class Peaks(NamedTuple):
    """The best of all repetitions: matrix products in FLOP/s by precision, and bytes/s read and written."""

    products: dict[str, float]
    bandwidth: float


def measure_peaks(device: torch.device, size: int, copied: int, repetitions: int) -> tuple[Peaks, list[Row]]:
    """Multiplies square matrices of at most `size` rows in both precisions, and copies an array of `copied` bytes.

    float32 products are in float32, as torch computes them unless told otherwise.
    """
    sizes = {name: _affordable(dtype, size, device) for name, dtype in DTYPES.items()}
    a = {name: torch.randn(sizes[name], sizes[name], device=device).to(dtype) for name, dtype in DTYPES.items()}
    products = {name: torch.empty_like(matrix) for name, matrix in a.items()}
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    functions = {name: lambda name=name: torch.mm(a[name], a[name], out=products[name]) for name in DTYPES} | {
        "bandwidth": lambda: target.copy_(source)
    }
    alternately(functions, 2, device)
    seconds = alternately(functions, repetitions, device)
    rates = {name: 2 * sizes[name] ** 3 / seconds[name] for name in DTYPES}
    moved = 2 * source.nbytes / seconds["bandwidth"]
    rows = [
        Row(
            "the machine's peak",
            f"matrix product, {name}",
            Spread.of(rates[name] / 1e9),
            "GFLOP/s",
            note=f"{sizes[name]}×{sizes[name]}, best {rates[name].max() / 1e9:.3g}",
        )
        for name in DTYPES
    ]
    rows.append(
        Row(
            "the machine's peak",
            "memory, copy",
            Spread.of(moved / 1e9),
            "GB/s",
            note=f"{source.nbytes / 2**20:.0f} MiB read and written, best {moved.max() / 1e9:.3g}",
        )
    )
    return Peaks({name: float(rate.max()) for name, rate in rates.items()}, float(moved.max())), rows


def _affordable(dtype: torch.dtype, size: int, device: torch.device) -> int:
    """The rows of square matrices, at most `size`, whose product takes no longer than `LONGEST`, or 64."""
    rows = min(size, 64)
    while rows < size:
        matrix = torch.ones(rows, rows, dtype=dtype, device=device)
        product = functools.partial(torch.mm, matrix, matrix)
        product()
        # Twice the rows are eight times the work.
        if 8 * timed(product, device) > LONGEST:
            break
        rows = min(size, 2 * rows)
    return rows
