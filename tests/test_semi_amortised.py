"""Semi-amortised inference: what it promises on an image's ELBO, where its steps end, what training sees of them."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import MODELS, factors, images
from torch import Tensor

from pnem.errors import ModelError, RunError, StrategyError
from pnem.inference import (
    ELBO,
    NEM,
    RNNEM,
    VAE,
    ClassicalEM,
    GradientEM,
    Normals,
    NormalStrategy,
    SemiAmortised,
    State,
    Strategy,
    encoders,
)
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.models.config import build, describe
from pnem.training import fit

every_model = pytest.mark.parametrize("model_name", MODELS)
float64 = pytest.mark.usefixtures("float64")


def vae(model: SpatialMixture) -> VAE:
    H, W, _ = model.decoder.image_shape
    return VAE(model, encoder=encoders.MLP((H, W, model.num_channels), hidden=(9,)))


class Given(NormalStrategy):
    """One iteration that finds a given q(θ)."""

    def __init__(self, model: SpatialMixture, location: Tensor, scale: Tensor):
        super().__init__(model, iterations=1)
        self.location, self.scale = location, scale

    def find_q(self, state: State, x_in: Tensor) -> Normals:
        return Normals(self.location, self.scale)


def linear_gaussian(count: int, M: int = 3) -> tuple[SpatialMixture, Tensor, Tensor, Tensor]:
    """Factor analysis, data, the mean of p(θ | x) (B, 1, M), and its precision (M, M)."""
    model, x = factors(C=6, M=M), torch.randn(count, 1, 6)
    with torch.no_grad():
        x = x @ torch.randn(6, 6)

    def log_joint(theta: Tensor) -> Tensor:
        return (model.log_evidence(x, theta) + model.log_prior(theta)).sum()

    zero = torch.zeros(count, 1, M)
    slope = torch.func.grad(log_joint)(zero).detach()
    precision = -torch.func.jacrev(torch.func.grad(log_joint))(zero)[0, 0, :, 0, 0].detach()
    return model, x, slope @ precision.inverse(), precision


def exact_elbo(model: SpatialMixture, x: Tensor, q: dist.TorchDistribution, precision: Tensor) -> Tensor:
    """The ELBO of a normal q where log p(x, θ) is quadratic: (B,)."""
    with torch.no_grad():
        at_mean = model.log_evidence(x, q.mean) + model.log_prior(q.mean)
        return at_mean - 0.5 * (precision.diagonal() * q.variance).sum((-2, -1)) + q.entropy()


def rise(model: SpatialMixture, x: Tensor, before: dist.Independent, after: dist.Independent, count: int = 1500):
    """The mean and standard error of the ELBO's rise, on draws of its own: (B,) both."""
    noise = torch.randn(count, *before.mean.shape, generator=torch.Generator().manual_seed(17))
    values = []
    with torch.no_grad():
        for q in (before, after):
            theta = q.mean + q.stddev * noise
            values.append(model.log_joint_at(x, model.decode(theta)).logsumexp(-2).sum(-1) + model.log_prior(theta))
    values = values[1] - values[0] + after.entropy() - before.entropy()
    return values.mean(0), values.std(0) / count**0.5


@float64
def test_reaches_the_optimum_of_the_normal_family_where_it_is_known():
    model, x, mean, precision = linear_gaussian(20)
    exact = ClassicalEM(model).infer(x).q
    torch.testing.assert_close(exact.mean.reshape(mean.shape), mean)
    found = SemiAmortised(vae(model), steps=40).infer(x).q
    torch.testing.assert_close(found.mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.variance, (1 / precision.diagonal()).expand_as(mean), rtol=1e-4, atol=1e-5)
    best = dist.Normal(mean, precision.diagonal().rsqrt().expand_as(mean)).to_event(2)
    gap = exact_elbo(model, x, best, precision) - exact_elbo(model, x, found, precision)
    assert bool((gap < 1e-6).all())


@float64
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 10.0])
def test_a_start_of_another_order_of_magnitude_converges_as_fast(scale):
    model, x, mean, precision = linear_gaussian(10)
    start = vae(model)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.zero_()
        start.head.bias[mean.shape[-1] :] = math.log(scale)
    assert start.infer(x).q.stddev.unique().item() == pytest.approx(scale, rel=0.01)
    found = SemiAmortised(start, steps=60).infer(x).q
    torch.testing.assert_close(found.mean, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.variance, (1 / precision.diagonal()).expand_as(mean), rtol=1e-3, atol=1e-4)


