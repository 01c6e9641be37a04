"""The main job in one call: data, two strategies on one model, a table and figures."""

import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from pnem import plots
from pnem.data import ImageDataset, write_static_shapes
from pnem.devices import bfloat16_speed, resolve_device
from pnem.errors import RunError
from pnem.inference import Posterior
from pnem.presets import PRESETS
from pnem.run import Run, Scores, SequenceScores
from pnem.training import fit

__all__ = ["run_demo"]

TITLES = {"rnn-em": "RNN-EM", "n-em": "N-EM"}
QUICK = {"rnn-em": "quick-rnn-em"}
# At inference: iterations beyond those of training go on improving, and are cheap.
RESTARTS, ITERATIONS = 4, 20


class Scale(NamedTuple):
    """How much work the demo does."""

    train: dict[str, int]
    test: int
    epochs: int


FULL = Scale({"rnn-em": 55_000, "n-em": 30_000}, 1_000, 2)
SMALL = Scale({"rnn-em": 640, "n-em": 640}, 50, 1)


def run_demo(out: Path, *, seed: int, device: str, small: bool, console: Console) -> None:
    """Writes data, runs and figures under `out`, and prints what it found.

    Raises:
        RunError: `out` exists.
    """
    if out.exists():
        raise RunError(f"{out} exists already: choose another name with --out, or remove it")
    scale = SMALL if small else FULL
    data = out / "shapes.h5"
    out.mkdir(parents=True)
    images = max(scale.train.values())
    console.print(f"generating {images} training images of three shapes each")
    write_static_shapes(data, train=images, valid=scale.test, test=scale.test, seed=seed)
    x = ImageDataset.from_hdf5(data, "test")[:50].x
    table = Table(title=f"static shapes, {scale.test} test images, K = 4, {ITERATIONS} iterations")
    columns = ("strategy", "test AMI", f"best of {RESTARTS} starts", "test ARI", "ELBO (nats per image)", "seconds")
    for column in columns:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    runs: dict[str, Run] = {}
    posteriors: dict[str, Posterior] = {}
    for name, title in TITLES.items():
        console.print(f"training {title}")
        start = time.perf_counter()
        runs[title] = _train(name, data, out / name, scale, seed, device)
        seconds = time.perf_counter() - start
        single, best = (
            runs[title].evaluate(data, restarts=restarts, iterations=ITERATIONS, seed=seed, progress=True)
            for restarts in (1, RESTARTS)
        )
        table.add_row(title, *_row(single, best), f"{seconds:.0f}")
        torch.manual_seed(seed)
        posteriors[title] = runs[title].infer(x, iterations=ITERATIONS)
    console.print(table)
    _draw(out, x, runs, posteriors)
    console.print(
        f"Figures: {out}/overview-*.png, {out}/training.png, {out}/elbo.png\n"
        "What to try next:\n"
        f"  pnem evaluate {out / 'rnn-em'} {data} --restarts 8 --iterations 20\n"
        f"  pnem train {data} --strategy rnn-em --out runs/rnn-em    (the full training)\n"
        "  notebooks/01_one_model_two_strategies.ipynb",
        highlight=False,
        soft_wrap=True,
    )


def _train(name: str, data: Path, directory: Path, scale: Scale, seed: int, device: str) -> Run:
    preset = PRESETS[QUICK.get(name, name)]
    torch.manual_seed(seed)
    model, strategy, objective = preset.build(ImageDataset.from_hdf5(data, "training").image_shape)
    settings = {**preset.training, "epochs": scale.epochs, "train_limit": scale.train[name]}
    settings["precision"] = "bfloat16" if bfloat16_speed(resolve_device(device)) > 1.2 else "float32"
    return fit(model, strategy, data, objective=objective, out=directory, seed=seed, device=device, **settings)


def _row(single: Scores | SequenceScores, best: Scores | SequenceScores) -> tuple[str, ...]:
    return (
        f"{single.ami:.3f} ± {single.ami_se:.3f}",
        f"{best.ami:.3f} ± {best.ami_se:.3f}",
        f"{single.ari:.3f} ± {single.ari_se:.3f}",
        f"{single.log_evidence:.1f}",
    )


def _draw(out: Path, x: torch.Tensor, runs: dict[str, Run], posteriors: dict[str, Posterior]) -> None:
    shape = next(iter(runs.values())).settings.image_shape
    for name, title in TITLES.items():
        plots.overview(x, posteriors[title], shape).savefig(out / f"overview-{name}.png")
    plots.training_curves({title: run.history for title, run in runs.items()}).savefig(out / "training.png")
    plots.elbo_by_iteration(posteriors).savefig(out / "elbo.png")
