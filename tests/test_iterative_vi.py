"""Iterative amortised inference: what it shares with RNN-EM, what its network sees, and that its refinements refine."""

import pytest
import torch
from cases import MODELS, factors, images

from pnem.errors import StrategyError
from pnem.inference import ELBO, RNNEM, BitFlip, IterativeVI, encoders
from pnem.inference.factor_analysis import posterior_of_factors
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.presets import find_preset

pytestmark = pytest.mark.usefixtures("float64")


def assert_same_states(first, second):
    for a, b in zip(first, second, strict=True):
        for one, other in zip(a, b, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"e_step": "greff2017", "layer_norm": True, "gamma_gradient": False},
        {
            "recurrence": "gated",
            "encoder": lambda: encoders.MLP((3, 4, 1), hidden=(7,)),
            "noise": lambda: BitFlip(0.2),
        },
    ],
)
def test_a_delta_posterior_without_gradients_is_rnn_em(options):
    """With the same weights all states are the same, bit for bit, and so are the gradients that train them."""
    model, x = MODELS["owned Bernoulli"](), images(3)

    def build(method, **more):
        parts = {name: value() if callable(value) else value for name, value in options.items()}
        return method(model, iterations=4, **parts, **more)

    rnn_em, iterative = build(RNNEM), build(IterativeVI, posterior="delta", gradients=False)
    iterative.load_state_dict(rnn_em.state_dict())
    gradients = []
    for strategy in (rnn_em, iterative):
        torch.manual_seed(0)
        states = strategy.unroll(x)
        model.zero_grad()
        ELBO("ramp")(strategy, states, x).loss.backward()
        gradients.append((states, [p.grad.clone() for part in (strategy, model) for p in part.parameters()]))
    (states, expected), (found_states, found) = gradients
    assert_same_states(states, found_states)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


def test_a_normal_posterior_reads_the_memory_as_its_parameters():
    """One loop: the cell sees the same error as RNN-EM's, and a linear map of its memory is (μ, log s)."""
    model, x = MODELS["owned Bernoulli"](proper=True), images(3)
    strategy = IterativeVI(model, gradients=False, hidden=6, iterations=3)
    state = strategy.init(x)
    for _ in range(3):
        after = strategy.step(state, x, x)
        epsilon = (state.theta - state.location) / state.scale
        error = state.gamma * (x.unsqueeze(1) - state.mean).squeeze(-1)
        inputs = torch.cat([error, state.location, state.scale.log(), epsilon], -1)
        memory = strategy.cell(inputs, state.memory)
        torch.testing.assert_close(after.memory, memory)
        location, log_scale = strategy.head(memory).chunk(2, -1)
        torch.testing.assert_close(after.location, location)
        torch.testing.assert_close(after.scale.log(), 10 * torch.tanh(log_scale / 10))
        state = after


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_it_sees_are_the_elbos(name):
    """At the draw of an iteration, whose γ is the posterior there; by autograd through reparameterised θ."""
    model, x = MODELS[name](proper=True), images(3)
    strategy = IterativeVI(model, hidden=6, iterations=2)
    state = strategy.unroll(x)[-1].map(torch.Tensor.detach)
    epsilon = (state.theta - state.location) / state.scale
    location, log_scale = state.location.clone().requires_grad_(), state.scale.log().requires_grad_()
    theta = location + log_scale.exp() * epsilon
    moved = strategy.evaluate(state._replace(location=location, scale=log_scale.exp()), theta, x)
    expected = torch.autograd.grad(strategy.elbo(moved).sum(), (location, log_scale))
    found = strategy.elbo_gradients(state, x)
    for a, b in zip(found, expected, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["owned Bernoulli", "tied Bernoulli"])
def test_the_gradient_of_a_delta_is_that_of_log_p(name):
    model, x = MODELS[name](), images(3)
    strategy = IterativeVI(model, posterior="delta", iterations=2)
    state = strategy.unroll(x)[-1].map(torch.Tensor.detach)
    theta = state.theta.clone().requires_grad_()
    expected = torch.autograd.grad((model.log_evidence(x, theta) + model.log_prior(theta)).sum(), theta)
    torch.testing.assert_close(strategy.elbo_gradients(state, x), expected)


def test_the_first_gradients_tell_components_apart_by_gamma():
    model, x = MODELS["owned Bernoulli"](proper=True), images(2)
    location, _ = IterativeVI(model).elbo_gradients(IterativeVI(model).init(x), x)
    assert float((location[:, 0] - location[:, 1]).abs().min()) > 0


