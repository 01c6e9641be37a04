"""The memory that a call takes at its peak."""

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["peak_memory"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the peak of a call on top of what was held before it.

    On a GPU what torch allocated; on Linux the resident memory of the process; None where neither can be known.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    # What was freed but is kept for later would hide as much of what the call takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    trim(0)
    try:
        # Resets the peak of the resident memory: see proc_pid_clear_refs(5).
        CLEAR.write_text("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
