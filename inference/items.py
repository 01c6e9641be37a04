"""Items in pieces, over which classical EM adds up."""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

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
        chunks: tensors (B, n, C), iterated once per E-step.
        weight: how often each item counts, (B, D); of a single chunk.
        seen: is told how many items have been seen.
    """

    def __init__(
        self,
        rule: MStep,
        chunks: Iterable[Tensor],
        weight: Tensor | None = None,
        seen: Callable[[int], None] | None = None,
    ):
        self.rule = rule
        self.chunks = chunks
        self.weight = weight
        self.seen = seen
        self.prepared: list[Tensor] | None = None
        if isinstance(chunks, list) and _fit(rule, chunks):
            self.prepared = [rule.prepare(piece) for chunk in chunks for piece in chunk.split(rule.piece, 1)]

    def shuffle(self) -> None:
        """Puts prepared items, and their weights, into a random order."""
        if self.prepared is not None:
            everything = torch.cat(self.prepared, 1)
            order = torch.randperm(everything.shape[1], device=everything.device)
            self.prepared = list(everything[:, order].split(self.rule.piece, 1))
            self.weight = None if self.weight is None else self.weight[:, order]

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
            yield from map(self.rule.prepare, chunk.double().split(self.rule.piece, 1))
            if self.seen is not None:
                self.seen(chunk.shape[1])

    def log_joint(self, parameters: Parameters) -> Tensor:
        """log p(x_i, z_i = k | θ, π) of all items at a single start's parameters: (B, K, D)."""
        e_step = self.rule.at(parameters)
        return torch.cat([e_step(prepared)[0].squeeze(-2) for prepared, _ in self], 1).transpose(-1, -2)

    def expect(self, parameters: Parameters) -> Expectation:
        """The E-step on all items, and log p(θ, π)."""
        e_step = self.rule.at(parameters)
        parts = (self.rule.expect(e_step, *piece) for piece in self)
        evidence, statistics = functools.reduce(operator.add, parts)
        return Expectation(evidence + self.rule.log_prior(parameters), statistics)

    def begin(self, gamma: Tensor) -> Tensor:
        """The statistics of all items under γ (R, B, K, D), before there are any parameters."""
        counted = []
        for (prepared, weight), part in zip(self, gamma.split(self.rule.piece, -1), strict=True):
            weighted = part if weight is None else part * weight.unsqueeze(-2)
            counted.append(self.rule.begin(prepared)(weighted.permute(1, 3, 0, 2)))
        return functools.reduce(operator.add, counted)


def _fit(rule: MStep, chunks: list[Tensor]) -> bool:
    few = rule.prepare(chunks[0][:, : rule.piece])
    items = sum(chunk.shape[0] * chunk.shape[1] for chunk in chunks)
    return few.element_size() * few.numel() / (few.shape[0] * few.shape[1]) * items <= KEEP


class Stream:
    """The items of one image in chunks (n, C), as images (1, n, C) on the model's device."""

    def __init__(self, chunks: Iterable[Tensor], model: SpatialMixture):
        if iter(chunks) is chunks:
            raise StrategyError("the chunks can be iterated only once: give a list, or an object that starts anew")
        self.chunks = chunks
        self.device = model.mixing_logits.device

    def __iter__(self) -> Iterator[Tensor]:
        for chunk in map(torch.as_tensor, self.chunks):
            if chunk.dim() != 2:
                raise StrategyError(f"a chunk of items must be (n, C), but has shape {tuple(chunk.shape)}")
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
    for chunk in stream:
        model.check(chunk if local else chunk.transpose(0, 1), missing=True)
        size += chunk.shape[1]
        missing = missing or bool(chunk.isnan().any())
        # Every item draws a key, and those with the smallest keys stay.
        candidates = chunk.double() if kept is None else torch.cat([kept, chunk.double()], 1)
        keys = torch.cat([keys, torch.rand(chunk.shape[1], dtype=torch.float64)])
        keys, order = keys.topk(min(SAMPLE, len(keys)), largest=False)
        kept = candidates[:, order.to(candidates.device)]
    if kept is None or size < 1:
        raise StrategyError("there are no items: give at least one")
    return Survey(size, missing, kept)
