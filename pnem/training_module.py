"""One training step of a (model, strategy) pair, as Lightning wants it."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import lightning
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pnem.compilation import compiled
from pnem.data import Batch
from pnem.diagnostics import terms_at
from pnem.diagnostics.symptoms import Symptoms, symptoms
from pnem.errors import RunError
from pnem.inference import Objective, State, Strategy
from pnem.inference.collectives import gathered
from pnem.loading import check_images
from pnem.metrics import adjusted_rand_index, mean_and_standard_error
from pnem.models import SpatialMixture
from pnem.run_directory import TERMS
from pnem.settings import TrainingSettings

__all__ = ["TrainingModule"]

# Between these steps no metric is read, for which a GPU would have to wait.
CHECK_EVERY = 50
# Seeds of the processes that train together are far from one another, also in the 32 bits that a CPU's generator takes.
APART = 0x9E3779B9
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
    """Trains by Adam on an objective over the unrolled strategy.

    Args:
        model, strategy, objective: what is trained, and on what.
        training: the settings.
        steps: the length of a cosine schedule.
        compile_on: the device to compile the iteration for; None to leave it as it is.
    """

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
        self.iterate: Callable[[State, Tensor, Tensor], tuple[State, Tensor, Tensor]] = self.iteration
        if compile_on is not None:
            self.iterate = compiled(self.iteration, required=training.compile is True, device=compile_on)
        self.stepwise = compile_on is not None or training.truncation is not None or training.activation_checkpointing
        self._reset()

    def outcome(self, x: Tensor) -> Outcome:
        """The losses of one unroll on images `x` (B, D, C) or sequences (T, B, D, C)."""
        states = self.strategy.unroll(x)
        loss, elbo = self.objective(self.strategy, states, x)
        return Outcome(loss, elbo.mean(), states[-1].gamma)

    def iteration(self, state: State, x_in: Tensor, x: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, its mean loss and its mean ELBO: a pure function of tensors, the unit that is compiled."""
        state = self.strategy.step(state, x_in, x)
        loss = self.objective.loss_at(self.strategy, state, x).mean()
        return state, loss, self.strategy.elbo(state).mean().detach()

    def stepwise_outcome(self, x: Tensor) -> Outcome:
        """`outcome` iteration by iteration: compiled, one small graph, run T times; truncated in time; checkpointed.

        Truncated, it goes back through all windows of frames but the last, and the loss carries no gradient of theirs.
        """
        if x.is_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        state, x_in = self.strategy.start(x)
        pairs = self.strategy.frames(x_in, x)
        weights = self.objective.step_weights(len(pairs))
        steps = [(weight, *pair) for weight, pair in zip(weights, pairs, strict=True)]
        total, elbos = x.new_zeros(()), []
        window = total
        for start, piece in _pieces(steps, self.training_settings.truncation):
            # What is left may have no weight, and then no gradient for the caller to go back through.
            if start and any(weights[start:]):
                state = state.map(Tensor.detach)
                if window.requires_grad:
                    window.backward()
                window, total = x.new_zeros(()), total + window.detach()
            checkpointing = self.training_settings.activation_checkpointing
            for _, segment in _pieces(piece, math.ceil(math.sqrt(len(piece))) if checkpointing else None):
                run = self._checkpointed if checkpointing else self._iterations
                state, loss, found = run(state, segment)
                window = window + loss
                elbos += found
        elbo = torch.stack(elbos).mean() if self.strategy.is_sequential else elbos[-1]
        return Outcome(total + window, elbo, state.gamma)

    def _iterations(
        self, state: State, steps: Sequence[tuple[float, Tensor, Tensor]]
    ) -> tuple[State, Tensor, list[Tensor]]:
        """The state after some iterations, their weighted loss and their ELBOs."""
        total, elbos = state.theta.new_zeros(()), []
        with warnings.catch_warnings():
            # The compiler looks at the gradients of its inputs, which within an unroll have none to keep.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            for weight, seen, target in steps:
                state, loss, elbo = self.iterate(state, seen, target)
                elbos.append(elbo)
                if weight > 0:
                    total = total + weight * loss
        return state, total, elbos

    def _checkpointed(
        self, state: State, steps: Sequence[tuple[float, Tensor, Tensor]]
    ) -> tuple[State, Tensor, list[Tensor]]:
        """`_iterations`, of which nothing is kept but where they start from."""

        def run(_: Tensor, *values: Tensor | None) -> tuple[Tensor | None, ...]:
            after, loss, found = self._iterations(State(*values), steps)  # type: ignore[arg-type]
            return loss, torch.stack(found), *after[: len(values)]

        # Reentrant, for the other kind does without `torch.func.grad`, by which strategies differentiate. It goes back
        # to parameters only from an input that has a gradient.
        anchor = torch.zeros((), requires_grad=True)
        loss, found, *values = checkpoint(run, anchor, *state[:-1], use_reentrant=True)
        return State(*values), loss, list(found)

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
        outcome = self.stepwise_outcome(x) if self.stepwise else self.outcome(x)
        self._train.append(torch.stack([outcome.loss.detach(), outcome.elbo.detach()]))
        if batch_idx % CHECK_EVERY == 0:
            self._require_finite("training", self._train[-1][0])
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
        train_loss, train_elbo = torch.stack(self._train).double().mean(0)
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
        self._symptoms: list[Symptoms] = []
        self._ari: list[Tensor] = []
        self._valid_images = 0

    def _gather(self) -> None:
        """What all processes have seen in this epoch in place of what this one has."""
        for name in ("_train", "_valid", "_symptoms", "_ari"):
            parts = gathered(getattr(self, name), self.device)
            setattr(self, name, [value for part in parts for value in part])
        self._valid_images = sum(gathered(self._valid_images))

    def _seed(self, seed: int) -> None:
        torch.manual_seed(seed + self.trainer.global_rank * APART)

    def _require_finite(self, split: str, loss: Tensor) -> None:
        if not bool(loss.isfinite()):
            raise RunError(
                f"the {split} loss is {loss.item()} in epoch {self.current_epoch + 1}: try a smaller learning_rate, "
                "a gradient_clip, or float32 in place of bfloat16; what the epochs before it learned is kept"
            )


Step = TypeVar("Step")


def _pieces(steps: Sequence[Step], length: int | None) -> Iterator[tuple[int, Sequence[Step]]]:
    """Runs of so many steps, or all of them; with the index of the first."""
    length = len(steps) if length is None else length
    for start in range(0, len(steps), length):
        yield start, steps[start : start + length]
