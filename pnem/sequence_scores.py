"""How well a run groups, follows and predicts the objects of sequences, in numbers."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, cat

from pnem.data import Batch
from pnem.errors import DataError
from pnem.inference import Posterior, State, Strategy
from pnem.metrics import mean_and_standard_error
from pnem.models import Bernoulli, SpatialMixture
from pnem.sequence_metrics import frame_error, grouping_over_time, identity_switches, over_steps

__all__ = ["SequenceScores", "score_sequences"]

_GROUPING = {"ami", "ari", "switches", "rollout_ari"}
_HORIZONS_IN_A_TABLE = {1, 2, 5, 10, 20, 50, 100, 200, 500}


class SequenceScores(NamedTuple):
    """How well a run groups, follows and predicts the objects of sequences.

    Each step is scored on one frame: for prediction on the next one, for denoising on the clean one. A number is the
    mean over all steps but the first, then over sequences; its standard error (`_se`) is that over sequences. The first
    step has seen a single frame, from which nobody can tell where things move, and so every number leaves it out: all
    are of the same frames. It is in the curves (`_by_step`), which are means over sequences.

    Attributes:
        task: ``"prediction"`` or ``"denoising"``.
        measure: what the errors of predicted frames are: ``"binary cross-entropy"`` in nats per frame for Bernoulli
            pixels, ``"squared error"`` per frame for others; summed over the pixels and channels of a frame.
        ami, ari: over pixels that belong to exactly one object, frame by frame; NaN without true groups.
        switches: how often an object changes the component that holds most of it, per object and sequence; NaN without
            true groups.
        prediction_error: the error of what the components predict of a frame together (`SpatialMixture.prediction`)
            before they have seen it.
        reconstruction_error: the error of Σ_k γ_k μ_k with γ from the frame itself: what is predicted by one who knows
            which component each pixel belongs to.
        log_evidence: log p(x | θ) of a frame at the θ that the frames before it gave (for denoising, the frames up to
            it), the mean of q(θ), in nats per frame. For prediction that is the predictive log-probability of the next
            frame; with ownership, of the declared joint density.
        ami_by_step, ari_by_step, prediction_error_by_step, reconstruction_error_by_step, log_evidence_by_step: for
            every step, the first included; empty where the number is NaN for want of groups.
        rollout_error: the error of the first, second, ... frame predicted without any input; empty without a rollout.
        rollout_ari: ARI by the γ of those frames; empty without a rollout or without groups.
        sequences: how many sequences there were.
    """

    task: str
    measure: str
    ami: float
    ami_se: float
    ari: float
    ari_se: float
    switches: float
    switches_se: float
    prediction_error: float
    prediction_error_se: float
    reconstruction_error: float
    reconstruction_error_se: float
    log_evidence: float
    log_evidence_se: float
    ami_by_step: tuple[float, ...]
    ari_by_step: tuple[float, ...]
    prediction_error_by_step: tuple[float, ...]
    reconstruction_error_by_step: tuple[float, ...]
    log_evidence_by_step: tuple[float, ...]
    rollout_error: tuple[float, ...]
    rollout_error_se: tuple[float, ...]
    rollout_ari: tuple[float, ...]
    rollout_ari_se: tuple[float, ...]
    sequences: int

    def rows(self) -> list[tuple[str, str, str]]:
        """What each score is, its mean and its standard error, as a table shows them: a dash for NaN.

        Of a long rollout the table shows some horizons and the last.
        """
        bernoulli = self.measure == "binary cross-entropy"
        error = "BCE" if bernoulli else "squared error"
        unit = "nats per frame" if bernoulli else "per frame"
        predicted, known = (
            ("of the next frame, predicted", "of the next frame, γ known")
            if self.task == "prediction"
            else ("of the clean frame, without γ", "of the reconstruction")
        )
        evidence = "predictive log p(next frame | θ)" if self.task == "prediction" else "log p(clean frame | θ)"
        rows = [
            ("AMI", _number(self.ami, 4), _number(self.ami_se, 4)),
            ("ARI", _number(self.ari, 4), _number(self.ari_se, 4)),
            ("identity switches per object", _number(self.switches, 4), _number(self.switches_se, 4)),
            (f"{error} {predicted}, {unit}", *_error(self.prediction_error, self.prediction_error_se)),
            (f"{error} {known}, {unit}", *_error(self.reconstruction_error, self.reconstruction_error_se)),
            (f"{evidence}, nats per frame", *_error(self.log_evidence, self.log_evidence_se)),
        ]
        last = len(self.rollout_error)
        for n in range(1, last + 1):
            if n not in _HORIZONS_IN_A_TABLE and n != last:
                continue
            mean, standard_error = self.rollout_error[n - 1], self.rollout_error_se[n - 1]
            rows.append((f"rollout, frame {n}: {error}, {unit}", *_error(mean, standard_error)))
            if self.rollout_ari:
                mean, standard_error = self.rollout_ari[n - 1], self.rollout_ari_se[n - 1]
                rows.append((f"rollout, frame {n}: ARI", _number(mean, 4), _number(standard_error, 4)))
        return rows


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _error(mean: float, standard_error: float) -> tuple[str, str]:
    return _number(mean, 2), _number(standard_error, 2)


def score_sequences(
    results: Iterable[tuple[Batch, Posterior, State | None]], model: SpatialMixture, strategy: Strategy
) -> SequenceScores:
    """The scores of sequences and their posteriors, batch by batch: of a batch only numbers per frame are kept.

    Args:
        results: for each batch the sequences, x (T, B, D, C) with groups (T, B, D) or without; what `Strategy.infer`
            found in all or the first of their frames; and what `FilteringStrategy.rollout` predicted of the frames
            after those, or None.
        model: the model; for Bernoulli pixels the errors are cross-entropies.
        strategy: the strategy, whose task says on which frame each step is scored.

    Raises:
        DataError: there are no sequences, only a single step, which would be the first, or not all the frames that were
            rolled out.
    """
    measured: dict[str, list[Tensor]] = defaultdict(list)
    for batch, posterior, rolled in results:
        for name, found in _measured(batch, posterior, rolled, model, strategy).items():
            measured[name].append(found.double().cpu())
    if not measured:
        raise DataError("there are no sequences to score: give at least one batch")
    values = {name: cat(batches, -1) for name, batches in measured.items()}

    def number(name: str) -> tuple[float, float]:
        if name not in values:
            return math.nan, math.nan
        found = values[name]
        if found.dim() == 2:
            found = over_steps(found) if name in _GROUPING else found[1:].mean(0)
        return _over_sequences(name, found)

    def curve(name: str) -> list[tuple[float, float]]:
        return [_over_sequences(name, found) for found in values.get(name, ())]

    def means(name: str) -> tuple[float, ...]:
        return tuple(mean for mean, _ in curve(name))

    def errors(name: str) -> tuple[float, ...]:
        return tuple(standard_error for _, standard_error in curve(name))

    return SequenceScores(
        strategy.task,
        "binary cross-entropy" if isinstance(model.likelihood, Bernoulli) else "squared error",
        *number("ami"),
        *number("ari"),
        *number("switches"),
        *number("prediction_error"),
        *number("reconstruction_error"),
        *number("log_evidence"),
        means("ami"),
        means("ari"),
        means("prediction_error"),
        means("reconstruction_error"),
        means("log_evidence"),
        means("rollout_error"),
        errors("rollout_error"),
        means("rollout_ari"),
        errors("rollout_ari"),
        values["log_evidence"].shape[-1],
    )


def _measured(
    batch: Batch, posterior: Posterior, rolled: State | None, model: SpatialMixture, strategy: Strategy
) -> dict[str, Tensor]:
    """What is known of each step, or frame of the rollout, and sequence of a batch: (S, B), (n, B); switches (B,)."""
    steps, first = len(posterior.log_evidence), strategy.steps_ahead
    if steps < 2:
        raise DataError(
            f"there is only {steps} step of {strategy.task}, and the first is not scored: give sequences of more "
            "frames, more iterations, or a shorter rollout"
        )
    scored = slice(first, first + steps)

    def error(frames: Tensor, prediction: Tensor) -> Tensor:
        return frame_error(frames.to(prediction.device), prediction, bernoulli=isinstance(model.likelihood, Bernoulli))

    found = {
        "prediction_error": error(batch.x[scored], model.prediction(posterior.psi, posterior.log_mixing)),
        "reconstruction_error": error(batch.x[scored], posterior.reconstruction),
        "log_evidence": posterior.log_evidence,
    }
    if batch.groups is not None:
        groups, labels = batch.groups[scored], posterior.labels.cpu()
        found |= grouping_over_time(groups, labels)._asdict()
        found["switches"] = identity_switches(groups, labels).per_object
    if rolled is not None:
        beyond = slice(first + steps, first + steps + len(rolled.gamma))
        if beyond.stop > len(batch.x):
            raise DataError(
                f"{len(rolled.gamma)} frames were rolled out after {beyond.start}, but the sequences have "
                f"{len(batch.x)}: give all that were predicted"
            )
        found["rollout_error"] = error(batch.x[beyond], model.prediction(rolled.psi, rolled.log_mixing))
        if batch.groups is not None:
            labels = rolled.gamma.argmax(-2).cpu()
            found["rollout_ari"] = grouping_over_time(batch.groups[beyond], labels).ari
    return found


def _over_sequences(name: str, values: Tensor) -> tuple[float, float]:
    """Mean and standard error over sequences (N,); NaN is left out only where it means that there is no object."""
    if name not in _GROUPING and values.isnan().any():
        return math.nan, math.nan
    return mean_and_standard_error(values)[:2]