@float64
@pytest.mark.parametrize("draws", [2, 4, 64])
@pytest.mark.parametrize("steps", [1, 15])
def test_exact_elbo_never_falls(draws, steps):
    model, x, *_, precision = linear_gaussian(100)
    strategy = vae(model)
    refined = SemiAmortised(strategy, steps=steps, draws=draws).infer(x)
    before = exact_elbo(model, x, strategy.infer(x).q, precision)
    assert bool((exact_elbo(model, x, refined.q, precision) >= before).all())
    for location, scale in zip(refined.trace.location, refined.trace.scale, strict=True):
        q = dist.Normal(location, scale).to_event(2)
        assert bool((exact_elbo(model, x, q, precision) >= before).all())


@float64
@pytest.mark.parametrize("off", [1.0, 1.1])
def test_a_start_that_steps_on_few_draws_would_spoil_is_kept(off):
    model, x, mean, precision = linear_gaussian(300)
    start = Given(model, mean, off * precision.diagonal().rsqrt().expand_as(mean))
    before = exact_elbo(model, x, start.infer(x).q, precision)
    strategy = SemiAmortised(start, draws=2)
    state = strategy.unroll(x)[-1]
    log_scale = state.memory[..., 3:6]
    unchecked = dist.Normal(state.memory[..., :3], log_scale.exp()).to_event(2)
    assert bool((exact_elbo(model, x, unchecked, precision) < before - 0.01).all())
    torch.testing.assert_close(state.location, mean)
    assert bool((exact_elbo(model, x, strategy.infer(x).q, precision) >= before - 1e-12).all())


@float64
@every_model
@pytest.mark.parametrize("epochs", [0, 60])
def test_elbo_of_a_vae_never_falls(model_name, epochs):
    model = MODELS[model_name](proper=True)
    strategy, x = vae(model), images(30)
    optimizer = torch.optim.Adam([*model.parameters(), *strategy.parameters()], lr=0.02)
    for _ in range(epochs):
        optimizer.zero_grad()
        ELBO()(strategy, strategy.unroll(x), x).loss.backward()
        optimizer.step()
    refined = SemiAmortised(strategy, steps=10).infer(x)
    mean, error = rise(model, x, strategy.infer(x).q, refined.q)
    assert bool((mean >= -4 * error).all())
    assert mean.sum() > 4 * error.square().sum().sqrt()


@float64
@every_model
@pytest.mark.parametrize("proper", [False, True])
@pytest.mark.parametrize(
    "make", [lambda m: RNNEM(m, iterations=2), lambda m: NEM(m, iterations=2), lambda m: GradientEM(m, iterations=2)]
)
def test_joint_density_at_a_delta_never_falls(make, model_name, proper):
    model = MODELS[model_name](proper=proper)
    strategy, x, gamma = make(model), images(10), torch.rand(10, 3, 12).softmax(1)
    before = strategy.infer(x, gamma=gamma).elbo_trace[-1:]
    after = SemiAmortised(strategy, steps=15).infer(x, gamma=gamma).elbo_trace
    assert bool((torch.cat([before, after]).diff(dim=0) >= -1e-10).all())
    assert bool((after[-1] > before[0]).all())


@float64
def test_its_objective_never_falls_and_without_certainty_more_is_taken():
    model, x = MODELS["plain Bernoulli"](proper=True), images(30)
    strategy = SemiAmortised(vae(model))
    state = strategy.init(x)
    start, objective = state.location, strategy.objective(state)
    for _ in range(10):
        state = strategy.climb(state, x)
        assert bool((strategy.objective(state) >= objective).all())
        objective = strategy.objective(state)
    assert torch.equal(state.location, start)
    kept = [
        (strategy.choose(state, x, certain=certain).location == start).all(-1).all(-1) for certain in (0.0, 3.0, 1e9)
    ]
    assert bool((kept[0] <= kept[1]).all())
    assert kept[2].all()
    assert not kept[0].all()


@float64
def test_a_delta_ends_where_the_gradient_is_zero():
    model = MODELS["tied Bernoulli"]()
    x = images(5)
    theta = SemiAmortised(RNNEM(model), steps=300).infer(x, keep_trace=False).theta
    gradient = torch.func.grad(lambda theta: (model.log_evidence(x, theta) + model.log_prior(theta)).sum())(theta)
    assert gradient.abs().max() < 1e-4


@float64
def test_training_sees_every_step_as_a_shift():
    model = MODELS["owned Bernoulli"](proper=True)
    strategy = SemiAmortised(vae(model), steps=5)
    x = images(4)
    start, x_in = strategy.start(x)
    last = strategy.iterate(start, x_in, x)[-1]
    assert not torch.allclose(last.location, start.location)
    weight = torch.randn_like(last.location)
    for after, before, factor in ((last.location, start.location, 1.0), (last.scale.log(), start.scale, start.scale)):
        (gradient,) = torch.autograd.grad((weight * after).sum(), before, retain_graph=True)
        torch.testing.assert_close(gradient * factor, weight)


