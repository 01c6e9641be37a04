"""Classical EM: the M-step in closed form, until the evidence rises no more."""

from collections.abc import Iterable, Iterator

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference.checks import check_starts
from pnem.inference.collectives import of_first, rank
from pnem.inference.convergence import Fit, best_start, has_converged
from pnem.inference.errors import StrategyError
from pnem.inference.factor_analysis import FactorAnalysis, posterior_of_factors
from pnem.inference.items import Items, Stream
from pnem.inference.m_steps import MStep, Parameters, find_m_step
from pnem.inference.posterior import Posterior, State
from pnem.inference.progress import Progress
from pnem.inference.shares import Seen, fail_together, look, put_together, require_group
from pnem.inference.starts import INITS, first_parameters
from pnem.inference.strategy import Strategy
from pnem.models import SpatialMixture
from pnem.models.closed_forms import assignments
from pnem.models.errors import PnemError

__all__ = ["ClassicalEM"]

FITS_NOTHING = "with a linear decoder infer fits nothing: leave all but x out, or use fit"


class ClassicalEM(Strategy):
    r"""Expectation maximisation with a closed-form M-step (Dempster, Laird & Rubin 1977).

    The E-step is that of the model, γ_{k,i} = p(z_i = k | x_i, θ); the M-step maximises

        Q(θ, π) = Σ_i Σ_k γ_{k,i} log p(x_i, z_i = k | θ, π)   + log p(θ, π) where the model has priors

    exactly, by the rule registered for the model's decoder, likelihood and prior (`register_m_step`), so that
    log p(x | θ, π) + log p(θ, π) never falls (but for a floor of the likelihood, which can make it, and for rounding
    where a component holds items beyond 10⁸ of its σ). Channels of x
    that are NaN are missing: they are summed or integrated out exactly.

    With `decoders.Constant`, θ and π are fitted for the images at hand, by `infer` and `fit` alike: there is nothing
    to train. With `decoders.Linear`, one component, `Normal` pixels and a standard-normal prior (factor analysis,
    probabilistic PCA), `fit` finds the model's own parameters with θ integrated out, and `infer` the exact posterior
    of θ under them.

    Args:
        model: the generative model.
        iterations: at most this many.
        tol: stop when the evidence rises by less than this, in nats per item.
        initial: where to start: ``"k-means++"``: items nearest to seeds far from one another (Arthur & Vassilvitskii
            2007); ``"random"``: random responsibilities, from which components that begin alike part slowly, so that
            tol must be small; ``"points"``: items nearest to random items. Loadings of factor analysis start at random.

    Raises:
        StrategyError: no rule is registered for the model; iterations < 1, a negative tol, or an unknown start.

    >>> from pnem.models import MultivariateNormal, SpatialMixture, decoders
    >>> normal = MultivariateNormal("full")
    >>> model = SpatialMixture(decoders.Constant(normal.num_parameters(2)), normal, 3, mixing="learned")
    >>> posterior = ClassicalEM(model).infer(torch.randn(1, 500, 2), restarts=5)
    >>> posterior.gamma.shape
    torch.Size([1, 3, 500])
    """

    monotone = True
    # Whether its items may be divided among processes, which takes sums over all of them.
    divisible = True

    def __init__(self, model: SpatialMixture, *, iterations: int = 100, tol: float = 1e-3, initial: str = "k-means++"):
        super().__init__(model, iterations=iterations)
        if not tol >= 0:
            raise StrategyError(f"tol must be at least 0, but is {tol}")
        if initial not in INITS:
            raise StrategyError(f"initial must be one of {', '.join(INITS)}, but is {initial!r}")
        self.rule = find_m_step(model)
        self.rule.choose(model, missing=False)
        self.tol = tol
        self.initial = initial

    def fit(
        self,
        x: Tensor | Iterable[Tensor],
        *,
        restarts: int = 1,
        iterations: int | None = None,
        gamma: Tensor | None = None,
        theta: Tensor | None = None,
        weight: Tensor | None = None,
        progress: bool = False,
        distributed: bool = False,
    ) -> Fit:
        """EM until it converges, from R starts at once; the best of each image is kept.

        What is the model's own (learned mixing weights, a linear decoder) becomes the fitted one.

        With `distributed`, every process of the default torch.distributed group calls it with its share of the items of
        every image (of the images, with a linear decoder), and all find what one process would with the items of all,
        to rounding: sufficient statistics and evidence are summed. They start where the process of rank 0 does, by its
        random numbers, from a sample of up to 65,536 items of all: all, where there are no more. Each share needs a
        value of every channel. What is invalid in one process is raised in all.

        Args:
            x: the images (B, D, C): B fits, independent but for what is the model's own. Or the items of one image in
                chunks (n, C), as `pnem.data.Rows`, iterated once per iteration: memory does not grow with
                their number, and the result is the same but for where it starts, which a sample of 65,536 decides.
            restarts: R.
            iterations: at most this many; the strategy's when None.
            gamma: initial responsibilities (B, K, D), in place of `initial`.
            theta: initial θ (B, K, M), at the model's mixing weights, in place of `initial`.
            weight: how often each item counts, (B, D); not for chunks.
            progress: whether to show a progress bar.
            distributed: whether `x`, `gamma` and `weight` are this process's share.

        Raises:
            ModelError: `x` does not fit the model, or every start collapsed.
            StrategyError: restarts or iterations < 1, restarts > 1 from a given start, or a start or weights of the
                wrong shape, or no items; with
                `distributed`, no process group, or processes that do not fit alike.

        Warns:
            ConvergenceWarning: the evidence was still rising by more than tol after the last iteration.
        """
        with torch.no_grad():
            parameters, evidence, converged, _ = self._climb(
                x,
                restarts,
                iterations,
                gamma=gamma,
                theta=theta,
                weight=weight,
                progress=progress,
                distributed=distributed,
            )
        theta = parameters.theta[0] if self.rule.local else evidence.new_zeros(0, 1, self.model.latent_features)
        dtype = self.model.mixing_logits.dtype
        return Fit(theta.to(dtype), parameters.log_mixing[0].to(dtype), evidence.to(dtype), converged)

    def check_infer(self, restarts: int, iterations: int, gamma: Tensor | None) -> None:
        """See `Strategy.check_infer`: with a linear decoder q(θ) is the exact posterior, and there are no starts."""
        if not self.rule.local and (restarts != 1 or gamma is not None):
            raise StrategyError(FITS_NOTHING)
        super().check_infer(restarts, iterations, gamma)

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
        """`fit` on images `x` (B, D, C), and the posterior at what it found.

        With a linear decoder nothing is fitted: the posterior means of θ, and for `elbo_trace` log p(x), (1, B).

        Args:
            keep_trace: must be False: a fit of many iterations has no room for all its states.
            x, restarts, iterations, gamma, theta, weight: see `fit`; its errors and warnings are those of this.
        """
        if keep_trace:
            raise StrategyError("classical EM keeps no trace: leave keep_trace out")
        with torch.no_grad():
            if not isinstance(x, Tensor):
                raise StrategyError(f"x must be a tensor (B, D, C), but is a {type(x).__name__}; chunks are for fit")
            if not self.rule.local:
                self.check_infer(restarts, self.iterations, gamma)
                if not all(given is None for given in (iterations, theta, weight)):
                    raise StrategyError(FITS_NOTHING)
                return self._factors(x)
            parameters, evidence, _, items = self._climb(
                x, restarts, iterations, gamma=gamma, theta=theta, weight=weight
            )
            state = self._state(parameters, items)
            return Posterior.from_states([state], evidence.to(state.gamma.dtype), keep_trace=False)

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:
        """The state at the first parameters, from `gamma` (B, K, D) or as `initial` says."""
        self.model.check(x, missing=True, new=True)
        with torch.no_grad():
            items = self._items(x)
            return self._state(self._start(items, x.double(), 1, gamma=gamma), items)

    def step(self, state: State, x_in: Tensor, x: Tensor) -> State:
        """One iteration: the E-step at the state's θ on `x_in`, the M-step, and the E-step on `x`."""
        with torch.no_grad():
            items = self._items(x_in)
            before = Parameters(state.theta.double().unsqueeze(0), state.log_mixing.double().unsqueeze(0))
            after = items.rule.maximise(items.expect(before).statistics)
            return self._state(after, items if x is x_in else self._items(x))

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.step(state, x_in, x_in).theta

    def forward(self, x: Tensor) -> Tensor:
        """The Pyro guide: fits images `x` (B, D, C), and with them the model's mixing weights; a Delta at θ.

        With a linear decoder nothing is fitted, and it is the exact posterior of θ, a normal.
        """
        return self.guide_at(self.infer(x))()

    def _make_rule(self, x: Tensor, missing: bool) -> MStep:
        return self.rule.choose(self.model, missing=missing)(self.model, x, missing=missing)

    def _items(self, x: Tensor, weight: Tensor | None = None) -> Items:
        if not self.rule.local:
            raise StrategyError("a linear decoder's parameters are found by `fit`, not in steps")
        # Single precision cannot hold the second moments of clusters that are far apart.
        x = x.double()
        return Items(self._make_rule(x, bool(x.isnan().any())), [x], None if weight is None else weight.double())

    def _climb(
        self,
        x: Tensor | Iterable[Tensor],
        restarts: int,
        iterations: int | None,
        *,
        gamma: Tensor | None = None,
        theta: Tensor | None = None,
        weight: Tensor | None = None,
        progress: bool = False,
        distributed: bool = False,
    ) -> tuple[Parameters, Tensor, bool, Items]:
        """The best start's parameters, its evidence (T, B), whether it converged, and the items."""
        iterations = self.iterations if iterations is None else iterations
        check_starts(restarts, iterations, given=gamma is not None or theta is not None)
        if distributed:
            require_group()
            if not self.divisible:
                raise StrategyError(f"the items of {type(self).__name__} cannot be divided: use ClassicalEM")
        with Progress(iterations, shown=progress and (not distributed or rank() == 0)) as bar:
            try:
                seen = look(self.model, x, gamma=gamma, theta=theta, weight=weight, local=self.rule.local)
            except PnemError as error:
                if distributed:
                    fail_together(error)
                raise
            if distributed:
                seen = put_together(seen, restarts, iterations, gamma is None, theta is None)
            items, start = self._begin(seen, restarts, gamma, theta, bar, distributed)
            count = seen.total
            evidence: list[Tensor] = []
            rise = torch.full((), torch.inf)
            for value, found in self._iterate(items, start, count):
                evidence.append(value)
                parameters = found
                if bar.shown:
                    bar.advance((evidence[-1] / count).max().item())
                if len(evidence) > 1:
                    rise = (evidence[-1] - evidence[-2]) / count
                if len(evidence) == iterations or not bool((rise >= self.tol).any()):
                    break
        best, trace = best_start(self.model, parameters, torch.stack(evidence))
        converged = has_converged(trace, count, self.tol, monotone=self.monotone)
        if isinstance(items.rule, FactorAnalysis):
            items.rule.write(best)
        else:
            self.model.set_log_mixing(best.log_mixing[0])
        return best, trace, converged, items

    def _iterate(
        self, items: Items, parameters: Parameters, count: Tensor | int
    ) -> Iterator[tuple[Tensor, Parameters]]:
        """Without end: the evidence (R, B) at the parameters so far, with log p(θ, π), and the next ones."""
        while True:
            evidence, statistics = items.expect(parameters)
            parameters = items.rule.maximise(statistics)
            yield evidence, parameters

    def _begin(
        self,
        seen: Seen,
        restarts: int,
        gamma: Tensor | None,
        theta: Tensor | None,
        bar: Progress,
        distributed: bool,
    ) -> tuple[Items, Parameters]:
        """The items, and where each start begins."""
        rule = self._make_rule(seen.sample, seen.missing)
        streamed = isinstance(seen.chunks, Stream)
        if streamed:
            bar.expect(seen.size)
        sampled = items = Items(rule, [seen.sample], seen.sample_weight)
        if streamed or distributed:
            items = Items(rule, seen.chunks, seen.weight, bar.see if streamed else None, shared=distributed)
        start = self._start(
            sampled if gamma is None else items,
            seen.sample,
            restarts,
            gamma=gamma,
            theta=theta,
            weight=seen.sample_weight,
        )
        return items, Parameters(*of_first(tuple(start), seen.sample.device)) if distributed else start

    def _start(self, items: Items, x: Tensor, restarts: int, **given: Tensor | None) -> Parameters:
        return first_parameters(self.model, items, x, restarts, self.initial, **given)

    def _state(self, parameters: Parameters, items: Items) -> State:
        """The E-step at the parameters of a single start, in the model's precision."""
        theta, log_mixing = parameters.theta[0], parameters.log_mixing[0]
        log_joint = items.log_joint(parameters)
        gamma, log_evidence = assignments(log_joint)
        psi = self.model.decode(theta)
        state = State(theta, self.model.likelihood.mean(psi), psi, gamma, log_joint, log_evidence.sum(-1), log_mixing)
        state = state.map(lambda value: value.to(self.model.mixing_logits.dtype))
        D = log_joint.shape[-1]
        return state._replace(mean=state.mean.expand(-1, -1, D, -1), psi=state.psi.expand(-1, -1, D, -1))

    def _factors(self, x: Tensor) -> Posterior:
        """The exact posterior of θ; what depends on θ at its mean, and for the ELBO log p(x), (1, B)."""
        mean, covariance, log_evidence = posterior_of_factors(self.model, x)
        theta = mean.unsqueeze(1)
        log_joint, psi = self.model.log_joint(x, theta), self.model.decode(theta)
        log_mixing = torch.zeros_like(theta[..., 0])
        gamma = torch.ones_like(log_joint)
        state = State(
            theta, self.model.likelihood.mean(psi), psi, gamma, log_joint, log_joint.sum((-2, -1)), log_mixing
        )
        posterior = Posterior.from_states([state], log_evidence.unsqueeze(0), keep_trace=False)
        return posterior._replace(q=dist.MultivariateNormal(theta, covariance.unsqueeze(1)).to_event(1))
