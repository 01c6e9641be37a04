"""What goes wrong in practice: components or latent dimensions that do nothing, and decoders that are stuck."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pnem.data import ImageDataset
from pnem.diagnostics.checks import check_run
from pnem.diagnostics.findings import Finding
from pnem.diagnostics.parting import parting
from pnem.diagnostics.symptoms import Symptoms, symptoms
from pnem.errors import DataError
from pnem.inference import Strategy
from pnem.loading import open_split
from pnem.models import Bernoulli, Normal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pnem.run import Run

__all__ = ["MINIMUM", "CollapseWarning", "collapse", "judge"]

# Images below which a share of them, or a variance over them (to a quarter of itself), says nothing.
MINIMUM = 30
# Of an image's divided pixels: what a component in use has at least.
USED = 0.01
# A component that has more of them explains the image alone.
ALL = 0.99
# Of the images: what happens in fewer is bad luck with the initial γ, which restarts mend.
MOST = 0.5
# Burda et al. (2016): the variances of active and of inactive units are orders of magnitude apart from this.
ACTIVE = 0.01
# Of the latent dimensions: every variational autoencoder leaves a few unused, which costs nothing.
INACTIVE = 0.5
# Of the pixels: at ten nats each, 0.05 nats per pixel; decoders that are not stuck stay orders of magnitude below.
STUCK = 0.005


class CollapseWarning(UserWarning):
    """A training collapses; the message is a `Finding`."""


def collapse(
    run: "Run",
    data: "str | Path | ImageDataset | Mapping[str, ImageDataset] | None" = None,
    *,
    split: str = "validation",
    limit: int = 500,
    batch_size: int = 100,
    seed: int = 0,
) -> list[Finding]:
    """What is wrong with a fitted run; an empty list if nothing is.

    Components are exchangeable, so that they are counted per image: a spare one in an image is normal. Looked for:

    - *dead components*: an index with less than 1 % of every image, or fewer than half of the components in use in an
      image on average (1 % of it or more). What counts is `pnem.diagnostics.symptoms.shares`.
    - *duplicated components*: in most images two components explain the same pixels alike.
    - *posterior collapse*: at least half of the latent dimensions are inactive: the mean of q(θ) varies over images by
      less than 0.01 of the prior's variance (Burda et al. 2016, "Importance weighted autoencoders", whose prior has
      variance 1), for each component, and averaged over them, so that a component of its own for each index does not
      count as activity. Not for a Delta; and the means of a sampler have the error of its draws, which takes some
      hundreds to be below.
    - *one component explains everything*: it has over 99 % of the image, in most images.
    - *saturated decoder*: over 0.5 % of the pixels are predicted wrongly with such confidence that each costs over 10
      nats (and one more for each further channel): for Bernoulli pixels a logit beyond ±10, for Normal ones a mean
      4.5 σ away. Confident right predictions, or a small σ that is right, are no finding.
    - *loss and grouping part ways*: in the run's history the validation ARI fell while the validation loss fell.

    Args:
        run: the fitted run.
        data: the data set; the one that the run was trained on when None.
        split: which of its splits.
        limit: look at only that many images.
        batch_size: images at once.
        seed: of the initial γ.

    Raises:
        RunError: no run.
        DataError: the run's own data are gone or were in memory, fewer than 30 images, or as `Run.infer_batches`.
    """
    check_run(run)
    dataset = open_split(_own_data(run) if data is None else data, split, run.strategy).limited(limit)
    if len(dataset) < MINIMUM:
        raise DataError(
            f"collapse needs at least {MINIMUM} images to say anything, but was given {len(dataset)}: "
            "raise limit, or give a larger split"
        )
    batches = run.infer_batches(dataset, split=split, batch_size=batch_size, seed=seed)
    seen = [symptoms(run.model, posterior, batch.x.to(posterior.gamma)) for batch, posterior in batches]
    return judge(Symptoms.concatenate(seen), run.strategy) + parting(run.history, run.strategy)


def _own_data(run: "Run") -> str:
    source = str(run.settings.data.get("source", "memory"))
    if source == "memory":
        raise DataError("the run was trained on data in memory, which it does not keep: give collapse(run, data)")
    if not Path(source).exists():
        raise DataError(f"the run was trained on {source}, which is not there: give its data, collapse(run, data)")
    return source


def judge(seen: Symptoms, strategy: Strategy, *, inactive: float = INACTIVE) -> list[Finding]:
    """The findings in what was seen of images, all but those in the history; none where fewer than 30 can be judged.

    A posterior has collapsed where at least the share `inactive` of the latent dimensions is.
    """
    alone = _one_for_all(seen, strategy)
    return [
        *([] if alone else _dead(seen, strategy)),
        *_duplicated(seen, strategy),
        *_inactive(seen, strategy, inactive),
        *alone,
        *_saturated(seen, strategy),
    ]


def _dead(seen: Symptoms, strategy: Strategy) -> list[Finding]:
    shares = seen.shares[~seen.shares.isnan().any(-1)]
    K = strategy.model.num_components
    if len(shares) < MINIMUM:
        return []
    dead = (shares.amax(0) < USED).nonzero().flatten().tolist()
    used = float((shares >= USED).sum(-1).double().mean())
    if not dead and used >= K / 2:
        return []
    if dead:
        what = f"of components 0 to {K - 1}, {dead} have less than {USED:.0%} of each of {len(shares)} images"
        ideas = [
            f"num_components={K - len(dead)}",
            "a strategy whose components start from random γ (RNNEM, IterativeVI)",
        ]
    else:
        what = f"{used:.1f} of {K} components are in use in an image, on average over {len(shares)}"
        ideas = [f"num_components={max(round(used) + 1, 2)}, if the images have no more objects"]
    if strategy.model.mixing_kind == "learned":
        ideas.append('mixing="uniform"')
    return [Finding("dead components", what, float(len(dead) or K - used), f"try {', or '.join(ideas)}")]


def _duplicated(seen: Symptoms, strategy: Strategy) -> list[Finding]:
    share = float(seen.duplicated.double().mean())
    if len(seen) < MINIMUM or share <= MOST:
        return []
    model = strategy.model
    ownership = (
        f"ownership above {model.ownership:g}, so that drawing a pixel twice costs more"
        if model.owned
        else "ownership, SpatialMixture(..., pixel_prior=...), so that drawing a pixel twice costs"
    )
    what = f"in {share:.0%} of {len(seen)} images two components explain the same pixels alike"
    advice = f"try {ownership}; fewer than {model.num_components} components; or a longer training"
    return [Finding("duplicated components", what, share, advice)]


def _one_for_all(seen: Symptoms, strategy: Strategy) -> list[Finding]:
    shares = seen.shares[~seen.shares.isnan().any(-1)]
    model = strategy.model
    if model.num_components == 1 or len(shares) < MINIMUM:
        return []
    share = float((shares.amax(-1) > ALL).double().mean())
    if share <= MOST:
        return []
    ideas = [] if model.owned else ["ownership, SpatialMixture(..., pixel_prior=...), which makes components divide"]
    ideas.append(f"components that cannot draw a whole image: fewer than {model.latent_features} latent_features")
    if not model.has_proper_prior:
        ideas.append('or prior="standard_normal" with IterativeVI')
    if model.mixing_kind == "learned":
        ideas.append('mixing="uniform"')
    if strategy.noise is None:
        ideas.append("input noise")
    what = f"in {share:.0%} of {len(shares)} images one component has over {ALL:.0%} of the pixels that are divided"
    return [Finding("one component explains everything", what, share, f"try {'; '.join(ideas)}")]


def _inactive(seen: Symptoms, strategy: Strategy, share: float) -> list[Finding]:
    if seen.location is None or len(seen) < MINIMUM:
        return []
    model = strategy.model
    # A prior that is learned has a scale of its own.
    prior = model.prior_distribution().variance.detach().double() if model.has_proper_prior else 1.0
    inactive = seen.location.double().var(0).mean(0) / prior < ACTIVE
    count, M = int(inactive.sum()), len(inactive)
    if count < share * M:
        return []
    what = (
        f"{count} of {M} latent dimensions say nothing of the image: over {len(seen)} images the mean of q(θ) has a "
        f"variance below {ACTIVE} of the prior's"
    )
    if seen.divergence is not None:
        largest = float(seen.divergence.double().mean((0, 1))[inactive].max())
        what += f", and their KL is at most {largest:.2g} nats each"
    if count < M:
        advice = f"latent_features={M - count} may do as well; what the others cost is their KL and time"
    else:
        ideas = [
            "a smaller learning_rate with warmup_steps",
            "a smaller decoder",
            "IterativeVI, which fits q to each image",
        ]
        if isinstance(model.likelihood, Normal):
            ideas.insert(0, "a smaller sigma, which makes the pixels count more against the prior")
        if strategy.noise is not None:
            ideas.append("less input noise")
        advice = f"try {', '.join(ideas)}"
    return [Finding("posterior collapse", what, float(count), advice)]


def _saturated(seen: Symptoms, strategy: Strategy) -> list[Finding]:
    share = float(seen.wrong.mean())
    if len(seen) < MINIMUM or not share > STUCK:
        return []
    likelihood = strategy.model.likelihood
    if isinstance(likelihood, Normal):
        learned = likelihood.log_sigma.requires_grad
        sigma = ", ".join(f"{value:.2g}" for value in torch.atleast_1d(likelihood.sigma.detach()).tolist())
        detail = f"means over 4.5 σ away, with σ = {sigma}"
        advice = (
            "fix sigma at what the residuals show"
            if learned
            else "raise sigma to what the residuals show, or give learn_sigma=True"
        )
    else:
        detail = "logits beyond ±10 on the wrong side" if isinstance(likelihood, Bernoulli) else "over 10 nats each"
        advice = "lower learning_rate, give gradient_clip, or use a smaller decoder or one with layer_norm=True"
        if strategy.noise is None:
            advice += ", or input noise"
    what = f"{share:.1%} of the pixels of {len(seen)} images are predicted confidently and wrongly ({detail})"
    return [Finding("saturated decoder", what, share, f"train anew: {advice}")]
