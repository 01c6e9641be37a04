"""Annealed importance sampling of log p(x) (Neal 2001)."""

import itertools
import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.inference import hmc
from pnem.inference.checks import require_images, require_proper_prior
from pnem.inference.errors import StrategyError
from pnem.inference.estimates import Estimate, check_counts, log_mean_weight
from pnem.inference.hmc import Point
from pnem.inference.posterior import Posterior
from pnem.inference.progress import Progress
from pnem.inference.proposals import prior_of_images, proposal
from pnem.inference.strategy import Strategy
from pnem.inference.svi import log_joint_of_theta
from pnem.models import SpatialMixture

__all__ = ["annealed_importance_sampling", "inverse_temperatures"]

# How far into the tails of the logistic function a sigmoidal schedule goes (Grosse et al. 2015).
TAILS = 4.0
TARGET_ACCEPTANCE = 0.65
# The pilot run has fewer chains, and more transitions where there are few temperatures.
PILOT_CHAINS = 4
PILOT_TRANSITIONS = 100
WARM_UP = 50
GAIN = 0.5
FIRST_STEP_SIZE = 0.1
# Step sizes vary by so much at random, lest a path come back to where it began.
JITTER = 0.2


def annealed_importance_sampling(
    model: SpatialMixture,
    strategy: Strategy | None,
    x: Tensor,
    *,
    chains: int = 16,
    temperatures: int = 100,
    leapfrog: int = 10,
    schedule: str = "sigmoidal",
    width: float | str | None = None,
    posterior: Posterior | None = None,
    progress: bool = False,
) -> Estimate:
    r"""log p(x) by annealing from an initial distribution f₀ to p(x, θ), along f_t ∝ f₀^{1 − β_t} p(x, θ)^{β_t}:

        log 1/S Σ_s w_s,      log w = Σ_{t=1..T} (β_t − β_{t−1}) [log p(x, θ_{t−1}) − log f₀(θ_{t−1})]

    θ_0 ~ f₀, and θ_t from θ_{t−1} by a transition of Hamiltonian Monte Carlo that leaves f_t invariant. w is unbiased
    for p(x), so that the estimate is a lower bound on log p(x) in expectation, and a tighter one the more chains and
    temperatures there are; with one temperature it is the importance-weighted bound of S samples.

    A pilot run finds the step size of every image at every temperature for which 65 % of the transitions are accepted;
    the run proper keeps them fixed, which keeps it unbiased, but for a random factor between 0.8 and 1.2. An image is
    decoded S T (1 + `leapfrog`) times with gradients, and in the pilot, of at most four chains and about T + 50
    transitions (150 for T < 100), 4 (T + 50) (1 + `leapfrog`) times.

    Args:
        model: the generative model, with a proper prior.
        strategy: a strategy of this model, whose q(θ) is f₀; None for the prior, from which the way is longer: more
            temperatures and chains are needed.
        x: the images (B, D, C).
        chains: S, run as one batch.
        temperatures: T.
        leapfrog: leapfrog steps in each transition.
        schedule: β_t = t/T, ``"linear"``; or ``"sigmoidal"``, which takes smaller steps at both ends.
        width, posterior: see `importance_weighted_bound`; with a strategy only.
        progress: whether to show a progress bar.

    Returns:
        The estimate, its error over chains, their effective sample size, and the share of transitions accepted.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: chains, temperatures or leapfrog < 1, an unknown schedule, a width or posterior without a
            strategy, or as `importance_weighted_bound`.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.MLP(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> estimate = annealed_importance_sampling(model, VAE(model), torch.zeros(3, 16, 1), temperatures=10)
    >>> estimate.log_marginal.shape, estimate.acceptance.shape
    (torch.Size([3]), torch.Size([3]))
    """
    check_counts(chains=chains, temperatures=temperatures, leapfrog=leapfrog)
    beta = inverse_temperatures(temperatures, schedule)
    q = _initial(model, strategy, x, width, posterior)
    with torch.no_grad(), Progress(2 * temperatures, shown=progress, description="AIS") as bar:
        path = _Path(model, q, x, beta, leapfrog, bar)
        sizes = path.pilot(min(chains, PILOT_CHAINS))
        log_weights, acceptance = path.run(chains, sizes)
    estimate = log_mean_weight(log_weights.logsumexp(0), (2 * log_weights).logsumexp(0), chains)
    return estimate._replace(acceptance=acceptance)


