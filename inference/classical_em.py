"""Classical EM: the M-step in closed form, until the evidence rises no more."""

import warnings

import torch
from torch import Tensor

from pnem.inference.errors import StrategyError
from pnem.inference.items import Items
from pnem.inference.m_steps import Parameters, find_m_step
from pnem.inference.posterior import Posterior, State
from pnem.inference.starts import nearest, seeds
from pnem.inference.strategy import Strategy, check_starts
from pnem.models import SpatialMixture
from pnem.models.errors import ModelError

__all__ = ["INITS", "ClassicalEM", "ConvergenceWarning"]

INITS = ("k-means++", "random", "points")


class ConvergenceWarning(UserWarning):
    """EM stopped at its last iteration while the evidence was still rising."""


class ClassicalEM(Strategy):
    r"""Expectation maximisation with a closed-form M-step (Dempster, Laird & Rubin 1977).

    The E-step is that of the model, γ_{k,i} = p(z_i = k | x_i, θ); the M-step maximises

        Q(θ, π) = Σ_i Σ_k γ_{k,i} log p(x_i, z_i = k | θ, π)

    exactly, by the rule registered for the model's decoder and likelihood (`register_m_step`), so that log p(x | θ)
    never falls (but for a floor of the likelihood, which can make it). θ and, where the model learns them, the mixing
    weights are fitted for the images at hand;
    there is nothing to train.

    Args:
        model: the generative model.
        iterations: at most this many.
        tol: stop when the evidence rises by less than this, in nats per item.
        initial: where to start: ``"k-means++"``: items nearest to seeds far from one another (Arthur & Vassilvitskii
            2007); ``"random"``: random responsibilities; ``"points"``: items nearest to random items.

    Raises:
        StrategyError: no rule is registered for the model; iterations < 1, a negative tol, or an unknown start.

    >>> from pnem.models import MultivariateNormal, SpatialMixture, decoders
    >>> normal = MultivariateNormal("full")
    >>> model = SpatialMixture(decoders.Constant(normal.num_parameters(2)), normal, 3, mixing="learned")
    >>> posterior = ClassicalEM(model).infer(torch.randn(1, 500, 2), restarts=5)
    >>> posterior.gamma.shape
    torch.Size([1, 3, 500])
    """

    def __init__(self, model: SpatialMixture, *, iterations: int = 100, tol: float = 1e-3, initial: str = "k-means++"):
        super().__init__(model, iterations=iterations)
        if not tol >= 0:
            raise StrategyError(f"tol must be at least 0, but is {tol}")
        if initial not in INITS:
            raise StrategyError(f"initial must be one of {', '.join(INITS)}, but is {initial!r}")
        self.rule = find_m_step(model)
        self.tol = tol
        self.initial = initial

    def forward(self, x: Tensor) -> Tensor:
        """The Pyro guide: fits images `x` (B, D, C), and with them the model's mixing weights; a Delta at θ."""
        return self.guide_at(self.infer(x))()

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self._maximise(state.gamma, x_in).theta[0]

    def step(self, state: State, x_in: Tensor, x: Tensor) -> State:  # noqa: D102
        return self._state(self._maximise(state.gamma, x_in), self._items(x))

    def _items(self, x: Tensor, weight: Tensor | None = None) -> Items:
        # Single precision cannot hold the second moments of clusters that are far apart.
        x = x.double()
        return Items(self.rule(self.model, x), x, None if weight is None else weight.double())

    def _maximise(self, gamma: Tensor, x: Tensor) -> Parameters:
        items = self._items(x)
        return items.rule.maximise(items.count(gamma.double().unsqueeze(0)))

    def _state(self, parameters: Parameters, items: Items) -> State:
        """The E-step at the parameters of a single start, in the model's precision."""
        theta, log_mixing = parameters.theta[0], parameters.log_mixing[0]
        log_joint = items.log_joint(parameters)
        psi = self.model.decode(theta)
        mean = self.model.likelihood.mean(psi)
        mean, psi = (value.expand(*value.shape[:-2], log_joint.shape[-1], value.shape[-1]) for value in (mean, psi))
        state = State(theta, mean, psi, log_joint.softmax(-2), log_joint, log_mixing)
        return State(*(value.to(self.model.mixing_logits.dtype) for value in state))

    def infer(
        self,
        x: Tensor,
        *,
        restarts: int = 1,
        iterations: int | None = None,
        gamma: Tensor | None = None,
        keep_trace: bool = False,
        theta: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Posterior:
        """EM on images `x` (B, D, C) until it converges, from R starts at once; the best of each image is kept.

        The model's mixing weights, where it learns them, become the fitted ones.

        Args:
            x: the images: B fits, independent but for the mixing weights if these are ``"learned"``.
            restarts: R.
            iterations: at most this many; the strategy's when None.
            gamma: initial responsibilities (B, K, D), in place of `initial`.
            keep_trace: must be False: a fit of many iterations has no room for all its states.
            theta: initial θ (B, K, M), at the model's mixing weights, in place of `initial`.
            weight: how often each item counts, (B, D).

        Returns:
            The posterior at the parameters of the last M-step; its `elbo_trace` is the evidence, with items counted by
            their weights, that each E-step saw.

        Raises:
            ModelError: `x` does not fit the model.
            StrategyError: restarts or iterations < 1, restarts > 1 from a given start, or a start or weights of the
                wrong shape, or no items.

        Warns:
            ConvergenceWarning: the evidence was still rising by more than tol after the last iteration.
        """
        if self.model.mixing_kind == "per_image" and theta is None:
            # Those of the images fitted before.
            self.model.set_log_mixing(x.new_zeros(len(x), self.model.num_components))
        self.model.check(x)
        iterations = self.iterations if iterations is None else iterations
        self._check(x, restarts, iterations, gamma, theta, weight)
        if keep_trace:
            raise StrategyError("classical EM keeps no trace: leave keep_trace out")
        with torch.no_grad():
            items = self._items(x, weight)
            parameters = self._start(items, x.double(), restarts, gamma, theta, weight)
            count = x.shape[-2] if weight is None else weight.sum(-1)
            evidence: list[Tensor] = []
            rise = torch.full((), torch.inf)
            while len(evidence) < iterations and bool((rise >= self.tol).any()):
                expectation = items.expect(parameters)
                evidence.append(expectation.evidence)
                parameters = items.rule.maximise(expectation.statistics)
                if len(evidence) > 1:
                    rise = (evidence[-1] - evidence[-2]) / count
            self._warn(len(evidence), rise[rise.isfinite()])
            return self._posterior(parameters, torch.stack(evidence), items)

    def _warn(self, iterations: int, rise: Tensor) -> None:
        """Warns unless the last rise of the evidence in nats per item, of every finite start, is within tol of zero."""
        if iterations > 1 and bool((rise.abs() <= max(self.tol, 1e-9)).all()):
            return
        if iterations == 1:
            change = "was seen only once"
        elif bool((rise > self.tol).any()):
            change = f"still rises by {rise.max().item():.2g} nats per item"
        else:
            change = f"fell by {-rise.min().item():.2g} nats per item, as a floor of the likelihood can make it"
        warnings.warn(
            f"after {iterations} iterations the evidence {change} (tol={self.tol:.2g}): allow more iterations, or "
            "change tol or the floor",
            ConvergenceWarning,
            stacklevel=3,
        )

    def _check(
        self,
        x: Tensor,
        restarts: int,
        iterations: int,
        gamma: Tensor | None,
        theta: Tensor | None,
        weight: Tensor | None,
    ) -> None:
        B, D, K, M = len(x), x.shape[-2], self.model.num_components, self.model.latent_features
        check_starts(restarts, iterations, given=gamma is not None or theta is not None)
        if B * D < 1:
            raise StrategyError(f"x has shape {tuple(x.shape)}: give at least one item")
        given = {"gamma": (gamma, (B, K, D)), "theta": (theta, (B, K, M)), "weight": (weight, (B, D))}
        for name, (value, shape) in given.items():
            if value is not None and value.shape != shape:
                raise StrategyError(f"{name} has shape {tuple(value.shape)}, but these images need {shape}")
            if value is not None and not bool(value.isfinite().all()):
                raise StrategyError(f"{name} holds values that are NaN or infinite")
        if gamma is not None and not bool((gamma >= 0).all() & (gamma.sum((-1, -2)) > 0).all()):
            raise StrategyError("gamma must be at least 0 and not all 0")
        if weight is not None and not bool((weight >= 0).all() & (weight.sum(-1) > 0).all()):
            raise StrategyError("weights must be at least 0 and not all 0")

    def _start(
        self,
        items: Items,
        x: Tensor,
        restarts: int,
        gamma: Tensor | None,
        theta: Tensor | None,
        weight: Tensor | None,
    ) -> Parameters:
        B, D, K = len(x), x.shape[-2], self.model.num_components
        if theta is not None:
            return Parameters(theta.double().unsqueeze(0), self.model.log_mixing.double().expand(1, B, K))
        if gamma is not None:
            weighted = gamma.double().unsqueeze(0)
        elif self.initial == "random":
            weighted = x.new_empty(restarts, B, K, D).normal_().abs_()
            weighted /= weighted.sum(-2, keepdim=True)
        else:
            chance = x.new_ones(B, D) if weight is None else weight.double()
            far = self.initial == "k-means++"
            weighted = torch.stack([nearest(x, seeds(x, chance, K, far=far)) for _ in range(restarts)])
        return items.rule.maximise(items.count(weighted))

    def _posterior(self, parameters: Parameters, evidence: Tensor, items: Items) -> Posterior:
        """The best start of each image: evidence (T, R, B)."""
        B = evidence.shape[-1]
        # Starts that share mixing weights between images stand or fall together.
        final = (
            evidence[-1].sum(-1, keepdim=True).expand(-1, B) if self.model.mixing_kind == "learned" else evidence[-1]
        )
        final = final.masked_fill(~final.isfinite(), -torch.inf)
        if bool(final.amax(0).isinf().any()):
            raise ModelError(
                "no start kept a finite evidence: a component's covariance is not positive definite where its items "
                "are equal or lie in a plane; use a larger floor, fewer components, or a simpler covariance"
            )
        best, images = final.argmax(0), torch.arange(B, device=evidence.device)
        chosen = Parameters(*(value[best, images].unsqueeze(0) for value in parameters))
        self.model.set_log_mixing(chosen.log_mixing[0])
        state = self._state(chosen, items)
        return Posterior.from_states([state], evidence[:, best, images].to(state.gamma.dtype), keep_trace=False)
