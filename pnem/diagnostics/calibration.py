"""Simulation-based calibration: whether q(θ) is the posterior of images that the model itself makes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pnem.diagnostics.checks import check_pair
from pnem.diagnostics.findings import Finding
from pnem.diagnostics.uniformity import uniformity_p_values
from pnem.errors import StrategyError
from pnem.inference import Strategy
from pnem.inference.chains import bulk_effective_sample_size
from pnem.inference.distributions import Draws
from pnem.inference.estimates import check_counts
from pnem.models import SpatialMixture

__all__ = ["Calibration", "as_p_value", "calibration"]

# Draws of all images that are decoded at once.
CHUNK = 10
# Of the smallest p-value, corrected for how many there are.
LEVEL = 0.01


@dataclass(frozen=True)
class Calibration:
    """Where the θ that made an image stands among draws from q(θ | x), for images that the model made.

    If q(θ | x) = p(θ | x), each column of ranks is uniform on 0, ..., L. Ranks at both ends are of a q that is too
    narrow, ranks in the middle of one too wide, ranks at one end of one that is off to the other side.

    Attributes:
        ranks: (N, Q) int64: of how many of the draws the test quantity is below that of the true θ.
        names: of the Q test quantities.
        draws: L, draws from q for each image.
    """

    ranks: Tensor
    names: tuple[str, ...]
    draws: int

    @cached_property
    def p_values(self) -> dict[str, float]:
        """For each test quantity the p-value of uniform ranks; see `uniformity_p_values`."""
        values = uniformity_p_values(self.ranks.numpy(), self.draws)
        return dict(zip(self.names, values.tolist(), strict=True))

    @property
    def p_value(self) -> float:
        """Of all test quantities together: the smallest p-value times their number, at most 1 (Bonferroni)."""
        return min(1.0, min(self.p_values.values()) * len(self.names))

    @property
    def findings(self) -> list[Finding]:
        """Ranks that are not uniform, at a level of 1 % for all test quantities together."""
        if self.p_value >= LEVEL:
            return []
        worst = min(self.names, key=self.p_values.__getitem__)
        share = (self.ranks[:, self.names.index(worst)] + 0.5) / (self.draws + 1)
        shape = [f"{(share < 0.1).double().mean():.0%} of them are in the lowest tenth"]
        shape.append(f"{(share >= 0.9).double().mean():.0%} in the highest")
        return [
            Finding(
                "not calibrated",
                f"on {len(self.ranks)} images that the model made, the ranks of {worst} are not uniform "
                f"(p-value {as_p_value(self.p_value)}, for {len(self.names)} test quantities): {' and '.join(shape)}",
                self.p_value,
                "ranks at both ends are of a q(θ) that is too narrow, and in the middle of one too wide: refine it by "
                "SemiAmortised, or allow it a full covariance (PyroGuide); for an amortised strategy see whether "
                "images of the model are like those it was trained on",
            )
        ]

    @classmethod
    def concatenate(cls, parts: Sequence["Calibration"]) -> "Calibration":
        """The ranks of the simulations of several, with the same test quantities and draws."""
        return cls(torch.cat([part.ranks for part in parts]), parts[0].names, parts[0].draws)


@torch.no_grad()
def calibration(
    model: SpatialMixture,
    strategy: Strategy,
    *,
    simulations: int = 200,
    draws: int = 99,
    batch_size: int = 100,
    num_pixels: int = 1,
) -> Calibration:
    r"""Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari & Gelman 2018) of a strategy's q(θ):

        θ ~ p(θ),    x ~ p(x | θ),    θ_1, ..., θ_L ~ q(θ | x),    rank = #{l: f(θ_l) < f(θ)}

    which is uniform for every f if q(θ | x) = p(θ | x). As components are exchangeable, each f is symmetric in them:
    the sum over components of every entry of θ, log p(θ), and, since some q that ignore x pass all that do not see it
    (Modrák et al. 2023), log p(x | θ). Ties are broken at random.

    A sampler's draws are thinned evenly, for ranks among draws that are correlated are not uniform.

    Args:
        model: the generative model, with a proper prior and without ownership.
        strategy: a strategy of this model, whose q(θ) is a distribution.
        simulations: N images.
        draws: L for each; with one less than a multiple of 10 ranks fall into equal bins.
        batch_size: images at once.
        num_pixels: D, where the decoder leaves it open.

    Raises:
        StrategyError: simulations, draws, batch_size or num_pixels < 1, a strategy of another model, a flat prior, an
            ownership term, mixing weights that were fitted to images, a q(θ) that is a Delta, chains that are worth
            fewer draws than asked, or a test quantity that is NaN.

    >>> from pnem.inference import ClassicalEM
    >>> from pnem.models import Normal, decoders
    >>> model = SpatialMixture(decoders.Linear(2, (1, 5, 1)), Normal(), 1, prior="standard_normal")
    >>> found = calibration(model, ClassicalEM(model), simulations=50, draws=19)
    >>> found.names, found.ranks.shape, found.p_value > 0.001
    (('θ[0]', 'θ[1]', 'log p(θ)', 'log p(x | θ)'), torch.Size([50, 4]), True)
    """
    check_counts(simulations=simulations, draws=draws, batch_size=batch_size, num_pixels=num_pixels)
    check_pair(model, strategy)
    obstacle = _why_not_simulated(model)
    if obstacle is not None:
        raise StrategyError(f"simulation-based calibration needs a model that makes images: {obstacle}")
    ranks = []
    for first in range(0, simulations, batch_size):
        theta, x = _simulated(model, min(batch_size, simulations - first), num_pixels)
        q = strategy.infer(x, keep_trace=False).q
        if isinstance(q, dist.Delta):
            raise StrategyError(
                f"simulation-based calibration needs a q(θ) with a width, but {type(strategy).__name__}'s is a Delta"
            )
        ranks.append(_ranks(_quantities(model, x, theta.unsqueeze(0)), _drawn(model, q, x, draws)))
    letter = "θ" if model.num_components == 1 else "Σ_k θ"
    entries = [f"{letter}[{m}]" for m in range(model.latent_features)]
    return Calibration(torch.cat(ranks).cpu(), (*entries, "log p(θ)", "log p(x | θ)"), draws)


def _why_not_simulated(model: SpatialMixture) -> str | None:
    """Why a model makes no images to be calibrated on, and what to do; None where it does."""
    if not model.has_proper_prior:
        return 'p(θ) is flat, and no θ can be drawn from it: give the model a proper prior, such as "standard_normal"'
    if model.owned:
        return (
            "with ownership the declared joint density is not normalised over x, and nothing can be drawn from it: a "
            "model without pixel_prior can be calibrated"
        )
    if model.log_mixing.dim() > 1:
        return "its mixing weights were fitted to given images, and new ones have none: declare a new model"
    return None


def as_p_value(value: float) -> str:
    """A p-value of `uniformity_p_values` as text; below 1e-12 rounding has hidden it."""
    return f"{value:.2g}" if value >= 1e-12 else "< 1e-12"


def _simulated(model: SpatialMixture, count: int, num_pixels: int) -> tuple[Tensor, Tensor]:
    """θ (B, K, M) and images (B, D, C) from the model's own Pyro program, of which no outer trace or store knows."""
    with poutine.block(), pyro.settings.context(module_local_params=True):
        sites = poutine.trace(model).get_trace(num_images=count, num_pixels=num_pixels).nodes
    return sites["theta"]["value"], sites["x"]["value"]


