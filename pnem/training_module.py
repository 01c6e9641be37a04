"""One training step of a (model, strategy) pair, as Lightning wants it."""

import math
import warnings
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from pnem.data import Batch
from pnem.diagnostics import terms_at
from pnem.diagnostics.symptoms import Symptoms, symptoms
from pnem.errors import RunError
from pnem.inference import Objective, State, Strategy
from pnem.loading import check_images
from pnem.metrics import adjusted_rand_index, mean_and_standard_error
from pnem.models import SpatialMixture
from pnem.run_directory import TERMS
from pnem.settings import TrainingSettings

__all__ = ["TrainingModule"]

# Between these steps no metric is read, for which a GPU would have to wait.
CHECK_EVERY = 50
# Validation images of every epoch that are looked at for collapse.
WATCHED = 500


class Outcome(NamedTuple):
    """The loss, the mean ELBO after the last iteration, both in nats per image, and γ (B, K, D).

    Of sequences the ELBO is the mean over frames.
    """

    loss: Tensor
    elbo: Tensor
    gamma: Tensor


class TrainingModule(lightning.LightningModule):
    """Trains by Adam on an objective over the unrolled strategy; `steps` is the length of the cosine schedule."""

    def __init__(
        self,
        model: SpatialMixture,
        strategy: Strategy,
        objective: Objective,
        training: TrainingSettings,
        steps: int,
    ):
        super().__init__()
        self.model = model
        self.strategy = strategy
        self.objective = objective
        self.training_settings = training
        self.steps = steps
        self.iterate = self.iteration
        if training.compile:
            # A function may be compiled only so many times in a process, counted over all trainings.
            torch.compiler.reset()
            self.iterate = torch.compile(self.iteration, fullgraph=True)
        self._reset()

    def outcome(self, x: Tensor) -> Outcome:
        """The losses of one unroll on images `x` (B, D, C) or sequences (T, B, D, C)."""
        return self._unrolled(x)[0]

    def _unrolled(self, x: Tensor) -> tuple[Outcome, list[State]]:
        """`outcome`, and all states."""
        states = self.strategy.unroll(x)
        loss, elbo = self.objective(self.strategy, states, x)
        return Outcome(loss, elbo.mean(), states[-1].gamma), states

    def iteration(self, state: State, x_in: Tensor, x: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, its mean loss and its mean ELBO: a pure function of tensors, the unit that is compiled."""
        state = self.strategy.step(state, x_in, x)
        loss = self.objective.loss_at(self.strategy, state, x).mean()
        return state, loss, self.strategy.elbo(state).mean().detach()

    def stepwise_outcome(self, x: Tensor) -> Outcome:
        """`outcome` iteration by iteration: compiled, one small graph, run T times; or truncated in time.

        Truncated, it goes back through all windows of frames but the last, and the loss carries no gradient of theirs.
        """
        state, x_in = self.strategy.start(x)
        truncation = self.training_settings.truncation
        pairs = self.strategy.frames(x_in, x)
        weights = self.objective.step_weights(len(pairs))
        window, total = x.new_zeros(()), x.new_zeros(())
        elbos: list[Tensor] = []
        with warnings.catch_warnings():
            # The compiler looks at the gradients of its inputs, which within an unroll have none to keep.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            for t, (weight, (seen, target)) in enumerate(zip(weights, pairs, strict=True)):
                # What is left may have no weight, and then no gradient for the caller to go back through.
                if truncation is not None and t and t % truncation == 0 and any(weights[t:]):
                    state = state.map(Tensor.detach)
                    if window.requires_grad:
                        window.backward()
                    window, total = x.new_zeros(()), total + window.detach()
                state, loss, elbo = self.iterate(state, seen, target)
                elbos.append(elbo)
                if weight > 0:
                    window = window + weight * loss
        elbo = torch.stack(elbos).mean() if self.strategy.is_sequential else elbos[-1]
        return Outcome(total + window, elbo, state.gamma)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning empties gradients after the step's loss is there, when truncated windows have left theirs."""
        if self.training_settings.truncation is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Starts every epoch with its own stream of random numbers, so that a resumed run repeats none and skips none.

        (At the first batch, because making the loaders' iterators draws from the stream as well.)
        """
        if batch_idx == 0:
            torch.manual_seed(self.training_settings.seed * 1_000_003 + self.current_epoch)
            self._reset()
        if self.training_settings.truncation is not None:
            self.zero_grad()

    def on_validation_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draws the same initial γ in every validation, so that epochs are compared on equal terms."""
        if batch_idx == 0:
            torch.manual_seed(self.training_settings.seed)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Checks the images while they are in the CPU's memory, those on a device having been; raises `DataError`."""
        if batch.x.device.type == "cpu":
            check_images(self.model, batch.x, f"the {'training' if self.trainer.training else 'validation'} split")
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: D102
        x = batch.x.to(self.model.mixing_logits.dtype)
        training = self.training_settings
        stepwise = training.compile or training.truncation is not None
        outcome = self.stepwise_outcome(x) if stepwise else self.outcome(x)
        self._train.append(torch.stack([outcome.loss.detach(), outcome.elbo.detach()]))
        if batch_idx % CHECK_EVERY == 0:
            self._require_finite("training", self._train[-1][0])
        return outcome.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: D102
        x = batch.x.to(self.model.mixing_logits.dtype)
        outcome, states = self._unrolled(x)
        images = x.shape[-3]
        self._valid.append(torch.stack([outcome.loss, outcome.elbo]) * images)
        # Frames of sequences are as many images.
        shown = states if self.strategy.is_sequential else states[-1:]
        # (A state of its own, for combining leaves out a q(θ) that is no normal.)
        state = State.combine(torch.cat, shown) if len(shown) > 1 else shown[0]
        terms = terms_at(self.strategy, state)
        self._terms.append(torch.stack([getattr(terms, name).sum() / len(shown) for name in TERMS]))
        if self._valid_images < WATCHED:
            self._symptoms.append(symptoms(self.model, state, torch.cat(list(self.strategy.targets(x, len(shown))))))
        self._valid_images += images
        if batch.groups is not None:
            groups = torch.stack(list(self.strategy.targets(batch.groups, len(shown))))
            ari = adjusted_rand_index(groups, torch.stack([s.gamma.argmax(-2) for s in shown]))
            # The γ of a sequence's first step follow from no grouping yet.
            self._ari.append(ari[1:].nanmean(0) if len(ari) > 1 else ari[0])

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's metrics once, for a log in every step costs as much as a small step."""
        train_loss, train_elbo = torch.stack(self._train).double().mean(0)
        valid_loss, valid_elbo = torch.stack(self._valid).double().sum(0) / self._valid_images
        self._require_finite("training", train_loss)
        self._require_finite("validation", valid_loss)
        metrics = {
            "train_loss": train_loss,
            "train_elbo": train_elbo,
            "valid_loss": valid_loss,
            "valid_elbo": valid_elbo,
        }
        terms = torch.stack(self._terms).sum(0) / self._valid_images
        metrics |= {f"valid_{name}": value for name, value in zip(TERMS, terms, strict=True)}
        if self._ari:
            metrics["valid_ari"] = torch.tensor(mean_and_standard_error(torch.cat(self._ari)).mean)
        self.log_dict(metrics)

    def symptoms(self) -> Symptoms:
        """What this epoch's validation showed of collapse."""
        return Symptoms.concatenate(self._symptoms)

    def mean_train_loss(self) -> float | None:
        """Over the last steps of this epoch, in nats per image; None before the first."""
        return torch.stack(self._train[-CHECK_EVERY:])[:, 0].mean().item() if self._train else None

    def configure_optimizers(self) -> Any:  # noqa: D102
        settings = self.training_settings
        optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
            if settings.schedule == "constant":
                return warm
            return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _reset(self) -> None:
        self._train: list[Tensor] = []
        self._valid: list[Tensor] = []
        self._terms: list[Tensor] = []
        self._symptoms: list[Symptoms] = []
        self._ari: list[Tensor] = []
        self._valid_images = 0

    def _require_finite(self, split: str, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise RunError(
                f"the {split} loss is {loss.item()} in epoch {self.current_epoch + 1}: try a smaller learning_rate, "
                "a gradient_clip, or float32 in place of bfloat16; what the epochs before it learned is kept"
            )
