"""What the processes of a torch.distributed group tell one another."""

import io
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["are_several", "gathered", "largest", "of_first", "rank", "summed"]

Value = TypeVar("Value")


def are_several() -> bool:
    """Whether this process is in a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Which process this is, from 0; 0 for one that is in no group."""
    return dist.get_rank() if are_several() else 0


def summed(value: Tensor) -> Tensor:
    """The sum of all processes' tensors, the same on all."""
    total = value.contiguous().clone()
    dist.all_reduce(total)
    return total


def largest(value: Tensor) -> Tensor:
    """The largest of all processes' tensors, entry by entry."""
    most = value.contiguous().clone()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most


def gathered(value: Value, device: torch.device | str = "cpu") -> list[Value]:
    """The values of all processes in the order of their ranks, tensors in them on `device`."""
    packed: list[bytes] = [b""] * dist.get_world_size()
    dist.all_gather_object(packed, _pack(value))
    return [_unpack(content, device) for content in packed]


def of_first(value: Value, device: torch.device | str = "cpu") -> Value:
    """The value that the process of rank 0 has, tensors in it on `device`."""
    packed = [_pack(value) if rank() == 0 else b""]
    dist.broadcast_object_list(packed)
    unpacked: Value = _unpack(packed[0], device)
    return unpacked


def _pack(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(content: bytes, device: torch.device | str) -> Value:  # type: ignore[type-var]
    value: Value = torch.load(io.BytesIO(content), map_location=device, weights_only=False)
    return value
