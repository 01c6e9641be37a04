"""Hamiltonian Monte Carlo for many chains and images at once (Duane et al. 1987; Neal 2011)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Point", "transition"]


class Point(NamedTuple):
    """Where chains are.

    Attributes:
        theta: (S, B, K, M), S chains of B images.
        log_density: (S, B), at θ, up to a constant, in nats.
        gradient: (S, B, K, M), of the log density at θ.
    """

    theta: Tensor
    log_density: Tensor
    gradient: Tensor


def transition(
    evaluate: Callable[[Tensor], Point], point: Point, step_size: Tensor, leapfrog: int
) -> tuple[Point, Tensor]:
    """One transition of every chain, which leaves its density invariant, and the probability of its acceptance (S, B).

    Momenta are standard normal, the path `leapfrog` steps of `step_size` each, and its end is accepted by Metropolis'
    rule. An end where the density or the path is not finite is rejected, with probability 0.

    Args:
        evaluate: the point at a θ (S, B, K, M).
        point: where the chains are.
        step_size: (S, B), or what broadcasts to it; it must not depend on where the chains are.
        leapfrog: the number of steps.

    >>> def evaluate(theta):
    ...     return Point(theta, -0.5 * theta.square().sum((-2, -1)), -theta)
    >>> start = evaluate(torch.zeros(5, 3, 1, 2))
    >>> point, accepted = transition(evaluate, start, torch.tensor(0.1), 10)
    >>> point.theta.shape, accepted.shape
    (torch.Size([5, 3, 1, 2]), torch.Size([5, 3]))
    """
    size = step_size[..., None, None]
    momentum = torch.randn_like(point.theta)
    energy = point.log_density - 0.5 * momentum.square().sum((-2, -1))
    end = point
    for _ in range(leapfrog):
        momentum = momentum + 0.5 * size * end.gradient
        end = evaluate(end.theta + size * momentum)
        momentum = momentum + 0.5 * size * end.gradient
    change = end.log_density - 0.5 * momentum.square().sum((-2, -1)) - energy
    # NaN is where a path has left the numbers; +∞ could only come from there too.
    probability = torch.where(change < torch.inf, change.clamp_max(0).exp(), 0.0)
    accepted = torch.rand_like(probability) < probability
    theta, gradient = (
        torch.where(accepted[..., None, None], new, old)
        for new, old in ((end.theta, point.theta), (end.gradient, point.gradient))
    )
    return Point(theta, torch.where(accepted, end.log_density, point.log_density), gradient), probability
