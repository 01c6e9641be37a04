"""Normal channels given those of an item that are there: one set of matrices for all items that have the same ones."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.models.linear_algebra import half_log_det

__all__ = ["Conditionals", "Group", "condition", "group_by_channels", "one_group", "patterns"]


class Group(NamedTuple):
    """Items of one image that have the same channels: their image, their places, and which channels."""

    image: int
    rows: Tensor
    present: Tensor


class Conditionals(NamedTuple):
    """Of groups (R, G, K, ...): W with δ = |W(x − μ)|², ½ log|Σ_oo|, A with E[x | x_o] = μ + A(x − μ), Cov[x | x_o]."""

    whitening: Tensor
    half_log_det: Tensor
    slope: Tensor
    covariance: Tensor


def one_group(present: Tensor) -> list[Group]:
    """All items of each image, which have the same channels: (B, D, C)."""
    every = torch.arange(present.shape[1], device=present.device)
    return [Group(b, every, channels) for b, channels in enumerate(present[:, 0])]


def group_by_channels(present: Tensor) -> list[Group]:
    """The items of each image by which of their channels are there: (B, D, C)."""
    groups = []
    for b, channels in enumerate(present):
        pattern, counts = patterns(channels > 0)
        places = pattern.argsort().split(counts.tolist())
        groups += [Group(b, rows, channels[rows[0]]) for rows in places]
    return groups


def patterns(there: Tensor) -> tuple[Tensor, Tensor]:
    """A number for every item's pattern of channels, (D, C) -> (D,), and how many items each has."""
    C = there.shape[-1]
    if C > 62:
        return there.unique(dim=0, return_inverse=True, return_counts=True)[1:]
    # As the bits of a whole number, which is far quicker to sort.
    code = (there * 2 ** torch.arange(C, device=there.device)).sum(-1)
    return code.unique(return_inverse=True, return_counts=True)[1:]


def condition(lower: Tensor, groups: list[Group]) -> Conditionals:
    """From L (R, B, K, C, C) with Σ = L Lᵀ."""
    images = torch.tensor([group.image for group in groups], device=lower.device)
    there = torch.stack([group.present for group in groups]).unsqueeze(1)
    lower = lower[:, images]
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    both = there.unsqueeze(-1) * there.unsqueeze(-2)
    covariance = lower @ lower.transpose(-1, -2)
    # Absent channels as independent ones of unit variance leave the others' inverse and determinant as they are.
    factor, info = torch.linalg.cholesky_ex(covariance * both + eye * (1 - both))
    factor = factor.masked_fill((info != 0)[..., None, None], math.nan)
    whitening = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False) * both
    absent = (1 - there).unsqueeze(-1)
    regression = absent * (covariance @ whitening.transpose(-1, -2) @ whitening)
    # Of x − E[x | x_o], as a square, which has no negative variance.
    left = (absent * eye - regression) @ lower
    return Conditionals(
        whitening, half_log_det(factor), regression + eye * there.unsqueeze(-1), left @ left.transpose(-1, -2)
    )
