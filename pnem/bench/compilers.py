"""Whether this machine can compile what torch.compile writes."""

import importlib.util
import os
import shutil
import sys

import torch

__all__ = ["missing_compiler"]


def missing_compiler(device: torch.device) -> str | None:
    """What is missing for torch.compile, in one line; None where nothing is.

    >>> missing_compiler(torch.device("cpu"))  # doctest: +SKIP
    'no compiler: g++ is not on the PATH'
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no compiler: triton is not installed"
    names = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(names) is None:
        return f"no compiler: {names} is not on the PATH"
    return None
