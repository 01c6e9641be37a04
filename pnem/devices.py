"""Where to compute, and in which precision."""

import os
import time
from contextlib import AbstractContextManager

import torch

from pnem.errors import DeviceError

__all__ = ["PRECISIONS", "bfloat16_speed", "forked_rng", "resolve_device", "resolve_devices"]

# Our names, and Lightning's.
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float64": "64-true"}


def resolve_device(name: str) -> torch.device:
    """The device called ``"auto"`` (the first CUDA device if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        DeviceError: the name is none of these, or this machine has no such device.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise DeviceError(f'unknown device {name!r}: choose "auto", "cpu", "cuda" or "cuda:N"')
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(
                f"{name} was asked for, but this machine has {count} CUDA devices that torch {torch.__version__} "
                'can use: choose "cpu" or "auto"'
            )
        return torch.device("cuda", device.index or 0)
    return device


def resolve_devices(name: str, count: int) -> list[torch.device]:
    """So many devices of this machine: the one of this name (see `resolve_device`), or the first ones of its kind.

    On a CPU, whose cores the processes share, all are the same.

    Raises:
        DeviceError: this machine has fewer, or the name is that of a single one.

    >>> resolve_devices("cpu", 1)
    [device(type='cpu')]
    """
    device = resolve_device(name)
    if count == 1:
        return [device]
    if device.type == "cuda" and ":" in name:
        raise DeviceError(f'{name} is a single device, but devices={count} were asked for: choose "cuda"')
    cuda = device.type == "cuda"
    there, kind = (torch.cuda.device_count(), "CUDA devices") if cuda else (os.cpu_count() or 1, "CPU cores")
    if count > there:
        raise DeviceError(
            f"devices={count} were asked for, but this machine has {there} {kind}: choose at most {there}"
        )
    return [torch.device("cuda", index) for index in range(count)] if cuda else [device] * count


def bfloat16_speed(device: torch.device) -> float:
    """How many times as fast as in float32 matrices are multiplied in bfloat16, measured within half a second.

    On CPUs without instructions for it that is a hundredth. Of matrices so large that a GPU's time is not that of its
    launches.
    """
    best, size = [], 4096 if device.type == "cuda" else 512
    for dtype in (torch.float32, torch.bfloat16):
        a = b = torch.ones(size, size, dtype=dtype, device=device)
        (a @ b)[0, 0].item()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            seconds.append(time.perf_counter() - start)
        best.append(min(seconds))
    return best[0] / best[1]


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves torch's global random states, the CPU's and every CUDA device's, as they were."""
    used = device.type == "cuda" or torch.cuda.is_initialized()
    return torch.random.fork_rng(range(torch.cuda.device_count()) if used else [])
