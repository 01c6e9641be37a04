"""Checks on arrays of images and groups, in memory or in a file."""

import contextlib
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pnem.errors import DataError

__all__ = ["array_of", "check_arrays", "check_finite", "check_size", "check_whole", "whole_labels"]


class Shaped(Protocol):
    """An array, or one in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...


def check_whole(value: int, name: str, minimum: int = 1) -> int:
    """The value as an int.

    Raises:
        DataError: if it is not a whole number or below `minimum`.

    Example:
        >>> check_whole(np.int64(3), "limit")
        3
    """
    try:
        whole = operator.index(value)
    except TypeError:
        raise DataError(f"{name}={value!r}: give a whole number, at least {minimum}") from None
    if whole < minimum:
        raise DataError(f"{name}={whole}: give at least {minimum}")
    return whole


def check_size(size: int | tuple[int, int], least: tuple[int, int], what: str) -> tuple[int, int]:
    """Height and width; raises `DataError` unless they are at least the `least`, which `what` needs.

    Example:
        >>> check_size(28, least=(7, 12), what="the outlines")
        (28, 28)
    """
    pair = size if isinstance(size, tuple) else (size, size)
    if len(pair) != 2:
        raise DataError(f"size={size!r}: give one number, or (height, width)")
    H, W = (check_whole(length, "size") for length in pair)
    rows, columns = least
    if rows > H or columns > W:
        raise DataError(f"size={size!r} is too small for {what}: give at least {rows} rows and {columns} columns")
    return H, W


def array_of(value: ArrayLike | Tensor, name: str) -> NDArray[Any]:
    """The value as a NumPy array; raises `DataError` where it is none."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        sizes: set[tuple[int, ...]] = set()
        if isinstance(value, Sequence):
            with contextlib.suppress(ValueError):
                sizes = {np.shape(frame) for frame in value}
        if len(sizes) > 1:
            raise DataError(
                f"{name} has frames of different shapes, {' and '.join(map(str, sorted(sizes)))}: all frames of all "
                "sequences need the same (N, H, W, C); pad or crop them"
            ) from error
        raise DataError(f"{name} is not an array ({error}): give one of shape (T, N, H, W, C)") from error


def check_arrays(features: Shaped, groups: Shaped | None, source: str) -> None:
    """Raises `DataError` unless the arrays are numbers of shapes (T, N, H, W, C) that go together."""
    for name, array in (("features", features), ("groups", groups)):
        if array is None:
            continue
        if array.dtype.kind not in "biuf":
            raise DataError(f"{source}: {name} has dtype {array.dtype}: give booleans, integers or floats")
        if len(array.shape) != 5:
            raise DataError(
                f"{source}: {name} has shape {array.shape}, expected five axes (T, N, H, W, C): "
                "T = 1 for static images, C = 1 for one channel"
            )
        if 0 in array.shape:
            raise DataError(
                f"{source}: {name} is empty, its shape (T, N, H, W, C) is {array.shape}: give at least one image"
            )
    if groups is not None and groups.shape not in (features.shape, (*features.shape[:4], 1)):
        raise DataError(
            f"{source}: features has shape {features.shape} and groups {groups.shape}: "
            "both must be (T, N, H, W, C), groups may have C = 1"
        )


def check_finite(x: NDArray[Any], index: NDArray[np.intp], source: str) -> None:
    """Raises `DataError` naming the first image with NaN or infinity."""
    if x.dtype.kind == "f" and not (finite := np.isfinite(x)).all():
        image = index[np.argmin(finite.all(axis=(0, 2, 3, 4)))]
        raise DataError(
            f"{source}, image {image}: features has NaN or infinity (as float32); repair the image or leave it out"
        )


def whole_labels(groups: NDArray[Any], index: NDArray[np.intp], source: str) -> NDArray[np.int64]:
    """Groups as integers; raises `DataError` naming the first image whose groups are not whole numbers from 0."""
    with np.errstate(invalid="ignore"):
        labels = groups.astype(np.int64)
    if not np.can_cast(groups.dtype, np.uint32) and (bad := (labels < 0) | (labels != groups)).any():
        image = index[np.argmax(bad.any(axis=(0, 2, 3, 4)))]
        raise DataError(
            f"{source}, image {image}: groups has values that are not whole numbers from 0 (0 is for background)"
        )
    if labels.shape[-1] > 1 and (bad := labels != labels[..., :1]).any():
        image = index[np.argmax(bad.any(axis=(0, 2, 3, 4)))]
        raise DataError(f"{source}, image {image}: groups differ between channels; a pixel belongs to one object")
    return labels[..., 0]
