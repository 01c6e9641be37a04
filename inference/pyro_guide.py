"""Pyro's guides as strategies: q(θ) of every image is fitted by SVI, without amortisation."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pnem.inference.checks import best_starts, check_starts, require_images, require_pixels, require_proper_prior
from pnem.inference.convergence import ConvergenceWarning
from pnem.inference.errors import StrategyError
from pnem.inference.guide_fits import AUTO_GUIDES, Fitted, Options, fit_auto, fit_callable, mean_of
from pnem.inference.posterior import Posterior, State
from pnem.inference.strategy import Strategy
from pnem.models import SpatialMixture

__all__ = ["PyroGuide"]


class PyroGuide(Strategy):
    r"""Variational inference without amortisation: the q(θ) of every image is optimised by itself, by Pyro's SVI.

        q_b = argmax_q E_q[log p(x_b | θ) + log p(θ) − log q(θ)],      z summed out

    With ``"AutoNormal"`` q is Π N(m, s²) over all entries of θ, with ``"AutoMultivariateNormal"`` a normal with full
    covariance over all components, with ``"AutoIAFNormal"`` an inverse autoregressive flow (Kingma et al. 2016), with
    ``"AutoLaplaceApproximation"`` the normal around the posterior's mode with the curvature there, and with
    ``"AutoDelta"`` that mode alone: with a flat prior, maximum likelihood. All images of a batch are fitted at once,
    but flows to one image after another.

    What the gap between this and an amortised strategy is made of: Cremer, Li & Duvenaud (2018), whose rule for
    stopping this follows: 10 windows of 100 steps without improvement. An image's parameters are then their mean over
    the windows since its best one.

    The strategy has no parameters. Where the model is trained with it (``pnem.fit``, ``SVI``), q is constant for the
    model's gradient: variational EM. That calls for few `steps`. Random numbers are torch's global generator's, and
    Pyro's parameter store stays as it was.

    Args:
        model: the generative model, with a proper prior, but for ``"AutoDelta"``.
        guide: the name of one of these guides, or its class; or any callable ``guide(x)`` that samples ``"theta"`` in
            plates ``"images"`` (dim -2) and ``"components"`` (dim -1), with event dim 1, and declares its parameters by
            ``pyro.param`` or ``pyro.module``. It sees the whole batch, and is optimised for it as one problem; a module
            is copied for every fit. A strategy with a callable cannot be saved, or be given to `pnem.fit`.
        learning_rate: Adam's.
        steps: at most this many.
        particles: draws of θ in each step.
        init_scale: the standard deviations that normals start from; their means start at draws of N(0, I).

    Raises:
        StrategyError: a flat prior, a constant decoder, mixing weights per image, an unknown guide, a flow of a single
            number, or options that are not positive and finite.

    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Linear(2, (2, 2, 1)), Bernoulli(), 2, prior="standard_normal")
    >>> posterior = PyroGuide(model, "AutoNormal", learning_rate=0.1).infer(torch.ones(3, 4, 1))
    >>> posterior.q.stddev.shape, posterior.elbo_trace.shape[1]
    (torch.Size([3, 2, 2]), 3)
    """

    # For what is reported as well.
    merit_draws = 100

    def __init__(
        self,
        model: SpatialMixture,
        guide: str | type[AutoGuide] | Callable[[Tensor], Any] = "AutoNormal",
        *,
        learning_rate: float = 0.01,
        steps: int = 20_000,
        particles: int = 10,
        init_scale: float = 0.1,
    ):
        super().__init__(model, iterations=1)
        self.guide = _named(guide)
        # So that a class can be described, and the strategy saved.
        self.config = {**self.config, "guide": self.guide}
        name = self.guide if isinstance(self.guide, str) else "a guide of one's own"
        require_pixels(model, f"PyroGuide with {name}")
        if self.guide != "AutoDelta":
            require_proper_prior(model, f"PyroGuide with {name}")
        if self.guide == "AutoIAFNormal" and model.num_components * model.latent_features < 2:
            raise StrategyError("a flow needs θ of at least two numbers, but K·M is 1: use AutoNormal")
        if model.mixing_kind == "per_image":
            raise StrategyError(
                'PyroGuide leaves mixing weights as they are, but mixing="per_image" needs them fitted: use "uniform" '
                'or "learned", or ClassicalEM'
            )
        for option, value in (("steps", steps), ("particles", particles)):
            if not isinstance(value, int) or value < 1:
                raise StrategyError(f"{option} must be at least 1, and whole, but is {value}")
        for option, number in (("learning_rate", learning_rate), ("init_scale", init_scale)):
            if not 0 < number < math.inf:
                raise StrategyError(f"{option} must be positive and finite, but is {number}")
        self.options = Options(float(learning_rate), steps, particles, float(init_scale))

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:  # noqa: D102
        if gamma is not None:
            raise StrategyError("a guide does not start from responsibilities: leave gamma out")
        return super().init(x)

    def improve(self, state: State, x_in: Tensor) -> State:
        """The state with q(θ) fitted to the images, and θ drawn from it."""
        return self._state(state, self._fit(x_in, keep_means=False))

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.improve(state, x_in).theta

    def merit(self, state: State, x: Tensor) -> Tensor:  # noqa: D102
        return super().merit(self.evaluate(state, state.theta, x), x)

    def settle(self, state: State, x: Tensor) -> State:  # noqa: D102
        return self.evaluate(state, mean_of(state.q), x)

    def check_infer(self, restarts: int, iterations: int, gamma: Tensor | None) -> None:
        """See `Strategy.check_infer`: fits of the guide are its restarts, and it has no iterations or γ."""
        if iterations != 1:
            raise StrategyError("a guide is optimised to convergence: give PyroGuide(..., steps=...), not iterations")
        if gamma is not None:
            raise StrategyError("a guide does not start from responsibilities: leave gamma out")
        check_starts(restarts, 1, given=False)
        if restarts > 1 and not isinstance(self.guide, str):
            raise StrategyError("a guide of one's own says itself where it starts: leave restarts at 1")

    def infer(
        self,
        x: Tensor,
        *,
        restarts: int = 1,
        iterations: int | None = None,
        gamma: Tensor | None = None,
        keep_trace: bool = True,
    ) -> Posterior:
        """q(θ) fitted to images `x` (B, D, C), and what follows at its mean.

        The posterior's `elbo_trace` has an entry for each window of 100 steps: the mean over its steps, but the last is
        the ELBO of the q that is returned, the mean over 100 draws. (Until then ``"AutoLaplaceApproximation"`` climbs
        log p(x, θ).) Images that converge before others repeat what they reached.

        Args:
            x: the images.
            restarts: R fits of each image, from other starts; the one with the highest ELBO is kept. One, for a guide
                of one's own.
            iterations: leave it out; `steps` is the strategy's.
            gamma: leave it out.
            keep_trace: whether to keep the state at the mean of q after each window.

        Raises:
            ModelError: `x` does not fit the model.
            StrategyError: γ or iterations given, restarts of a guide of one's own, such a guide with the wrong sites
                or without parameters, an ELBO that is not finite, or no Laplace approximation at the mode.

        Warns:
            ConvergenceWarning: some image's ELBO was still rising after the last step.
        """
        self.check_infer(restarts, self.iterations if iterations is None else iterations, gamma)
        self.model.check(x)
        require_images(self.model, x)
        with torch.no_grad():
            repeated = x.repeat(restarts, 1, 1)
            fitted = self._fit(repeated, keep_means=keep_trace)
            if restarts > 1:
                merit = self.merit(self._state(self.init(repeated), fitted), repeated)
                fitted = fitted.select(best_starts(merit, restarts))
            state = self._state(self.init(x), fitted)
            trace, converged, means = fitted.climb
            elbo = torch.cat([trace[:-1], self.merit(state, x).unsqueeze(0)])
            state = self.settle(state, x)
            states = [self.evaluate(self.init(x), mean, x) for mean in means[:-1]]
        if not bool(converged.all()):
            warnings.warn(
                f"{int((~converged).sum())} of {len(x)} images were still improving after {self.options.steps} steps: "
                "allow more steps, or a higher learning_rate",
                ConvergenceWarning,
                stacklevel=2,
            )
        posterior = Posterior.from_states([state], elbo, keep_trace=False)
        if not keep_trace:
            return posterior
        return posterior._replace(trace=State.combine(torch.stack, [*states, _at_mean(state)]))

    def _fit(self, x: Tensor, *, keep_means: bool) -> Fitted:
        if isinstance(self.guide, str):
            return fit_auto(self.guide, self.model, x, self.options, keep_means=keep_means)
        return fit_callable(self.guide, self.model, x, self.options, keep_means=keep_means)

    def _state(self, state: State, fitted: Fitted) -> State:
        if fitted.location is not None and fitted.scale is None:
            return state._replace(theta=fitted.location)
        state = state._replace(location=fitted.location, scale=fitted.scale, distribution=fitted.distribution)
        return state._replace(theta=state.q.sample())


def _at_mean(state: State) -> State:
    """The state with a Delta at its θ, as all of a trace have it."""
    return state._replace(location=None, scale=None, distribution=None)


def _named(guide: Any) -> str | Callable[[Tensor], Any]:
    name = guide.__name__ if isinstance(guide, type) and issubclass(guide, AutoGuide) else guide
    if (
        (isinstance(name, str) and name not in AUTO_GUIDES)
        or isinstance(guide, AutoGuide)
        or not (isinstance(name, str) or callable(guide))
    ):
        raise StrategyError(
            f"guide must be one of {', '.join(AUTO_GUIDES)}, by name or class, or a callable guide(x) that samples "
            f'"theta", but is {guide!r}'
        )
    return name
