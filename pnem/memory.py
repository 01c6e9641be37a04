"""How much memory a training step will take, before it is started."""

import math
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pnem.data import ImageDataset
from pnem.errors import RunError
from pnem.inference import Objective, State, Strategy
from pnem.settings import TrainingSettings

__all__ = ["MemoryEstimate", "check_memory", "estimate_memory"]

# Images that what an iteration keeps is measured on; the difference between the two is what one image takes.
FEW, MORE = 2, 4
# More numbers than any of the networks here keeps for a pixel, component and iteration: a step that would fit even so
# needs no estimate, which takes a moment.
GENEROUS = 1_000


class MemoryEstimate(NamedTuple):
    """What a training step takes, in bytes.

    Attributes:
        parameters: weights, their gradients and Adam's two moments.
        activations: what the unroll keeps for the way back, at its largest.
    """

    parameters: int
    activations: int

    @property
    def total(self) -> int:
        """Of both."""
        return self.parameters + self.activations


def estimate_memory(strategy: Strategy, objective: Objective, x: Tensor, training: TrainingSettings) -> MemoryEstimate:
    """What a training step will take, from what an iteration keeps on a few images.

    An iteration keeps a + b·B bytes of B images, T iterations T times that; with `truncation` as many as a window has;
    with activation checkpointing the states between segments of ⌈√T⌉, and what one segment keeps. Compiled, a step
    takes less.

    Args:
        strategy: the strategy, with its model.
        objective: what is minimised.
        x: at least four images (B, D, C) or sequences (T, B, D, C) of the kind that the training is on.
        training: its settings.

    >>> from pnem.inference import ELBO, RNNEM
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (8, 8, 1)), Bernoulli(), 3)
    >>> x, settings = torch.zeros(4, 64, 1), TrainingSettings(batch_size=100)
    >>> short, long = (estimate_memory(RNNEM(model, iterations=T), ELBO(), x, settings) for T in (10, 20))
    >>> long.activations == 2 * short.activations
    True
    """
    parts = strategy.model, strategy
    numbers = [p for part in parts for p in part.parameters() if p.requires_grad]
    parameters = 4 * sum(p.numel() * p.element_size() for p in numbers)
    (few, state), (more, _) = (_held(strategy, objective, x[..., :n, :, :], training) for n in (FEW, MORE))
    each = (more - few) / (MORE - FEW)
    iteration = few - FEW * each + each * training.batch_size
    steps = min(strategy.iterations, training.truncation or strategy.iterations)
    if not training.activation_checkpointing:
        return MemoryEstimate(parameters, round(steps * iteration))
    length = math.ceil(math.sqrt(steps))
    between = sum(v.numel() * v.element_size() for v in state if isinstance(v, Tensor)) / FEW * training.batch_size
    return MemoryEstimate(parameters, round(math.ceil(steps / length) * between + length * iteration))


def _held(strategy: Strategy, objective: Objective, x: Tensor, training: TrainingSettings) -> tuple[int, State]:
    """Bytes that an iteration in the middle of an unroll keeps for the way back, and the state after it."""
    enabled = training.precision == "bfloat16"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False):
        state, x_in = strategy.start(x)
        (seen, target), *_ = strategy.frames(x_in, x)
        state = strategy.step(state, seen, target)
        with _Allocations() as allocations:
            after = strategy.step(state, seen, target)
            loss = objective.loss_at(strategy, after, target).mean()
    held = allocations.held()
    # What is kept for their gradients lives as long as they do.
    del loss, after
    return held, state


class _Allocations(TorchDispatchMode):
    """Notes the memory that operations allocate, and knows how much of it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in inputs:
                storage = value.untyped_storage()
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def held(self) -> int:
        """Bytes that are still in use."""
        return sum(size for storage, size in self._sizes.items() if not storage.expired())


def check_memory(
    strategy: Strategy, objective: Objective, dataset: ImageDataset, training: TrainingSettings, device: torch.device
) -> None:
    """Raises `RunError` where a training step will not fit the free memory of the device, with what to change."""
    model, free = strategy.model, _free(device)
    steps = min(strategy.iterations, training.truncation or strategy.iterations)
    pixels = training.batch_size * model.num_components * math.prod(dataset.image_shape[:2]) * steps
    if pixels * GENEROUS * 4 < free:
        return
    x = dataset.__getitems__([i % len(dataset) for i in range(MORE)]).x.to(model.mixing_logits)
    needed = estimate_memory(strategy, objective, x, training).total
    if needed <= free:
        return
    knobs = [f"a smaller batch_size (now {training.batch_size})", f"fewer iterations (now {strategy.iterations})"]
    if not training.activation_checkpointing:
        knobs.insert(0, "activation_checkpointing=True")
    if training.truncation is None and strategy.is_sequential:
        knobs.append("truncation")
    if training.precision != "bfloat16":
        knobs.append('precision="bfloat16"')
    raise RunError(
        f"a training step takes about {_gib(needed)}, but {device} has {_gib(free)} free: use {', '.join(knobs[:-1])} "
        f"or {knobs[-1]}"
    )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
