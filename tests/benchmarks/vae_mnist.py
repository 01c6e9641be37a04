"""How well pnem's VAE explains MNIST digits beside the same network trained by Pyro's SVI: run it as a script.

The preset ``vae-mnist``, trained by `pnem.fit`, against a VAE as in Pyro's own example: a model and a guide of plain
modules, ``Trace_ELBO`` with its divergence from the same draw as the rest, Adam at a constant 1e-3. Both have the same
layers, the same initial weights, batch size and number of epochs, and keep their best epoch on the validation images.
With ``--same-schedule`` Pyro's learning rate follows the preset's too, so that what differs is the estimator alone.

Test log p(x) of both is by the same importance weighting; errors are standard errors over images. One thread;
seconds are of processor time, which other programs on the machine disturb little.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pnem
from pnem.data import ImageDataset, write_mnist
from pnem.inference import VAE, evidence_lower_bound, importance_weighted_bound
from pnem.models import SpatialMixture, decoders
from pnem.presets import Parts, find_preset

IMAGE = (28, 28, 1)
SMALL = {"train": 256, "valid": 50, "test": 50}


class Result(NamedTuple):
    """A trained pair, and what its training took."""

    model: SpatialMixture
    strategy: VAE
    best_epoch: int
    epochs: int
    seconds: float


class PyroVAE(nn.Module):
    """The pair's networks as plain modules in a model and a guide: training them trains the pair."""

    def __init__(self, parts: Parts):
        super().__init__()
        model, strategy, _ = parts
        assert isinstance(strategy, VAE)
        assert isinstance(model.decoder, decoders.MLP)
        self.features = model.latent_features
        self.decoder = nn.Sequential(model.decoder.hidden, model.decoder.output)
        self.encoder = nn.Sequential(nn.Flatten(), strategy.encoder.hidden, strategy.head)

    def model(self, x: Tensor) -> None:
        """θ from the prior, and the pixels (B, D, C) given θ."""
        pyro.module("decoder", self.decoder)
        with pyro.plate("images", len(x)):
            prior = dist.Normal(x.new_zeros(len(x), self.features), x.new_ones(len(x), self.features))
            theta = pyro.sample("theta", prior.to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(theta)).to_event(1), obs=x.flatten(1))

    def guide(self, x: Tensor) -> None:
        """θ from the encoder's normal."""
        pyro.module("encoder", self.encoder)
        with pyro.plate("images", len(x)):
            location, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("theta", dist.Normal(location, log_scale.exp()).to_event(1))


def built(seed: int) -> Parts:
    """The preset's parts, with the same initial weights for the same seed."""
    torch.manual_seed(seed)
    return find_preset("vae").build(IMAGE)


def by_pnem(path: Path, seed: int, settings: dict[str, Any]) -> Result:
    """Trained by `pnem.fit`."""
    model, strategy, objective = built(seed)
    start = time.process_time()
    run = pnem.fit(model, strategy, path, objective=objective, seed=seed, device="cpu", progress=False, **settings)
    seconds = time.process_time() - start
    assert isinstance(run.strategy, VAE)
    return Result(run.model, run.strategy, int(run.history["valid_loss"].argmin()) + 1, len(run.history), seconds)


def by_pyro(path: Path, seed: int, settings: dict[str, Any], factor: Callable[[int], float] | None) -> Result:
    """Trained by SVI; `factor` scales the preset's learning rate at each step, and None is Pyro's constant 1e-3."""
    train, valid = (ImageDataset.from_hdf5(path, split, with_groups=None)[:].x for split in ("training", "validation"))
    parts = built(seed)
    assert isinstance(parts.strategy, VAE)
    size, epochs = settings["batch_size"], settings["epochs"]
    pyro.clear_param_store()
    start = time.process_time()
    vae = PyroVAE(parts)
    optimizer: Any = pyro.optim.Adam({"lr": 1e-3})
    if factor is not None:
        lr = {"lr": settings["learning_rate"]}
        optimizer = pyro.optim.LambdaLR({"optimizer": torch.optim.Adam, "optim_args": lr, "lr_lambda": factor})
    svi = SVI(vae.model, vae.guide, optimizer, loss=Trace_ELBO())
    best, best_epoch, weights = math.inf, 0, {}
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(train)).split(size)[: len(train) // size]:
            svi.step(train[chosen])
            if factor is not None:
                optimizer.step()
        loss = sum(svi.evaluate_loss(batch) for batch in valid.split(size)) / len(valid)
        if loss < best:
            best, best_epoch, weights = loss, epoch, copy.deepcopy(vae.state_dict())
    vae.load_state_dict(weights)
    return Result(parts.model.eval(), parts.strategy.eval(), best_epoch, epochs, time.process_time() - start)


def cosine(settings: dict[str, Any], steps: int) -> Callable[[int], float]:
    """The learning rate of `pnem.fit` at a step, by its largest."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (settings["warmup_steps"] + 1))
        return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    return factor


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table, and returns 1 where pnem's log p(x) is worse by more than two standard errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, help="the preset's when left out")
    parser.add_argument("--samples", type=int, default=500, help="importance samples")
    parser.add_argument("--seed", type=int, default=0, help="of weights, shuffling and draws; the data are the same")
    parser.add_argument("--same-schedule", action="store_true", help="also Pyro with the preset's learning rate")
    parser.add_argument("--small", action="store_true", help="seconds of work, to see that all runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    settings = dict(find_preset("vae").training)
    if options.epochs or options.small:
        settings["epochs"] = options.epochs or 2
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.h5")
        write_mnist(path, **SMALL if options.small else {})
        x = ImageDataset.from_hdf5(path, "test", with_groups=None)[:].x
        size = len(ImageDataset.from_hdf5(path, with_groups=None))
        results = {"pnem": by_pnem(path, options.seed, settings)}
        results["Pyro"] = by_pyro(path, options.seed, settings, None)
        if options.same_schedule:
            schedule = cosine(settings, settings["epochs"] * (size // settings["batch_size"]))
            results["Pyro, pnem's schedule"] = by_pyro(path, options.seed, settings, schedule)
    print(f"{len(x)} test digits, log p(x) by {options.samples} importance samples, nats per image")
    print(f"{'':24}{'log p(x)':>18}{'ELBO':>18}{'pnem better by':>18}{'seconds':>9}{'best epoch':>12}")
    ours, worse = None, False
    for name, (model, strategy, best_epoch, epochs, seconds) in results.items():
        torch.manual_seed(options.seed)
        estimate = importance_weighted_bound(model, strategy, x, samples=options.samples)
        bound = evidence_lower_bound(model, strategy, x, samples=100)
        cells = [f"{e.mean:.2f} ± {e.standard_error:.2f}" for e in (estimate, bound)]
        if ours is None:
            ours, gain = estimate, ""
        else:
            difference = ours.log_marginal - estimate.log_marginal
            error = difference.std().item() / math.sqrt(len(x))
            gain = f"{difference.mean().item():.2f} ± {error:.2f}"
            worse = worse or difference.mean().item() < -2 * error
        row = "".join(f"{cell:>18}" for cell in (*cells, gain))
        print(f"{name:24}{row}{seconds:>9.0f}{f'{best_epoch} of {epochs}':>12}")
        print(f"{'':24}of which from the draws {estimate.monte_carlo_error_of_mean:.3f}")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main())
