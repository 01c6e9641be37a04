"""Compiling the unroll of a training: when it pays, and what is said where it cannot be done."""

import contextlib
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException

from pnem.errors import DeviceError

__all__ = ["compiled", "compiler_warnings_ignored", "missing_compiler", "should_compile"]

# Compiling takes 4 to 10 s an iteration, once. On a CPU it saves 18 to 85 ns for every pixel and component that goes
# through the iteration, and has paid for itself after 1.2e8 to 3.9e8 of them (the strategies in `pnem bench`); on a
# GPU, where small operations wait for their launches, it saves milliseconds an iteration.
WORTH_IT_ON_A_CPU = 3e8
WORTH_IT_ON_A_GPU = 40_000


def should_compile(asked: bool | str, device: torch.device, *, iterations: int, pixels: float) -> bool:
    """Whether to compile: where ``"auto"`` was asked for, if the training is long enough and there is a compiler.

    Args:
        asked: True, False or ``"auto"``.
        device: where the training runs.
        iterations: of the whole training, over all of its steps.
        pixels: what goes through an iteration over all steps: images × pixels × components.

    Raises:
        DeviceError: True was asked for, but there is no compiler.
    """
    if asked == "auto":
        long = iterations >= WORTH_IT_ON_A_GPU if device.type == "cuda" else pixels >= WORTH_IT_ON_A_CPU
        if not long:
            return False
    elif not asked:
        return False
    missing = missing_compiler(device)
    if missing is None:
        return True
    if asked == "auto":
        warnings.warn(
            f"training is not compiled, and takes up to twice as long, because {missing}; or say compile=False",
            stacklevel=2,
        )
        return False
    raise DeviceError(f"compile=True, but {missing}; or leave compile out")


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this device, and what to do; None where it lacks nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "there is no Triton, which torch compiles for GPUs with: install the package triton"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler}: install one, or name yours in the environment variable CXX"
    return None


@contextlib.contextmanager
def compiler_warnings_ignored() -> Iterator[None]:
    """Without what torch's compiler warns of in what it does itself."""
    with warnings.catch_warnings():
        # It looks at the gradients of its inputs, which within an unroll have none to keep,
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        # and makes objects of autograd functions.
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        yield


def compiled(function: Callable[..., Any], *, required: bool, device: torch.device) -> Callable[..., Any]:
    """`function`, compiled at its first call: as one graph, and on a GPU captured as a CUDA graph.

    Where that fails, it stays as it is, which a warning says; if `required`, `DeviceError`. What was compiled is kept
    on disk by torch (``TORCHINDUCTOR_CACHE_DIR``), and compiled once for all runs of the same shapes.
    """
    # A function may be compiled only so many times in a process, counted over all trainings.
    torch.compiler.reset()
    fast = torch.compile(function, fullgraph=True, mode="reduce-overhead" if device.type == "cuda" else None)
    failed = False

    def call(*args: Any) -> Any:
        nonlocal failed
        if failed:
            return function(*args)
        try:
            with compiler_warnings_ignored():
                return fast(*args)
        except TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            if required:
                raise DeviceError(f"this training cannot be compiled ({reason}): leave compile out") from error
            warnings.warn(f"training goes on without being compiled, which failed: {reason}", stacklevel=2)
            failed = True
            return function(*args)

    return call
