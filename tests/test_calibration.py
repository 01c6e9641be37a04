"""Calibration: exact posteriors pass, wrong ones fail, and the test of uniformity has the size that it says."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import MODELS, factors, mixture
from pyro import poutine
from torch import Tensor

from pnem.diagnostics import Calibration, calibration
from pnem.diagnostics.uniformity import uniformity_p_values
from pnem.errors import StrategyError
from pnem.inference import NUTS, RNNEM, VAE, ClassicalEM, GradientEM, MixingWarning, Posterior
from pnem.models import Bernoulli, MultivariateNormal, Poisson, SpatialMixture, decoders

pytestmark = pytest.mark.usefixtures("float64")


def linear_gaussian(C: int = 5, M: int = 2) -> SpatialMixture:
    model = factors(C, M)
    with torch.no_grad():
        model.decoder.linear.weight.normal_()
        model.decoder.linear.bias.normal_()
    return model


class Guide(ClassicalEM):
    """The exact posterior of factor analysis, its standard deviations stretched and its mean shifted by some."""

    def __init__(self, model: SpatialMixture, stretch: float = 1.0, shift: float = 0.0):
        super().__init__(model)
        self.stretch, self.shift = stretch, shift

    def infer(self, x: Tensor, **options: object) -> Posterior:
        posterior = super().infer(x)
        normal = posterior.q.base_dist
        location = normal.mean + self.shift * normal.variance.sqrt()
        q = dist.MultivariateNormal(location, scale_tril=self.stretch * normal.scale_tril).to_event(1)
        return posterior._replace(q=q)


def test_the_exact_posterior_passes():
    model = linear_gaussian()
    found = calibration(model, ClassicalEM(model), simulations=500, batch_size=200)
    assert found.names == ("θ[0]", "θ[1]", "log p(θ)", "log p(x | θ)")
    assert found.ranks.shape == (500, 4)
    assert found.ranks.dtype == torch.int64
    assert (found.ranks.min().item(), found.ranks.max().item()) == (0, 99)
    assert min(found.p_values.values()) > 0.01
    assert found.p_value > 0.05
    assert found.findings == []


@pytest.mark.filterwarnings("ignore::pnem.inference.MixingWarning")
@pytest.mark.parametrize("K", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nuts_passes(K):
    if K == 1:
        model = linear_gaussian(3, 1)
    else:
        model = SpatialMixture(decoders.Linear(1, (1, 3, 1)), Bernoulli(), 2, prior="standard_normal")
    strategy = NUTS(model, chains=1, warmup=50, draws=100, max_tree_depth=4)
    found = calibration(model, strategy, simulations=200, draws=19, batch_size=200)
    assert found.p_value > 0.05


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        ({"stretch": 0.5}, "θ[0]"),
        ({"stretch": 2.0}, "θ[1]"),
        ({"shift": 0.7}, "θ[0]"),
        ({"shift": -0.7}, "θ[1]"),
    ],
)
def test_wrong_posteriors_fail(wrong, seen):
    model = linear_gaussian()
    found = calibration(model, Guide(model, **wrong), simulations=200)
    assert found.p_values[seen] < 1e-4
    (finding,) = found.findings
    assert finding.name == "not calibrated"
    assert finding.value == found.p_value < 1e-3
    tails = (found.ranks[:, found.names.index(seen)].double() / 99 - 0.5).abs().mean().item()
    if "stretch" in wrong:
        # Uniform ranks are a quarter of the range away from the middle.
        assert (tails > 0.3) == (wrong["stretch"] < 1)
        assert (tails < 0.2) == (wrong["stretch"] > 1)
    else:
        above = (found.ranks[:, found.names.index(seen)] > 49).double().mean().item()
        assert (above < 0.3) == (wrong["shift"] > 0)
        assert (above > 0.7) == (wrong["shift"] < 0)


def test_the_prior_as_q_fails_only_on_what_sees_the_data():
    """Modrák et al. (2023): q = p(θ) is calibrated for every quantity of θ alone."""
    model = linear_gaussian()

    class Prior(ClassicalEM):
        def infer(self, x: Tensor, **options: object) -> Posterior:
            q = dist.Normal(torch.zeros(len(x), 1, 2), 1.0).to_event(2)
            return super().infer(x)._replace(q=q)

    found = calibration(model, Prior(model), simulations=500)
    assert min(found.p_values[name] for name in ("θ[0]", "θ[1]", "log p(θ)")) > 0.01
    assert found.p_values["log p(x | θ)"] < 1e-6
    assert "log p(x | θ) are not uniform" in found.findings[0].seen
    assert "in the highest" in found.findings[0].seen


def test_the_order_of_components_changes_no_rank():
    """A q that has found the components of every image in an order of its own."""
    model = SpatialMixture(decoders.MLP(2, (2, 3, 1), hidden=(7,)), Bernoulli(), 3, prior="standard_normal")
    ranks = []
    for order in ([0, 1, 2], [2, 0, 1]):

        class Prior(VAE):
            def infer(self, x: Tensor, order: list[int] = order, **options: object) -> Posterior:
                theta = torch.randn(50, len(x), 3, 2)[..., order, :]
                posterior = super().infer(x)

                class Given(dist.Normal):
                    def sample(self, sample_shape: torch.Size) -> Tensor:
                        return theta[: sample_shape[0]]

                return posterior._replace(q=Given(torch.zeros(len(x), 3, 2), 1.0))

        torch.manual_seed(3)
        strategy = Prior(model)
        torch.manual_seed(4)
        found = calibration(model, strategy, simulations=30, draws=9)
        ranks.append(found.ranks)
    assert found.names[:2] == ("Σ_k θ[0]", "Σ_k θ[1]")
    assert torch.equal(*ranks)


def test_what_is_simulated_is_the_model_and_leaves_no_trace():
    seen = []

    class Spy(ClassicalEM):
        def infer(self, x: Tensor, **options: object) -> Posterior:
            seen.append(x)
            return super().infer(x)

    model = linear_gaussian()
    pyro.param("mine", torch.ones(1))
    with poutine.trace() as outer:
        calibration(model, Spy(model), simulations=3000, draws=1, batch_size=1600)
    assert list(outer.trace.nodes) == []
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert [len(x) for x in seen] == [1600, 1400]
    x = torch.cat(seen).squeeze(1)
    W, b = model.decoder.linear.weight.detach(), model.decoder.linear.bias.detach()
    covariance = W @ W.T + model.likelihood.sigma.detach().square().diag()
    deviation = covariance.diagonal().sqrt()
    assert bool(((x.mean(0) - b).abs() < 4.5 * deviation / 3000**0.5).all())
    error = (deviation.outer(deviation).square() + covariance.square()).sqrt() / 3000**0.5
    assert bool(((x.T.cov() - covariance).abs() < 4.5 * error).all())


@pytest.mark.filterwarnings("ignore::pnem.inference.MixingWarning")
def test_a_decoder_that_leaves_the_number_of_pixels_open():
    model = SpatialMixture(decoders.Constant(1), Poisson(), 1, prior="standard_normal")
    strategy = NUTS(model, chains=1, warmup=30, draws=60)
    found = calibration(model, strategy, simulations=100, draws=9, num_pixels=4)
    assert found.p_value > 0.05


def test_single_precision_and_ties():
    model = linear_gaussian().float()
    torch.set_default_dtype(torch.float32)
    found = calibration(model, ClassicalEM(model), simulations=50)
    assert found.ranks.shape == (50, 4)

    class Same(ClassicalEM):
        """Each draw is of the same two values as each θ: nearly all are ties."""

        def infer(self, x: Tensor, **options: object) -> Posterior:
            q = dist.Bernoulli(torch.full((len(x), 1, 2), 0.5)).to_event(2)
            return super().infer(x)._replace(q=q)

    prior = dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1)
    model.prior_distribution = lambda: prior
    found = calibration(model, Same(model), simulations=500)
    assert found.p_values["θ[0]"] > 0.01


def test_ranks_of_uniform_distribution_have_uniform_p_values():
    rng = np.random.default_rng(0)
    p = uniformity_p_values(rng.integers(0, 20, (60, 2000)), 19)
    for level in (0.01, 0.05, 0.2, 0.5):
        # Discrete, and so a little conservative.
        assert 0.5 * level < (p <= level).mean() < level + 4 * math.sqrt(level / 2000)


def test_the_p_value_is_that_of_all_outcomes_counted():
    N, L = 5, 3
    outcomes = np.array(list(itertools.product(range(L + 1), repeat=N))).T
    counted = uniformity_p_values(outcomes, L)
    # As extreme as an outcome are those whose p-value is no larger than its own.
    for value in np.unique(counted.round(12)):
        assert (counted <= value + 1e-9).mean() == pytest.approx(value, abs=1e-9)


def test_ranks_off_the_uniform_are_found():
    rng = np.random.default_rng(0)
    fine = rng.integers(0, 100, 200)
    both_ends = np.concatenate([rng.integers(0, 20, 100), rng.integers(80, 100, 100)])
    p = uniformity_p_values(np.stack([fine, both_ends, np.full(200, 50), np.arange(200) // 2], 1), 99)
    assert p[0] > 0.05
    assert p[1] < 1e-4
    assert p[2] < 1e-12
    assert p[3] > 0.99


def test_calibrations_concatenate():
    model = linear_gaussian()
    parts = [calibration(model, ClassicalEM(model), simulations=n, draws=19) for n in (20, 30)]
    whole = Calibration.concatenate(parts)
    assert torch.equal(whole.ranks, torch.cat([part.ranks for part in parts]))
    assert (whole.names, whole.draws) == (parts[0].names, 19)


def test_what_cannot_be_calibrated_is_refused():
    model = linear_gaussian()
    for count in ("simulations", "draws", "batch_size", "num_pixels"):
        with pytest.raises(StrategyError, match=f"{count} must be at least 1"):
            calibration(model, ClassicalEM(model), **{count: 0})
    with pytest.raises(StrategyError, match="of another model"):
        calibration(linear_gaussian(), ClassicalEM(model))
    with pytest.raises(StrategyError, match=r"needs a q.* with a width, but GradientEM's is a Delta"):
        calibration(model, GradientEM(model, iterations=1))
    owned = MODELS["owned Normal"](proper=True)
    with pytest.raises(StrategyError, match=r"with ownership .* not normalised over x.* without pixel_prior"):
        calibration(owned, VAE(owned))
    flat = MODELS["plain Bernoulli"]()
    with pytest.raises(StrategyError, match="flat, and no θ can be drawn"):
        calibration(flat, RNNEM(flat))
    moments = mixture(MultivariateNormal("full"))
    with pytest.raises(StrategyError, match="flat"):
        calibration(moments, ClassicalEM(moments))


def test_a_sampler_that_is_worth_too_little_is_refused():
    model = linear_gaussian(3, 1)
    strategy = NUTS(model, chains=1, warmup=20, draws=20)
    with pytest.warns(MixingWarning), pytest.raises(StrategyError, match=r"the 20 draws .* worth \d+ .* draws=99"):
        calibration(model, strategy, simulations=3)


def test_a_quantity_that_is_nan_is_not_hidden():
    model = linear_gaussian()

    class Broken(ClassicalEM):
        def infer(self, x: Tensor, **options: object) -> Posterior:
            posterior = super().infer(x)
            return posterior._replace(q=dist.Normal(posterior.theta * math.nan, 1.0, validate_args=False).to_event(2))

    with pytest.raises(StrategyError, match="a test quantity is NaN"):
        calibration(model, Broken(model), simulations=3)
