"""What `pnem.fit` costs beside the same training step written by hand in PyTorch: run it as a script.

RNN-EM on the ownership model, 28×28 pixels, K = 4, T = 10, batches of 64, float32, eager, one thread. Whenever `fit`
asks for its next batch, the hand-written step is timed in between, so that both see the same machine. The ratio is of
processor time, which other programs on the machine disturb little; that of wall-clock time is printed too.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pnem
from pnem.data import Batch, ImageDataset
from pnem.inference import ELBO, RNNEM, BitFlip
from pnem.models import Bernoulli, SpatialMixture, decoders

H = W = 28
D, K, M, T, B = H * W, 4, 250, 10, 64
FLIP, OWNERSHIP = 0.1, 0.5
BAR = 1.15


def now() -> np.ndarray:
    """Processor and wall-clock time in seconds."""
    return np.array([time.process_time(), time.perf_counter()])


class HandWritten:
    """The same network, loss and optimiser, without pnem."""

    def __init__(self) -> None:
        self.inputs = nn.Linear(D, M)
        self.recurrent = nn.Linear(M, M, bias=False)
        self.decoder = nn.Linear(M, D)
        parameters = [p for layer in (self.inputs, self.recurrent, self.decoder) for p in layer.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def loss(self, x: Tensor) -> Tensor:
        """The ramp-weighted negative ELBO of images (B, 1, D)."""
        x_in = torch.where(torch.rand_like(x) < FLIP, 1 - x, x)
        gamma = torch.randn(len(x), K, D).abs()
        gamma = gamma / gamma.sum(1, keepdim=True)
        theta, mean = x.new_zeros(len(x), K, M), x.new_zeros(len(x), K, D)
        loss = x.new_zeros(())
        for t in range(1, T + 1):
            theta = torch.sigmoid(self.inputs(gamma * (x_in - mean)) + self.recurrent(theta))
            psi = self.decoder(theta)
            mean = psi.sigmoid()
            log_p0 = -F.softplus(psi)
            unowned = OWNERSHIP * log_p0.sum(1, keepdim=True) - float(np.log(K))
            log_joint = x * psi + (1 - OWNERSHIP) * log_p0 + unowned
            gamma = log_joint.softmax(1)
            loss = loss - t * log_joint.logsumexp(1).sum(1).mean()
        return loss / (T * (T + 1) / 2)

    def step(self, x: Tensor) -> None:
        """One step of training."""
        self.optimizer.zero_grad()
        self.loss(x).backward()
        self.optimizer.step()


class Stopwatch(ImageDataset):
    """Images that time what happens between the batches asked of them, and the hand-written step."""

    def __init__(self, features: np.ndarray):
        super().__init__(features)
        self.hand_written = HandWritten()
        self.left: np.ndarray | None = None
        self.seconds: list[tuple[np.ndarray, np.ndarray]] = []

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = super().__getitems__(indices)
        loaded = now()
        self.hand_written.step(batch.x.transpose(1, 2))
        done = now()
        if self.left is not None:
            self.seconds.append((loaded - self.left, done - loaded))
        self.left = now()
        return batch


def main() -> None:
    """Prints the median and the quartiles of the ratio, and fails above the bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--compile", action="store_true", help="compile pnem's side only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warm_up = 5
    features = np.random.default_rng(0).random((1, B * (options.steps + warm_up), H, W, 1)) < 0.1
    train = Stopwatch(features)
    model = SpatialMixture(decoders.Linear(M, (H, W, 1)), Bernoulli(), K, pixel_prior=0.0, ownership=OWNERSHIP)
    strategy = RNNEM(model, iterations=T, noise=BitFlip(FLIP))
    data = {"training": train, "validation": ImageDataset(features[:, :B])}
    settings = {"epochs": 1, "batch_size": B, "device": "cpu", "progress": False, "compile": options.compile}
    pnem.fit(model, strategy, data, objective=ELBO("ramp"), **settings)
    fit, hand = np.array(train.seconds[warm_up:]).transpose(1, 2, 0)
    for i, clock in enumerate(("processor", "wall-clock")):
        low, ratio, high = np.quantile(fit[i] / hand[i], [0.25, 0.5, 0.75])
        print(
            f"{clock} time a step: fit {np.median(fit[i]):.4f} s, by hand {np.median(hand[i]):.4f} s, "
            f"ratio {ratio:.3f} (quartiles {low:.3f} to {high:.3f}, {fit.shape[1]} steps)"
        )
    ratio = float(np.median(fit[0] / hand[0]))
    print(f"the bar is {BAR}")
    sys.exit(0 if options.compile or ratio <= BAR else 1)


if __name__ == "__main__":
    main()
