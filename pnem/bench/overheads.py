"""What Pyro adds to a training step, what Lightning adds to an epoch, and how an epoch grows with its images."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pnem.bench.cases import Size, build, images
from pnem.bench.clock import Spread, alternately, timed
from pnem.bench.growth import growth_row
from pnem.bench.report import Row
from pnem.bench.steps import WARM_UP, training_step
from pnem.compilation import compiler_warnings_ignored, missing_compiler
from pnem.data import ImageDataset
from pnem.inference import ELBO
from pnem.recipe import Parts
from pnem.training import fit

__all__ = ["pyro_step", "time_fit", "time_pyro"]


def pyro_step(parts: Parts, x: Tensor) -> Callable[[], None]:
    """A step of training through Pyro: its own ELBO of model and guide at the last iteration, and the same Adam."""
    model, strategy, _ = parts
    loss = TraceEnum_ELBO(max_plate_nesting=2)(model.train(), strategy.train())
    optimizer = torch.optim.Adam(loss.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        # Parameters are the modules' own, not shared by name with all other models.
        with pyro.settings.context(module_local_params=True):
            (loss(x) / len(x)).backward()
        optimizer.step()

    return step


def time_pyro(size: Size, *, repetitions: int, device: torch.device, seed: int) -> Iterator[Row]:
    """How much longer a step takes through Pyro, eager and with the strategy's step compiled, for RNN-EM."""
    section = f"Pyro's share of a step of rnn-em\nK {size.K}, T {size.T}, batch {size.batch}"
    parts = build("rnn-em", size, device, seed)._replace(objective=ELBO("last"))
    x, lacking = images(parts, size, device), missing_compiler(device)
    for variant in ("eager", "compiled"):
        if variant == "compiled" and lacking is not None:
            yield Row(section, variant, None, note=lacking)
            continue
        pairs = {name: copy.deepcopy(parts) for name in ("plain", "pyro")}
        if variant == "compiled":
            torch.compiler.reset()
            for _, strategy, _ in pairs.values():
                strategy.step = torch.compile(strategy.step, fullgraph=True)  # type: ignore[method-assign]
        steps = {
            "plain": training_step(pairs["plain"], x, precision="float32", compile=False),
            "pyro": pyro_step(pairs["pyro"], x),
        }
        with compiler_warnings_ignored():
            alternately(steps, WARM_UP, device)
        seconds = alternately(steps, repetitions, device)
        share = 100 * (seconds["pyro"] / seconds["plain"] - 1)
        note = (
            f"{1000 * np.median(seconds['pyro']):.0f} ms through Pyro, {1000 * np.median(seconds['plain']):.0f} without"
        )
        yield Row(section, variant, Spread.of(share), "% more", note=note)


def time_fit(size: Size, steps: int, *, repetitions: int, device: torch.device, seed: int) -> Iterator[Row]:
    """How much longer `fit`'s steps take than the bare ones, and how its epochs grow with N, for RNN-EM, eager.

    Epochs of one, two and four times `steps` steps, each the second one of its training, after which bare steps are
    timed. A step of `fit` is what an epoch takes more for more steps.
    """
    parts = build("rnn-em", size, device, seed)
    counts = [steps, 2 * steps, 4 * steps]
    # Random binary images, one pixel in ten on.
    rng = np.random.default_rng(seed)
    pixels = rng.random((1, counts[-1] * size.batch, *size.image_shape)) < 0.1
    data = {"training": ImageDataset(pixels), "validation": ImageDataset(pixels[:, : min(8, size.batch)])}
    trained, x = copy.deepcopy(parts), images(parts, size, device)
    bare = training_step(parts, x, precision="float32", compile=False)
    settings: dict[str, Any] = {"epochs": 2, "batch_size": size.batch, "device": str(device), "compile": False}

    def epoch(count: int) -> float:
        limit = count * size.batch
        model, strategy, objective = trained
        run = fit(model, strategy, data, objective=objective, train_limit=limit, progress=False, **settings)
        return float(run.history["seconds"].diff().iloc[-1])

    epoch(counts[0])
    alternately({"bare": bare}, WARM_UP, device)
    rounds = [
        [*(epoch(count) for count in counts), timed(lambda: [bare() for _ in range(counts[-1] - counts[0])], device)]
        for _ in range(repetitions)
    ]
    first, _, last, seconds = np.array(rounds).T
    section = f"fit with rnn-em, eager\nK {size.K}, T {size.T}, batch {size.batch}"
    note = f"{1000 * np.median(last - first) / (counts[-1] - counts[0]):.0f} ms a step, against the bare step"
    yield Row(section, "Lightning's share", Spread.of(100 * ((last - first) / seconds - 1)), "% more", note=note)
    yield growth_row(section, "N", [count * size.batch for count in counts], np.array(rounds)[:, :-1])
