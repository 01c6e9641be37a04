"""Where to compute, and in which precision."""

from contextlib import AbstractContextManager

import torch

from pnem.errors import DeviceError

__all__ = ["PRECISIONS", "forked_rng", "resolve_device"]

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


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves torch's global random states, the CPU's and every CUDA device's, as they were."""
    used = device.type == "cuda" or torch.cuda.is_initialized()
    return torch.random.fork_rng(range(torch.cuda.device_count()) if used else [])
