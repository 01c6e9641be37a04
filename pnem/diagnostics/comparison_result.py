"""What a comparison of runs found: a table of scores, and their paired differences."""

import itertools
import json
import math
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from pnem.diagnostics.comparison_notes import notes_on
from pnem.diagnostics.comparison_tables import ComparisonTables
from pnem.inference.distributions import Concatenated
from pnem.inference.proposals import MomentMatched
from pnem.metrics import Estimate, mean_and_standard_error
from pnem.run import Run

__all__ = ["Comparison", "Measured", "kind_of", "mean_over_images"]

GROUPING = ("ami", "ari")
PAIRED = ("log_marginal", "elbo", *GROUPING)
# Above it importance-weighted estimates are not to be trusted.
LARGEST_K_HAT = 0.7


def kind_of(q: dist.TorchDistribution) -> str:
    """Whether q(θ) is a ``"point"``, has a ``"density"``, or is ``"draws"`` of a sampler."""
    q = q.parts[0] if isinstance(q, Concatenated) else q
    return "point" if isinstance(q, dist.Delta) else "draws" if isinstance(q, MomentMatched) else "density"


@dataclass
class Measured:
    """What was measured of one run so far.

    Attributes:
        scores: per image, batch by batch.
        timings: of each batch, its images and the seconds of inference.
        q: the kind of q(θ).
        cheap: seconds that the last batch took without what is expensive.
        rising: images whose best q(θ) was still getting better when the search for it ended.
    """

    scores: dict[str, list[Tensor]] = field(default_factory=dict)
    timings: list[tuple[int, float]] = field(default_factory=list)
    q: str = ""
    cheap: float = 0.0
    rising: int = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Adds the scores of a batch."""
        for name, value in values.items():
            self.scores.setdefault(name, []).append(value.detach().cpu().double())

    def joined(self) -> dict[str, NDArray[np.float64]]:
        """The scores of all images."""
        return {name: torch.cat(values).numpy() for name, values in self.scores.items()}

    def cost(self) -> dict[str, float]:
        """Milliseconds per image, the median over the largest batches, and how many images these were of."""
        largest = max(images for images, _ in self.timings)
        seconds = statistics.median(seconds for images, seconds in self.timings if images == largest)
        return {"ms_per_image": 1000 * seconds / largest, "timed_batch": largest}


@dataclass(frozen=True, repr=False)
class Comparison:
    """Runs compared on the same images; printed, it is three tables with their units and notes.

    Attributes:
        table: a row for each run, by its name. In nats per image, means over images and (``_se``) their standard
            errors: log_marginal, elbo, approximation_gap, amortisation_gap and, of a Delta, optimality_gap. ``k_hat``
            is the share of images with k̂ > 0.7; ``ami`` and ``ari`` are means over images in which there is something
            to group; ``parameters`` those of model and strategy; ``train_seconds`` the time it took to train the model;
            ``ms_per_image`` that of inference, in batches of ``timed_batch`` images. ``q`` is the kind of q(θ):
            "point", "density" or "draws"; ``elbo_is_bound`` says whether the ELBO is one, or the plug-in log p(x, θ) of
            a point. What there is none of is NaN, or has no column.
        differences: of every two runs and every measure that compares between them, the mean difference (``run``
            minus ``reference``), its standard error over the same images, and how many these were.
        scores: of each run, every score of every image, in the order of the data. What is expensive may be of the first
            images only.
        counts: how many images each score of the table rests on.
        images: how many images were used.
        available: how many there were.
        split, measures, samples, seed: as they were asked for.
        notes: what is to be known about the numbers.
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    scores: dict[str, dict[str, NDArray[np.float64]]]
    counts: dict[str, int]
    images: int
    available: int
    split: str
    measures: str
    samples: int
    seed: int
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        runs: Mapping[str, Run],
        results: Mapping[str, Measured],
        split: str,
        available: int,
        measures: str,
        samples: int,
        seed: int,
    ) -> "Comparison":
        """The comparison of runs that these measurements are of."""
        scores = {name: result.joined() for name, result in results.items()}
        table = pd.DataFrame([_row(runs[name], results[name], scores[name]) for name in runs], index=[*runs])
        table.index.name = "run"
        measured = {score for own in scores.values() for score in own}
        counts = {
            score: max(mean_over_images(score, own[score]).count for own in scores.values() if score in own)
            for score in sorted(measured)
        }
        images = sum(images for images, _ in next(iter(results.values())).timings)
        notes = tuple(notes_on(runs, results, counts, images, available, measures, samples))
        differences = _differences(runs, results, scores)
        return cls(table, differences, scores, counts, images, available, split, measures, samples, seed, notes)

    def __rich__(self) -> ComparisonTables:
        return ComparisonTables(self)

    def __repr__(self) -> str:
        console = Console(color_system=None, force_jupyter=False)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")

    def to_json(self) -> str:
        """Everything but the scores of single images, as JSON; what there is none of, or is infinite, is null."""
        content = {
            "split": self.split,
            "images": self.images,
            "available": self.available,
            "measures": self.measures,
            "samples": self.samples,
            "seed": self.seed,
            "counts": self.counts,
            "table": _records(self.table.reset_index()),
            "differences": _records(self.differences),
            "notes": list(self.notes),
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _row(run: Run, result: Measured, scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    row: dict[str, Any] = {"q": result.q}
    for score, values in scores.items():
        if score == "k_hat":
            row[score] = math.nan if np.isnan(values).any() else float((values > LARGEST_K_HAT).mean())
        else:
            row[score], row[f"{score}_se"], _ = mean_over_images(score, values)
    if "elbo" in scores:
        row["elbo_is_bound"] = result.q != "point"
    parameters = {id(p): p.numel() for part in (run.model, run.strategy) for p in part.parameters()}
    row["parameters"] = sum(parameters.values())
    row["train_seconds"] = float(run.history["seconds"].iloc[-1]) if len(run.history) else math.nan
    return row | result.cost()


def mean_over_images(score: str, values: NDArray[np.float64]) -> Estimate:
    """The mean of a score: a grouping that is NaN has nothing to group and is left out, but nats make the mean NaN."""
    if score not in GROUPING and np.isnan(values).any():
        return Estimate(math.nan, math.nan, len(values))
    return mean_and_standard_error(torch.from_numpy(values))


def _differences(
    runs: Mapping[str, Run], results: Mapping[str, Measured], scores: Mapping[str, Mapping[str, NDArray[np.float64]]]
) -> pd.DataFrame:
    rows = []
    bounded = {name: _bounded(run, results[name].q) for name, run in runs.items()}
    for reference, name in itertools.combinations(runs, 2):
        for score in PAIRED:
            if score not in scores[name] or score not in scores[reference]:
                continue
            if score == "elbo" and bounded[name] != bounded[reference]:
                continue
            a, b = scores[name][score], scores[reference][score]
            common = min(len(a), len(b))
            rows.append((name, reference, score, *mean_over_images(score, a[:common] - b[:common])))
    columns = ["run", "reference", "measure", "difference", "standard_error", "images"]
    return pd.DataFrame(rows, columns=columns)


def _bounded(run: Run, q: str) -> Hashable:
    """What a run's "ELBO" is a value of: log p(x), or the joint density of x and a θ of some size."""
    if q != "point":
        return "log p(x)"
    return (run.model.num_components, run.model.latent_features) if run.model.has_proper_prior else "log p(x | θ)"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {
            str(name): None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in row.items()
        }
        for row in table.astype(object).to_dict("records")
    ]
