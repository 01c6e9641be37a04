"""Closed-form EM: the rules, one for each kind of model, and how they are found."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.models import Prior, SpatialMixture, decoders
from pnem.models.likelihoods import Likelihood

__all__ = ["Count", "EStep", "Expectation", "MStep", "Parameters", "find_m_step", "register_m_step"]

# From responsibilities times weights, (B, D, R, K), to the statistics (R, B, K, S) of those items.
Count = Callable[[Tensor], Tensor]
# From prepared items to log p(x_i, z_i = k), (B, D, R, K), and to what counts them.
EStep = Callable[[Tensor], tuple[Tensor, Count]]


class Parameters(NamedTuple):
    """What EM moves: θ (R, B, K, M) and log π (R, B, K), for R starts on B images."""

    theta: Tensor
    log_mixing: Tensor


class Expectation(NamedTuple):
    """What an E-step adds up over items: the evidence in nats, (R, B), and the sufficient statistics (R, B, K, S)."""

    evidence: Tensor
    statistics: Tensor

    def __add__(self, other: "Expectation") -> "Expectation":  # type: ignore[override]
        return Expectation(self.evidence + other.evidence, self.statistics + other.statistics)


class MStep(ABC):
    """Closed-form EM for one kind of model: register a subclass with `register_m_step`.

    The items are prepared once and seen in pieces, whose expectations add up: so EM streams, weighs items and runs
    many starts at once without any rule knowing of it.

    Args:
        model: the generative model.
        x: the items (B, D, C), or a sample of them, in double precision.
        missing: whether some values are NaN.
    """

    # Items of one piece: their statistics and responsibilities stay in the processor's cache.
    piece = 4096
    # Whether statistics must be about the same origin in all iterations, as online EM adds them up.
    about_origin = False
    # Whether θ is what is fitted; otherwise it is parameters of the model itself, common to all images.
    local = True

    def __init__(self, model: SpatialMixture, x: Tensor, *, missing: bool):
        self.model = model
        self.missing = missing

    @classmethod
    def choose(cls, model: SpatialMixture, *, missing: bool) -> "type[MStep]":
        """This rule, or one that serves the model better.

        Raises:
            StrategyError: the model cannot be fitted so.
        """
        return cls

    def order(self, x: Tensor) -> Tensor | None:
        """An order of items (B, D, C) in which pieces of them are cheaper: (D,); None for the one they have."""
        return None

    @abstractmethod
    def prepare(self, x: Tensor) -> Tensor:
        """What is computed once for items x (B, D, C): -> (B, D, anything)."""

    @abstractmethod
    def begin(self, prepared: Tensor) -> Count:
        """What counts prepared items before there are any parameters."""

    def centre_on(self, statistics: Tensor | None) -> bool:
        """Told what a pass of `begin` has counted, and None before it: whether to count again, about these means."""
        return False

    def agree(self) -> None:  # noqa: B027
        """Makes what `at` has learned from prepared items that of all processes, where the items are divided."""

    @abstractmethod
    def at(self, parameters: Parameters) -> EStep:
        """The E-step at these parameters."""

    @abstractmethod
    def maximise(self, statistics: Tensor) -> Parameters:
        """The parameters that maximise Q + log p(θ, π), from summed statistics (R, B, K, S)."""

    def expect(self, e_step: EStep, prepared: Tensor, weight: Tensor | None) -> Expectation:
        """The E-step on prepared items, each counted `weight` (B, D) times."""
        log_joint, count = e_step(prepared)
        # logsumexp and softmax in one, with a single exponential.
        largest = log_joint.amax(-1, keepdim=True)
        gamma = log_joint.sub_(largest).exp_()
        total = gamma.sum(-1, keepdim=True)
        gamma = gamma.div_(total)
        log_evidence = (largest + total.log_()).squeeze(-1)
        if weight is not None:
            gamma = gamma * weight[..., None, None]
            log_evidence = log_evidence * weight.unsqueeze(-1)
        return Expectation(log_evidence.sum(1).T, count(gamma))

    def log_prior(self, parameters: Parameters) -> Tensor:
        """log p(θ, π) in nats, (R, B): where images share π, divided among them."""
        theta, log_mixing = parameters
        log_prior = self.model.log_mixing_prior(log_mixing)
        if self.model.mixing_kind == "learned":
            log_prior = log_prior / log_prior.shape[-1]
        return log_prior if self.model.prior == "flat" else log_prior + self.model.log_prior(theta)

    def log_mixing(self, weight: Tensor) -> Tensor:
        """The most probable log π from what each component owns: (R, B, K) -> (R, B, K)."""
        if self.model.mixing_kind == "uniform":
            return torch.zeros_like(weight).log_softmax(-1)
        if self.model.mixing_kind == "learned":
            weight = weight.sum(1, keepdim=True).expand_as(weight)
        weight = weight + (self.model.mixing_concentration - 1)
        return (weight / weight.sum(-1, keepdim=True)).log()


Rule = TypeVar("Rule", bound=type[MStep])
_RULES: dict[tuple[type, type, type | str], type[MStep]] = {}


def register_m_step(
    decoder: type[decoders.Decoder], likelihood: type[Likelihood], prior: type[Prior] | str = "flat"
) -> Callable[[Rule], Rule]:
    """Registers the decorated `MStep` for models of these parts and their subclasses, as ``register_kl`` does."""

    def register(rule: Rule) -> Rule:
        _RULES[decoder, likelihood, prior] = rule
        return rule

    return register


def find_m_step(model: SpatialMixture) -> type[MStep]:
    """The rule registered for the closest base classes of the model's parts.

    Raises:
        StrategyError: there is none, or the model has an ownership term.
    """
    if model.owned:
        raise StrategyError(
            "no closed-form M-step for a model with ownership: leave pixel_prior out, or use GradientEM, or NEM or "
            "RNNEM with a neural decoder"
        )
    priors = [model.prior] if isinstance(model.prior, str) else type(model.prior).__mro__
    for decoder in type(model.decoder).__mro__:
        for likelihood in type(model.likelihood).__mro__:
            for prior in priors:
                if (decoder, likelihood, prior) in _RULES:
                    return _RULES[decoder, likelihood, prior]
    prior = model.prior if isinstance(model.prior, str) else type(model.prior).__name__
    raise StrategyError(
        f"no closed-form M-step for {type(model.decoder).__name__}, {type(model.likelihood).__name__} and the prior "
        f"{prior}: use GradientEM, or NEM or RNNEM with a neural decoder; MultivariateNormal or another exponential "
        "family with decoders.Constant; or add a rule by register_m_step"
    )
