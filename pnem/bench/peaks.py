"""What the machine can do at best: matrix products and memory bandwidth, measured."""

from typing import NamedTuple

import torch

from pnem.bench.clock import Spread, alternately
from pnem.bench.report import Row

__all__ = ["Peaks", "measure_peaks"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Peaks(NamedTuple):
    """The best of all repetitions: matrix products in FLOP/s by precision, and bytes/s read and written."""

    products: dict[str, float]
    bandwidth: float


def measure_peaks(device: torch.device, size: int, copied: int, repetitions: int) -> tuple[Peaks, list[Row]]:
    """Multiplies square matrices of `size` rows in both precisions, and copies an array of `copied` bytes.

    float32 products are in float32, as torch computes them unless told otherwise.
    """
    a = {name: torch.randn(size, size, device=device).to(dtype) for name, dtype in DTYPES.items()}
    products = {name: torch.empty_like(matrix) for name, matrix in a.items()}
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    functions = {name: lambda name=name: torch.mm(a[name], a[name], out=products[name]) for name in DTYPES} | {
        "bandwidth": lambda: target.copy_(source)
    }
    alternately(functions, 2, device)
    seconds = alternately(functions, repetitions, device)
    flops, moved = 2 * size**3, 2 * source.nbytes
    rows = [
        Row(
            "the machine's peak",
            f"matrix product, {name}",
            Spread.of(flops / seconds[name] / 1e9),
            "GFLOP/s",
            note=f"{size}×{size}, best {flops / seconds[name].min() / 1e9:.3g}",
        )
        for name in DTYPES
    ]
    rate = moved / seconds["bandwidth"]
    rows.append(
        Row(
            "the machine's peak",
            "memory, copy",
            Spread.of(rate / 1e9),
            "GB/s",
            note=f"{source.nbytes / 2**20:.0f} MiB read and written, best {rate.max() / 1e9:.3g}",
        )
    )
    return Peaks({name: float(flops / seconds[name].min()) for name in DTYPES}, float(rate.max())), rows
