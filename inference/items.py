"""Items in pieces, over which classical EM adds up."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.inference.collectives import summed
from pnem.inference.errors import StrategyError
from pnem.inference.m_steps import Expectation, MStep, Parameters
from pnem.models import SpatialMixture

__all__ = ["Items", "Stream", "Survey", "survey"]

# Bytes of prepared items that are kept from one iteration to the next.
KEEP = 2**30
# Items of a stream that starts are made from.
SAMPLE = 2**16


class Items:
    """Items of B images, (B, D, C), in pieces.

    Args:
        rule: what is to be added up.
        chunks: a list of one tensor (B, D, C); or a stream of (B, n, C), iterated once per E-step.
        weight: how often each item counts, (B, D); not of a stream.
        seen: is told how many items have been seen.
        shared: whether they are this process's share of items that are divided among several: sums are then over all.
    """

    def __init__(
        self,
        rule: MStep,
        chunks: Iterable[Tensor],
        weight: Tensor | None = None,
        seen: Callable[[int], None] | None = None,
        *,
        shared: bool = False,
    ):
        self.rule = rule
        self.chunks = chunks
        self.weight = weight
        self.seen = seen
        self.shared = shared
        self.prepared: list[Tensor] | None = None
        # Where the items of a single chunk, as pieces go through them, stand in it.
        self.order: Tensor | None = None
        if isinstance(chunks, list):
            self._arrange(rule.order(chunks[0]))
            (x,) = self.chunks
            if _fit(rule, x):
                self.prepared = list(map(rule.prepare, x.split(rule.piece, 1)))

    def _arrange(self, order: Tensor | None) -> None:
        """Puts the items of a single chunk, and their weights, into another order."""
        if order is not None and isinstance(self.chunks, list):
            self.chunks = [self.chunks[0][:, order]]
            self.weight = None if self.weight is None else self.weight[:, order]
            self.order = order if self.order is None else self.order[order]
            if self.prepared is not None:
                self.prepared = list(torch.cat(self.prepared, 1)[:, order].split(self.rule.piece, 1))

    def shuffle(self) -> None:
        """Puts the items of a single chunk into a random order."""
        if isinstance(self.chunks, list):
            self._arrange(torch.randperm(self.chunks[0].shape[1], device=self.chunks[0].device))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Prepared pieces with their weights."""
        pieces: Iterable[Tensor] = self.prepared or self._pieces()
        if self.weight is None:
            for prepared in pieces:
                yield prepared, None
        else:
            yield from zip(pieces, self.weight.split(self.rule.piece, 1), strict=True)

    def _pieces(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            order = None if isinstance(self.chunks, list) else self.rule.order(chunk)
            arranged = chunk if order is None else chunk[:, order]
            yield from map(self.rule.prepare, arranged.double().split(self.rule.piece, 1))
            if self.seen is not None:
                self.seen(chunk.shape[1])

    def log_joint(self, parameters: Parameters) -> Tensor:
        """log p(x_i, z_i = k | θ, π) of all items at a single start's parameters: (B, K, D)."""
        e_step = self.rule.at(parameters)
        log_joint = torch.cat([e_step(prepared)[0].squeeze(-2) for prepared, _ in self], 1).transpose(-1, -2)
        return log_joint if self.order is None else torch.empty_like(log_joint).index_copy_(-1, self.order, log_joint)

    def expect(self, parameters: Parameters) -> Expectation:
        """The E-step on all items, and log p(θ, π)."""
        if self.shared:
            self.rule.agree()
        e_step = self.rule.at(parameters)
        parts = (self.rule.expect(e_step, *piece) for piece in self)
        evidence, statistics = functools.reduce(operator.add, parts)
        if self.shared:
            evidence, statistics = summed(evidence), summed(statistics)
        return Expectation(evidence + self.rule.log_prior(parameters), statistics)

    def begin(self, gamma: Tensor) -> Tensor:
        """The statistics (1, B, K, S) of all items under γ (B, K, D), before there are any parameters."""
        gamma = gamma if self.order is None else gamma[..., self.order]
        self.rule.centre_on(None)
        statistics = self._begin(gamma)
        return self._begin(gamma) if self.rule.centre_on(statistics) else statistics

    def _begin(self, gamma: Tensor) -> Tensor:
        counted = []
        for (prepared, weight), part in zip(self, gamma.split(self.rule.piece, -1), strict=True):
            weighted = part if weight is None else part * weight.unsqueeze(-2)
            counted.append(self.rule.begin(prepared)(weighted.permute(0, 2, 1).unsqueeze(2)))
        statistics: Tensor = functools.reduce(operator.add, counted)
        return summed(statistics) if self.shared else statistics


def _fit(rule: MStep, x: Tensor) -> bool:
    one = rule.prepare(x[:1, :1])
    return one.element_size() * one.numel() * x.shape[0] * x.shape[1] <= KEEP


class Stream:
    """The items of one image in chunks (n, C), as images (1, n, C) on the model's device."""

    def __init__(self, chunks: Iterable[Tensor], model: SpatialMixture):
        if iter(chunks) is chunks:
            raise StrategyError("the chunks can be iterated only once: give a list, or an object that starts anew")
        self.chunks = chunks
        self.device = model.mixing_logits.device

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in self.chunks:
            if not isinstance(chunk, Tensor) or chunk.dim() != 2:
                got = tuple(chunk.shape) if isinstance(chunk, Tensor) else type(chunk).__name__
                raise StrategyError(f"a chunk of items must be a tensor (n, C), but is {got}")
            if len(chunk):
                yield chunk.to(self.device).unsqueeze(0)


class Survey(NamedTuple):
    """What one look at a stream of items finds: how many, whether values are missing, and a sample, (1, n, C)."""

    size: int
    missing: bool
    sample: Tensor


def survey(stream: Stream, model: SpatialMixture, *, local: bool) -> Survey:
    """Checks all items of a stream and draws a sample of them without replacement.

    Raises:
        ModelError: items do not fit the model.
        StrategyError: there are none.
    """
    size, missing = 0, False
    kept, keys = None, torch.empty(0, dtype=torch.float64)
    # The first item of every channel that has it.
    first: dict[int, Tensor] = {}
    for chunk in stream:
        model.check(chunk if local else chunk.transpose(0, 1), missing=True, new=True)
        size += chunk.shape[1]
        there = ~chunk[0].isnan()
        missing = missing or not bool(there.all())
        for channel in there.any(0).nonzero().flatten().tolist():
            if channel not in first:
                first[channel] = chunk[:, int(there[:, channel].long().argmax()), None].double()
        # Every item draws a key, and those with the smallest keys stay.
        candidates = chunk.double() if kept is None else torch.cat([kept, chunk.double()], 1)
        keys = torch.cat([keys, torch.rand(chunk.shape[1], dtype=torch.float64)])
        keys, order = keys.topk(min(SAMPLE, len(keys)), largest=False)
        kept = candidates[:, order.to(candidates.device)]
    if kept is None or size < 1:
        raise StrategyError("there are no items: give at least one")
    for channel, nothing in enumerate(kept.isnan().all(1)[0].tolist()):
        if channel not in first:
            raise StrategyError(f"channel {channel} has no value at all, only NaN: leave it out")
        if nothing:
            kept = torch.cat([kept, first[channel]], 1)
    return Survey(size, missing, kept)