def _quantities(model: SpatialMixture, x: Tensor, theta: Tensor) -> Tensor:
    """The test quantities of θ (L, B, K, M): (L, B, Q), in double precision."""
    pieces = theta.split(CHUNK)
    log_p = torch.cat([model.log_joint_at(x, model.decode(piece)).logsumexp(-2).sum(-1) for piece in pieces])
    return torch.cat([theta.sum(-2), torch.stack([model.log_prior(theta), log_p], -1)], -1).double()


def _drawn(model: SpatialMixture, q: dist.TorchDistribution, x: Tensor, draws: int) -> Tensor:
    """The test quantities of L draws from q: (L, B, Q)."""
    if not isinstance(q, Draws):
        return _quantities(model, x, q.sample(torch.Size([draws])))
    chains = q.draws.shape[:2]
    values = _quantities(model, x, q.draws.flatten(0, 1))
    worth = bulk_effective_sample_size(values.unflatten(0, chains)).median(0).values.amin().item()
    if not min(worth, len(values)) >= draws:
        raise StrategyError(
            f"the {len(values)} draws of the chains are worth {worth:.0f} independent ones for an image in the middle, "
            f"but draws={draws} are to be compared: let the sampler take more, or give fewer draws here"
        )
    return values[torch.linspace(0, len(values) - 1, draws).round().long()]


def _ranks(true: Tensor, drawn: Tensor) -> Tensor:
    """Of how many draws (L, B, Q) each is below the true value (1, B, Q), ties at random: (B, Q)."""
    if bool(true.isnan().any() | drawn.isnan().any()):
        raise StrategyError("a test quantity is NaN: look at q(θ) and log p(x | θ) of images that the model makes")
    ties = (drawn == true).sum(0)
    return (drawn < true).sum(0) + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long()
