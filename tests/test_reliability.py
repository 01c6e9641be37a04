"""Reliability: its parts are what they say, every strategy has them or a reason, and nothing is left changed."""

import math
import re
import warnings

import pyro.distributions as dist
import pytest
import torch
from cases import CLASSICAL, MODELS, ONE_START, PROPER, STRATEGIES, factors, images, items, pair
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from pnem.diagnostics import (
    Calibration,
    Reliability,
    gradient_signal_to_noise,
    psis_k_hat,
    reliability,
    restart_spread,
)
from pnem.errors import ModelError, StrategyError
from pnem.inference import (
    NUTS,
    RNNEM,
    VAE,
    ClassicalEM,
    ConvergenceWarning,
    GradientEM,
    IterativeVI,
    MixingWarning,
    Posterior,
    State,
    Strategy,
)
from pnem.models import Bernoulli, SpatialMixture, decoders

every_strategy = pytest.mark.parametrize("strategy_name", STRATEGIES)
SMALL = {"samples": 40, "restarts": 2, "repetitions": 2, "simulations": 6}


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        # A few steps and draws are enough for what is tested here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", MixingWarning)
        return function(*arguments, **options)


def linear_gaussian(C: int = 6, M: int = 2) -> SpatialMixture:
    model = factors(C, M)
    with torch.no_grad():
        model.decoder.linear.weight.normal_()
    return model


def assert_each_part_is_there_or_absent(found: Reliability, B: int) -> None:
    for name in ("k_hat", "effective_sample_size", "elbo_spread", "pairwise_ari"):
        value = getattr(found, name)
        assert (value is None) == (name in found.absent), name
        if value is not None:
            assert value.shape == (B,)
            assert value.dtype == torch.float64
            # An image without a pixel that is decided has no segmentation.
            assert name == "pairwise_ari" or not value.isnan().any()
    assert (not found.gradient_snr) == ("gradient_snr" in found.absent)
    assert (found.calibration is None) == ("calibration" in found.absent)
    assert all(found.absent.values())


