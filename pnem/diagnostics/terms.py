"""The ELBO taken apart: every term of its two forms, per image and per iteration, in nats."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import pandas as pd
import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.checks import check_pair, check_posterior
from pnem.inference import ClassicalEM, Posterior, State, Strategy
from pnem.inference.checks import require_images
from pnem.inference.distributions import Concatenated
from pnem.inference.estimates import check_counts
from pnem.inference.posterior import extended
from pnem.inference.proposals import MomentMatched
from pnem.models import SpatialMixture
from pnem.models.closed_forms import assignments

__all__ = ["Terms", "elbo_terms", "images_at_once", "state_at", "state_of", "terms_at"]


@dataclass(frozen=True)
class Terms:
    r"""The terms of the ELBO, in nats per image and in double precision; each of shape (B,), or (T, B) over iterations.

        ELBO = E_q[log p(x, z | θ)] + H[q(z)] + E_q[log p(θ)] + H[q(θ)]          `free_energy`
             = E_q[log p(x | θ)] − KL(q(θ) ‖ p(θ)) − KL(q(z) ‖ p(z | x, θ))      `penalised_fit`

    The first is the form of Neal & Hinton (1998), the second the one that VAEs are trained by. They are computed apart,
    and equal to rounding. The last divergence is zero but for an E-step that is not the model's own.

    Attributes:
        expected_log_joint: Q = E_q[log p(x, z | θ)], the expected complete-data log-likelihood, ownership included.
        assignment_entropy: H[q(z)], the entropy of the responsibilities.
        log_prior: E_q[log p(θ)]; zero where the prior is flat.
        theta_entropy: H[q(θ)]; a Delta has none, which counts as zero.
        reconstruction: E_q[log p(x | θ)], z summed out.
        divergence: KL(q(θ) ‖ p(θ)); for a Delta −log p(θ).
        assignment_divergence: KL(q(z) ‖ p(z | x, θ)), what an E-step loses that is not the model's own.
        log_mixing_prior: log p(π), where there is a prior on π, shared by the images that share π.
        log_evidence: log p(x | θ) at the mean of q(θ): with a Delta the same as `reconstruction`.
        monte_carlo_error: the standard error of the ELBO from the draws of θ; zero for a Delta, NaN for one draw.
        is_bound: whether the ELBO is a lower bound on log p(x). With a Delta it is not: there it is the plug-in
            log p(x, θ), which compares with nothing but itself.
    """

    expected_log_joint: Tensor
    assignment_entropy: Tensor
    log_prior: Tensor
    theta_entropy: Tensor
    reconstruction: Tensor
    divergence: Tensor
    assignment_divergence: Tensor
    log_mixing_prior: Tensor
    log_evidence: Tensor
    monte_carlo_error: Tensor
    is_bound: bool

    @property
    def free_energy(self) -> Tensor:
        """Q + H[q(z)] + E_q[log p(θ)] + H[q(θ)] (+ log p(π))."""
        energy = self.expected_log_joint + self.log_prior + self.log_mixing_prior
        return energy + self.assignment_entropy + self.theta_entropy

    @property
    def penalised_fit(self) -> Tensor:
        """E_q[log p(x | θ)] − KL(q(θ) ‖ p(θ)) − KL(q(z) ‖ p(z | x, θ)) (+ log p(π))."""
        return self.reconstruction - self.divergence - self.assignment_divergence + self.log_mixing_prior

    @property
    def elbo(self) -> Tensor:
        """The ELBO, as `free_energy`."""
        return self.free_energy

    @property
    def title(self) -> str:
        """What the ELBO is to be called wherever it is shown."""
        return "ELBO" if self.is_bound else "plug-in log p(x, θ)"

    def map(self, function: Callable[[Tensor], Tensor]) -> "Terms":
        """The terms with `function` applied to each."""
        return Terms.combine(lambda values: function(values[0]), [self])

    @classmethod
    def combine(cls, function: Callable[[list[Tensor]], Tensor], parts: Sequence["Terms"]) -> "Terms":
        """One set of terms from several, such as ``torch.stack`` of each; a bound where all are."""
        names = [field.name for field in fields(cls) if field.name != "is_bound"]
        joined = {name: function([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, is_bound=all(part.is_bound for part in parts))

    @classmethod
    def concatenate(cls, parts: Sequence["Terms"]) -> "Terms":
        """The terms (T, B) of more images; of those that took fewer iterations the last one is repeated."""
        T = max(len(part.reconstruction) for part in parts)
        return cls.combine(lambda values: torch.cat([extended(value, T) for value in values], 1), parts)

    def table(self) -> pd.DataFrame:
        """The means over images, and of the ELBO the standard error: one row for each iteration, from 1."""
        terms = self if self.reconstruction.dim() == 2 else self.map(lambda value: value.unsqueeze(0))
        names = [field.name for field in fields(self) if field.name not in ("is_bound", "monte_carlo_error")]
        columns = {name: getattr(terms, name).mean(-1).cpu().numpy() for name in names}
        elbo = terms.elbo
        images = elbo.shape[-1]
        error = elbo.std(-1) / math.sqrt(images) if images > 1 else elbo[:, 0] * math.nan
        columns |= {"elbo": elbo.mean(-1).cpu().numpy(), "elbo_se": error.cpu().numpy()}
        return pd.DataFrame(columns, index=pd.RangeIndex(1, len(elbo) + 1, name="iteration"))


def images_at_once(strategy: Strategy, x: Tensor, batch_size: int) -> int:
    """How many of the images to infer at once: all that share what the strategy fits, else `batch_size`."""
    together = strategy.model.mixing_kind == "per_image" or isinstance(strategy, ClassicalEM)
    return max(1, len(x)) if together else batch_size


def terms_at(strategy: Strategy, state: State) -> Terms:
    """The terms of the ELBO at a state, (B,): from its θ, which is one draw from q(θ), and what it knows there.

    The prior and the entropy of a normal q(θ) are in closed form where the divergence is; otherwise they are those of
    the draw, −log q(θ) and log p(θ).

    Args:
        strategy: the strategy.
        state: one of its states, as `Strategy.step` returns it.

    >>> from pnem.inference import RNNEM
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (4, 4, 1)), Bernoulli(), 3)
    >>> strategy, x = RNNEM(model, iterations=2), torch.ones(2, 16, 1)
    >>> terms = terms_at(strategy, strategy.unroll(x)[-1])
    >>> torch.allclose(terms.free_energy, terms.penalised_fit)
    True
    """
    gamma, log_joint = state.gamma.double(), state.log_joint.double()
    log_posterior = log_joint.log_softmax(-2)
    surprise = torch.where(gamma > 0, gamma * (gamma.log() - log_posterior), 0.0)
    log_prior, theta_entropy = _prior_and_entropy(strategy.model, state)
    log_evidence = state.log_evidence.double()
    return Terms(
        expected_log_joint=torch.where(gamma > 0, gamma * log_joint, 0.0).sum((-2, -1)),
        assignment_entropy=torch.special.entr(gamma).sum((-2, -1)),
        log_prior=log_prior,
        theta_entropy=theta_entropy,
        reconstruction=log_evidence,
        divergence=strategy.divergence(state).double(),
        assignment_divergence=surprise.sum((-2, -1)),
        log_mixing_prior=torch.zeros_like(log_evidence) + strategy.log_mixing_prior(state),
        log_evidence=log_evidence,
        monte_carlo_error=torch.full_like(log_evidence, 0.0 if isinstance(state.q, dist.Delta) else math.nan),
        is_bound=not isinstance(state.q, dist.Delta),
    )


def _prior_and_entropy(model: SpatialMixture, state: State) -> tuple[Tensor, Tensor]:
    """E_q[log p(θ)] and H[q(θ)]: (B,) each."""
    q = state.q
    if isinstance(q, dist.Delta):
        log_prior = model.log_prior(state.theta).double()
        return log_prior, torch.zeros_like(log_prior)
    if state.distribution is None and state.location is not None and state.scale is not None:
        location, scale = state.location.double(), state.scale.double()
        log_prior_mean = model.expected_log_prior(location, scale)
        if log_prior_mean is not None:
            entropy = scale.log().sum((-2, -1)) + 0.5 * math.log(2 * math.pi * math.e) * scale[0].numel()
            return log_prior_mean, entropy
    return model.log_prior(state.theta).double(), -q.log_prob(state.theta).double()


@torch.no_grad()
def elbo_terms(
    model: SpatialMixture,
    strategy: Strategy,
    x: Tensor,
    *,
    draws: int = 10,
    batch_size: int = 100,
    posterior: Posterior | None = None,
) -> Terms:
    """The terms of the ELBO of images `x`, (T, B): after each iteration where the strategy keeps a trace, else T = 1.

    Classical EM and samplers keep none, and guides fitted by SVI none of their q(θ). Of a sampler the terms are those
    of the normal with the moments of its draws.

    Args:
        model: the generative model.
        strategy: a strategy of this model.
        x: the images (B, D, C).
        draws: of θ for each image and iteration, over which the terms are averaged where q(θ) is a distribution.
        batch_size: images at once. Classical EM, whose images may share π, takes all of them at once.
        posterior: what ``strategy.infer(x)`` gave before; inferred when None.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: draws or batch_size < 1, a strategy of another model, no images, or a posterior of others.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.MLP(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> terms = elbo_terms(model, VAE(model), torch.zeros(3, 16, 1))
    >>> terms.elbo.shape, terms.is_bound, torch.allclose(terms.elbo, terms.penalised_fit)
    (torch.Size([1, 3]), True, True)
    """
    check_counts(draws=draws, batch_size=batch_size)
    check_pair(model, strategy)
    model.check(x, missing=True, new=True)
    require_images(model, x)
    if posterior is not None:
        check_posterior(model, posterior, x)
        return _terms_of(strategy, posterior, x, draws)
    pieces = x.split(images_at_once(strategy, x, batch_size))
    return Terms.concatenate([_terms_of(strategy, strategy.infer(piece), piece, draws) for piece in pieces])


def _terms_of(strategy: Strategy, posterior: Posterior, x: Tensor, draws: int) -> Terms:
    """(T, B)."""
    return Terms.combine(
        torch.stack, [_averaged(strategy, state, x, draws) for state in _states(posterior, x, strategy)]
    )


def _states(posterior: Posterior, x: Tensor, strategy: Strategy) -> Iterator[State]:
    """The states at the means of q(θ) after each iteration whose q(θ) is known; at least the last."""
    q = posterior.q
    if posterior.trace is not None and (isinstance(q, dist.Delta) or posterior.trace.location is not None):
        for t in range(len(posterior.trace.theta)):
            yield posterior.trace.map(operator.itemgetter(t))
        return
    state = state_of(strategy.model, posterior, x)
    if isinstance(q, MomentMatched):
        q = q.moment_matched()
    elif isinstance(q, Concatenated):
        q = Concatenated([part.moment_matched() if isinstance(part, MomentMatched) else part for part in q.parts])
    yield state if isinstance(q, dist.Delta) else state._replace(distribution=q)


def state_of(model: SpatialMixture, posterior: Posterior, x: Tensor) -> State:
    """The last state at the posterior's θ, as of a Delta there."""
    log_joint = _log_joint(model, x, posterior.psi, posterior.log_mixing)
    log_evidence = log_joint.logsumexp(-2).sum(-1)
    return State(
        posterior.theta, posterior.mean, posterior.psi, posterior.gamma, log_joint, log_evidence, posterior.log_mixing
    )


def _averaged(strategy: Strategy, state: State, x: Tensor, draws: int) -> Terms:
    """The terms (B,) of a state at the mean of q(θ), averaged over draws from it."""
    q = state.q
    if isinstance(q, dist.Delta):
        return terms_at(strategy, state)
    samples = Terms.combine(
        torch.stack, [terms_at(strategy, state_at(strategy, state, q.sample(), x)) for _ in range(draws)]
    )
    error = samples.elbo.std(0) / math.sqrt(draws) if draws > 1 else samples.elbo[0] * math.nan
    means = samples.map(lambda value: value.mean(0))
    return replace(means, log_evidence=state.log_evidence.double(), monte_carlo_error=error)


def state_at(strategy: Strategy, state: State, theta: Tensor, x: Tensor) -> State:
    """The state at another θ (B, K, M), after the E-step on `x`, also of images with missing values; its q(θ) stays."""
    if not bool(x.isnan().any()):
        return strategy.evaluate(state, theta, x)
    psi = strategy.model.decode(theta)
    log_joint = _log_joint(strategy.model, x, psi, state.log_mixing)
    gamma, log_evidence = assignments(log_joint)
    return state._replace(theta=theta, psi=psi, gamma=gamma, log_joint=log_joint, log_evidence=log_evidence.sum(-1))


def _log_joint(model: SpatialMixture, x: Tensor, psi: Tensor, log_mixing: Tensor) -> Tensor:
    """log p(x_i, z_i = k | θ), also of images with missing values: (B, K, D)."""
    if not bool(x.isnan().any()):
        return model.log_joint_at(x, psi, log_mixing)
    return log_mixing.unsqueeze(-1) + model.likelihood.log_marginal(x.unsqueeze(-3), psi)
