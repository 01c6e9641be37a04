"""One training step of a (model, strategy) pair, as Lightning wants it."""

import math
from collections import deque
from typing import Any

import lightning
import torch
from torch import Tensor

from pnem.data import Batch
from pnem.diagnostics import terms_at
from pnem.diagnostics.symptoms import Symptoms, symptoms
from pnem.errors import RunError
from pnem.inference import Objective, Strategy
from pnem.inference.collectives import gathered
from pnem.loading import check_images
from pnem.metrics import adjusted_rand_index, mean_and_standard_error
from pnem.models import SpatialMixture
from pnem.run_directory import TERMS
from pnem.settings import TrainingSettings
from pnem.unrolling import Unroll

__all__ = ["TrainingModule"]

# Between these steps no metric is read, for which a GPU would have to wait.
CHECK_EVERY = 50
# Seeds of the processes that train together are far from one another, also in the 32 bits that a CPU's generator takes.
APART = 0x9E3779B9
# Validation images of every epoch that are looked at for collapse.
WATCHED = 500


class TrainingModule(lightning.LightningModule):
    """Trains by Adam on an objective over the unrolled strategy.

    Args:
        model, strategy, objective: what is trained, and on what.
        training: the settings.
        steps: the length of a cosine schedule.
        compile_on: the device to compile the unroll for; None to leave it as it is.
    """

    # Of the loss and the ELBO, over an epoch's steps.
    _train_sums: Tensor

    def __init__(
        self,
        model: SpatialMixture,
        strategy: Strategy,
        objective: Objective,
        training: TrainingSettings,
        steps: int,
        *,
        compile_on: torch.device | None = None,
    ):
        super().__init__()
        self.model = model
        self.strategy = strategy
        self.objective = objective
        self.training_settings = training
        self.steps = steps
        self.unroll = Unroll(strategy, objective, training, compile_on=compile_on)
        self._reset()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning empties gradients after the step's loss is there, when truncated windows have left theirs."""
        if self.training_settings.truncation is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Starts every epoch with its own stream of random numbers, so that a resumed run repeats none and skips none.

        (At the first batch, because making the loaders' iterators draws from the stream as well.)
        """
        if batch_idx == 0:
            self._seed(self.training_settings.seed * 1_000_003 + self.current_epoch)
            self._reset()
        if self.training_settings.truncation is not None:
            self.zero_grad()

    def on_validation_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Draws the same initial γ in every validation, so that epochs are compared on equal terms."""
        if batch_idx == 0:
            self._seed(self.training_settings.seed)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Checks the images while they are in the CPU's memory, those on a device having been; raises `DataError`."""
        if batch.x.device.type == "cpu":
            check_images(self.model, batch.x, f"the {'training' if self.trainer.training else 'validation'} split")
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: D102
        x = batch.x.to(self.model.mixing_logits.dtype)
        outcome = self.unroll(x)
        found = torch.stack([outcome.loss.detach(), outcome.elbo.detach()])
        self._recent.append(found)
        self._train_sums = self._train_sums + found.double()
        self._train_steps += 1
        if batch_idx % CHECK_EVERY == 0:
            self._require_finite("training", found[0])
        if self.training_settings.processes > 1:
            # DDP averages the gradients of what takes part here, be they left by an earlier window of frames.
            return outcome.loss + 0 * torch.stack([p.sum() for p in self.parameters() if p.requires_grad]).sum()
        return outcome.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: D102
        x = batch.x.to(self.model.mixing_logits.dtype)
        state, x_in = self.strategy.start(x)
        pairs = self.strategy.frames(x_in, x)
        groups = None if batch.groups is None else self.strategy.targets(batch.groups, len(pairs))
        # Frames of sequences are as many images; of images the last iteration is what counts.
        counted = range(len(pairs)) if self.strategy.is_sequential else range(len(pairs) - 1, len(pairs))
        images, loss, found, ari = x.shape[-3], x.new_zeros(()), [], []
        for t, (weight, (seen, target)) in enumerate(zip(self.objective.step_weights(len(pairs)), pairs, strict=True)):
            state = self.strategy.step(state, seen, target)
            if weight > 0:
                loss = loss + weight * self.objective.loss_at(self.strategy, state, target).mean()
            if t not in counted:
                continue
            terms = terms_at(self.strategy, state)
            values = [self.strategy.elbo(state).sum(), *(getattr(terms, name).sum() for name in TERMS)]
            found.append(torch.stack([value.double() for value in values]))
            if self._valid_images * self.training_settings.processes < WATCHED:
                self._symptoms.append(symptoms(self.model, state, target))
            if groups is not None:
                ari.append(adjusted_rand_index(groups[t], state.gamma.argmax(-2)))
        self._valid.append(torch.cat([(loss * images).double().unsqueeze(0), torch.stack(found).mean(0)]))
        self._valid_images += images
        if ari:
            # The γ of a sequence's first step follow from no grouping yet.
            self._ari.append(torch.stack(ari[1:]).nanmean(0) if len(ari) > 1 else ari[0])

    def on_validation_epoch_end(self) -> None:
        """Logs the epoch's metrics once, for a log in every step costs as much as a small step."""
        if self.training_settings.processes > 1:
            self._gather()
        train_loss, train_elbo = self._train_sums / self._train_steps
        valid_loss, valid_elbo, *terms = torch.stack(self._valid).sum(0) / self._valid_images
        self._require_finite("training", train_loss)
        self._require_finite("validation", valid_loss)
        metrics = {
            "train_loss": train_loss,
            "train_elbo": train_elbo,
            "valid_loss": valid_loss,
            "valid_elbo": valid_elbo,
        }
        metrics |= {f"valid_{name}": value for name, value in zip(TERMS, terms, strict=True)}
        if self._ari:
            metrics["valid_ari"] = torch.tensor(mean_and_standard_error(torch.cat(self._ari)).mean)
        self.log_dict(metrics)

    def symptoms(self) -> Symptoms:
        """What this epoch's validation showed of collapse."""
        return Symptoms.concatenate(self._symptoms)

    def mean_train_loss(self) -> float | None:
        """Over the last steps of this epoch, in nats per image; None before the first."""
        return torch.stack(list(self._recent))[:, 0].mean().item() if self._recent else None

    def configure_optimizers(self) -> Any:  # noqa: D102
        settings = self.training_settings
        optimizer = torch.optim.Adam(self.parameters(), lr=settings.learning_rate, fused=True)

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / (settings.warmup_steps + 1))
            if settings.schedule == "constant":
                return warm
            return warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, *_: object, **__: object) -> None:
        """Clips by the norm: Lightning refuses to where the optimiser is fused and some of a step is in bfloat16."""
        if self.training_settings.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.training_settings.gradient_clip)

    def _reset(self) -> None:
        # Sums and the last few, for an epoch's steps may be many.
        self._train_sums = torch.zeros(())
        self._train_steps = 0
        self._recent: deque[Tensor] = deque(maxlen=CHECK_EVERY)
        self._valid: list[Tensor] = []
        self._symptoms: list[Symptoms] = []
        self._ari: list[Tensor] = []
        self._valid_images = 0

    def _gather(self) -> None:
        """What all processes have seen in this epoch in place of what this one has."""
        for name in ("_valid", "_symptoms", "_ari"):
            parts = gathered(getattr(self, name), self.device)
            setattr(self, name, [value for part in parts for value in part])
        for name in ("_train_sums", "_train_steps", "_valid_images"):
            setattr(self, name, sum(gathered(getattr(self, name), self.device)))

    def _seed(self, seed: int) -> None:
        torch.manual_seed(seed + self.trainer.global_rank * APART)

    def _require_finite(self, split: str, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise RunError(
                f"the {split} loss is {loss.item()} in epoch {self.current_epoch + 1}: try a smaller learning_rate, "
                "a gradient_clip, or float32 in place of bfloat16; what the epochs before it learned is kept"
            )
