"""What distributions with a scale matrix need of linear algebra."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pnem.models.likelihoods import present_channels

__all__ = ["half_log_det", "marginals", "squared_distance", "symmetric"]


def symmetric(triangle: Tensor, C: int) -> Tensor:
    """The symmetric matrix (..., C, C) of a lower triangle, row by row: (..., C (C + 1) / 2)."""
    rows, columns = torch.tril_indices(C, C, device=triangle.device)
    matrix = triangle.new_zeros(*triangle.shape[:-1], C, C)
    matrix[..., rows, columns] = triangle
    return matrix.tril(-1).transpose(-1, -2) + matrix.tril()


def half_log_det(lower: Tensor) -> Tensor:
    """½ log |L Lᵀ|: (..., C, C) -> (...)."""
    return lower.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def squared_distance(difference: Tensor, lower: Tensor) -> Tensor:
    """Mahalanobis' |L⁻¹ d|²: (..., C), (..., C, C) -> (...)."""
    if lower.dim() > 2 and lower.shape[-3] == 1:
        # The items of one matrix are the columns of a single equation.
        white = torch.linalg.solve_triangular(lower.squeeze(-3), difference.transpose(-1, -2), upper=False)
        return white.square().sum(-2)
    return torch.linalg.solve_triangular(lower, difference.unsqueeze(-1), upper=False).squeeze(-1).square().sum(-1)


def marginals(
    x: Tensor, mean: Tensor, lower: Tensor, log_density: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """A density of the channels that are not NaN, from their distance, ½ log |Σ| and number: (..., D).

    x (..., D, C), mean (..., 1, C) and L (..., 1, C, C) with Σ = L Lᵀ.
    """
    dtype, x, mean, lower = x.dtype, x.double(), mean.double(), lower.double()
    covariance = lower @ lower.transpose(-1, -2)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    results = []
    # Every item has a matrix of its own.
    for piece in x.split(1024, -2):
        present, filled = present_channels(piece)
        both = present.unsqueeze(-1) * present.unsqueeze(-2)
        # Absent channels become independent ones of unit variance, at their mean.
        factor, info = torch.linalg.cholesky_ex(covariance * both + eye * (1 - both))
        factor = factor.masked_fill((info != 0)[..., None, None], math.nan)
        distance = squared_distance((filled - mean) * present, factor)
        results.append(log_density(distance, half_log_det(factor), present.sum(-1)).to(dtype))
    return torch.cat(results, -1)
