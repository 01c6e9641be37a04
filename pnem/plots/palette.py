"""Colours of components that readers of every kind of colour vision tell apart."""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pnem.errors import DataError

__all__ = ["component_colours"]

Array = NDArray[Any]

# Okabe & Ito's palette, in an order that keeps the first few far apart for every reader.
OKABE_ITO = ("0072B2", "D55E00", "56B4E9", "F0E442", "E69F00", "009E73", "CC79A7", "000000")
# What normal, protan and deutan readers see of a linear RGB colour (Machado, Oliveira & Fernandes 2009, severity 1).
VISION = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
)
# Oklab (Ottosson 2020): Euclidean distances in it are about as large as the differences that people see.
RGB_TO_LMS = ((0.412221, 0.536333, 0.051446), (0.211903, 0.680700, 0.107397), (0.088302, 0.281719, 0.629979))
LMS_TO_OKLAB = ((0.210454, 0.793618, -0.004072), (1.977998, -2.428592, 0.450594), (0.025904, 0.782772, -0.808676))


def component_colours(K: int) -> Array:
    """A colour for each of K components, as RGB in [0, 1]: (K, 3).

    The first eight are Okabe and Ito's. Each one after is the colour, of those not too dark, farthest from white and
    from all before it, in Oklab and for whichever of normal, protan and deutan readers tells them apart the least.

    Raises:
        DataError: K < 1.

    >>> component_colours(3).shape
    (3, 3)
    """
    if K < 1:
        raise DataError(f"K must be at least 1, but is {K}")
    return _palette(max(K, len(OKABE_ITO)))[:K].copy()


@cache
def _palette(K: int) -> Array:
    levels = np.linspace(0, 1, 16)
    used = np.array([[int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)] for code in ("FFFFFF", *OKABE_ITO)])
    others = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    # Oklab overrates differences between colours that are nearly black.
    colours = np.concatenate([used, others[_seen(others)[0, :, 0] > 0.4]])
    seen = _seen(colours)
    order = list(range(len(used)))
    distance = np.full(len(colours), np.inf)
    for i in range(K):
        distance = np.minimum(distance, np.linalg.norm(seen - seen[:, order[i], None], axis=-1).min(0))
        if i >= len(OKABE_ITO):
            order.append(int(distance.argmax()))
    return colours[order[1:]]


def _seen(rgb: Array) -> Array:
    """Oklab coordinates of N colours for each of V kinds of readers: (V, N, 3)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    simulated = np.clip(np.einsum("vij,nj->vni", np.array(VISION), linear), 0, 1)
    return np.cbrt(simulated @ np.array(RGB_TO_LMS).T) @ np.array(LMS_TO_OKLAB).T
