"""Where classical EM starts: items as seeds, and to each seed the items nearest to it."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["nearest", "seeds"]


def seeds(x: Tensor, weight: Tensor, K: int, *, far: bool) -> Tensor:
    """K items of each image, by weight and, if `far`, far from one another: (B, D, C), (B, D) -> (B, K, C)."""
    chosen = _draw(x, weight)
    distance = (x - chosen).square().sum(-1)
    for _ in range(1, K):
        seed = _draw(x, weight * distance if far else weight)
        chosen = torch.cat([chosen, seed], 1)
        distance = torch.minimum(distance, (x - seed).square().sum(-1))
    return chosen


def _draw(x: Tensor, chance: Tensor) -> Tensor:
    """One item of each image, in proportion to its chance: (B, D, C), (B, D) -> (B, 1, C)."""
    cumulative = chance.cumsum(-1)
    target = torch.rand(len(x), 1, dtype=x.dtype, device=x.device) * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_max(x.shape[-2] - 1)
    return x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def nearest(x: Tensor, seeds: Tensor) -> Tensor:
    """γ (B, K, D) of one for the nearest seed and zero for the others."""
    # Relative to a seed, for distances between items far from zero would cancel.
    owner = torch.cdist(x - seeds[:, :1], seeds - seeds[:, :1]).argmin(-1)
    return F.one_hot(owner, seeds.shape[1]).to(x.dtype).transpose(-1, -2)
