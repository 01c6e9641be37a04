"""Runs compared on the same images: how well they explain them, how well they group them, and what they cost."""

import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from pnem.data import ImageDataset
from pnem.data.arrays import check_whole
from pnem.devices import forked_rng
from pnem.diagnostics.budget import check_budget
from pnem.diagnostics.comparability import check_comparable
from pnem.diagnostics.comparison_result import Comparison, Measured, kind_of
from pnem.diagnostics.gaps import inference_gap
from pnem.diagnostics.psis import LEAST_WEIGHTS, psis_k_hat
from pnem.diagnostics.terms import elbo_terms
from pnem.errors import DataError, PnemError
from pnem.inference import ConvergenceWarning, Posterior
from pnem.inference.estimates import log_mean_weight
from pnem.inference.marginal_likelihood import log_weights
from pnem.inference.proposals import proposal
from pnem.loading import check_images, open_split
from pnem.metrics import adjusted_mutual_information, adjusted_rand_index
from pnem.run import Run

__all__ = ["compare"]

# The share of a budget that goes to images that get everything, and images below which no batch is worth its start.
EVERYTHING, FEW = 0.8, 10
# A first batch that takes less than this many seconds is inferred again to be timed, when all is loaded and warm.
QUICK = 10.0
# Draws of every image decoded at once.
CHUNK = 10