def test_refinement_is_deterministic_and_leaves_the_random_state():
    model = MODELS["owned Normal"](proper=True)
    amortised, x = vae(model), images(6)
    state = torch.random.get_rng_state()
    strategy = SemiAmortised(amortised)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = strategy.infer(x)
    second = SemiAmortised(amortised).infer(x)
    assert torch.equal(first.q.mean, second.q.mean)
    assert not torch.equal(first.elbo_trace, second.elbo_trace)


def test_draws_in_pieces_give_the_same(monkeypatch):
    model = MODELS["owned Normal"](proper=True).double()
    strategy, x = SemiAmortised(vae(model)).double(), images(6).double()
    whole = strategy.infer(x)
    monkeypatch.setattr("pnem.inference.semi_amortised.PASS", 6 * 3 * 12 * 10)
    torch.testing.assert_close(strategy.infer(x).q.mean, whole.q.mean)


@float64
def test_restarts_are_refined_and_the_best_is_kept():
    model, x = MODELS["tied Bernoulli"](), images(8)
    strategy = SemiAmortised(RNNEM(model, iterations=2), steps=5)
    torch.manual_seed(3)
    best = strategy.infer(x, restarts=4, iterations=7)
    torch.manual_seed(3)
    starts = strategy.infer(x.repeat(4, 1, 1), iterations=7)
    assert best.elbo_trace.shape == (7, 8)
    torch.testing.assert_close(best.elbo_trace[-1], starts.elbo_trace[-1].reshape(4, 8).max(0).values)


def test_a_nested_strategy_is_built_again_on_the_same_model():
    model = MODELS["owned Bernoulli"](proper=True)
    strategy = SemiAmortised(SemiAmortised(vae(model), steps=2), steps=3, draws=8)
    again = build(describe(strategy), model)
    assert again.model is again.strategy.model is again.strategy.strategy.model is model
    again.load_state_dict(strategy.state_dict())
    x = images(3)
    assert torch.equal(again.infer(x).q.mean, strategy.infer(x).q.mean)
    with pytest.raises(ModelError, match="does not take the described arguments"):
        build(describe(strategy))
    with pytest.raises(ModelError, match="unknown part"):
        build(describe(strategy) | {"strategy": {"type": "os.system"}}, model)


class OtherState(State):
    """A state whose q(θ) is neither normal nor a Delta."""

    q = property(lambda self: dist.Laplace(self.theta, 1.0).to_event(2))


class OtherStrategy(RNNEM):
    """A strategy with such states."""

    def unroll(self, x: Tensor, gamma: Tensor | None = None) -> list[State]:
        return [OtherState(*state) for state in super().unroll(x, gamma)]


def pairs() -> tuple[SpatialMixture, Strategy]:
    model = MODELS["owned Bernoulli"](proper=True)
    return model, vae(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, s: SemiAmortised(s, steps=0), "steps must be at least 1, and whole, but is 0"),
        (lambda m, s: SemiAmortised(s, steps=2.5), "steps must be at least 1, and whole, but is 2.5"),
        (lambda m, s: SemiAmortised(s, draws=0), "draws must be at least 2"),
        (lambda m, s: SemiAmortised(s, draws=7), "give an even number, not 7"),
        (lambda m, s: SemiAmortised(m), "give one, not a SpatialMixture"),
        (lambda m, s: SemiAmortised(ClassicalEM(factors())), "nothing to refine"),
        (
            lambda m, s: SemiAmortised(GradientEM(SpatialMixture(decoders.Constant(2), Bernoulli(), 2))),
            "needs a decoder of images",
        ),
        (lambda m, s: SemiAmortised(s).infer(images(2), restarts=2), "depends on the image alone"),
        (lambda m, s: SemiAmortised(s).infer(images(2), gamma=torch.ones(2, 3, 12) / 3), "depends on the image alone"),
        (lambda m, s: SemiAmortised(s).infer(images(2), iterations=0), "iterations must be at least 1"),
        (
            lambda m, s: SemiAmortised(RNNEM(m)).infer(images(2), restarts=2, gamma=torch.ones(2, 3, 12) / 3),
            "restarts from a given start",
        ),
        (lambda m, s: SemiAmortised(OtherStrategy(m)).infer(images(2)), "OtherStrategy's is of type"),
    ],
)
def test_bad_input_says_what_to_do(make, message):
    with pytest.raises(StrategyError, match=message):
        make(*pairs())


def test_another_model_is_refused():
    (model, _), (_, other) = pairs(), pairs()
    with pytest.raises(RunError, match="built on another model"):
        fit(model, SemiAmortised(other), {})
