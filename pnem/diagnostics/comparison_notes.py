"""What is to be known about the numbers of a comparison."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pnem.diagnostics.comparison_result import Measured
    from pnem.run import Run

__all__ = ["GAPS", "LAPLACE", "MOMENTS", "POINT", "notes_on"]

GAPS = ("approximation_gap", "amortisation_gap", "optimality_gap")
# Marks of values by the kind of q(θ).
POINT, LAPLACE, MOMENTS = "†", "‡", "§"


def notes_on(
    runs: Mapping[str, "Run"],
    results: Mapping[str, "Measured"],
    counts: Mapping[str, int],
    images: int,
    available: int,
    measures: str,
    samples: int,
) -> Iterator[str]:
    """Sentences, of which those about marked numbers begin with the mark."""
    kinds = {result.q for result in results.values()}
    models = {id(run.model): run.model for run in runs.values()}
    estimated = "log_marginal" in counts
    if estimated:
        K = max(model.num_components for model in models.values())
        missed = f"; with K = {K} exchangeable components up to log K! = {math.lgamma(K + 1):.2f} nats too low"
        source = "q*, the best q(θ) of its family for each image" if "approximation_gap" in counts else "q(θ)"
        yield (
            f"log p(x): importance weighting with {samples} draws of θ for each image from {source}; on average a "
            f"lower bound{missed if K > 1 else ''}."
        )
        yield "k̂: of such weights from q(θ) itself; above 0.7 q(θ) misses parts of p(θ | x)."
    if "elbo" in counts and "point" in kinds:
        yield f"{POINT} plug-in log p(x, θ) at a point, no bound on log p(x): it compares only with its own kind."
    if estimated and "point" in kinds:
        yield (
            f"{LAPLACE} q(θ) is a point: draws from a normal around it as wide as Laplace's approximation of p(θ | x). "
            "It estimates what the model gives x, and says little about the strategy."
        )
    if measures != "grouping" and "draws" in kinds:
        yield f"{MOMENTS} q(θ) is draws of a sampler: that of the normal with their mean and covariance."
    if measures != "grouping" and not all(model.has_proper_prior for model in models.values()):
        yield "A flat prior on θ has no log p(x)."
    if measures != "grouping":
        yield from _notes_on_models(runs)
    devices = ", ".join(sorted({str(run.device) for run in runs.values()}))
    yield f"Inference: per image, warm, the median over batches of B images, on {devices}."
    yield from _notes_on_gaps(runs, results)
    if "ami" not in counts:
        yield "The data have no groups, and so there is no AMI or ARI."
    if images < available:
        yield f"The budget allowed {images:,} of {available:,} images."
    expensive = min((counts[name] for name in ("log_marginal", *GAPS) if name in counts), default=images)
    if expensive < images:
        yield (
            f"The budget allowed log p(x), gaps and k̂ for the first {expensive:,} images: they do not add up to the "
            "ELBO, which is of more images."
        )


def _notes_on_gaps(runs: Mapping[str, "Run"], results: Mapping[str, "Measured"]) -> Iterator[str]:
    own = [
        name
        for name, result in results.items()
        if "amortisation_gap" in result.scores and next(runs[name].strategy.parameters(), None) is None
    ]
    if own:
        yield f"{', '.join(own)}: each image has its own q(θ); its amortisation gap is what optimisation left undone."
    rising = [f"{result.rising} of {name}" for name, result in results.items() if result.rising]
    if rising:
        yield f"Images whose best q(θ) was still getting better, so that gaps are too small: {', '.join(rising)}."


def _notes_on_models(runs: Mapping[str, "Run"]) -> Iterator[str]:
    shared: dict[int, list[str]] = {}
    for name, run in runs.items():
        shared.setdefault(id(run.model), []).append(name)
    for names in shared.values():
        if len(names) > 1:
            which = f"{', '.join(names[:-1])} and {names[-1]}" if len(shared) > 1 else "All runs"
            yield (
                f"{which} infer in one model, whose log p(x) is one number: the highest estimate is on average the "
                "nearest to it. Training is that of the model."
            )
    if len(shared) > 1 and next(iter(runs.values())).model.owned:
        yield (
            "With ownership p is the declared joint density, which is not normalised over x: between models its nats "
            "say which fits what it declares better, not which gives images more probability."
        )
