"""Whether the numbers that inference gives can be relied on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pnem.diagnostics.calibration import Calibration, as_p_value, calibration
from pnem.diagnostics.checks import check_pair, check_posterior
from pnem.diagnostics.findings import Finding
from pnem.diagnostics.gradients import gradient_signal_to_noise
from pnem.diagnostics.psis import GOOD_K_HAT, LEAST_WEIGHTS, k_hat_findings, psis_k_hat, unreliable
from pnem.diagnostics.restarts import RestartSpread, restart_spread, same_mixing
from pnem.errors import StrategyError
from pnem.inference import Posterior, Strategy
from pnem.inference.checks import require_images
from pnem.inference.estimates import check_counts, log_mean_weight
from pnem.inference.marginal_likelihood import log_weights
from pnem.inference.proposals import proposal
from pnem.metrics import mean_and_standard_error
from pnem.models import SpatialMixture

__all__ = ["Reliability", "reliability"]

# Draws of every image that are decoded at once.
CHUNK = 10
# As many as a minibatch has, on which the signal-to-noise ratio depends.
MINIBATCH = 64
NOT_ASKED = "it was not asked for"


@dataclass(frozen=True)
class Reliability:
    """Whether the numbers that a strategy's inference gives can be relied on. Each part is None where it is absent.

    Attributes:
        k_hat: (B,), how heavy the tail of the importance weights p(x, θ) / q(θ) is; see `psis_k_hat`. Above 0.7
            importance-weighted estimates of log p(x) are not to be trusted.
        effective_sample_size: (B,), (Σ w)² / Σ w² of these weights.
        samples: how many there were for each image.
        gradient_snr: the signal-to-noise ratio of the ELBO's gradient by parameter tensor; see
            `gradient_signal_to_noise`; empty where nothing is trained.
        elbo_spread: (B,), the standard deviation of the ELBO over restarts, in nats; see `restart_spread`.
        pairwise_ari: (B,), how alike restarts divide the image; 1 is the same.
        calibration: ranks of the true θ of images that the model made; see `calibration`.
        absent: for each part that is absent, why, and what to do about it.
        is_bound: whether the ELBO is one. Of a Delta it is the plug-in log p(x, θ).
    """

    k_hat: Tensor | None = None
    effective_sample_size: Tensor | None = None
    samples: int = 0
    gradient_snr: dict[str, float] = field(default_factory=dict)
    elbo_spread: Tensor | None = None
    pairwise_ari: Tensor | None = None
    calibration: Calibration | None = None
    absent: dict[str, str] = field(default_factory=dict)
    is_bound: bool = True

    @property
    def findings(self) -> list[Finding]:
        """What is not to be relied on: k̂ above 0.7, restarts that disagree, ranks that are not uniform.

        A low signal-to-noise ratio of gradients is none of them: at the end of every training the signal vanishes.
        """
        return [
            *([] if self.k_hat is None else k_hat_findings(self.k_hat)),
            *([] if self._spread is None else self._spread.findings),
            *([] if self.calibration is None else self.calibration.findings),
        ]

    @property
    def _spread(self) -> RestartSpread | None:
        return None if self.elbo_spread is None else RestartSpread(self.elbo_spread, self.pairwise_ari, self.is_bound)

    def rows(self) -> list[tuple[str, str, str]]:
        """What each part is, its value and, where it is a mean over images, its standard error, as a table shows them.

        Parts that are absent have no row.
        """
        rows = []
        if self.k_hat is not None and self.effective_sample_size is not None:
            share, error, _ = mean_and_standard_error(unreliable(self.k_hat))
            rows = [
                (f"share of images with k̂ > {GOOD_K_HAT}", f"{share:.3f}", _error(error, 3)),
                ("k̂, median over images", f"{self.k_hat.median().item():.2f}", ""),
                (
                    f"effective sample size of {self.samples} weights, median over images",
                    f"{self.effective_sample_size.median().item():.1f}",
                    "",
                ),
            ]
        if self.gradient_snr:
            title = f"signal-to-noise ratio of gradients, lowest of {len(self.gradient_snr)} tensors"
            rows.append((title, f"{min(self.gradient_snr.values()):.2f}", ""))
        if self._spread is not None:
            title = f"standard deviation of the {self._spread.title} over restarts [nats]"
            rows.append(_row(title, self._spread.elbo, 2))
        if self.pairwise_ari is not None:
            rows.append(_row("ARI between the segmentations of restarts", self.pairwise_ari, 3))
        if self.calibration is not None:
            title = f"p-value of uniform calibration ranks, {len(self.calibration.names)} test quantities"
            rows.append((title, as_p_value(self.calibration.p_value), ""))
        return rows

    @classmethod
    def concatenate(cls, parts: Sequence["Reliability"]) -> "Reliability":
        """Of the images of several; each tensor is of those images for which it is there.

        Simulations for calibration add up. The gradients' ratios, which are of one minibatch, are the first part's that
        has them.
        """

        def joined(name: str) -> Tensor | None:
            there = [value for part in parts if (value := getattr(part, name)) is not None]
            return torch.cat(there) if there else None

        calibrations = [part.calibration for part in parts if part.calibration is not None]
        found = cls(
            joined("k_hat"),
            joined("effective_sample_size"),
            max(part.samples for part in parts),
            next((part.gradient_snr for part in parts if part.gradient_snr), {}),
            joined("elbo_spread"),
            joined("pairwise_ari"),
            Calibration.concatenate(calibrations) if calibrations else None,
            is_bound=all(part.is_bound for part in parts),
        )
        reasons = [(name, why) for part in parts for name, why in part.absent.items()]
        # The first, but of those that say something.
        for name, why in sorted(reasons, key=lambda reason: reason[1] == NOT_ASKED):
            if getattr(found, name) is None or getattr(found, name) == {}:
                found.absent.setdefault(name, why)
        return found


def reliability(
    model: SpatialMixture,
    strategy: Strategy,
    x: Tensor,
    *,
    samples: int = 1000,
    restarts: int = 4,
    repetitions: int = 20,
    simulations: int = 200,
    width: float | str | None = None,
    posterior: Posterior | None = None,
) -> Reliability:
    """How far inference can be relied on, from four sides: importance weights, gradients, starts and calibration.

    A part that this model or strategy cannot have is absent, with the reason in `Reliability.absent`. A count of 0
    leaves a part out. Many images are best taken in parts, of which only the first has gradients and simulations, and
    joined by `Reliability.concatenate`.

    Args:
        model: the generative model.
        strategy: a strategy of this model.
        x: the images (B, D, C). The gradients are those of the first 64.
        samples: L importance weights for each image, at least 30; k̂ of 1,000 has a standard error of about 0.15.
        restarts: fits of each image, at least 2.
        repetitions: unrolls whose gradients are compared, at least 2.
        simulations: images from the model itself that calibration takes.
        width: where q(θ) is a Delta: of the normal around its θ whose weights are looked at; see
            `pnem.inference.proposals.proposal`.
        posterior: what ``strategy.infer(x)`` gave before; inferred when None.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: counts below these, a strategy of another model, no images, a posterior of other images, a width
            that is not positive or for a q(θ) that has one.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.Linear(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> found = reliability(model, VAE(model), torch.zeros(3, 16, 1), samples=100, simulations=0)
    >>> found.k_hat.shape, found.absent["elbo_spread"][:26], found.absent["calibration"]
    (torch.Size([3]), 'there is one start only: a', 'it was not asked for')
    """
    least = {"samples": LEAST_WEIGHTS, "restarts": 2, "repetitions": 2, "simulations": 1}
    counts = dict(zip(least, (samples, restarts, repetitions, simulations), strict=True))
    for name, value in counts.items():
        if value != 0:
            check_counts(**{name: value})
            if value < least[name]:
                raise StrategyError(f"{name} must be at least {least[name]}, or 0 to leave it out, but is {value}")
    check_pair(model, strategy)
    model.check(x, new=True)
    require_images(model, x)
    first = None
    if posterior is None:
        with same_mixing(model):
            posterior = first = strategy.infer(x, keep_trace=False)
    else:
        check_posterior(model, posterior, x)
    parts = (
        _weights(strategy, x, samples, width, posterior),
        _gradients(strategy, x[:MINIBATCH], repetitions),
        _restarts(strategy, x, restarts, first),
        _simulations(strategy, simulations, posterior, x.shape[-2]),
    )
    found = {name: value for values, _ in parts for name, value in values.items()}
    absent = {name: why for _, reasons in parts for name, why in reasons.items()}
    return Reliability(**found, samples=samples, absent=absent, is_bound=not isinstance(posterior.q, dist.Delta))


# What a part finds, by the names of its attributes; and for those that it does not, why.
Part = tuple[dict[str, Any], dict[str, str]]


def _weights(strategy: Strategy, x: Tensor, samples: int, width: float | str | None, posterior: Posterior) -> Part:
    model, names = strategy.model, ("k_hat", "effective_sample_size")
    if samples == 0:
        return {}, dict.fromkeys(names, NOT_ASKED)
    if not model.has_proper_prior:
        why = "p(θ) is flat, so that there is no p(θ | x) to compare q(θ) with: give the model a proper prior"
        return {}, dict.fromkeys(names, why)
    if width is None and isinstance(posterior.q, dist.Delta):
        why = (
            'q(θ) is a Delta, which has no importance weights: give the width of a normal around it, or width="laplace"'
        )
        return {}, dict.fromkeys(names, why)
    with torch.no_grad():
        q = proposal(model, strategy, x, width=width, posterior=posterior)
        weights = torch.cat(list(log_weights(model, q, x, samples, CHUNK)))
    size = log_mean_weight(weights.logsumexp(0), (2 * weights).logsumexp(0), samples).effective_sample_size
    return {"k_hat": psis_k_hat(weights), "effective_sample_size": size}, {}


def _gradients(strategy: Strategy, x: Tensor, repetitions: int) -> Part:
    if repetitions == 0:
        return {}, {"gradient_snr": NOT_ASKED}
    try:
        return {"gradient_snr": gradient_signal_to_noise(strategy, x, repetitions)}, {}
    except StrategyError as error:
        return {}, {"gradient_snr": str(error)}


def _restarts(strategy: Strategy, x: Tensor, restarts: int, first: Posterior | None) -> Part:
    if restarts == 0:
        return {}, dict.fromkeys(("elbo_spread", "pairwise_ari"), NOT_ASKED)
    try:
        strategy.check_infer(restarts, strategy.iterations, None)
    except StrategyError as error:
        why = f"there is one start only: {str(error).partition(':')[0]}"
        return {}, dict.fromkeys(("elbo_spread", "pairwise_ari"), why)
    elbo, ari, _ = restart_spread(strategy, x, restarts, posterior=first)
    absent = {} if ari is not None else {"pairwise_ari": "the model has one component, to which all pixels belong"}
    return {"elbo_spread": elbo, "pairwise_ari": ari}, absent


def _simulations(strategy: Strategy, simulations: int, posterior: Posterior, num_pixels: int) -> Part:
    if simulations == 0:
        return {}, {"calibration": NOT_ASKED}
    if isinstance(posterior.q, dist.Delta):
        why = "q(θ) is a Delta, among whose draws no θ has a rank: use a strategy whose q(θ) has a width"
        return {}, {"calibration": why}
    try:
        ranks = calibration(strategy.model, strategy, simulations=simulations, num_pixels=num_pixels)
        return {"calibration": ranks}, {}
    except StrategyError as error:
        return {}, {"calibration": str(error)}


def _row(title: str, values: Tensor, digits: int) -> tuple[str, str, str]:
    mean, error, _ = mean_and_standard_error(values)
    return title, f"{mean:.{digits}f}", _error(error, digits)


def _error(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