@every_strategy
@pytest.mark.parametrize("model_name", ["plain Bernoulli", "owned Normal"])
def test_every_strategy_has_each_part_or_a_reason(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    model.decoder.requires_grad_(False)
    strategy.eval()
    state = {name: value.clone() for name, value in (model.state_dict() | strategy.state_dict()).items()}
    found = quietly(reliability, model, strategy, images(3), **SMALL)
    assert_each_part_is_there_or_absent(found, 3)
    proper, one_start = (
        strategy_name in PROPER,
        strategy_name
        in ONE_START
        - {
            "auto-delta",
            "auto-normal",
            "auto-multivariate-normal",
        },
    )
    assert (found.k_hat is not None) == proper
    assert (found.elbo_spread is None) == one_start
    assert (found.calibration is not None) == (proper and model_name == "plain Bernoulli")
    assert found.is_bound == proper
    # What is trained is all that is not frozen.
    trained = {f"model.{name}" for name, _ in model.named_parameters() if not name.startswith("decoder")}
    trained |= {f"strategy.{name}" for name, _ in strategy.named_parameters()}
    assert set(found.gradient_snr) == trained
    assert len(found.rows()) == 3 * proper + 1 + 2 * (not one_start) + (found.calibration is not None)
    assert all(isinstance(finding.value, float) and str(finding) for finding in found.findings)
    # All is as it was.
    assert not strategy.training
    assert not any(module.training for module in strategy.modules())
    assert not any(parameter.requires_grad for parameter in model.decoder.parameters())
    assert all(p.grad is None for p in [*model.parameters(), *strategy.parameters()])
    for name, value in (model.state_dict() | strategy.state_dict()).items():
        assert torch.equal(state[name], value)


@pytest.mark.parametrize("model_name", ["owned Bernoulli", "owned Normal"])
@pytest.mark.parametrize("width", [0.3, "laplace"])
def test_a_delta_has_importance_weights_where_a_width_is_given(model_name, width):
    model = MODELS[model_name](proper=True)
    strategy = GradientEM(model, iterations=2)
    x = images(3)
    found = reliability(model, strategy, x, **SMALL, width=width)
    assert found.k_hat.shape == (3,)
    assert not found.is_bound
    without = reliability(model, strategy, x, **SMALL)
    assert "Delta" in without.absent["k_hat"]
    assert 'width="laplace"' in without.absent["effective_sample_size"]


@pytest.mark.usefixtures("float64")
def test_the_exact_posterior_is_reliable():
    model = linear_gaussian()
    x = model(num_images=20).detach()
    found = reliability(model, ClassicalEM(model), x, samples=100)
    assert_each_part_is_there_or_absent(found, 20)
    assert bool((found.k_hat == -math.inf).all())
    torch.testing.assert_close(found.effective_sample_size, torch.full((20,), 100.0))
    assert found.calibration.ranks.shape == (200, 4)
    assert set(found.absent) == {"gradient_snr", "elbo_spread", "pairwise_ari"}
    assert "`fit`" in found.absent["gradient_snr"]
    assert found.absent["elbo_spread"].startswith("there is one start only: with a linear decoder infer fits nothing")
    assert found.findings == []
    assert [row[:2] for row in found.rows()][:2] == [
        ("share of images with k̂ > 0.7", "0.000"),
        ("k̂, median over images", "-inf"),
    ]


@pytest.mark.usefixtures("float64")
def test_a_sampler_has_weights_and_ranks():
    model = linear_gaussian(3, 1)
    strategy = NUTS(model, chains=2, warmup=30, draws=60)
    found = quietly(reliability, model, strategy, torch.randn(2, 1, 3), samples=100, simulations=3)
    assert_each_part_is_there_or_absent(found, 2)
    assert found.k_hat is not None
    assert re.search(r"the 120 draws of the chains are worth \d+ .* draws=99", found.absent["calibration"])
    assert "NUTS has no iterations to unroll" in found.absent["gradient_snr"]
    assert "NUTS draws chains from starts of its own" in found.absent["elbo_spread"]


@pytest.mark.usefixtures("float64")
def test_classical_em_leaves_the_mixing_weights_as_they_were():
    model = CLASSICAL["full"]()
    strategy = ClassicalEM(model, iterations=3)
    for _ in range(2):
        before = model.mixing_logits.detach().clone()
        found = quietly(reliability, model, strategy, items("full"), **SMALL)
        assert torch.equal(model.mixing_logits, before)
        assert isinstance(model.mixing_logits, nn.Parameter)
        model.mixing_logits.data.normal_()
    assert_each_part_is_there_or_absent(found, 1)
    assert found.elbo_spread is not None
    assert "flat" in found.absent["k_hat"]
    assert "no parameter is trained" in found.absent["gradient_snr"]
    local = CLASSICAL["full"](mixing="per_image")
    quietly(reliability, local, ClassicalEM(local, iterations=3), items("full", B=2), **SMALL)
    assert local.mixing_logits.shape == (3,)


class Given(Strategy):
    """A strategy whose ELBO has the gradient μ + σ ε, and of which each fit is the next of some posteriors."""

    def __init__(self, model: SpatialMixture, mean: Tensor, deviation: float):
        super().__init__(model)
        self.weight = nn.Parameter(torch.zeros_like(mean))
        self.mean_of_gradient, self.deviation = mean, deviation
        self.modes: list[bool] = []

    def m_step(self, state: State, x_in: Tensor) -> Tensor:
        return state.theta

    def unroll(self, x: Tensor, gamma: Tensor | None = None) -> list[State]:
        self.modes.append(self.training)
        return [self.init(x, gamma)]

    def elbo(self, state: State) -> Tensor:
        gradient = self.mean_of_gradient + self.deviation * torch.randn_like(self.mean_of_gradient)
        return (self.weight * gradient).sum().expand(len(state.theta))


@pytest.mark.usefixtures("float64")
def test_the_ratio_is_that_of_the_gradients_mean_and_deviation():
    model, mean = linear_gaussian(), torch.randn(50)
    strategy = Given(model, mean, 2.0).eval()
    found = gradient_signal_to_noise(strategy, torch.zeros(3, 1, 6), repetitions=500)
    assert found == {"strategy.weight": pytest.approx((mean.norm() / (2 * 50**0.5)).item(), rel=0.05)}
    assert strategy.modes == [True] * 500
    assert not strategy.training


@pytest.mark.usefixtures("float64")
def test_the_noise_in_the_mean_of_the_gradients_is_no_signal():
    """Of R = 10 the norm of the mean alone would give a ratio of 1/√10."""
    strategy = Given(linear_gaussian(), torch.zeros(10_000), 1.0)
    (ratio,) = gradient_signal_to_noise(strategy, torch.zeros(3, 1, 6), repetitions=10).values()
    assert ratio < 0.1


def test_a_gradient_without_noise_has_an_infinite_ratio():
    strategy = Given(linear_gaussian(), torch.ones(2), 0.0)
    assert gradient_signal_to_noise(strategy, torch.zeros(3, 1, 6), 3) == {"strategy.weight": math.inf}
    strategy = Given(linear_gaussian(), torch.zeros(2), 0.0)
    with pytest.raises(StrategyError, match="no parameter is trained by the gradient of Given's ELBO"):
        gradient_signal_to_noise(strategy, torch.zeros(3, 1, 6), 3)


@pytest.mark.usefixtures("float64")
def test_the_ratio_grows_with_the_square_root_of_the_images():
    model = linear_gaussian()
    vae, x = VAE(model), torch.randn(2, 1, 6)
    few, many = (gradient_signal_to_noise(vae, x.repeat(n, 1, 1), 300) for n in (1, 16))
    for name, ratio in few.items():
        assert many[name] == pytest.approx(4 * ratio, rel=0.3), name


@pytest.mark.usefixtures("float64")
def test_gradients_that_are_there_stay():
    model = linear_gaussian()
    vae, x = VAE(model), torch.randn(4, 1, 6)
    (-vae.elbo(vae.unroll(x)[-1]).mean()).backward()
    before = [parameter.grad.clone() for parameter in vae.parameters()]
    with torch.no_grad():
        gradient_signal_to_noise(vae, x, 2)
    assert all(torch.equal(old, new.grad) for old, new in zip(before, vae.parameters(), strict=True))


class Several(RNNEM):
    """Of which each fit is the next of some posteriors."""

    def infer(self, x: Tensor, **options: object) -> Posterior:
        assert "restarts" not in options
        return self.posteriors.pop(0)


@pytest.mark.usefixtures("float64")
def test_restarts_are_compared_by_their_elbo_and_their_segmentations():
    model = MODELS["tied Bernoulli"]()
    strategy, x = Several(model, iterations=2), images(5)
    fits = [super(Several, strategy).infer(x) for _ in range(3)]
    strategy.posteriors = list(fits)
    spread = restart_spread(strategy, x, 3)
    assert strategy.posteriors == []
    elbos = torch.stack([fit.elbo_trace[-1] for fit in fits])
    torch.testing.assert_close(spread.elbo, elbos.std(0))
    # So that some pixels are decided, and others are not.
    fits = [fit._replace(gamma=(2 * torch.randn(5, 3, 12)).softmax(-2)) for fit in fits]
    strategy.posteriors = list(fits)
    spread = restart_spread(strategy, x, 3)
    for b in range(5):
        pairs = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            one, other = fits[i].gamma[b], fits[j].gamma[b]
            decided = (one.amax(0) > 0.5) & (other.amax(0) > 0.5)
            pairs.append(adjusted_rand_score(one.argmax(0)[decided], other.argmax(0)[decided]))
        assert 0 < decided.sum().item() < 12
        assert spread.pairwise_ari[b].item() == pytest.approx(sum(pairs) / 3)
    # A fit that is there already is the first of them.
    strategy.posteriors = fits[1:]
    again = restart_spread(strategy, x, 3, posterior=fits[0])
    torch.testing.assert_close(again, spread)


@pytest.mark.usefixtures("float64")
def test_restarts_that_find_the_same_agree_whatever_the_order_of_components_and_the_draws():
    model = SpatialMixture(decoders.MLP(5, (3, 4, 1), hidden=(7,)), Bernoulli(), 3, prior="standard_normal")
    strategy, x = IterativeVI(model, iterations=2), images(200)
    fit = strategy.infer(x, keep_trace=False)._replace(gamma=(2 * torch.randn(200, 3, 12)).softmax(-2))
    order = [2, 0, 1]
    swapped = fit._replace(
        theta=fit.theta[:, order],
        psi=fit.psi[:, order],
        mean=fit.mean[:, order],
        gamma=fit.gamma[:, order],
        log_mixing=fit.log_mixing[:, order],
        q=dist.Normal(fit.q.mean[:, order], fit.q.stddev[:, order]).to_event(2),
    )

    class Same(IterativeVI):
        def infer(self, x: Tensor, **options: object) -> Posterior:
            return swapped

    same = restart_spread(Same(model, iterations=2), x, 4, posterior=fit)
    torch.testing.assert_close(same.pairwise_ari, torch.ones(200))
    # The variance over four restarts is that of the estimate, which is taken off: half are below zero and become 0.
    assert 0.3 < (same.elbo == 0).double().mean().item() < 0.75
    assert same.elbo.mean().item() < 1
    assert same.findings == []


def test_with_one_component_there_is_nothing_to_divide():
    model = MODELS["plain Bernoulli"](K=1)
    found = reliability(model, RNNEM(model, iterations=2), images(3), **SMALL)
    assert bool((found.elbo_spread == 0).all())
    assert "one component" in found.absent["pairwise_ari"]
    assert found.findings == []


@pytest.mark.usefixtures("float64")
def test_k_hat_and_effective_sample_size_are_those_of_the_weights():
    model = linear_gaussian()
    vae, x = VAE(model), torch.randn(4, 1, 6)
    posterior = vae.infer(x)
    torch.manual_seed(5)
    found = reliability(model, vae, x, samples=200, repetitions=0, simulations=0, posterior=posterior)
    torch.manual_seed(5)
    theta = torch.cat([posterior.q.sample((10,)) for _ in range(20)])
    log_prior = dist.Normal(0.0, 1.0).log_prob(theta).sum((-2, -1))
    log_p = torch.stack([model.log_evidence(x, one) for one in theta]).detach()
    weights = log_p + log_prior - posterior.q.log_prob(theta)
    torch.testing.assert_close(found.k_hat, psis_k_hat(weights))
    w = weights.softmax(0)
    torch.testing.assert_close(found.effective_sample_size, 1 / w.square().sum(0))


def test_findings_name_what_is_wrong():
    bad = Reliability(
        k_hat=torch.tensor([0.1, 0.9, math.nan, math.inf, -math.inf]),
        effective_sample_size=torch.ones(5),
        samples=100,
        gradient_snr={"model.a": 2.0, "strategy.b": 0.25, "strategy.c": 0.5},
        elbo_spread=torch.tensor([3.0, 5.0]),
        pairwise_ari=torch.tensor([0.4, 0.6]),
        calibration=Calibration(torch.zeros(50, 1, dtype=torch.int64), ("θ[0]",), 99),
    )
    weights, restarts, ranks = bad.findings
    assert (weights.name, weights.value) == ("unreliable importance weights", pytest.approx(0.6))
    assert "above 0.7 for 60% of 5 images" in weights.seen
    assert (restarts.name, restarts.value) == ("restarts disagree", 4.0)
    assert "4 nats, and their segmentations have an ARI of 0.50" in restarts.seen
    assert ranks.name == "not calibrated"
    (plug_in,) = Reliability(elbo_spread=torch.tensor([3.0]), is_bound=False).findings
    assert "an image's plug-in log p(x, θ) has" in plug_in.seen
    assert {name: (value, error) for name, value, error in bad.rows()} == {
        "share of images with k̂ > 0.7": ("0.600", "0.245"),
        "k̂, median over images": ("nan", ""),
        "effective sample size of 100 weights, median over images": ("1.0", ""),
        "signal-to-noise ratio of gradients, lowest of 3 tensors": ("0.25", ""),
        "standard deviation of the ELBO over restarts [nats]": ("4.00", "1.00"),
        "ARI between the segmentations of restarts": ("0.500", "0.100"),
        "p-value of uniform calibration ranks, 1 test quantities": ("< 1e-12", ""),
    }


def test_parts_concatenate():
    model, strategy = pair("plain Bernoulli", "iterative vi")
    x = images(5)
    first = reliability(model, strategy, x[:2], **SMALL)
    rest = reliability(model, strategy, x[2:], **SMALL | {"repetitions": 0, "simulations": 4, "restarts": 0})
    whole = Reliability.concatenate([first, rest])
    torch.testing.assert_close(whole.k_hat, torch.cat([first.k_hat, rest.k_hat]))
    assert whole.effective_sample_size.shape == (5,)
    assert whole.gradient_snr == first.gradient_snr
    assert whole.calibration.ranks.shape[0] == 10
    assert torch.equal(whole.elbo_spread, first.elbo_spread)
    assert whole.absent == {}
    assert set(rest.absent) == {"gradient_snr", "elbo_spread", "pairwise_ari"}
    neither = Reliability.concatenate([rest, rest])
    assert neither.absent == rest.absent
    assert neither.elbo_spread is None
    # A reason that says something comes before one that does not.
    said = Reliability.concatenate([Reliability(absent={"k_hat": why}) for why in ("it was not asked for", "flat")])
    assert said.absent == {"k_hat": "flat"}


def test_what_is_not_asked_for_costs_nothing():
    model, strategy = pair("plain Bernoulli", "vae")
    found = reliability(model, strategy, images(2), samples=0, restarts=0, repetitions=0, simulations=0)
    assert set(found.absent.values()) == {"it was not asked for"}
    assert_each_part_is_there_or_absent(found, 2)
    assert found.rows() == []
    assert found.findings == []


def test_bad_arguments_are_refused():
    model, strategy = pair("plain Bernoulli", "vae")
    x = images(2)
    for option, value, least in (("samples", 29, 30), ("restarts", 1, 2), ("repetitions", 1, 2)):
        with pytest.raises(StrategyError, match=f"{option} must be at least {least}, or 0 to leave it out"):
            reliability(model, strategy, x, **{option: value})
    for option in SMALL:
        with pytest.raises(StrategyError, match=f"{option} must be at least 1"):
            reliability(model, strategy, x, **{option: -1})
    with pytest.raises(StrategyError, match="of another model"):
        reliability(MODELS["plain Bernoulli"](proper=True), strategy, x)
    with pytest.raises(StrategyError, match="at least one image"):
        reliability(model, strategy, images(0))
    with pytest.raises(StrategyError, match="of 3 images, but x holds 2"):
        reliability(model, strategy, x, posterior=strategy.infer(images(3)))
    with pytest.raises(StrategyError, match="leave width out"):
        reliability(model, strategy, x, width=0.1)
    with pytest.raises(ModelError, match="12"):
        reliability(model, strategy, images(2, (3, 3, 1)))
    with pytest.raises(StrategyError, match="repetitions must be at least 2"):
        gradient_signal_to_noise(strategy, x, 1)
    for wrong in (x[0], x.unflatten(1, (3, 4)), x.numpy(), x + 3):
        with pytest.raises(ModelError):
            gradient_signal_to_noise(strategy, wrong, 2)
    with pytest.raises(StrategyError, match="at least one image"):
        gradient_signal_to_noise(strategy, images(0), 2)
    for function in (gradient_signal_to_noise, restart_spread):
        with pytest.raises(StrategyError, match="strategy must be a Strategy, but is of type SpatialMixture"):
            function(model, x, 2)
    with pytest.raises(StrategyError, match="restarts must be at least 2"):
        restart_spread(strategy, x, 1)
    with pytest.raises(StrategyError, match="depends on the image alone"):
        restart_spread(strategy, x, 2)
