"""The directory of a mixture fitted to a table: labels, parameters, bound and picture."""

import json
import math
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pnem import plots
from pnem.components import describe_component
from pnem.data import Rows
from pnem.em_fit import FittedMixture
from pnem.errors import RunError
from pnem.files import write_atomically
from pnem.models.config import describe

__all__ = ["new_directory", "write_results"]

# Rows of a stream that are drawn.
DRAWN = 20_000


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `out` at the end: all of it, or, after an error, nothing.

    Raises:
        RunError: `out` exists, or cannot be written.
    """
    _refuse_existing(out)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        _refuse_existing(out)
        partial.rename(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            # Those that hold results, or were not made, stay as they are.
            with suppress(OSError):
                folder.rmdir()


def _refuse_existing(out: Path) -> None:
    """Raises `RunError` if there is anything at `out`."""
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} exists already: choose another name with --out, or remove it")


def write_results(fitted: FittedMixture, directory: Path, settings: dict[str, Any], *, plot: bool) -> None:
    """Writes labels.csv, parameters.json, bound.csv and, if `plot`, mixture.png into a directory.

    ``labels.csv`` has a line for each row of the table: its number from 0, the component most responsible for it, the
    probability of that, and the responsibility of each component; ``bound.csv`` the bound of each iteration, in nats
    per item.

    Raises:
        RunError: the directory cannot be written.
    """
    _write_labels(fitted, directory / "labels.csv")
    bound = fitted.bound.cpu().numpy()
    trace = pd.DataFrame({"iteration": np.arange(1, len(bound) + 1), "nats_per_item": bound})
    write_atomically(directory / "bound.csv", trace.to_csv(index=False).encode())
    parameters = json.dumps(_parameters(fitted, settings), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(directory / "parameters.json", (parameters + "\n").encode())
    if plot:
        _draw(fitted).savefig(directory / "mixture.png")


def _write_labels(fitted: FittedMixture, path: Path) -> None:
    first = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for piece in fitted.responsibilities():
            gamma = piece.numpy()
            label = gamma.argmax(0)
            columns = {"row": np.arange(first, first + len(label)), "label": label, "probability": gamma.max(0)}
            columns |= {f"gamma_{k}": values for k, values in enumerate(gamma)}
            pd.DataFrame(columns).to_csv(file, index=False, header=first == 0)
            first += len(label)


def _parameters(fitted: FittedMixture, settings: dict[str, Any]) -> dict[str, Any]:
    likelihood, names = fitted.model.likelihood, fitted.data.names
    bound = fitted.bound.tolist()
    return {
        "likelihood": describe(likelihood),
        "columns": list(names),
        "items": fitted.data.num_items,
        "total_weight": fitted.total_weight,
        "components": [
            {"weight": math.exp(log_weight), **describe_component(likelihood, psi, names).parameters}
            for log_weight, psi in zip(
                fitted.log_mixing[0].tolist(), fitted.model.decode(fitted.theta)[0, :, 0], strict=True
            )
        ],
        "bound": {
            "nats_per_item": bound[-1],
            "nats": bound[-1] * fitted.total_weight,
            "iterations": len(bound),
            "converged": fitted.converged,
        },
        "settings": settings,
        "versions": {
            **{name: version(name) for name in ("pnem", "torch", "pyro-ppl", "numpy")},
            "python": platform.python_version(),
        },
    }


def _draw(fitted: FittedMixture) -> Any:
    data = fitted.data
    draw = plots.mixture_1d if len(data.names) == 1 else plots.mixture_2d
    x = data.sample(DRAWN) if isinstance(data, Rows) else torch.from_numpy(data.values)
    weight = None if data.weight is None else torch.from_numpy(data.weight)
    figure = draw(x, fitted.model, fitted, names=data.names, weight=weight)
    if len(x) < data.num_items:
        figure.supxlabel(f"data: a sample of {len(x):,} of {data.num_items:,} rows", fontsize="small")
    return figure
