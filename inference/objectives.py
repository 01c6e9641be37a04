"""Training objectives: what `fit` minimises over an unrolled strategy."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.inference.posterior import State
from pnem.inference.strategy import Strategy
from pnem.models import Configured

__all__ = ["ELBO", "Losses", "NEMLoss", "Objective"]


class Losses(NamedTuple):
    """What an objective returns: the scalar to minimise, and the ELBO after the last iteration (B,), both in nats.

    Of sequences the ELBO is the mean over frames.
    """

    loss: Tensor
    elbo: Tensor


class Objective(Configured, ABC):
    """A loss in nats per image: a weighted mean over iterations of a term that each iteration contributes.

    Of sequences, whose iterations are frames, in nats per frame.

    Args:
        weights: ``"last"``; ``"all"`` (equal); ``"ramp"`` (t/T); or one non-negative number per iteration. They are
            scaled to sum to one, so that the loss stays in nats per image.

    Raises:
        StrategyError: unknown weights, negative ones, or none above zero.
    """

    def __init__(self, weights: str | Sequence[float] = "last"):
        if isinstance(weights, str):
            if weights not in ("last", "all", "ramp"):
                raise StrategyError(f'weights must be "last", "all", "ramp" or a sequence, but is {weights!r}')
        elif not all(0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
            raise StrategyError(f"weights must be finite, at least 0 and not all 0, but are {tuple(weights)}")
        self.weights = weights

    @abstractmethod
    def loss_at(self, strategy: Strategy, state: State, x: Tensor) -> Tensor:
        """The loss of one iteration, whose state is of an E-step on `x`, in nats per image: (B,)."""

    def __call__(self, strategy: Strategy, states: Sequence[State], x: Tensor) -> Losses:
        """The losses of an unroll on images `x` (B, D, C), or on sequences (T, B, D, C).

        Raises:
            StrategyError: as many weights as iterations were expected, but others were given.
        """
        weights, targets = self.step_weights(len(states)), strategy.targets(x, len(states))
        terms = [
            weight * self.loss_at(strategy, state, target).mean()
            for weight, state, target in zip(weights, states, targets, strict=True)
            if weight > 0
        ]
        if strategy.is_sequential:
            elbo = torch.stack([strategy.elbo(state) for state in states]).mean(0)
        else:
            elbo = strategy.elbo(states[-1])
        return Losses(torch.stack(terms).sum(), elbo)

    def step_weights(self, iterations: int) -> list[float]:
        """The weight of each of T iterations; they sum to one."""
        if self.weights == "last":
            raw = [0.0] * (iterations - 1) + [1.0]
        elif self.weights == "all":
            raw = [1.0] * iterations
        elif self.weights == "ramp":
            raw = [float(t) for t in range(1, iterations + 1)]
        else:
            raw = [float(w) for w in self.weights]
        if len(raw) != iterations:
            raise StrategyError(f"{len(raw)} weights were given for {iterations} iterations: give one for each")
        return [w / sum(raw) for w in raw]


class ELBO(Objective):
    """Minus the strategy's ELBO, z summed out exactly.

    With ``"last"`` it is what Pyro's ``TraceEnum_ELBO`` computes for the same model and guide, divided by the number
    of images. With a Delta guide and a flat prior it is minus the log-likelihood that EM climbs.
    """

    def loss_at(self, strategy: Strategy, state: State, x: Tensor) -> Tensor:  # noqa: D102
        return -strategy.elbo(state)


class NEMLoss(Objective):
    r"""N-EM's own training loss (Greff et al. 2017, eq. 6), with the γ of the strategy's E-step.

        L = Σ_i Σ_k −γ_{k,i} log p(x_i | ψ_{k,i}) + w (1 − γ_{k,i}) KL(P₀ ‖ p(· | ψ_{k,i}))

    where the KL is taken between distributions of the likelihood's own family. It is minus Q of the ownership model
    up to terms of π and of P₀ alone, and is computed so, from the state's log joint; with consistent γ it differs
    from minus the ELBO by these and the entropy of γ.

    Raises:
        StrategyError: the model has no pixel prior.
    """

    def loss_at(self, strategy: Strategy, state: State, x: Tensor) -> Tensor:  # noqa: D102
        model = strategy.model
        if model.pixel_prior is None:
            raise StrategyError("NEMLoss needs a pixel prior: give SpatialMixture(..., pixel_prior=...)")
        # As γ sums to one, the terms of what a component does not own are those in the log joint.
        q = (state.gamma * (state.log_joint - state.log_mixing.unsqueeze(-1))).sum((-2, -1))
        unowned_pixels = (model.num_components - 1) * state.gamma.shape[-1]
        return model.ownership * unowned_pixels * model.likelihood.saturated_log_prob(model.pixel_prior) - q
