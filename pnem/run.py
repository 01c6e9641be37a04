"""A fitted (model, strategy) pair: use it, score it, save it, load it."""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro.distributions as dist
import torch
from rich import get_console
from rich.progress import track
from torch import Tensor

from pnem.alternatives import find_alternative
from pnem.data import Batch, ImageDataset
from pnem.data.arrays import check_whole
from pnem.devices import forked_rng, resolve_device
from pnem.errors import DataError, RunError, StrategyError
from pnem.files import write_atomically
from pnem.inference import FilteringStrategy, Posterior, State, Strategy, importance_weighted_bound
from pnem.inference.rollouts import check_memory
from pnem.loading import batches, check_images, open_split
from pnem.models import Bernoulli, SpatialMixture
from pnem.models.config import build, describe
from pnem.run_directory import RunFiles, load_weights, read_history, reserve, save_weights, weights_of
from pnem.scores import Scores, score
from pnem.sequence_scores import SequenceScores, score_sequences
from pnem.settings import Settings

__all__ = ["Run", "load"]


@dataclass
class Run:
    """A fitted (model, strategy) pair.

    Attributes:
        model: as it was at the best validation loss.
        strategy: the same.
        history: one row per epoch: ``epoch, train_loss, train_elbo, valid_loss, valid_elbo, valid_ari``, the terms of
            the validation ELBO (`pnem.diagnostics.Terms`) ``valid_expected_log_joint, valid_assignment_entropy,
            valid_log_prior, valid_theta_entropy, valid_reconstruction, valid_divergence``, and ``seconds``.
        settings: how it was built and trained.
        directory: where it is stored; None if it is not.
    """

    model: SpatialMixture
    strategy: Strategy
    history: pd.DataFrame
    settings: Settings
    directory: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.mixing_logits.device

    def to(self, device: str) -> "Run":
        """Moves model and strategy.

        Raises:
            DeviceError: there is no such device.
        """
        target = resolve_device(device)
        self.model.to(target)
        self.strategy.to(target)
        return self

    def using(self, strategy: Strategy | str) -> "Run":
        """This run with another strategy for its model, in memory: the same numbers, inferred in another way.

        Args:
            strategy: one built on this run's model; or by name one that needs no training: ``"semi-amortised"``, which
                refines this run's own, ``"gradient-em"``, ``"auto-delta"``, ``"auto-normal"``,
                ``"auto-multivariate-normal"``, ``"auto-laplace"``, ``"auto-iaf-normal"`` or ``"nuts"``.

        Raises:
            StrategyError: an unknown name, or a strategy that cannot serve this model.
            RunError: a strategy of another model.
            ModelError: it has a part that cannot be described, such as a guide of one's own.
        """
        if isinstance(strategy, str):
            strategy = find_alternative(strategy, self.strategy)
        if strategy.model is not self.model:
            raise RunError("the strategy was built on another model than the run's: build it on run.model")
        settings = replace(self.settings, strategy=describe(strategy))
        strategy = strategy.to(self.device, self.model.mixing_logits.dtype).eval()
        return replace(self, strategy=strategy, settings=settings, directory=None)

    def infer(
        self,
        x: Tensor | np.ndarray,
        *,
        restarts: int = 1,
        iterations: int | None = None,
        keep_trace: bool | None = None,
        state: State | None = None,
    ) -> Posterior:
        """The posterior for images `x`, (B, D, C) or (B, H, W, C), in one batch; see `Strategy.infer`.

        A trace is kept where the strategy has one, unless `keep_trace` says otherwise. Runs on sequences take
        (T, B, D, C) or (T, B, H, W, C); see `pnem.inference.FilteringStrategy.infer`.

        Args:
            x: the images, or sequences.
            restarts, iterations, keep_trace: as there.
            state: of sequences, where to go on from: ``posterior.state`` of what went before.

        Raises:
            ModelError: the images do not fit the model.
            StrategyError: restarts or iterations < 1, images where sequences are needed or the reverse, or too few
                frames.
        """
        options: dict[str, Any] = {} if keep_trace is None else {"keep_trace": keep_trace}
        if state is not None:
            self._require_filtering("going on from a state")
            options["state"] = state
        return self.strategy.infer(self.images(x), restarts=restarts, iterations=iterations, **options)

    def rollout(self, posterior: Posterior, x: Tensor | np.ndarray, frames: int, **options: Any) -> State:
        """What follows the sequences `x` that `posterior` is of, predictions fed back for so many frames.

        The predicted frames are ``run.model.prediction(rolled.psi)``, (frames, B, D, C).

        Args:
            posterior: ``run.infer(x)``.
            x: the sequences, or their end: the last frame is the one that the posterior's last step was scored on.
            frames: how many to predict.
            **options: ``feedback, memory_limit`` of `pnem.inference.FilteringStrategy.rollout`.

        Raises:
            StrategyError: as `pnem.inference.FilteringStrategy.rollout`; the posterior has no state to go on from; or
                `x` has more frames than the posterior is of.
        """
        strategy = self._require_filtering("a rollout")
        if posterior.state is None:
            raise StrategyError("this posterior has no state to go on from: give what run.infer(x) found in sequences")
        images, seen = self.images(x), len(posterior.theta) + strategy.steps_ahead
        if images.dim() == 3:
            raise StrategyError(
                f"x has shape {tuple(x.shape)}, but a rollout takes sequences (T, B, D, C): give what run.infer was "
                "given, or its last frame as x[-1:]"
            )
        if len(images) > seen:
            raise StrategyError(
                f"x has {len(images)} frames, but this posterior's steps end at frame {seen}, after which the rollout "
                f"begins: give x[:{seen}], or infer all of x"
            )
        return strategy.rollout(posterior.state, images[-1], frames, **options)

    def _require_filtering(self, what: str) -> FilteringStrategy:
        if not (isinstance(self.strategy, FilteringStrategy) and self.strategy.is_sequential):
            raise StrategyError(
                f"{what} is for strategies on sequences, but this {type(self.strategy).__name__} infers images: use a "
                'run trained on sequences, with task="prediction" say'
            )
        return self.strategy

    def with_components(self, components: int) -> "Run":
        """This run with another number of components K, in memory, with the same weights: they do not depend on K.

        Raises:
            ModelError: K < 1.
            RunError: the model learned mixing weights, of which there is one per component.
        """
        if self.model.mixing_kind != "uniform":
            raise RunError(
                f"this model's mixing weights are {self.model.mixing_kind!r}, one for each of its "
                f"{self.model.num_components} components: only models with uniform ones serve another number"
            )
        described = self.settings.model | {"num_components": components}
        with forked_rng(torch.device("cpu")):
            model = build(described)
            strategy = build(self.settings.strategy, model)
        for new, old in ((model, self.model), (strategy, self.strategy)):
            new.to(self.device, self.model.mixing_logits.dtype).load_state_dict(old.state_dict())
        settings = replace(self.settings, model=described)
        return replace(self, model=model.eval(), strategy=strategy.eval(), settings=settings, directory=None)

    def images(self, x: Tensor | np.ndarray) -> Tensor:
        """Images `x`, (B, D, C) or (B, H, W, C), as the model takes them: (B, D, C), its precision, and where it is.

        Sequences alike, with a leading T.
        """
        images = torch.as_tensor(x)
        axes = 5 if self.strategy.is_sequential else 4
        if images.dim() == axes and tuple(images.shape[-3:]) == self.settings.image_shape:
            images = images.flatten(-3, -2)
        return self._ours(images)

    def _ours(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.model.mixing_logits.dtype)

    def infer_batches(
        self,
        data: str | Path | ImageDataset | Mapping[str, ImageDataset],
        *,
        split: str = "test",
        limit: int | None = None,
        restarts: int = 1,
        iterations: int | None = None,
        batch_size: int = 100,
        seed: int = 0,
        progress: bool = False,
    ) -> Iterator[tuple[Batch, Posterior]]:
        """Batches of a split in order, each with its posterior (without trace), in memory that does not grow with it.

        The initial γ follow from `seed`, and torch's global random state is left as it was.

        Raises:
            DataError: the split is missing or does not fit the model; or limit or batch_size is below 1.
            StrategyError: restarts or iterations < 1.
        """
        check_whole(batch_size, "batch_size")
        dataset = open_split(data, split, self.strategy, steps=iterations if self.strategy.is_sequential else None)
        loader = batches(dataset if limit is None else dataset.limited(limit), batch_size)
        # Elsewhere than on a terminal a bar would leave an empty line.
        hidden = not (progress and get_console().is_terminal)
        for i, batch in enumerate(track(loader, "inferring", disable=hidden, transient=True)):
            check_images(self.model, batch.x, f"split {split!r}")
            with forked_rng(self.device):
                torch.manual_seed(seed * 1_000_003 + i)
                posterior = self.infer(batch.x, restarts=restarts, iterations=iterations, keep_trace=False)
            yield batch, posterior

    def evaluate(
        self,
        data: str | Path | ImageDataset | Mapping[str, ImageDataset],
        *,
        split: str = "test",
        limit: int | None = None,
        restarts: int = 1,
        iterations: int | None = None,
        importance_samples: int | None = None,
        rollout: int = 0,
        batch_size: int = 100,
        seed: int = 0,
        progress: bool = False,
    ) -> Scores | SequenceScores:
        """Scores on a split, for strategies on sequences `SequenceScores`; other arguments are `infer_batches`'.

        Args:
            importance_samples: L draws of θ for each image, by which log p(x) is estimated; None leaves that out. It
                takes a strategy on images whose q(θ) has a density.
            rollout: how many frames at the end of each sequence (with `iterations`, after as many steps) the strategy
                does not see but predicts, from predictions alone: for strategies that predict sequences.

        Raises:
            DataError: importance_samples < 1, rollout < 0, or sequences too short to leave two steps before a rollout.
            StrategyError: importance samples are asked of a strategy on sequences or one whose q(θ) is a Delta; or a
                rollout of one that does not predict frames, or of more frames than the memory for them.

        Otherwise as `infer_batches`.
        """
        if importance_samples is not None:
            check_whole(importance_samples, "importance_samples")
        if check_whole(rollout, "rollout", 0):
            self._require_filtering("a rollout")
        if self.strategy.is_sequential:
            if importance_samples is not None:
                raise StrategyError(
                    "importance samples estimate log p(x) of images, but this run is on sequences: leave "
                    "importance_samples out; log_evidence is that of each frame"
                )
            data = open_split(data, split, self.strategy)
            iterations = self._steps_before(data.num_frames, rollout, iterations)
            if rollout:
                self._check_rollout(min(batch_size, len(data), limit or batch_size), rollout)
        results = self.infer_batches(
            data,
            split=split,
            limit=limit,
            restarts=restarts,
            iterations=iterations,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        bernoulli = isinstance(self.model.likelihood, Bernoulli)
        with forked_rng(self.device):
            # A stream that no batch of `infer_batches` has.
            torch.manual_seed((seed + 1) * 1_000_003 - 1)
            if self.strategy.is_sequential:
                return score_sequences(self._rolled_out(results, rollout), self.model, self.strategy)
            if importance_samples is None:
                return score(results, bernoulli=bernoulli)
            log_marginal = functools.partial(self._log_marginal, samples=importance_samples)
            return score(results, bernoulli=bernoulli, log_marginal=log_marginal, importance_samples=importance_samples)

    def _steps_before(self, frames: int, rollout: int, iterations: int | None) -> int:
        """The steps to take through sequences of so many frames, of which a rollout predicts the last."""
        ahead = self.strategy.steps_ahead
        steps = frames - rollout - ahead if iterations is None else check_whole(iterations, "iterations")
        needed = max(steps, 2) + ahead + rollout
        if needed > frames:
            rolled = f" and a rollout of {rollout} frames" if rollout else ""
            raise DataError(
                f"{max(steps, 2)} steps of {self.strategy.task} (at least 2: the first is not scored){rolled} take "
                f"sequences of {needed} frames, but these have {frames}: give longer ones, or ask for less"
            )
        if steps < 2:
            raise DataError("the first step is not scored: give at least 2 iterations")
        return steps

    def _check_rollout(self, sequences: int, frames: int) -> None:
        """Raises `StrategyError` where rollouts of a batch take too much memory, before anything is inferred."""
        strategy, shape = self._require_filtering("a rollout"), self.settings.image_shape
        x = self.model.mixing_logits.new_zeros(sequences, math.prod(shape[:2]), self.model.num_channels)
        with forked_rng(self.device):
            state = strategy.init(x)
        check_memory(state, frames, remedy="give a smaller batch_size (--batch-size), or fewer frames")

    def _rolled_out(
        self, results: Iterable[tuple[Batch, Posterior]], rollout: int
    ) -> Iterator[tuple[Batch, Posterior, State | None]]:
        for batch, posterior in results:
            seen = batch.x[: len(posterior.log_evidence) + self.strategy.steps_ahead]
            yield batch, posterior, self.rollout(posterior, seen, rollout) if rollout else None

    def _log_marginal(self, batch: Batch, posterior: Posterior, samples: int) -> Tensor:
        if isinstance(posterior.q, dist.Delta):
            raise StrategyError(
                f"importance samples need a q(θ) with a density, but {type(self.strategy).__name__}'s is a Delta: "
                "leave importance_samples out, or give pnem.inference.importance_weighted_bound a width in Python"
            )
        x = self._ours(batch.x)
        return importance_weighted_bound(
            self.model, self.strategy, x, samples=samples, posterior=posterior
        ).log_marginal

    def save(self, directory: str | Path) -> None:
        """Stores the run in a new directory, from which `load` reproduces it exactly; without its checkpoints.

        Raises:
            RunError: the directory exists and is not empty, or the disk is full.
        """
        directory = reserve(directory, self.settings)
        files = RunFiles.of(directory)
        write_atomically(files.history, self.history.to_csv(index=False).encode())
        save_weights(self.model, self.strategy, files.weights)
        self.directory = directory


def load(directory: str | Path, *, device: str = "cpu") -> Run:
    """The run that `fit(..., out=directory)`, ``pnem train`` or `Run.save` wrote.

    Nothing in the directory is executed: settings are JSON, weights are plain tensors.

    Raises:
        RunError: the directory is missing, corrupt, or was written by something else.
        DeviceError: there is no such device.
    """
    directory = Path(directory)
    resolve_device(device)
    settings = Settings.read(directory)
    files = RunFiles.of(directory)
    try:
        with forked_rng(torch.device("cpu")):
            model = build(settings.model)
            strategy = build(settings.strategy, model)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise RunError(f"{directory} cannot be built again: {error}") from error
    if not isinstance(model, SpatialMixture) or not isinstance(strategy, Strategy):
        raise RunError(f"{files.settings} is corrupt: it does not describe a model and a strategy")
    load_weights(model, strategy, weights_of(directory))
    return Run(model.eval(), strategy.eval(), read_history(files.history), settings, directory).to(device)
