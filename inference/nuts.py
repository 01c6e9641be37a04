"""NUTS: the posterior of θ by Hamiltonian Monte Carlo, the reference for all that is approximate."""

import warnings
from typing import NoReturn

import torch
from pyro.infer import mcmc
from torch import Tensor

from pnem.inference.chains import (
    Chains,
    MixingWarning,
    bulk_effective_sample_size,
    match_components,
    rank_normalised_r_hat,
)
from pnem.inference.checks import require_images, require_proper_prior
from pnem.inference.distributions import Draws
from pnem.inference.errors import StrategyError
from pnem.inference.posterior import Posterior, State
from pnem.inference.strategy import Strategy
from pnem.inference.svi import isolated, log_joint_of_theta
from pnem.models import SpatialMixture

__all__ = ["NUTS"]

LARGEST_R_HAT = 1.01
LEAST_PER_CHAIN = 100
ELBO_DRAWS = 100
# Draws decoded at once.
CHUNK = 20


class NUTS(Strategy):
    r"""Pyro's no-U-turn sampler (Hoffman & Gelman 2014) on p(θ | x) ∝ p(x | θ) p(θ), z summed out.

    Several chains run one after another, each from a draw of N(0, I) of its own, all images of a batch together: their
    posteriors are independent, and share nothing but the step size and the length of a trajectory. For small problems:
    a transition takes up to 2^max_tree_depth gradients.

    Components are exchangeable where mixing weights are equal, so that chains may have them in other orders, and one
    chain may change its own: they are matched before anything is summarised. R̂ and effective sample sizes are those of
    Vehtari et al. (2021), after matching. Chains that stay in different modes have a large R̂: no order of components
    makes them agree, and their mean is no summary of either.

    It has no parameters, and trains no model: `infer` and `sample` are all it does.

    Args:
        model: the generative model, with a proper prior.
        chains: how many.
        warmup: transitions of each chain that adapt the step size and the mass matrix, and are thrown away.
        draws: transitions of each chain after that.
        max_tree_depth: of a trajectory.
        target_accept: the acceptance that the step size is adapted to; nearer to 1 for smaller steps.
        max_dimensions: B·K·M may be at most this.
        progress: whether to show Pyro's progress bars.

    Raises:
        StrategyError: a flat prior; chains, warmup, max_tree_depth or max_dimensions below 1, draws below 4, or a
            target_accept that is not between 0 and 1.

    >>> from pnem.models import Normal, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Linear(2, (1, 3, 1)), Normal(1.0), 1, prior="standard_normal")
    >>> chains = NUTS(model, chains=2, warmup=20, draws=10).sample(torch.zeros(1, 3, 1))
    >>> chains.draws.shape, chains.r_hat.shape
    (torch.Size([2, 10, 1, 1, 2]), torch.Size([1, 1, 2]))
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        chains: int = 4,
        warmup: int = 500,
        draws: int = 500,
        max_tree_depth: int = 10,
        target_accept: float = 0.8,
        max_dimensions: int = 10_000,
        progress: bool = False,
    ):
        super().__init__(model, iterations=1)
        require_proper_prior(model, "NUTS")
        least = {"chains": 1, "warmup": 1, "draws": 4, "max_tree_depth": 1, "max_dimensions": 1}
        given = (chains, warmup, draws, max_tree_depth, max_dimensions)
        for (name, minimum), value in zip(least.items(), given, strict=True):
            if not isinstance(value, int) or value < minimum:
                raise StrategyError(f"{name} must be at least {minimum}, and whole, but is {value}")
        if not 0 < target_accept < 1:
            raise StrategyError(f"target_accept must be between 0 and 1, but is {target_accept}")
        self.chains = chains
        self.warmup = warmup
        self.draws = draws
        self.max_tree_depth = max_tree_depth
        self.target_accept = target_accept
        self.max_dimensions = max_dimensions
        self.progress = progress

    def sample(self, x: Tensor) -> Chains:
        """Chains of θ for images `x` (B, D, C), with torch's global generator.

        Raises:
            ModelError: `x` does not fit the model.
            StrategyError: more than `max_dimensions`, or a log p(x, θ) that is not finite where a chain starts.
        """
        model = self.model
        model.check(x)
        require_images(model, x)
        shape = (len(x), model.num_components, model.latent_features)
        dimensions = shape[0] * shape[1] * shape[2]
        if dimensions > self.max_dimensions:
            raise StrategyError(
                f"θ of {shape[0]} images has B·K·M = {shape[0]}·{shape[1]}·{shape[2]} = {dimensions} dimensions, and "
                f"NUTS is for small problems: give fewer images, or allow it by max_dimensions={dimensions}"
            )
        with isolated(model, x) as images:
            runs = [self._chain(images, shape) for _ in range(self.chains)]
        draws = torch.stack([run for run, _ in runs])
        with torch.no_grad():
            parts = [log_joint_of_theta(model, x, part) for part in draws.flatten(0, 1).split(CHUNK)]
            log_density = torch.cat(parts).unflatten(0, draws.shape[:2])
        log_mixing = model.log_mixing
        if bool(torch.isclose(log_mixing, log_mixing[..., :1]).all()):
            draws = match_components(draws, log_density)
        size = bulk_effective_sample_size(draws)
        diverging = torch.stack([failed for _, failed in runs])
        return Chains(draws, rank_normalised_r_hat(draws), size, diverging, log_density)

    def check_infer(self, restarts: int, iterations: int, gamma: Tensor | None) -> None:
        """See `Strategy.check_infer`: chains start where they do, and a strategy has `warmup` and `draws`."""
        if restarts != 1 or iterations != 1 or gamma is not None:
            raise StrategyError("NUTS draws chains from starts of its own: leave restarts, iterations and gamma out")

    def infer(
        self,
        x: Tensor,
        *,
        restarts: int = 1,
        iterations: int | None = None,
        gamma: Tensor | None = None,
        keep_trace: bool = False,
    ) -> Posterior:
        """`sample` for images `x` (B, D, C), and what follows at the mean of the draws.

        The posterior's q is a `Draws`, of which ``moment_matched()`` has a density. Its `elbo_trace`, (1, B), is the
        ELBO of that normal, the mean over 100 draws: below log p(x) by as much as the posterior is not normal.

        Args:
            x: the images.
            restarts, iterations, gamma, keep_trace: leave them out.

        Raises:
            ModelError: `x` does not fit the model.
            StrategyError: as `sample`, no more draws than an image's θ has dimensions, or one of the others was given.

        Warns:
            MixingWarning: some R̂ > 1.01, an effective sample size below 100 per chain, or divergences.
        """
        self.check_infer(restarts, self.iterations if iterations is None else iterations, gamma)
        if keep_trace:
            raise StrategyError("NUTS keeps no states: leave keep_trace out; strategy.sample(x) gives its draws")
        found = self.sample(x)
        self._warn(found)
        q = Draws(found.draws, found.diverging)
        with torch.no_grad():
            state = self.evaluate(super().init(x), q.mean, x)
            normal = q.moment_matched()
            theta = normal.sample(torch.Size([ELBO_DRAWS]))
            log_p = torch.cat([log_joint_of_theta(self.model, x, part) for part in theta.split(CHUNK)])
            elbo = (log_p - normal.log_prob(theta)).mean(0) + self.log_mixing_prior(state)
            # A constant decoder gives one pixel for all.
            mean, psi = (value.expand(-1, -1, x.shape[-2], -1) for value in (state.mean, state.psi))
            state = state._replace(mean=mean, psi=psi)
        return Posterior.from_states([state], elbo.unsqueeze(0), keep_trace=False)._replace(q=q)

    def init(self, x: Tensor, gamma: Tensor | None = None) -> State:  # noqa: D102
        self._refuse()

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise StrategyError(
            "NUTS has no iterations to unroll or train through: strategy.infer(x) or strategy.sample(x) draws from the "
            "posterior"
        )

    def _chain(self, x: Tensor, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The draws of one chain, (draws, B, K, M), and which of its transitions diverged, (draws,)."""

        def potential(params: dict[str, Tensor]) -> Tensor:
            return -log_joint_of_theta(self.model, x, params["theta"]).sum()

        kernel = mcmc.NUTS(
            potential_fn=potential, target_accept_prob=self.target_accept, max_tree_depth=self.max_tree_depth
        )
        start = torch.randn(shape, dtype=x.dtype, device=x.device)
        if not bool(potential({"theta": start}).isfinite()):
            raise StrategyError(
                "log p(x, θ) is not finite at a draw of N(0, I), from which the chain would start: check that the "
                "images are on the scale of the model's, and its parameters finite"
            )
        chain = mcmc.MCMC(
            kernel,
            num_samples=self.draws,
            warmup_steps=self.warmup,
            initial_params={"theta": start},
            disable_progbar=not self.progress,
        )
        chain.run()
        diverging = torch.zeros(self.draws, dtype=torch.bool)
        diverging[chain.diagnostics()["divergences"]["chain 0"]] = True
        return chain.get_samples()["theta"].detach(), diverging

    def _warn(self, found: Chains) -> None:
        # Where an entry never moved, both are NaN.
        apart = ~(found.r_hat <= LARGEST_R_HAT)
        least = LEAST_PER_CHAIN * self.chains
        few = ~(found.effective_sample_size >= least)
        if not bool(apart.any()) and not bool(few.any()) and not found.divergences:
            return
        warnings.warn(
            f"the chains have not mixed: of {apart.numel()} entries of θ, {int(apart.sum())} have R̂ above "
            f"{LARGEST_R_HAT} (the largest is {found.r_hat.max().item():.3g}) and {int(few.sum())} an effective sample "
            f"size below {least} (the least is {found.effective_sample_size.min().item():.3g}), and "
            f"{found.divergences} of {self.chains * self.draws} transitions diverged; take more draws and a longer "
            "warmup, against divergences a target_accept nearer to 1, and where R̂ stays large look at the chains one "
            "by one, for they are in different modes",
            MixingWarning,
            stacklevel=3,
        )
