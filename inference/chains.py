"""Markov chains of θ: whether they mixed, and their components matched."""

import math
from typing import NamedTuple

import torch
from pyro.ops import stats
from torch import Tensor

__all__ = ["Chains", "MixingWarning", "bulk_effective_sample_size", "match_components", "rank_normalised_r_hat"]

# Each lowers the summed distance to the mean; a few are enough.
ROUNDS = 20


class MixingWarning(UserWarning):
    """Markov chains that have not mixed, or whose integrator diverged: summaries of them are not to be trusted."""


class Chains(NamedTuple):
    """What a sampler draws from p(θ | x) of B images.

    Attributes:
        draws: (chains, draws, B, K, M), components matched where they are exchangeable.
        r_hat: (B, K, M), rank-normalised split R̂; near 1 where the chains agree.
        effective_sample_size: (B, K, M), of the bulk: how many independent draws all chains are worth.
        diverging: (chains, draws), which transitions the integrator failed in.
        log_density: (chains, draws, B), log p(x, θ) in nats, z summed out.
    """

    draws: Tensor
    r_hat: Tensor
    effective_sample_size: Tensor
    diverging: Tensor
    log_density: Tensor

    @property
    def divergences(self) -> int:
        """How many transitions after warmup the integrator failed in."""
        return int(self.diverging.sum())


def match_components(draws: Tensor, log_density: Tensor) -> Tensor:
    """Draws (chains, draws, B, K, M) with the components of each in the order nearest to that of all others.

    The reference is at first the draw of highest density (Marin, Mengersen & Robert 2005), then the mean of what was
    matched to it, until no order changes. Each match is the permutation of least squared distance in θ.

    >>> one = torch.tensor([[-3.0], [3.0]]) + 0.1 * torch.randn(50, 1, 2, 1)
    >>> swapped = torch.stack([one, one.flip(-2)])
    >>> matched = match_components(swapped, torch.randn(2, 50, 1))
    >>> torch.equal(matched[0], matched[1])
    True
    """
    # SciPy loads when it is first used.
    from scipy.optimize import linear_sum_assignment

    flat, density = draws.flatten(0, 1), log_density.flatten(0, 1)
    S, B, K, _ = flat.shape
    if K == 1:
        return draws
    images = torch.arange(B, device=flat.device)
    reference = flat[density.argmax(0), images]
    order, matched = torch.arange(K).expand(S, B, K), flat
    for _ in range(ROUNDS):
        cost = torch.cdist(reference, flat).square().reshape(S * B, K, K).cpu().numpy()
        best = torch.as_tensor([linear_sum_assignment(matrix)[1].tolist() for matrix in cost]).reshape(S, B, K)
        matched = flat.gather(-2, best.to(flat.device).unsqueeze(-1).expand_as(flat))
        if torch.equal(best, order):
            break
        order, reference = best, matched.mean(0)
    return matched.reshape(draws.shape)


def rank_normalised_r_hat(draws: Tensor) -> Tensor:
    """R̂ of draws (chains, draws, ...), also of their distance from the median: (...) (Vehtari et al. 2021)."""
    folded = (draws - draws.flatten(0, 1).median(0).values).abs()
    return torch.maximum(*(stats.split_gelman_rubin(_normal_scores(value)) for value in (draws, folded)))


def bulk_effective_sample_size(draws: Tensor) -> Tensor:
    """The effective sample size of the rank-normalised halves of chains (chains, draws, ...): (...).

    At most S log₁₀ S of S draws, as Stan has it: the autocorrelations of draws that alternate around the mean sum to
    nearly nothing, or by their noise to less.
    """
    half = draws.shape[1] // 2
    halves = torch.cat([draws[:, :half], draws[:, -half:]])
    total = halves.shape[0] * half
    time = total / stats.effective_sample_size(_normal_scores(halves))
    return total / time.clamp_min(1 / math.log10(total))


def _normal_scores(draws: Tensor) -> Tensor:
    from scipy.stats import rankdata

    flat = draws.flatten(0, 1)
    # Draws that are the same, where a chain stood still, share a rank.
    ranks = torch.from_numpy(rankdata(flat.cpu().numpy(), axis=0)).to(draws.device)
    return torch.special.ndtri((ranks - 0.375) / (len(flat) + 0.25)).reshape(draws.shape)
