"""Where classical EM starts: items as seeds, and to each seed the items nearest to it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pnem.inference.errors import StrategyError
from pnem.inference.factor_analysis import FactorAnalysis
from pnem.inference.items import Items
from pnem.inference.m_steps import Parameters
from pnem.models import SpatialMixture

__all__ = ["INITS", "check_given", "first_parameters", "nearest", "require_channels", "seeds"]

INITS = ("k-means++", "random", "points")


def first_parameters(
    model: SpatialMixture,
    items: Items,
    x: Tensor,
    restarts: int,
    initial: str,
    *,
    gamma: Tensor | None = None,
    theta: Tensor | None = None,
    weight: Tensor | None = None,
) -> Parameters:
    """Where R starts begin: at a given θ or γ of items x (B, D, C), or as `initial` says."""
    B, D, K = len(x), x.shape[-2], model.num_components
    if isinstance(items.rule, FactorAnalysis):
        return items.rule.start(restarts)
    if theta is not None:
        return Parameters(theta.double().unsqueeze(0), model.log_mixing.double().expand(1, B, K))
    if gamma is not None:
        return items.rule.maximise(items.begin(gamma.double()))

    chance = x.new_ones(B, D) if weight is None else weight
    filled = torch.where(x.isnan(), x.nanmedian(1, keepdim=True).values, x) if items.rule.missing else x

    def draw() -> Tensor:
        if initial == "random":
            weighted = x.new_empty(B, K, D).normal_().abs_()
            return weighted / weighted.sum(-2, keepdim=True)
        return nearest(filled, seeds(filled, chance, K, far=initial == "k-means++"))

    # One by one, for γ of all starts at once would take much memory.
    starts = [items.rule.maximise(items.begin(draw())) for _ in range(restarts)]
    return Parameters(*(torch.cat(values) for values in zip(*starts, strict=True)))


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
    difference, others = x - seeds[:, :1], seeds - seeds[:, :1]
    owner = torch.cdist(difference, others, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    return F.one_hot(owner, seeds.shape[1]).to(x.dtype).transpose(-1, -2)


def check_given(
    model: SpatialMixture,
    x: Tensor,
    *,
    local: bool,
    gamma: Tensor | None = None,
    theta: Tensor | None = None,
    weight: Tensor | None = None,
) -> None:
    """Raises `StrategyError` unless a given start and weights fit images `x` (B, D, C)."""
    B, D, K, M = len(x), x.shape[-2], model.num_components, model.latent_features
    if B * D < 1:
        raise StrategyError(f"x has shape {tuple(x.shape)}: give at least one item")
    if not local and (gamma is not None or theta is not None):
        raise StrategyError("factor analysis starts at random loadings: leave gamma and theta out")
    if not local and D > 1 and weight is not None:
        raise StrategyError("weights are of items, and here an item is an image: give images of one pixel")
    for name, value in (("gamma", gamma), ("theta", theta), ("weight", weight)):
        if value is not None and not isinstance(value, Tensor):
            raise StrategyError(f"{name} must be a tensor, but is a {type(value).__name__}: use torch.as_tensor")
    given = {"gamma": (gamma, (B, K, D)), "theta": (theta, (B, K, M)), "weight": (weight, (B, D))}
    for name, (value, shape) in given.items():
        if value is not None and value.shape != shape:
            raise StrategyError(f"{name} has shape {tuple(value.shape)}, but these images need {shape}")
        if value is not None and not bool(value.isfinite().all()):
            raise StrategyError(f"{name} holds values that are NaN or infinite")
    if gamma is not None and not bool((gamma >= 0).all() & (gamma.sum((-1, -2)) > 0).all()):
        raise StrategyError("gamma must be at least 0 and not all 0")
    totals = None if weight is None else weight.sum(-1) if local else weight.sum()
    if weight is not None and totals is not None and not bool((weight >= 0).all() & (totals > 0).all()):
        raise StrategyError("weights must be at least 0 and not all 0")


def require_channels(x: Tensor, weight: Tensor | None) -> bool:
    """Whether values of items (B, D, C) of weights (B, D) are missing.

    Raises:
        StrategyError: all those of a channel of an image are, among the items that count.
    """
    missing = x.isnan()
    if not bool(missing.any()):
        return False
    absent = missing if weight is None else missing | (weight == 0).unsqueeze(-1)
    nothing = absent.all(1).nonzero()
    if len(nothing):
        image, channel = nothing[0].tolist()
        raise StrategyError(f"channel {channel} of image {image} has no value at all, only NaN: leave it out")
    return True
