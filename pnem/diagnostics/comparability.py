"""Which runs have nats that compare, and what compares where they do not."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pnem.diagnostics.checks import check_run
from pnem.errors import RunError
from pnem.models import SpatialMixture
from pnem.models.config import describe
from pnem.run import Run

__all__ = ["MEASURES", "check_comparable"]

MEASURES = ("all", "marginal", "grouping")
GROUPING = 'measures="grouping" (--measures grouping) compares AMI, ARI and cost'
MARGINAL = 'measures="marginal" (--measures marginal) compares log p(x), AMI, ARI and cost'


def check_comparable(runs: Mapping[str, Run], measures: str) -> None:
    """Raises `RunError`, saying why and what does compare, unless these measures of all runs compare with one another.

    Grouping and cost compare wherever the images have the same shape. Nats compare between runs that were trained on
    the same images and whose models give densities with respect to the same measure, of the same declared form: the
    same prior on θ and the same ownership. Of log p(x) alone, in which θ is integrated out, the priors may be different
    if they are proper and there is no ownership, without which p is normalised over x.
    """
    if measures not in MEASURES:
        raise RunError(f"measures must be one of {', '.join(MEASURES)}, but is {measures!r}")
    if not isinstance(runs, Mapping) or not all(isinstance(name, str) for name in runs):
        raise RunError(f'runs must be a mapping from names to runs, such as {{"vae": run}}, but is {runs!r:.60}')
    for name, run in runs.items():
        check_run(run, name)
    if len(runs) < 2:
        raise RunError("there is nothing to compare: give at least two runs; Run.evaluate scores one alone")
    for (a, run_a), (b, run_b) in itertools.combinations(runs.items(), 2):
        shapes = run_a.settings.image_shape, run_b.settings.image_shape
        if shapes[0] != shapes[1]:
            raise RunError(
                f"{a} is for images of shape (H, W, C) = {shapes[0]} and {b} for {shapes[1]}: only runs that can be "
                "given the same images compare"
            )
        if measures != "grouping":
            _check_nats(a, run_a, b, run_b, measures)


def _check_nats(a: str, run_a: Run, b: str, run_b: Run, measures: str) -> None:
    models = run_a.model, run_b.model
    if not _same_images(run_a.settings.data, run_b.settings.data):
        trained = " and ".join(_trained_on(run.settings.data) for run in (run_a, run_b))
        raise RunError(
            f"{a} and {b} were trained on different images ({trained}), so that their nats do not compare: {GROUPING} "
            "on the same test images; train both on the same data for the rest"
        )
    discrete = [_discrete(model) for model in models]
    if discrete[0] != discrete[1]:
        kinds = [
            f"{type(model.likelihood).__name__} ({'probabilities' if own else 'densities'})"
            for model, own in zip(models, discrete, strict=True)
        ]
        raise RunError(
            f"the pixels of {a} are {kinds[0]} and those of {b} {kinds[1]}: a probability and a density do not "
            f"compare; {GROUPING}"
        )
    owners = [_ownership(model) for model in models]
    if owners[0] != owners[1]:
        raise RunError(
            f"{a} and {b} declare different joint densities ({owners[0]} and {owners[1]}), which are not normalised "
            f"over x, so that their nats do not compare: {GROUPING}"
        )
    priors = [_prior(model) for model in models]
    proper = [model.has_proper_prior for model in models]
    if measures == "marginal" and not all(proper):
        raise RunError(
            f"{(a, b)[proper.index(False)]} has no log p(x): its prior on θ is {priors[proper.index(False)]}, which "
            f'has no mass to integrate; {GROUPING}, and measures="all" the plug-in log-likelihoods of flat priors'
        )
    if priors[0] == priors[1] or (measures == "marginal" and not models[0].owned):
        return
    if not all(proper):
        reason = "under a flat prior there is no p(x), only log p(x | θ) at the θ found, and no nats compare with that"
        offer = GROUPING
    elif models[0].owned:
        reason = "with ownership neither joint density is normalised over x, so that their nats do not compare"
        offer = GROUPING
    else:
        reason, offer = "their ELBOs and gaps are of different joint densities", f"{MARGINAL}; {GROUPING}"
    raise RunError(f"the prior on θ of {a} is {priors[0]} and that of {b} {priors[1]}: {reason}; {offer}")


def _same_images(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two runs had the same training images, for all that their settings say."""
    if "fingerprint" in a and "fingerprint" in b:
        return bool(a["fingerprint"] == b["fingerprint"])
    names = {Path(data["source"]).name for data in (a, b)} - {"memory"}
    return a["training"] == b["training"] and len(names) < 2


def _trained_on(data: Mapping[str, Any]) -> str:
    fingerprint = f", fingerprint {data['fingerprint'][:8]}" if "fingerprint" in data else ""
    return f"{data['training']} of {Path(data['source']).name}{fingerprint}"


def _discrete(model: SpatialMixture) -> bool:
    """Whether p(x) is a probability rather than a density."""
    theta = model.mixing_logits.new_zeros(1, model.num_components, model.latent_features)
    with torch.no_grad():
        return bool(model.likelihood.distribution(model.decode(theta)).support.is_discrete)


def _ownership(model: SpatialMixture) -> str:
    if not model.owned or model.pixel_prior is None:
        return "no ownership"
    mean = ", ".join(f"{value:g}" for value in model.pixel_prior.tolist())
    return f"ownership {model.ownership:g} with pixel prior {mean}"


def _prior(model: SpatialMixture) -> str:
    """What kind of prior there is on θ, of however many features."""
    if isinstance(model.prior, str):
        return model.prior
    arguments = {name: value for name, value in describe(model.prior).items() if name not in ("type", "features")}
    return f"{type(model.prior).__name__}({', '.join(f'{name}={value}' for name, value in arguments.items())})"
