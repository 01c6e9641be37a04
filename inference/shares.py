"""What a look at items finds, and where they are divided among processes, what these must know in common."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.inference.collectives import are_several, gathered
from pnem.inference.errors import StrategyError
from pnem.inference.items import SAMPLE, Stream, survey
from pnem.inference.starts import check_given, require_channels
from pnem.models import SpatialMixture
from pnem.models.errors import PnemError

__all__ = ["Seen", "fail_together", "look", "put_together", "require_group"]


class Seen(NamedTuple):
    """What a look at items has found.

    Attributes:
        chunks: the items, as `Items` takes them.
        weight: how often each counts, (B, D), or None.
        size: D.
        total: how many there are by weight: (B,), or D.
        missing: whether values are NaN.
        sample: items that starts are made from, (B, n, C): all of those in memory.
        sample_weight: how often each of them counts, (B, n), or None.
    """

    chunks: Iterable[Tensor]
    weight: Tensor | None
    size: int
    total: Tensor | int
    missing: bool
    sample: Tensor
    sample_weight: Tensor | None


def look(
    model: SpatialMixture,
    x: Tensor | Iterable[Tensor],
    *,
    gamma: Tensor | None,
    theta: Tensor | None,
    weight: Tensor | None,
    local: bool,
) -> Seen:
    """What there is in `x`, once it and a given start or weights have been checked.

    Raises:
        ModelError: it does not fit the model.
        StrategyError: the start or the weights do not fit it, or there are no items.
    """
    if isinstance(x, Tensor):
        # Mixing weights per image, if any, are those of images fitted before.
        model.check(x, missing=True, new=theta is None)
        check_given(model, x, gamma=gamma, theta=theta, weight=weight, local=local)
        x = (x if local else x.flatten(1).unsqueeze(0)).double()
        weight = None if weight is None else weight.double().reshape(x.shape[:2])
        total = x.shape[1] if weight is None else weight.sum(-1)
        return Seen([x], weight, x.shape[1], total, require_channels(x, weight), x, weight)
    if hasattr(x, "__array__") or not isinstance(x, Iterable):
        raise StrategyError(
            f"x must be a tensor (B, D, C), or an iterable of chunks (n, C), but is a {type(x).__name__}: "
            "torch.as_tensor(x) makes a tensor of an array"
        )
    if gamma is not None or weight is not None:
        raise StrategyError("items in chunks take neither gamma nor weight: leave them out")
    stream = Stream(x, model)
    found = survey(stream, model, local=local)
    if theta is not None:
        check_given(model, found.sample, theta=theta, local=local)
    return Seen(stream, None, found.size, found.size, found.missing, found.sample, None)


def require_group() -> None:
    """Raises `StrategyError` unless this process is in a group."""
    if not are_several():
        raise StrategyError(
            "distributed=True needs a process group of torch.distributed: call torch.distributed.init_process_group in "
            "every process first, or leave distributed out"
        )


def fail_together(error: PnemError) -> None:
    """Tells the processes that `put_together` theirs of an error in this one."""
    gathered(error)


def put_together(seen: Seen, *options: object) -> Seen:
    """This process's items, with the total and the sample of all processes' items, in the order of their ranks.

    The sample are all items if they are no more than 65,536, and else of each process in proportion to what it has.

    Raises:
        PnemError: what another process raised.
        StrategyError: the processes do not fit the same, or with other `options`.
    """
    fitted = len(seen.sample), seen.sample.shape[-1], seen.weight is not None, *options
    told: list[PnemError | tuple[int, Tensor | int, bool, tuple[object, ...]]]
    told = gathered((seen.size, seen.total, seen.missing, fitted), seen.sample.device)
    shares = []
    for rank, share in enumerate(told):
        if isinstance(share, PnemError):
            share.add_note(f"raised in the process of rank {rank}")
            raise share
        shares.append(share)
    if any(share[-1] != fitted for share in shares):
        raise StrategyError(
            "the processes do not fit alike: give all of them items of the same shape, and the same restarts, "
            "iterations and kind of start"
        )
    sizes, totals, missing, _ = zip(*shares, strict=True)
    chosen = _some(seen, min(1.0, SAMPLE / sum(sizes)), any(missing))
    own = seen.sample[:, chosen], None if seen.sample_weight is None else seen.sample_weight[:, chosen]
    samples, weights = zip(*gathered(own, seen.sample.device), strict=True)
    weight = None if seen.weight is None else torch.cat(weights, 1)
    return seen._replace(total=sum(totals), missing=any(missing), sample=torch.cat(samples, 1), sample_weight=weight)


def _some(seen: Seen, share: float, missing: bool) -> Tensor:
    """Which items of the sample to keep for so large a share of all, and of every channel one that has it."""
    there, wanted = seen.sample.shape[1], max(1, int(share * seen.size))
    if wanted >= there:
        return torch.arange(there)
    chosen = torch.randperm(there)[:wanted]
    if missing:
        first = (~seen.sample.isnan()).long().argmax(1).flatten().cpu()
        chosen = torch.cat([chosen, first])
    return chosen.unique()
