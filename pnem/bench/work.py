"""How much a training step has to compute and to move at least, and its share of the machine's peak."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pnem.bench.peaks import Peaks

__all__ = ["Work", "count_work"]


class Work(NamedTuple):
    """Of matrix products and convolutions, forwards and backwards: floating-point operations, and bytes.

    The bytes are those of their operands and results, each once: what no fusion of the operations in between spares.
    """

    flops: int
    bytes: int

    def share(self, seconds: float, peaks: Peaks, precision: str) -> tuple[float, str]:
        """The share of the measured peak that binds, and which one it is.

        >>> Work(flops=10, bytes=10).share(4.0, Peaks({"float32": 5.0}, 10.0), "float32")
        (0.5, 'products')
        """
        least = {"products": self.flops / peaks.products[precision], "bandwidth": self.bytes / peaks.bandwidth}
        binds = max(least, key=least.__getitem__)
        return least[binds] / seconds, binds


def count_work(step: Callable[[], object]) -> Work:
    """Counts what an eager (not compiled) call does.

    >>> import torch
    >>> layer, x = torch.nn.Linear(30, 20, bias=False), torch.ones(5, 30)
    >>> count_work(lambda: layer(x))
    Work(flops=6000, bytes=3400)
    """
    with _Counter() as counter:
        step()
    return Work(counter.flops, counter.bytes)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor))
        return out