def compare(
    runs: Mapping[str, Run],
    data: str | Path | ImageDataset | Mapping[str, ImageDataset],
    *,
    split: str = "test",
    limit: int | None = None,
    measures: str = "all",
    samples: int = 500,
    budget: float | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Scores of several runs on the same images, in the same order and from the same seeds, and their differences.

    Runs may be of different models or, by `Run.using`, of one model inferred in different ways. What compares is what
    bounds or estimates one and the same quantity; see `pnem.diagnostics.comparability.check_comparable`. Of each run:

    - log p(x) by importance weighting: on average a lower bound. θ is drawn from q*, the best q(θ) of its family for
      each image; without gaps from q(θ). Where q(θ) is a Delta, θ is drawn from a normal around it that is as wide as
      Laplace's approximation of p(θ | x), and of a sampler from the normal with the moments of its draws. There is none
      where the prior on θ is flat.
    - The share of images where weights from q(θ) have a tail of k̂ > 0.7, so that q(θ) misses parts of p(θ | x).
    - The ELBO, or where q(θ) is a Delta the plug-in log p(x, θ), which is no bound; without a prior on π, as log p(x).
    - What the ELBO loses to the family of q(θ) and to amortisation, and of a Delta what log p(x, θ) loses to the
      maximum next to θ; see `pnem.diagnostics.inference_gap`.
    - AMI and ARI where the data have groups; parameters of model and strategy; seconds it took to train the model;
      milliseconds per image that inference takes, warm: the median over batches.

    Args:
        runs: by name, at least two.
        data: a file or datasets, as `Run.evaluate` takes them; not necessarily those that were trained on.
        split: which split.
        limit: use only the first so many images; all when None.
        measures: ``"all"``; ``"marginal"``: without ELBO and gaps, for models with different proper priors on θ;
            ``"grouping"``: AMI, ARI and cost, which compare for any runs.
        samples: draws of θ for each image, by which log p(x) is estimated: at least 30.
        budget: seconds that the comparison may take: fewer images then get what is expensive (log p(x), k̂, gaps), and
            if need be fewer are used at all; but always at least two. None for all of everything.
        batch_size: images at once; with a budget fewer at first, until it is known what they cost.
        seed: of the initial γ and all draws.
        progress: whether to show a progress bar.

    Raises:
        RunError: fewer than two runs, unknown measures, or runs whose measures do not compare: the message says why,
            and what does.
        DataError: the split is missing or does not fit the models, it has fewer than two images, or no groups where
            only grouping is asked for; limit or batch_size is below 1, samples below 30, or budget not positive.
        StrategyError: a strategy that cannot do it, by the name of its run.

    >>> import pnem
    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> images = ImageDataset(torch.rand(1, 8, 3, 4, 1).round())
    >>> model = SpatialMixture(decoders.Linear(2, (3, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> data = {"training": images, "validation": images}
    >>> run = pnem.fit(model, VAE(model), data, epochs=1, batch_size=8, device="cpu", progress=False)
    >>> runs = {"vae": run, "semi-amortised": run.using("semi-amortised")}
    >>> result = compare(runs, images, samples=100)
    >>> result.table.index.tolist(), result.differences["measure"].tolist()
    (['vae', 'semi-amortised'], ['log_marginal', 'elbo'])
    """
    check_whole(batch_size, "batch_size")
    check_whole(samples, "samples", LEAST_WEIGHTS)
    check_budget(budget)
    check_comparable(runs, measures)
    dataset = open_split(data, split, next(iter(runs.values())).strategy)
    dataset = dataset if limit is None else dataset.limited(limit)
    _check_enough(dataset, split, measures)
    schedule = Schedule(len(dataset), batch_size, budget, divided=measures != "grouping")
    results = {name: Measured() for name in runs}
    with _progress_bar(progress) as bar:
        task = bar.add_task("comparing", total=len(dataset) * len(runs))
        for i, (piece, everything) in enumerate(schedule):
            x, groups = dataset[piece.start : piece.stop]
            for name, run in runs.items():
                bar.update(task, description=name)
                try:
                    check_images(run.model, x, f"split {split!r}")
                    _measure(results[name], run, x, groups, measures, samples, seed * 1_000_003 + i, everything)
                except PnemError as error:
                    raise type(error)(f"{name}: {error}") from error
                bar.advance(task, len(x))
            schedule.cheap = sum(result.cheap for result in results.values()) / len(x)
    return Comparison.of(runs, results, split, len(dataset), measures, samples, seed)


def _check_enough(dataset: ImageDataset, split: str, measures: str) -> None:
    if len(dataset) < 2:
        raise DataError(
            f"split {split!r} gives one image, from which there are no error bars: give at least two, better a hundred"
        )
    if measures == "grouping" and not dataset.has_groups:
        raise DataError(
            f'split {split!r} has no groups, which measures="grouping" needs: leave measures at "all" for nats and cost'
        )


class Schedule:
    """Which images come next, and whether they get everything, so that all is done in time.

    Attributes:
        cheap: seconds per image that all runs together took without what is expensive, on the last images.
    """

    def __init__(self, images: int, batch_size: int, budget: float | None, *, divided: bool):
        self.images = images
        self.batch_size = batch_size
        self.budget = budget
        self.divided = divided
        self.cheap = 0.0

    def __iter__(self) -> Iterator[tuple[range, bool]]:
        if self.budget is None:
            for first in range(0, self.images, self.batch_size):
                yield range(first, min(first + self.batch_size, self.images)), True
            return
        began = before = time.perf_counter()
        first, size = 0, min(2, self.batch_size)
        while first < self.images and size > 0:
            piece = range(first, min(first + size, self.images))
            yield piece, True
            first, now = piece.stop, time.perf_counter()
            # The more images at once, the less each of them takes.
            affordable = int((began + EVERYTHING * self.budget - now) / (now - before) * len(piece))
            size = min(2 * size, self.batch_size, max(affordable if self.divided else 0, 2 - first))
            before = now
        while first < self.images:
            affordable = int((began + self.budget - time.perf_counter()) / self.cheap)
            if affordable < min(FEW, self.images - first):
                return
            piece = range(first, min(first + min(self.batch_size, affordable), self.images))
            yield piece, False
            first = piece.stop


def _measure(
    result: Measured,
    run: Run,
    x: Tensor,
    groups: Tensor | None,
    measures: str,
    samples: int,
    seed: int,
    everything: bool,
) -> None:
    """Adds the scores of these images to the result."""
    x = x.to(run.device, run.model.mixing_logits.dtype)
    with forked_rng(run.device):
        start = time.perf_counter()
        posterior, seconds = _timed_inference(run, x, seed)
        if not result.timings and seconds < QUICK:
            posterior, seconds = _timed_inference(run, x, seed)
        result.timings.append((len(x), seconds))
        result.q = kind_of(posterior.q)
        values: dict[str, Tensor] = {}
        if groups is not None:
            labels = posterior.labels.cpu()
            values |= {
                "ami": adjusted_mutual_information(groups, labels),
                "ari": adjusted_rand_index(groups, labels),
            }
        if measures == "all":
            terms = elbo_terms(run.model, run.strategy, x, posterior=posterior)
            values["elbo"] = terms.elbo[-1] - terms.log_mixing_prior[-1]
        result.cheap = time.perf_counter() - start
        if everything and measures != "grouping":
            if run.model.has_proper_prior:
                values |= _estimated(run, x, posterior, samples)
            if measures == "all":
                values |= _gaps(result, run, x, posterior, samples)
    result.add(values)


def _timed_inference(run: Run, x: Tensor, seed: int) -> tuple[Posterior, float]:
    """The posterior of images, and how many seconds it took."""
    torch.manual_seed(seed)
    _synchronise(run.device)
    start = time.perf_counter()
    posterior = run.infer(x, keep_trace=False)
    _synchronise(run.device)
    return posterior, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _estimated(run: Run, x: Tensor, posterior: Posterior, samples: int) -> dict[str, Tensor]:
    """log p(x) by importance weighting from q(θ), and the k̂ of the weights."""
    width = "laplace" if kind_of(posterior.q) == "point" else None
    q = proposal(run.model, run.strategy, x, width=width, posterior=posterior)
    weights = torch.cat(list(log_weights(run.model, q, x, samples, CHUNK)))
    estimate = log_mean_weight(weights.logsumexp(0), (2 * weights).logsumexp(0), samples)
    return {"log_marginal": estimate.log_marginal, "k_hat": psis_k_hat(weights)}


def _gaps(result: Measured, run: Run, x: Tensor, posterior: Posterior, samples: int) -> dict[str, Tensor]:
    """What the ELBO loses, and the ELBO and log p(x) that this is the difference of, which replace others."""
    with warnings.catch_warnings():
        # Counted instead, over all images.
        warnings.simplefilter("ignore", ConvergenceWarning)
        gap = inference_gap(run.model, run.strategy, x, samples=samples, posterior=posterior)
    result.rising += int(gap.rising.sum())
    if gap.log_marginal is None:
        return {"optimality_gap": gap.best - gap.elbo}
    values = {"elbo": gap.elbo, "log_marginal": gap.log_marginal, "approximation_gap": gap.log_marginal - gap.best}
    return values | {"amortisation_gap": gap.best - gap.elbo} if gap.refined else values


def _progress_bar(wanted: bool) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(TextColumn("{task.description}", markup=False), *columns, transient=True, disable=not wanted)
