"""Items in pieces, over which classical EM adds up."""

import functools
import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from pnem.inference.m_steps import Expectation, MStep, Parameters

__all__ = ["Items"]

# Items of one piece: their statistics and responsibilities stay in the processor's cache.
PIECE = 4096
# Bytes of prepared items that are kept from one iteration to the next.
KEEP = 2**30


class Items:
    """Items in pieces, prepared once if they fit into memory."""

    def __init__(self, rule: MStep, x: Tensor, weight: Tensor | None):
        self.rule = rule
        self.x = x.split(PIECE, 1)
        self.weight = [None] * len(self.x) if weight is None else weight.split(PIECE, 1)
        first = rule.prepare(self.x[0])
        keep = first.element_size() * first.numel() / self.x[0].shape[1] * x.shape[1] <= KEEP
        self.prepared = [first, *(rule.prepare(piece) for piece in self.x[1:])] if keep else None

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.prepared or map(self.rule.prepare, self.x)

    def log_joint(self, parameters: Parameters) -> Tensor:
        """log p(x_i, z_i = k | θ, π) of all items at a single start's parameters: (B, K, D)."""
        log_joint_of = self.rule.score(parameters)
        return torch.cat([log_joint_of(prepared).squeeze(-2) for prepared in self], 1).transpose(-1, -2)

    def expect(self, parameters: Parameters) -> Expectation:
        """The E-step on all items."""
        log_joint_of = self.rule.score(parameters)
        parts = (self.rule.expect(log_joint_of, *piece) for piece in zip(self, self.weight, strict=True))
        return functools.reduce(operator.add, parts)

    def count(self, gamma: Tensor) -> Tensor:
        """The statistics of all items under γ (R, B, K, D)."""
        total: Tensor | None = None
        for prepared, part, weight in zip(self, gamma.split(PIECE, -1), self.weight, strict=True):
            weighted = part if weight is None else part * weight.unsqueeze(-2)
            counted = self.rule.count(prepared, weighted.permute(1, 3, 0, 2))
            total = counted if total is None else total + counted
        assert total is not None
        return total
