"""Named arrays as what ArviZ works with: `InferenceData` of its versions below 1, a `DataTree` from 1 on."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np

__all__ = ["inference_data", "load_arviz"]

Variable = tuple[tuple[str, ...], np.ndarray] | tuple[tuple[str, ...], np.ndarray, dict[str, str]]
"""The dimensions of an array, the array, and if there are any its attributes, such as units."""


def load_arviz() -> ModuleType:
    """The module ArviZ, without what versions below 1 say once a day about the coming of version 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        return import_module("arviz")


def inference_data(
    groups: Mapping[str, Mapping[str, Variable]],
    *,
    coords: Mapping[str, np.ndarray] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Any:
    """Groups of named arrays, as the installed version of ArviZ takes them.

    It is the one place that depends on that version.

    Args:
        groups: for each group its variables: dimensions and values, if wanted also attributes.
        coords: the labels of dimensions that are not just numbered from 0.
        attrs: attributes of the whole and of every group, that a netCDF file can hold: numbers, strings, and lists.

    Returns:
        ``arviz.InferenceData`` with ArviZ below 1, else ``xarray.DataTree``.

    >>> theta = np.zeros((4, 100, 3))
    >>> data = inference_data({"posterior": {"theta": (("chain", "draw", "image"), theta)}}, attrs={"model": "none"})
    >>> dict(data["posterior"].sizes), data["posterior"].attrs["model"]
    ({'chain': 4, 'draw': 100, 'image': 3}, 'none')
    """
    import xarray

    given, attributes = dict(coords or {}), dict(attrs or {})
    datasets = {}
    for name, variables in groups.items():
        dataset = xarray.Dataset(dict(variables), attrs=attributes)
        labels = {dim: given.get(str(dim), np.arange(size)) for dim, size in dataset.sizes.items()}
        datasets[name] = dataset.assign_coords(labels)
    if int(version("arviz").partition(".")[0]) < 1:
        return load_arviz().InferenceData(attrs=attributes, **datasets)
    return xarray.DataTree.from_dict({"/": xarray.Dataset(attrs=attributes), **datasets})
