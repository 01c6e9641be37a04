"""Closed-form EM: for each kind of model its E-step on items and the M-step from what that adds up to."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.models import SpatialMixture, decoders
from pnem.models.likelihoods import ExponentialFamily, Likelihood

__all__ = ["Expectation", "MStep", "Parameters", "find_m_step", "register_m_step"]


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
    """

    def __init__(self, model: SpatialMixture, x: Tensor):
        self.model = model

    @abstractmethod
    def prepare(self, x: Tensor) -> Tensor:
        """What is computed once for items x (B, D, C): -> (B, D, anything)."""

    @abstractmethod
    def score(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        """The function from prepared items to log p(x_i, z_i = k | θ, π), (B, D, R, K), at these parameters."""

    def expect(self, log_joint_of: Callable[[Tensor], Tensor], prepared: Tensor, weight: Tensor | None) -> Expectation:
        """The E-step on prepared items, each counted `weight` (B, D) times."""
        log_joint = log_joint_of(prepared)
        # logsumexp and softmax in one, with a single exponential.
        largest = log_joint.amax(-1, keepdim=True)
        gamma = log_joint.sub_(largest).exp_()
        total = gamma.sum(-1, keepdim=True)
        gamma = gamma.div_(total)
        log_evidence = (largest + total.log_()).squeeze(-1)
        if weight is not None:
            gamma = gamma * weight[..., None, None]
            log_evidence = log_evidence * weight.unsqueeze(-1)
        return Expectation(log_evidence.sum(1).T, self.count(prepared, gamma))

    @abstractmethod
    def count(self, prepared: Tensor, gamma: Tensor) -> Tensor:
        """The statistics (R, B, K, S) of prepared items under γ, times their weights: (B, D, R, K)."""

    @abstractmethod
    def maximise(self, statistics: Tensor) -> Parameters:
        """The parameters that maximise Q, from summed statistics (R, B, K, S)."""


Rule = TypeVar("Rule", bound=type[MStep])
_RULES: dict[tuple[type, type], type[MStep]] = {}


def register_m_step(decoder: type[decoders.Decoder], likelihood: type[Likelihood]) -> Callable[[Rule], Rule]:
    """Registers the decorated `MStep` for models of these parts and their subclasses, as ``register_kl`` does."""

    def register(rule: Rule) -> Rule:
        _RULES[decoder, likelihood] = rule
        return rule

    return register


def find_m_step(model: SpatialMixture) -> type[MStep]:
    """The rule registered for the closest base classes of the model's parts.

    Raises:
        StrategyError: there is none, or the model has an ownership term or a prior on θ.
    """
    if model.owned or model.prior != "flat":
        raise StrategyError(
            "no closed-form M-step for a model with ownership or a prior on θ: leave pixel_prior and prior out, or use "
            "NEM or RNNEM with a neural decoder"
        )
    for decoder in type(model.decoder).__mro__:
        for likelihood in type(model.likelihood).__mro__:
            if (decoder, likelihood) in _RULES:
                return _RULES[decoder, likelihood]
    raise StrategyError(
        f"no closed-form M-step for {type(model.decoder).__name__} and {type(model.likelihood).__name__}: use NEM or "
        "RNNEM with a neural decoder, an exponential family with a constant one, or add a rule by register_m_step"
    )


@register_m_step(decoders.Constant, ExponentialFamily)  # type: ignore[type-abstract]
class MatchMoments(MStep):
    """The M-step of every exponential family: match the γ-weighted mean of T(x).

    Both steps are one matrix product against [T(x), 1], of items taken relative to an origin among them.
    """

    def __init__(self, model: SpatialMixture, x: Tensor):
        super().__init__(model, x)
        assert isinstance(model.likelihood, ExponentialFamily)
        self.family = model.likelihood
        self.origin = self.family.origin(x)

    def prepare(self, x: Tensor) -> Tensor:
        x = x - self.origin
        base = self.family.log_base_measure(x).unsqueeze(-1)
        return torch.cat([self.family.statistics(x), torch.ones_like(base), base], -1)

    def score(self, parameters: Parameters) -> Callable[[Tensor], Tensor]:
        R, _, K, _ = parameters.theta.shape
        eta, log_partition = self.family.natural(self.family.translate(parameters.theta, -self.origin))
        constant = (parameters.log_mixing - log_partition).unsqueeze(-1)
        # [η, log π − A, 1] against [T(x), 1, log h(x)].
        coefficients = torch.cat([eta, constant, torch.ones_like(constant)], -1).transpose(0, 1).flatten(1, 2)
        coefficients = coefficients.transpose(-1, -2).contiguous()
        return lambda prepared: (prepared @ coefficients).unflatten(-1, (R, K))

    def count(self, prepared: Tensor, gamma: Tensor) -> Tensor:
        statistics = gamma.flatten(-2).transpose(-1, -2) @ prepared[..., :-1]
        return statistics.unflatten(1, gamma.shape[-2:]).transpose(0, 1)

    def maximise(self, statistics: Tensor) -> Parameters:
        total, weight = statistics[..., :-1], statistics[..., -1]
        # A component that owns nothing gets the parameters of the whole, at a weight of zero.
        empty = (weight <= torch.finfo(weight.dtype).eps * weight.sum(-1, keepdim=True)).unsqueeze(-1)
        whole = total.sum(-2, keepdim=True) / weight.sum(-1)[..., None, None]
        mean = torch.where(empty, whole, total / weight.unsqueeze(-1))
        theta = self.family.translate(self.family.match(mean, weight), self.origin)
        return Parameters(theta, self._log_mixing(weight))

    def _log_mixing(self, weight: Tensor) -> Tensor:
        if self.model.mixing_kind == "uniform":
            return torch.zeros_like(weight).log_softmax(-1)
        if self.model.mixing_kind == "learned":
            weight = weight.sum(1, keepdim=True).expand_as(weight)
        return (weight / weight.sum(-1, keepdim=True)).log()
