"""The course of inference: each number is what it says, only real falls are flagged, and every strategy has one."""

import math
import warnings

import pytest
import torch
from cases import BY_SVI, CLASSICAL, MODELS, ONE_START, PROPER, STRATEGIES, factors, images, items, pair
from torch.nn.functional import one_hot

from pnem.diagnostics import Trace, elbo_terms, trace
from pnem.errors import DataError, ModelError, StrategyError
from pnem.inference import (
    NUTS,
    RNNEM,
    VAE,
    ClassicalEM,
    ConvergenceWarning,
    GradientEM,
    IterativeVI,
    MixingWarning,
    OnlineEM,
    Posterior,
    PyroGuide,
    SemiAmortised,
    State,
    Strategy,
)
from pnem.metrics import adjusted_mutual_information, adjusted_rand_index

PER_IMAGE = ("elbo", "confidence", "components_used", "change", "decreased")


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        # A few steps and draws are enough for what is tested here.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", MixingWarning)
        return function(*arguments, **options)


def known(values):
    return values[~values.isnan()]


def posterior_of(gamma, theta=None, elbo=None):
    """A posterior with these γ (T, B, K, D), θ (T, B, K, M) and ELBOs (T, B)."""
    T, B, K, D = gamma.shape
    theta = torch.zeros(T, B, K, 5) if theta is None else theta
    mean, log_mixing = torch.zeros(B, K, D, 1), torch.full((B, K), -math.log(K))
    states = [
        State(m, mean, mean, g, g.clamp_min(1e-30).log(), torch.zeros(B), log_mixing)
        for m, g in zip(theta, gamma, strict=True)
    ]
    return Posterior.from_states(states, torch.zeros(T, B) if elbo is None else elbo, keep_trace=True)


def gradient_em():
    return GradientEM(MODELS["tied Bernoulli"](), iterations=3)


class Descent(Strategy):
    """Claims to climb, and walks the other way from θ ≠ 0."""

    monotone = True

    def m_step(self, state, x_in):
        def log_joint(theta):
            return self.elbo(self.evaluate(state._replace(theta=theta), theta, x_in)).sum()

        sign = -1 if bool(state.theta.any()) else 1
        return state.theta + sign * 0.3 * torch.func.grad(log_joint)(state.theta)


