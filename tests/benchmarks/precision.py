"""How well a preset groups static shapes trained in bfloat16 and in float32, over seeds: run it as a script.

Each seed trains twice from the same weights, on the same batches with the same noise; what differs is the precision
that the networks' products are taken in. Scores are in float32, from one start, on test images.

``--emulate`` is for a CPU that has no instructions for bfloat16, where such products take a hundred times as long. It
takes the same products in float32, of the same operands, and rounds their results: that is what those instructions do,
but for the order of their sums.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pnem
from pnem.data import ImageDataset, write_static_shapes
from pnem.presets import PRESETS

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}
MEASURES = {"ami": "AMI", "ari": "ARI", "log_evidence": "log evidence, nats/image"}
SMALL = {"train": 128, "valid": 32, "test": 32}


class EmulatedProducts(TorchDispatchMode):
    """Products of bfloat16 matrices are taken in float32, and rounded."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[-1].dtype == torch.bfloat16:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
            return func(*args, **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def trained(path: Path, preset: str, precision: str, seed: int, emulate: bool, settings: dict[str, Any]) -> Any:
    """The scores of a run, and the seconds that it took."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    recipe = PRESETS[preset]
    model, strategy, objective = recipe.build(ImageDataset.from_hdf5(path, "training").image_shape)
    with EmulatedProducts() if emulate and precision == "bfloat16" else contextlib.nullcontext():
        run = pnem.fit(
            model,
            strategy,
            path,
            objective=objective,
            seed=seed,
            precision=precision,
            compile=False,
            progress=False,
            **{**recipe.training, **settings},
        )
    seconds = time.perf_counter() - start
    scores = run.evaluate(path, limit=1_000, iterations=20, seed=0)
    return {name: getattr(scores, name) for name in MEASURES} | {"seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="a file of `pnem data static-shapes`; its own when left out")
    parser.add_argument("--preset", default="quick-rnn-em", choices=[name for name in PRESETS if "rnn-em" in name])
    parser.add_argument("--epochs", type=int, help="the preset's when left out")
    parser.add_argument("--train-limit", type=int, help="training images; all when left out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--emulate", action="store_true", help="bfloat16's rounding with float32's products")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--small", action="store_true", help="seconds of work, to see that all runs")
    options = parser.parse_args(arguments)
    given = {"epochs": 1 if options.small else options.epochs, "train_limit": options.train_limit}
    settings = {name: value for name, value in given.items() if value is not None}
    found: dict[str, list[dict[str, float]]] = {"float32": [], "bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        path = options.data or Path(folder, "shapes.h5")
        if options.data is None:
            write_static_shapes(path, **(SMALL if options.small else {}))
        for seed in range(options.seeds):
            for precision, results in found.items():
                results.append(trained(path, options.preset, precision, seed, options.emulate, settings))
                shown = ", ".join(f"{name} {value:.4g}" for name, value in results[-1].items())
                print(f"seed {seed}, {precision}: {shown}", file=sys.stderr, flush=True)
    print(f"{options.preset}, {options.seeds} seeds: mean ± standard deviation over seeds")
    print(f"{'':26}" + "".join(f"{name:>20}" for name in found) + f"{'bfloat16 − float32':>22}")
    for name, title in MEASURES.items():
        values = {precision: np.array([result[name] for result in results]) for precision, results in found.items()}
        digits = 1 if name == "log_evidence" else 4
        columns = [*values.values(), values["bfloat16"] - values["float32"]]
        cells = [
            f"{column.mean():.{digits}f} ± {column.std(ddof=min(1, len(column) - 1)):.{digits}f}" for column in columns
        ]
        print(f"{title:26}{cells[0]:>20}{cells[1]:>20}{cells[2]:>22}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