def test_the_scale_cannot_overflow_and_nan_is_not_hidden():
    model, x = MODELS["owned Bernoulli"](proper=True), images(2)
    strategy = IterativeVI(model, hidden=6, iterations=3)
    with torch.no_grad():
        strategy.head.bias[5:] = 1e6
    assert bool(strategy.unroll(x)[-1].log_evidence.isfinite().all())
    with torch.no_grad():
        strategy.head.bias[5:] = torch.nan
    with pytest.raises(StrategyError, match="not finite"):
        strategy.unroll(x)


def trained(strategy, draw, steps, learning_rate):
    """The strategy after Adam on fresh images, its model as it is if that has no parameters to train."""
    parameters = [p for part in (strategy, strategy.model) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = draw()
        optimizer.zero_grad()
        ELBO("ramp")(strategy, strategy.unroll(x), x).loss.backward()
        optimizer.step()
        schedule.step()
    return strategy.eval()


@pytest.mark.slow
def test_after_training_iterations_raise_the_elbo():
    """Bars of two components: the ELBO rises from iteration to iteration, and far above an untrained strategy's."""
    torch.manual_seed(0)
    model = SpatialMixture(
        decoders.MLP(4, (4, 4, 1), hidden=(16,)), Bernoulli(), 2, prior="standard_normal", pixel_prior=0.0
    )
    strategy = IterativeVI(model, hidden=32, recurrence="gated", iterations=4)

    def bars(count=64):
        x = torch.zeros(count, 4, 4)
        for _ in range(2):
            x[torch.arange(count), torch.randint(0, 4, (count,))] = 1.0
        return x.reshape(count, 16, 1)

    x = bars(500)
    before = strategy.infer(x).elbo_trace[-1].mean()
    trace = trained(strategy, bars, 300, 1e-2).infer(x).elbo_trace.mean(1)
    assert float(trace[-1] - before) > 10
    assert float(trace[-1] - trace[0]) > 1


def divergence_from_posterior(state, mean, covariance):
    """KL(q(θ) ‖ p(θ | x)), averaged over images: log p(x) − ELBO, without the noise of draws."""
    q = torch.distributions.MultivariateNormal(state.location.squeeze(1), torch.diag_embed(state.scale.squeeze(1) ** 2))
    return torch.distributions.kl_divergence(q, torch.distributions.MultivariateNormal(mean, covariance)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("gradients", [True, False])
def test_it_finds_the_exact_posterior_of_a_linear_gaussian_model(gradients):
    """To 0.05 nats above the best diagonal normal's KL(q ‖ p(θ | x)), and nearer than after one iteration."""
    torch.manual_seed(0)
    model = factors().requires_grad_(False)
    torch.nn.init.normal_(model.decoder.linear.weight)
    strategy = IterativeVI(model, gradients=gradients, hidden=32, recurrence="gated", iterations=4)

    def draw(count=128):
        return model.likelihood.distribution(model.decode(torch.randn(count, 2))).sample()

    strategy = trained(strategy, draw, 300, 1e-2)
    x = draw(1000)
    mean, covariance, log_evidence = posterior_of_factors(model, x)
    posterior = strategy.infer(x)
    precision = torch.linalg.inv(covariance)
    best = 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) + covariance.logdet()).item()
    states = [posterior.trace.map(lambda value, t=t: value[t]) for t in range(4)]
    gaps = [divergence_from_posterior(state, mean, covariance).item() - best for state in states]
    assert 0 <= gaps[-1] < 0.05
    assert gaps[-1] < 0.5 * gaps[0]
    assert float((posterior.theta.squeeze(1) - mean).square().mean().sqrt()) < 0.1
    # The estimates from one draw say the same, and stay below log p(x).
    below = log_evidence - posterior.elbo_trace[-1]
    error = below.std() / 1000**0.5
    assert abs(float(below.mean() - best - gaps[-1])) < 4 * float(error)


def test_options_it_does_not_know_are_refused():
    proper, flat = MODELS["owned Bernoulli"](proper=True), MODELS["owned Bernoulli"]()
    with pytest.raises(StrategyError, match="proper prior"):
        IterativeVI(flat)
    with pytest.raises(StrategyError, match="posterior"):
        IterativeVI(proper, posterior="laplace")
    with pytest.raises(StrategyError, match="memory is θ"):
        IterativeVI(flat, posterior="delta", hidden=8)
    with pytest.raises(StrategyError, match="hidden"):
        IterativeVI(proper, hidden=0)
    with pytest.raises(StrategyError, match="recurrence"):
        IterativeVI(proper, recurrence="lstm")
    with pytest.raises(StrategyError, match="the encoder is for images"):
        IterativeVI(proper, encoder=encoders.MLP((5, 5, 1)))


def test_its_preset_is_the_strategys_default():
    model, strategy, objective = find_preset("iterative-vi").build((28, 28, 1), components=2, iterations=2)
    x = images(2, (28, 28, 1))
    assert bool(objective(strategy, strategy.unroll(x), x).loss.isfinite())
    assert model.has_proper_prior
