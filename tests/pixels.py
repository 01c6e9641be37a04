"""Pixels to write and to compare: what the tests of the data share."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pnem.data import Batch

Array = NDArray[Any]


def arrays(
    T: int = 1, N: int = 10, H: int = 4, W: int = 3, C: int = 2, dtype: str = "uint8", seed: int = 0
) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    features = rng.integers(0, 2 if dtype == "bool" else 100, (T, N, H, W, C)).astype(dtype)
    if features.dtype.kind == "f":
        features = features / np.asarray(7, dtype)
    return features, rng.integers(0, 4, (T, N, H, W, 1)).astype("uint8")


def pixel_by_pixel(features: Array, groups: Array, indices: list[int]) -> Batch:
    T, _, H, W, C = features.shape
    x = torch.empty(T, len(indices), H * W, C)
    labels = torch.empty(T, len(indices), H * W, dtype=torch.int64)
    for t, b, h, w in np.ndindex(T, len(indices), H, W):
        labels[t, b, h * W + w] = int(groups[t, indices[b], h, w, 0])
        for c in range(C):
            x[t, b, h * W + w, c] = float(np.float32(features[t, indices[b], h, w, c]))
    return Batch(x[0], labels[0]) if T == 1 else Batch(x, labels)


def assert_same(batch: Batch, expected: Batch) -> None:
    torch.testing.assert_close(batch.x, expected.x, rtol=0, atol=0)
    assert (batch.groups is None) == (expected.groups is None)
    if batch.groups is not None:
        torch.testing.assert_close(batch.groups, expected.groups, rtol=0, atol=0)


FEATURES, GROUPS = arrays()
