"""Stepwise online EM: an M-step after every few items, for data that are many."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pnem.inference.classical_em import ClassicalEM
from pnem.inference.errors import StrategyError
from pnem.inference.items import Items
from pnem.inference.m_steps import Parameters
from pnem.models import SpatialMixture

__all__ = ["OnlineEM"]

TINY = 1e-300


class OnlineEM(ClassicalEM):
    r"""`ClassicalEM` that follows a running mean of the sufficient statistics (Cappé & Moulines 2009).

    After every piece of 4,096 items (1,024 where matrices depend on what is missing), whose statistics are ŝ,

        s ← (1 − ρ_t) s + ρ_t ŝ,      ρ_t = (t + delay)^(−exponent),      θ = M-step(s)

    so that a pass over the data takes many M-steps and a few passes do what many iterations of EM do. Items should come
    in no order: in memory they are shuffled once; for a file use `pnem.data.Rows(..., shuffle=True)`.

    Its sums are about one origin, the median, so that components more than some 10⁶ of their σ from it lose digits,
    which `ClassicalEM` would keep.

    An iteration is a pass. Its evidence is that which every piece had before it was learned from. Near the optimum it
    differs from pass to pass by noise: that it falls, too, counts as convergence.

    Args:
        model: the generative model.
        iterations: at most this many passes.
        tol: stop when the evidence rises by less than this from pass to pass, in nats per item.
        initial: where to start, see `ClassicalEM`.
        exponent: how fast steps become small: more than 0.5, at most 1, which weighs all pieces alike.
        delay: how many pieces the first step is as small as after.

    Raises:
        StrategyError: an exponent or delay outside its range, or as `ClassicalEM`.
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        iterations: int = 10,
        tol: float = 1e-3,
        initial: str = "k-means++",
        exponent: float = 0.7,
        delay: float = 2.0,
    ):
        super().__init__(model, iterations=iterations, tol=tol, initial=initial)
        if not 0.5 < exponent <= 1:
            raise StrategyError(f"exponent must be more than 0.5 and at most 1, but is {exponent}")
        if not 0 <= delay < float("inf"):
            raise StrategyError(f"delay must be at least 0 and finite, but is {delay}")
        self.exponent = exponent
        self.delay = delay

    monotone = False
    divisible = False

    def _iterate(
        self, items: Items, parameters: Parameters, count: Tensor | int
    ) -> Iterator[tuple[Tensor, Parameters]]:
        items.shuffle()
        items.rule.about_origin = True
        device = parameters.theta.device
        # Statistics are of all items, so that priors weigh against them as they should.
        scale = torch.as_tensor(count, dtype=torch.float64, device=device).reshape(-1, 1, 1)
        mean: Tensor | None = None
        seen = torch.zeros_like(scale)
        step = 0
        while True:
            evidence: Tensor | None = None
            for prepared, weight in items:
                step += 1
                expectation = items.rule.expect(items.rule.at(parameters), prepared, weight)
                evidence = expectation.evidence if evidence is None else evidence + expectation.evidence
                items_here = prepared.shape[1] if weight is None else weight.sum(-1)
                size = torch.as_tensor(items_here, dtype=torch.float64, device=device).reshape(-1, 1, 1)
                seen = seen + size
                # A piece of fewer items than usual is a smaller step.
                share = (size * step / seen.clamp_min(TINY)).clamp_max(1)
                rate = share * (step + self.delay) ** -self.exponent if step > 1 else torch.ones_like(share)
                update = expectation.statistics / size.clamp_min(TINY)
                mean = update if mean is None else (1 - rate) * mean + rate * update
                parameters = items.rule.maximise(mean * scale)
            assert evidence is not None
            yield evidence + items.rule.log_prior(parameters), parameters