def inverse_temperatures(temperatures: int, schedule: str) -> list[float]:
    """β_0 = 0 < β_1 < ... < β_T = 1, T + 1 of them.

    The sigmoidal ones are β_t ∝ σ(4 (2t/T − 1)) − σ(−4).

    Raises:
        StrategyError: an unknown schedule.

    >>> inverse_temperatures(4, "linear")
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    steps = torch.linspace(0, 1, temperatures + 1, dtype=torch.float64)
    if schedule == "sigmoidal":
        steps = (TAILS * (2 * steps - 1)).sigmoid()
        steps = (steps - steps[0]) / (steps[-1] - steps[0])
    elif schedule != "linear":
        raise StrategyError(f'schedule must be "linear" or "sigmoidal", but is {schedule!r}')
    return steps.tolist()


def _initial(
    model: SpatialMixture,
    strategy: Strategy | None,
    x: Tensor,
    width: float | str | None,
    posterior: Posterior | None,
) -> dist.TorchDistribution:
    if strategy is not None:
        return proposal(model, strategy, x, width=width, posterior=posterior)
    if width is not None or posterior is not None:
        raise StrategyError(
            "width and posterior say what q(θ) is, but without a strategy the initial distribution is the prior: give "
            "the strategy, or leave them out"
        )
    require_proper_prior(model, "an estimate of log p(x)")
    model.check(x)
    require_images(model, x)
    return prior_of_images(model, len(x))


class _Path:
    """The distributions from q(θ) to p(θ | x), and chains along them."""

    def __init__(
        self,
        model: SpatialMixture,
        q: dist.TorchDistribution,
        x: Tensor,
        beta: list[float],
        leapfrog: int,
        bar: Progress,
    ):
        self.model, self.q, self.x, self.beta, self.leapfrog, self.bar = model, q, x, beta, leapfrog, bar

    def evaluate(self, theta: Tensor, beta: float) -> tuple[Point, Tensor]:
        """The point at θ under f_β, and log p(x, θ) − log q(θ) there, (S, B)."""

        # As autograd's functions do not, this works in inference mode too.
        def density(theta: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            log_q, log_p = self.q.log_prob(theta), log_joint_of_theta(self.model, self.x, theta)
            log_density = (1 - beta) * log_q + beta * log_p
            return log_density.sum(), (log_density, log_p.double() - log_q.double())

        gradient, (log_density, difference) = torch.func.grad(density, has_aux=True)(theta)
        return Point(theta, log_density, gradient), difference

    def move(self, point: Point, beta: float, step_size: Tensor) -> tuple[Point, Tensor]:
        """One transition under f_β with steps of about `step_size` (B,), and its probability of acceptance (S, B)."""
        jitter = 1 - JITTER + 2 * JITTER * torch.rand_like(point.log_density)
        return hmc.transition(lambda theta: self.evaluate(theta, beta)[0], point, step_size * jitter, self.leapfrog)

    def chains(self, count: int, move: Callable[[Point, float], Point]) -> Tensor:
        """Their log weights, (S, B): between temperatures they `move`."""
        theta = self.q.sample(torch.Size([count]))
        log_weights = torch.zeros((), dtype=torch.float64, device=theta.device)
        for before, beta in itertools.pairwise(self.beta):
            point, difference = self.evaluate(theta, beta)
            log_weights = log_weights + (beta - before) * difference
            if beta < 1:
                theta = move(point, beta).theta
            if self.bar.shown:
                self.bar.advance(log_weights.mean().item())
        return log_weights

    def pilot(self, chains: int) -> list[Tensor]:
        """The step size of every image (B,) at each temperature between the first and the last.

        After every transition log ε rises by 0.5 (a − 0.65), a the mean acceptance probability of the image's chains
        (Robbins & Monro 1951); ε is the geometric mean over what a temperature sees.
        """
        sizes: list[Tensor] = []
        log_size = torch.full_like(self.x[:, 0, 0], math.log(FIRST_STEP_SIZE))
        repeats = math.ceil(PILOT_TRANSITIONS / len(self.beta))

        def move(point: Point, beta: float) -> Point:
            nonlocal log_size
            seen = []
            for _ in range(repeats if sizes else repeats + WARM_UP):
                point, probability = self.move(point, beta, log_size.exp())
                log_size = log_size + GAIN * (probability.mean(0) - TARGET_ACCEPTANCE)
                seen.append(log_size)
            sizes.append(torch.stack(seen[-repeats:]).mean(0).exp())
            return point

        self.chains(chains, move)
        return sizes

    def run(self, chains: int, sizes: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The log weights of chains with given step sizes, (S, B), and their acceptance (B,); None of no transition."""
        remaining, probabilities = iter(sizes), []

        def move(point: Point, beta: float) -> Point:
            point, probability = self.move(point, beta, next(remaining))
            probabilities.append(probability.mean(0))
            return point

        log_weights = self.chains(chains, move)
        return log_weights, torch.stack(probabilities).mean(0) if probabilities else None
