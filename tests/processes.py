"""What the tests of several processes run in them: they import it by name."""

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fitting import SETTINGS, SHAPE, arrays
from torch import nn

import pnem
from pnem.data import ImageDataset
from pnem.errors import DataError, StrategyError
from pnem.inference import ELBO, RNNEM, BitFlip, ClassicalEM, OnlineEM, collectives
from pnem.models import Bernoulli, MultivariateNormal, Normal, Poisson, SpatialMixture, StudentT, decoders
from pnem.run import Run


class LearnedStart(RNNEM):
    """Begins at a θ of its own, which only the first window of a truncated unroll uses."""

    def __init__(self, model: SpatialMixture, *, iterations: int):
        super().__init__(model, iterations=iterations)
        self.first = nn.Parameter(torch.full((model.latent_features,), 0.1))

    def init(self, x, gamma=None):
        state = super().init(x, gamma)
        return state._replace(theta=state.theta + self.first)


class RecordedFlips(BitFlip):
    """Writes down with what random numbers each process begins an epoch."""

    def __init__(self, probability: float, path: str):
        super().__init__(probability)
        self.path = path

    def forward(self, x):
        noisy = super().forward(x)
        with open(f"{self.path}.{collectives.rank()}", "a") as file:
            print((noisy != x).sum().item(), noisy[0].flatten().tolist(), file=file)
        return noisy


class Harmed(ImageDataset):
    """Images that do something to the process of `rank` when it asks for batch number `at`."""

    def __init__(self, harm: str, rank: int, at: int):
        super().__init__(*arrays())
        self.harm, self.rank, self.countdown = harm, rank, at + 1

    def __getitems__(self, indices):
        if self.rank == collectives.rank() and collectives.are_several():
            self.countdown -= 1
            if self.countdown == 0:
                if self.harm == "error":
                    raise DataError("these images are broken")
                if self.harm == "bug":
                    raise LookupError("a bug")
                if self.harm == "interrupt":
                    os.kill(os.getppid(), signal.SIGINT)
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitems__(indices)


def harmed(*args: Any) -> dict[str, ImageDataset]:
    return {"training": Harmed(*args), "validation": ImageDataset(*arrays())}


def uneven() -> dict[str, ImageDataset]:
    """27 validation images in joint batches of 8: the last has 3, which two processes cannot share evenly."""
    return {"training": ImageDataset(*arrays()), "validation": ImageDataset(*arrays(27))}


def train(out: Path | None = None, *, data: Any = None, K: int = 1, noise: Any = None, **settings: Any) -> Run:
    """A training in double precision that with one component and no noise has nothing random in it."""
    torch.manual_seed(0)
    model = SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), K, pixel_prior=0.0)
    if settings.get("truncation"):
        strategy = LearnedStart(model, iterations=5)
    else:
        strategy = RNNEM(model, iterations=3, noise=noise)
    given = SETTINGS | {"epochs": 2, "schedule": "constant", "precision": "float64"} | settings
    return pnem.fit(model, strategy, uneven() if data is None else data, objective=ELBO("ramp"), out=out, **given)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Nothing hangs."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"it did not end within {seconds} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


EM_CASES = ["full", "diagonal, far", "full, missing", "student", "poisson", "weighted", "gamma", "factors", "chunks"]


def em_model(case: str) -> SpatialMixture:
    if case == "factors":
        return SpatialMixture(decoders.Linear(2, (1, 4, 1)), Normal(), 1, prior="standard_normal").double()
    likelihood = {"student": StudentT(), "poisson": Poisson(), "diagonal, far": MultivariateNormal("diagonal")}.get(
        case, MultivariateNormal("full")
    )
    return SpatialMixture(
        decoders.Constant(likelihood.num_parameters(3)), likelihood, 3, mixing="learned", mixing_concentration=1.5
    ).double()


def em_data(case: str) -> dict[str, torch.Tensor]:
    """Items, and what else `fit` takes of each of them: (B, D, ...)."""
    generator = torch.Generator().manual_seed(3)
    draw = {"generator": generator, "dtype": torch.float64}
    if case == "factors":
        return {"x": torch.randn(60, 2, **draw) @ torch.randn(2, 4, **draw) + 0.3 * torch.randn(60, 4, **draw)}
    images = 1 if case == "chunks" else 2
    centres = 4 * torch.randn(3, 3, **draw)
    if case == "diagonal, far":
        centres[0] += 1e7
    x = centres[torch.randint(0, 3, (images, 101), generator=generator)] + torch.randn(images, 101, 3, **draw)
    if case == "poisson":
        x = x.abs().round()
    if case == "full, missing":
        x[torch.rand(x.shape, generator=generator) < 0.1] = float("nan")
    more = {}
    if case == "weighted":
        more["weight"] = torch.rand(images, 101, **draw)
    if case == "gamma":
        more["gamma"] = torch.rand(images, 3, 101, **draw)
    return {"x": x} | more


def em_fit(case: str, data: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, ...]:
    """The parameters, the trace of the evidence, and the model's own parameters."""
    torch.manual_seed(5 + collectives.rank())
    model = em_model(case)
    if case == "chunks":
        # A stream's sample is in another order, and so is the start.
        torch.manual_seed(6)
        data = {"x": list(data["x"][0].split(20)), "theta": em_start(model)}
    elif case == "factors":
        data = {"x": data["x"].unsqueeze(-1)}
    fit = ClassicalEM(model, iterations=6, tol=0.0).fit(**data, **settings)
    return fit.theta, fit.elbo_trace, *model.state_dict().values()


def em_start(model: SpatialMixture) -> torch.Tensor:
    theta = ClassicalEM(model, iterations=1).fit(torch.randn(1, 30, 3, dtype=torch.float64)).theta
    assert theta.shape[:2] == (1, 3)
    return theta


def em_on_shares() -> tuple[dict[str, list[tuple[torch.Tensor, ...]]], list[list[str]]]:
    """`fit_shares` and `fit_invalid`, and a warning."""
    if collectives.rank() == 0:
        warnings.warn("something is odd", UserWarning, stacklevel=1)
    return fit_shares(), fit_invalid()


def fit_shares() -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """What every process finds in every case, with 37 items in the first and the others in the second."""
    found = {}
    for case in EM_CASES:
        shares = {name: own(value, name, case) for name, value in em_data(case).items()}
        found[case] = collectives.gathered(em_fit(case, shares, distributed=True))
    return found


def own(value: torch.Tensor, name: str, case: str) -> torch.Tensor:
    axis = 0 if case == "factors" else -1 if name == "gamma" else 1
    return value.split([37, value.shape[axis] - 37], axis)[collectives.rank()]


def fit_invalid() -> list[list[str]]:
    """What every process is told, where the second gives what cannot be fitted."""
    model, x = em_model("full"), em_data("full")["x"]
    second = collectives.rank() == 1
    attempts = [
        lambda: ClassicalEM(model).fit(x / (0.0 if second else 1.0), distributed=True),
        lambda: ClassicalEM(model).fit(x[:, :0] if second else x, distributed=True),
        lambda: ClassicalEM(model).fit(x, restarts=2 if second else 1, distributed=True),
        lambda: OnlineEM(model).fit(x, distributed=True),
    ]
    told = []
    for attempt in attempts:
        try:
            attempt()
        except (pnem.errors.PnemError, StrategyError) as error:
            told.append(str(error))
    return collectives.gathered(told)