@pytest.mark.parametrize("model_name", ["plain Bernoulli", "owned Normal"])
@pytest.mark.parametrize("strategy_name", STRATEGIES)
def test_every_strategy_has_a_trace(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x, groups = images(4), torch.randint(0, 3, (4, 12))
    was_training = strategy.training
    torch.manual_seed(1)
    found = quietly(trace, strategy, x, groups, draws=3, batch_size=3)
    torch.manual_seed(1)
    first = quietly(strategy.infer, x[:3])
    assert strategy.training == was_training
    T = len(found.elbo)
    assert all(getattr(found, name).shape == (T, 4) for name in (*PER_IMAGE, "ami", "ari"))
    assert found.terms.elbo.shape == (1 if strategy_name in BY_SVI & PROPER else T, 4)
    # What every strategy of this list knows of every iteration.
    assert bool((found.confidence >= 1 / 3).all() & (found.confidence <= 1).all())
    assert bool((found.components_used > 1 - 1e-6).all() & (found.components_used < 3 + 1e-6).all())
    assert bool(found.change[:1].isnan().all() & (found.change[1:] >= 0).all())
    counted = weights(model, x[:3])
    torch.testing.assert_close(found.confidence[-1, :3], (counted * first.gamma.double().amax(-2)).sum(-1))
    for values, index in ((found.ami, adjusted_mutual_information), (found.ari, adjusted_rand_index)):
        torch.testing.assert_close(values[-1, :3], index(groups[:3], first.labels), equal_nan=True)
    assert found.monotone == (strategy_name in {"gradient em", "semi-amortised rnn-em"})
    assert found.findings == []
    if not found.terms.is_bound:
        torch.testing.assert_close(found.elbo, found.terms.elbo)
    assert list(found.table().index) == list(range(1, T + 1))


def weights(model, x):
    """How much each pixel counts: with ownership, for its distance from the pixel prior."""
    distance = (x.double() - model.pixel_prior).square().sum(-1) if model.owned else torch.ones_like(x[..., 0]).double()
    return distance / distance.sum(-1, keepdim=True)


def test_what_is_at_the_pixel_prior_does_not_count():
    model = MODELS["owned Bernoulli"]()
    x = torch.zeros(2, 12, 1)
    x[0, :6] = 1
    gamma = torch.full((2, 3, 12), 1 / 3)
    gamma[0, :, :6] = one_hot(torch.arange(6) % 2, 3).mT.float()
    found = trace(GradientEM(model), x, posterior=posterior_of(gamma[None]))
    torch.testing.assert_close(found.confidence[0, 0].item(), 1.0)
    torch.testing.assert_close(found.components_used[0, 0].item(), 2.0)
    assert bool(found.confidence[0, 1].isnan() & found.components_used[0, 1].isnan())
    assert found.table()["confidence"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("T", [2, 3])
@pytest.mark.usefixtures("float64")
def test_change_confidence_and_components_are_those_of_brute_force(T):
    model = MODELS["tied Bernoulli"]()
    x, theta, gamma = images(4), torch.randn(T, 4, 3, 5), torch.rand(T, 4, 3, 12).softmax(2)
    found = trace(GradientEM(model), x, posterior=posterior_of(gamma, theta))
    counted = weights(model, x).tolist()
    for b in range(4):
        assert math.isnan(found.change[0, b])
        for t in range(T):
            shares = [sum(counted[b][i] * gamma[t, b, k, i].item() for i in range(12)) for k in range(3)]
            used = math.exp(-sum(share * math.log(share) for share in shares))
            assert found.components_used[t, b].item() == pytest.approx(used, rel=1e-12)
            confidence = sum(counted[b][i] * max(gamma[t, b, k, i].item() for k in range(3)) for i in range(12))
            assert found.confidence[t, b].item() == pytest.approx(confidence, rel=1e-12)
        for t in range(1, T):
            squares = [(theta[t, b, k, m] - theta[t - 1, b, k, m]).item() ** 2 for k in range(3) for m in range(5)]
            assert found.change[t, b].item() == pytest.approx(math.sqrt(sum(squares) / 15), rel=1e-12)


@pytest.mark.usefixtures("float64")
def test_sure_and_unsure_responsibilities_have_exact_values():
    uniform = torch.full((3, 12), 1 / 3)
    one = one_hot(torch.zeros(12).long(), 3).mT.double()
    two = one_hot(torch.arange(12) % 2, 3).mT.double()
    three = one_hot(torch.arange(12) % 3, 3).mT.double()
    x = torch.ones(4, 12, 1)
    found = trace(gradient_em(), x, posterior=posterior_of(torch.stack([uniform, one, two, three])[None]))
    torch.testing.assert_close(found.confidence[0], torch.tensor([1 / 3, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(found.components_used[0], torch.tensor([3.0, 1.0, 2.0, 3.0]))


def test_groups_are_scored_at_every_iteration_and_may_be_missing():
    strategy, x = gradient_em(), images(3)
    groups = torch.tensor([[1, 2] * 6, [0] * 12, [1, 1, 2] * 4])
    posterior = strategy.infer(x)
    found = trace(strategy, x, groups, posterior=posterior)
    for t in range(3):
        labels = posterior.trace.gamma[t].argmax(-2)
        torch.testing.assert_close(found.ari[t], adjusted_rand_index(groups, labels), equal_nan=True)
        torch.testing.assert_close(found.ami[t], adjusted_mutual_information(groups, labels), equal_nan=True)
    # An image without a scored pixel has no score, and does not spoil the mean of the others.
    assert bool(found.ari[:, 1].isnan().all())
    assert found.table()["ari"].to_numpy() == pytest.approx(found.ari[:, [0, 2]].mean(1).numpy())
    without = trace(strategy, x, posterior=posterior)
    assert without.ami is None
    assert without.ari is None
    assert not {"ami", "ari"} & set(without.table())


@pytest.mark.usefixtures("float64")
def test_a_strategy_that_breaks_its_promise_is_found():
    model = MODELS["tied Bernoulli"]()
    found = trace(Descent(model, iterations=4), images(5))
    assert found.monotone
    assert not bool(found.decreased[0].any())
    assert bool(found.decreased[1:].all())
    (finding,) = found.findings
    largest = -found.elbo.diff(dim=0).min().item()
    assert finding.value == largest > 0
    assert finding.name == "monotone method decreased"
    assert finding.seen.startswith(f"the plug-in log p(x, θ) of 5 of 5 images fell by up to {largest:.3g} nats")
    assert "first in iteration 2" in finding.seen
    # A strategy that promises nothing breaks no promise.
    Descent.monotone = False
    try:
        found = trace(Descent(model, iterations=4), images(5))
    finally:
        Descent.monotone = True
    assert bool(found.decreased[1:].all())
    assert found.findings == []


def test_an_elbo_that_becomes_nan_has_decreased():
    strategy, x = gradient_em(), images(2)
    gamma, theta = torch.full((3, 2, 3, 12), 1 / 3), torch.zeros(3, 2, 3, 5)
    theta[1:, 1] = math.nan
    found = trace(strategy, x, posterior=posterior_of(gamma, theta))
    assert found.decreased.tolist() == [[False, False], [False, True], [False, False]]
    assert "1 of 2 images became NaN, first in iteration 2" in found.findings[0].seen


@pytest.mark.parametrize("fall", [1e-7, 1e-3])
@pytest.mark.usefixtures("float64")
def test_only_falls_beyond_rounding_count(fall):
    """At ELBOs of about 100 in single precision."""
    strategy = gradient_em()
    state = strategy.infer(images(1)).trace.map(lambda values: values[-1:].expand(2, *values.shape[1:]).float())
    gamma, log_joint = state.gamma.clone(), state.log_joint.double() * 10
    log_joint[1] -= fall * log_joint.logsumexp(-2).sum(-1).abs()[1, 0] / 12
    found = trace(
        strategy,
        images(1),
        posterior=posterior_of(gamma, state.theta)._replace(
            trace=state._replace(
                log_joint=log_joint,
                gamma=log_joint.softmax(-2).float(),
                log_evidence=log_joint.logsumexp(-2).sum(-1),
            )
        ),
    )
    assert found.elbo[1, 0] < found.elbo[0, 0]
    assert found.decreased.tolist() == [[False], [fall > 1e-4]]


@pytest.mark.usefixtures("float64")
def test_noise_of_draws_is_no_decrease():
    """The same q(θ) at every iteration: what differs are the draws."""
    model = factors()
    strategy, x = VAE(model), torch.randn(200, 1, 6)
    state = strategy.infer(x).trace.map(lambda values: values.expand(5, *values.shape[1:]))
    posterior = strategy.infer(x)._replace(trace=state, elbo_trace=torch.zeros(5, 200))
    found = trace(strategy, x, posterior=posterior, draws=30)
    assert bool((found.elbo.diff(dim=0) < 0).any())
    # One-sided, and with errors from 30 draws: 0.2 % of 800; six would be four standard deviations more.
    assert int(found.decreased.sum()) <= 6
    # A q(θ) that becomes much worse is.
    moved = state._replace(location=state.location.clone())
    moved.location[3:] += 10
    found = trace(strategy, x, posterior=posterior._replace(trace=moved), draws=30)
    assert bool(found.decreased[3].all())
    assert not found.monotone
    assert found.findings == []
    # From a single draw nothing can be said.
    assert not bool(trace(strategy, x, posterior=posterior._replace(trace=moved), draws=1).decreased.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_em_is_monotone_and_known_at_the_end(name, dtype):
    torch.set_default_dtype(dtype)
    model = CLASSICAL[name]()
    x = items(name.partition(",")[0] if "student" not in name else name.removesuffix(", prior"), B=1).to(dtype)
    strategy = ClassicalEM(model, iterations=30, tol=0.0)
    posterior = quietly(strategy.infer, x)
    found = trace(strategy, x, torch.arange(60)[None] % 3, posterior=posterior)
    T = len(posterior.elbo_trace)
    assert T > 1
    assert found.monotone
    assert found.findings == []
    torch.testing.assert_close(found.elbo, posterior.elbo_trace.double())
    for values in (found.confidence, found.components_used, found.ami, found.ari):
        assert bool(values[:-1].isnan().all() & values[-1].isfinite().all())
    assert bool(found.change.isnan().all())
    table = found.table()
    assert table["expected_log_joint"].notna().tolist() == [False] * (T - 1) + [True]
    assert table["elbo"].notna().all()


@pytest.mark.usefixtures("float64")
def test_classical_em_that_falls_is_flagged_by_its_own_trace():
    model = CLASSICAL["full"]()
    strategy, x = ClassicalEM(model, iterations=5, tol=0.0), items("full")
    posterior = quietly(strategy.infer, x)
    elbo = posterior.elbo_trace.clone()
    elbo[-1] = elbo[-2] - 0.5
    found = trace(strategy, x, posterior=posterior._replace(elbo_trace=elbo))
    assert found.decreased[:, 0].nonzero().flatten().tolist() == [len(elbo) - 1]
    assert found.findings[0].value == pytest.approx(0.5)


@pytest.mark.usefixtures("float64")
def test_images_that_share_fitted_mixing_weights_may_fall_where_their_sum_rises():
    model, x = CLASSICAL["spherical"](mixing="learned"), items("spherical", B=6)
    strategy = ClassicalEM(model, iterations=20, tol=0.0)
    posterior = quietly(strategy.infer, x)
    assert (posterior.elbo_trace.diff(dim=0) < -1e-3).any()
    assert trace(strategy, x, posterior=posterior).findings == []
    elbo = posterior.elbo_trace.clone()
    elbo[-1, 2] -= 5.0
    found = trace(strategy, x, posterior=posterior._replace(elbo_trace=elbo))
    assert found.decreased[-1, 2]
    assert not found.decreased[:-1].any()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.usefixtures("float64")
def test_classical_em_takes_batches_missing_values_and_weights_per_image(missing):
    model = CLASSICAL["diagonal"](mixing="per_image")
    x = items("diagonal", B=3)
    if missing:
        x[:, ::4, 1] = math.nan
    found = quietly(trace, ClassicalEM(model), x, torch.arange(60).expand(3, -1) % 3, batch_size=2)
    assert found.ari.shape == found.elbo.shape
    assert found.elbo.shape[1] == 3
    assert found.findings == []


def test_online_em_promises_nothing():
    model = CLASSICAL["diagonal"]()
    found = quietly(trace, OnlineEM(model), items("diagonal", D=200).float())
    assert not found.monotone


@pytest.mark.usefixtures("float64")
def test_a_sampler_has_one_iteration():
    model = MODELS["owned Normal"](proper=True)
    strategy = NUTS(model, chains=2, warmup=4, draws=20, max_tree_depth=2)
    found = quietly(trace, strategy, images(2), torch.randint(0, 3, (2, 12)))
    assert found.elbo.shape == found.terms.elbo.shape == (1, 2)
    assert bool(found.change.isnan().all() & ~found.decreased.any())
    torch.testing.assert_close(found.elbo, found.terms.elbo)


@pytest.mark.usefixtures("float64")
def test_a_guide_fitted_by_svi_has_the_elbo_of_every_window():
    model = factors()
    strategy, x = PyroGuide(model, "AutoNormal", steps=200, learning_rate=0.05), torch.randn(3, 1, 6)
    posterior = quietly(strategy.infer, x)
    found = trace(strategy, x, posterior=posterior)
    assert found.terms.elbo.shape == (1, 3)
    torch.testing.assert_close(found.elbo, posterior.elbo_trace)
    assert found.elbo.shape == (2, 3)
    expected = posterior.trace.theta.diff(dim=0).square().mean((-2, -1)).sqrt()
    torch.testing.assert_close(found.change[1:], expected)
    # The errors of windows are not known.
    assert not bool(found.decreased.any())


@pytest.mark.parametrize(
    ("make", "monotone"),
    [
        (lambda model: SemiAmortised(RNNEM(model, iterations=1)), True),
        (lambda model: SemiAmortised(RNNEM(model, iterations=1, e_step="greff2017")), False),
        (lambda model: SemiAmortised(IterativeVI(model, iterations=1), draws=2, steps=2), False),
        (lambda model: RNNEM(model, iterations=2), False),
        (GradientEM, True),
    ],
)
def test_who_promises_what(make, monotone):
    model = MODELS["owned Bernoulli"](proper=True)
    found = trace(make(model), images(20))
    assert found.monotone == monotone
    assert found.findings == []


def test_batches_are_put_together_in_order():
    strategy, x = gradient_em(), images(5)
    gamma, groups = torch.rand(5, 3, 12).softmax(1), torch.randint(0, 3, (5, 12))
    pieces = (slice(0, 2), slice(2, 5))
    parts = [trace(strategy, x[i], groups[i], posterior=strategy.infer(x[i], gamma=gamma[i])) for i in pieces]
    whole = trace(strategy, x, groups, posterior=strategy.infer(x, gamma=gamma))
    joined = Trace.concatenate(parts)
    for name in (*PER_IMAGE, "ami", "ari"):
        # Line searches of batches of other sizes round differently, and on flat ground go on from there.
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), equal_nan=True, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined.terms.reconstruction, whole.terms.reconstruction)
    assert Trace.concatenate([parts[0], trace(strategy, x)]).ami is None


def test_images_that_end_before_others_stay_where_they_are():
    strategy, x = gradient_em(), images(4)
    short, long = (
        trace(strategy, x[i], posterior=strategy.infer(x[i], iterations=T))
        for i, T in ((slice(2), 2), (slice(2, 4), 4))
    )
    joined = Trace.concatenate([short, long])
    assert joined.elbo.shape == (4, 4)
    assert bool((joined.elbo[2:, :2] == short.elbo[-1]).all())
    assert bool((joined.confidence[2:, :2] == short.confidence[-1]).all())
    assert bool((joined.change[2:, :2] == 0).all())
    assert not bool(joined.decreased[2:, :2].any())
    torch.testing.assert_close(joined.change[:, 2:], long.change, equal_nan=True)


@pytest.mark.usefixtures("float64")
def test_restarts_keep_the_best_start_of_each_image():
    strategy, x = gradient_em(), images(6)
    torch.manual_seed(1)
    found = trace(strategy, x, restarts=4)
    torch.manual_seed(1)
    torch.testing.assert_close(found.elbo, strategy.infer(x, restarts=4).elbo_trace)


def test_the_table_holds_means_over_images():
    model = MODELS["tied Bernoulli"]()
    found = trace(RNNEM(model, iterations=3), images(5))
    table = found.table()
    for name in ("confidence", "components_used", "change", "elbo"):
        assert table[name].to_numpy() == pytest.approx(getattr(found, name).mean(1).numpy(), nan_ok=True)
    assert table["decreased"].to_numpy() == pytest.approx(found.decreased.double().mean(1).numpy())
    assert table["reconstruction"].to_numpy() == pytest.approx(found.terms.reconstruction.mean(1).numpy())
    assert not table.columns.duplicated().any()
    assert trace(RNNEM(model, iterations=1), images(1)).table()["elbo_se"].isna().all()


def test_terms_are_those_of_elbo_terms():
    strategy, x = gradient_em(), images(3)
    posterior = strategy.infer(x)
    expected = elbo_terms(strategy.model, strategy, x, posterior=posterior)
    torch.testing.assert_close(trace(strategy, x, posterior=posterior).terms.elbo, expected.elbo)


@pytest.mark.parametrize("name", sorted(ONE_START & {"vae"}))
def test_restarts_of_a_strategy_that_has_none_are_refused(name):
    _, strategy = pair("owned Bernoulli", name)
    with pytest.raises(StrategyError, match="leave restarts"):
        trace(strategy, images(2), restarts=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"draws": 0}, StrategyError, "draws must be at least 1"),
        ({"batch_size": 0}, StrategyError, "batch_size must be at least 1"),
        ({"restarts": 0}, StrategyError, "restarts must be at least 1"),
        ({"x": images(0)}, StrategyError, "at least one image"),
        ({"x": images(2, (3, 3, 1))}, ModelError, "12"),
        ({"groups": torch.zeros(2, 12)}, DataError, "float32.*integers"),
        ({"groups": torch.zeros(2, 11).long()}, DataError, r"\(2, 11\).*\(2, 12\)"),
        ({"groups": torch.zeros(12).long()}, DataError, r"\(12,\)"),
        ({"groups": torch.ones(2, 12).bool()}, DataError, "bool.*integers"),
        ({"posterior": images(2)}, StrategyError, "of type Tensor"),
        ({"groups": torch.full((2, 12), -1)}, DataError, "from 0 on"),
        ({"posterior": gradient_em().infer(images(3))}, StrategyError, "of 3 images, but x holds 2"),
        ({"posterior": gradient_em().infer(images(2)), "restarts": 2}, StrategyError, "leave one of them out"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        trace(gradient_em(), **{"x": images(2), **change})


def test_a_model_in_the_place_of_a_strategy_is_named():
    with pytest.raises(StrategyError, match="strategy must be a Strategy, but is of type SpatialMixture"):
        trace(gradient_em().model, images(2))
