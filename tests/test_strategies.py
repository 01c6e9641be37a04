"""What each method promises beyond conformance: its own equations."""

import math

import pytest
import torch
from cases import MODELS, images

from pnem.errors import StrategyError
from pnem.inference import ELBO, NEM, RNNEM, BitFlip, MaskedUniform, NEMLoss, State, encoders
from pnem.inference.checks import best_starts
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders

pytestmark = pytest.mark.usefixtures("float64")


def state_at(strategy, x, theta) -> State:
    """The state that follows from θ: predictions, γ and log joint belong to it."""
    model = strategy.model
    psi = model.decode(theta)
    start = strategy.init(x)._replace(theta=theta, psi=psi, mean=model.likelihood.mean(psi))
    log_joint = model.log_joint_at(x, psi)
    log_evidence = log_joint.logsumexp(-2).sum(-1)
    return start._replace(gamma=log_joint.softmax(-2), log_joint=log_joint, log_evidence=log_evidence)


@pytest.mark.parametrize("name", MODELS)
def test_n_em_steps_along_the_gradient_of_q(name):
    """γ is held fixed in Q, though it was computed from the same θ."""
    model = MODELS[name]()
    strategy = NEM(model, step_size=0.7)
    x, theta = images(2), torch.randn(2, 3, 5)
    state = state_at(strategy, x, theta)
    gradient = torch.func.grad(lambda t: (state.gamma * model.log_joint(x, t)).sum() + model.log_prior(t).sum())(theta)
    torch.testing.assert_close(strategy.m_step(state, x), theta + 0.7 * gradient)


def test_n_em_of_a_convolutional_decoder_is_exact_too():
    model = SpatialMixture(decoders.Convolutional(3, (4, 4, 2), hidden=(5,), channels=(4, 3)), Normal(0.5), 2)
    strategy = NEM(model, step_size=0.1)
    x, theta = images(2, (4, 4, 2)), torch.randn(2, 2, 3)
    state = state_at(strategy, x, theta)
    gradient = torch.func.grad(lambda t: (state.gamma * model.log_joint(x, t)).sum())(theta)
    torch.testing.assert_close(strategy.m_step(state, x), theta + 0.1 * gradient)


def test_tied_n_em_is_the_formula_of_the_paper():
    """θ ← θ + η σ(θ)(1 − σ(θ)) ⊙ Wᵀ(γ (x − ψ)), ψ = σ(W σ(θ)), from θ = 0 and ψ = 0."""
    model = SpatialMixture(
        decoders.Linear(5, (3, 4, 1), bias=False, input_activation="sigmoid"), Bernoulli(), 3, pixel_prior=0.0
    )
    strategy = NEM(model, step_size=0.6, iterations=3, e_step="greff2017")
    x, x_in = images(2), images(2)
    W = model.decoder.linear.weight
    state = strategy.init(x)
    theta, psi, gamma = torch.zeros(2, 3, 5), torch.zeros(2, 3, 12), state.gamma
    for found in strategy.iterate(state, x_in, x):
        sigma = theta.sigmoid()
        theta = theta + 0.6 * sigma * (1 - sigma) * ((gamma * (x_in.squeeze(-1).unsqueeze(1) - psi)) @ W)
        psi = (theta.sigmoid() @ W.T).sigmoid()
        target = x.squeeze(-1).unsqueeze(1)
        p = target * psi + (1 - target) * (1 - psi) + 1e-6
        gamma = p / p.sum(1, keepdim=True)
        torch.testing.assert_close(found.theta, theta)
        torch.testing.assert_close(found.gamma, gamma)


def test_a_small_n_em_step_raises_the_evidence():
    """Generalised EM: an increase of Q is an increase of log p(x, θ)."""
    for name in MODELS:
        model = MODELS[name]()
        strategy = NEM(model, step_size=1e-3)
        x, theta = images(3), torch.randn(3, 3, 5)
        state = state_at(strategy, x, theta)
        after = strategy.step(state, x, x)
        assert bool((strategy.elbo(after) >= strategy.elbo(state)).all())


def test_the_outer_gradient_flows_through_gamma_unless_it_is_stopped():
    model = MODELS["owned Bernoulli"]()
    x, gamma = images(2), torch.rand(2, 3, 12).softmax(1)
    gradients = []
    for gamma_gradient in (True, False):
        strategy = NEM(model, iterations=3, gamma_gradient=gamma_gradient)
        model.zero_grad()
        ELBO()(strategy, strategy.unroll(x, gamma), x).loss.backward()
        gradients.append(model.decoder.linear.weight.grad.clone())
    assert not torch.allclose(*gradients)


def test_n_em_gradients_through_the_unroll_equal_finite_differences():
    model = MODELS["plain Bernoulli"]((2, 2, 1))
    strategy = NEM(model, step_size=0.5, iterations=3)
    x, gamma = images(2, (2, 2, 1)), torch.rand(2, 3, 4).softmax(1)
    parameters = [*model.parameters(), *strategy.parameters()]

    def loss(*_: torch.Tensor) -> torch.Tensor:
        return ELBO("ramp")(strategy, strategy.unroll(x, gamma), x).loss

    assert torch.autograd.gradcheck(loss, parameters)


def test_original_rnn_em_is_its_formula():
    model = MODELS["owned Bernoulli"]()
    strategy = RNNEM(model, iterations=2)
    x = images(2)
    state = strategy.init(x)
    after = strategy.step(state, x, x)
    W, b, R = strategy.cell.inputs.weight, strategy.cell.inputs.bias, strategy.cell.recurrent.weight
    inputs = state.gamma * x.squeeze(-1).unsqueeze(1)
    torch.testing.assert_close(after.theta, (inputs @ W.T + b + state.theta @ R.T).sigmoid())
    torch.testing.assert_close(after.gamma, model.responsibilities(x, after.theta))


def test_gated_recurrence_without_norm_is_torchs_gru():
    model = MODELS["owned Bernoulli"]()
    cell = RNNEM(model, recurrence="gated").cell
    gru = torch.nn.GRUCell(12, 5)
    with torch.no_grad():
        gru.weight_ih.copy_(cell.inputs.weight), gru.bias_ih.copy_(cell.inputs.bias)
        gru.weight_hh.copy_(cell.recurrent.weight), gru.bias_hh.copy_(cell.recurrent.bias)
    inputs, theta = torch.randn(6, 12), torch.randn(6, 5)
    torch.testing.assert_close(cell(inputs, theta), gru(inputs, theta))


def test_initial_responsibilities_are_normalised_and_random_or_one():
    strategy = RNNEM(MODELS["owned Bernoulli"]())
    first, second = strategy.init(images(2)).gamma, strategy.init(images(2)).gamma
    torch.testing.assert_close(first.sum(1), torch.ones(2, 12))
    assert not torch.equal(first, second)
    alone = RNNEM(MODELS["owned Bernoulli"](K=1)).init(images(2)).gamma
    assert torch.equal(alone, torch.ones(2, 1, 12))


def test_noise_is_drawn_in_training_only():
    strategy = RNNEM(MODELS["owned Bernoulli"](), noise=BitFlip(0.5))
    x = images(2)
    assert not torch.equal(strategy.train().start(x)[1], x)
    assert torch.equal(strategy.eval().start(x)[1], x)


def test_noise_hits_as_often_as_it_says():
    x = images(200)
    flipped = (BitFlip(0.2)(x) != x).double().mean().item()
    assert flipped == pytest.approx(0.2, abs=4 * (0.16 / x.numel()) ** 0.5)
    noisy = MaskedUniform(0.3)(x)
    assert (noisy != x).double().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / x.numel()) ** 0.5)
    assert bool(((noisy >= 0) & (noisy <= 1)).all())


def test_inference_may_take_more_iterations_than_training():
    strategy = RNNEM(MODELS["owned Bernoulli"](), iterations=4)
    x, gamma = images(3), torch.rand(3, 3, 12).softmax(1)
    longer = strategy.infer(x, iterations=strategy.iterations + 3, gamma=gamma)
    assert longer.elbo_trace.shape == (strategy.iterations + 3, 3)
    assert torch.equal(longer.elbo_trace[: strategy.iterations], strategy.infer(x, gamma=gamma).elbo_trace)
    assert torch.equal(longer.trace.theta[-1], longer.theta)
    alone = strategy.infer(x, iterations=strategy.iterations + 3, gamma=gamma, keep_trace=False)
    assert alone.trace is None
    assert torch.equal(alone.elbo_trace, longer.elbo_trace)


def test_restarts_keep_the_best_evidence_of_each_image():
    strategy = RNNEM(MODELS["owned Bernoulli"](), iterations=2)
    x = images(5)
    torch.manual_seed(3)
    kept = strategy.infer(x, restarts=4)
    torch.manual_seed(3)
    every = strategy.infer(x.repeat(4, 1, 1)).log_evidence.reshape(4, 5)
    torch.testing.assert_close(kept.log_evidence, every.amax(0))
    torch.testing.assert_close(strategy.model.log_evidence(x, kept.theta), kept.log_evidence)
    assert kept.trace.gamma.shape == (2, 5, 3, 12)
    assert torch.equal(kept.trace.gamma[-1], kept.gamma)


@pytest.mark.parametrize("strategy_class", [NEM, RNNEM])
def test_given_responsibilities_may_be_of_another_dtype(strategy_class):
    strategy = strategy_class(MODELS["owned Bernoulli"](), iterations=2)
    x = images(2)
    gamma = torch.nn.functional.one_hot(torch.randint(3, (2, 12)), 3).transpose(1, 2)
    expected = strategy.infer(x, gamma=gamma.to(x.dtype)).gamma
    for dtype in (torch.int64, torch.float32, torch.float64):
        assert torch.equal(strategy.infer(x, gamma=gamma.to(dtype)).gamma, expected)


def test_inference_leaves_training_mode_and_gradients_alone():
    strategy = RNNEM(MODELS["owned Bernoulli"]())
    posterior = strategy.train().infer(images(2))
    assert strategy.training
    assert not posterior.gamma.requires_grad


def test_n_em_loss_is_equation_6():
    """With the KL between Bernoulli(p₀) and Bernoulli(ψ) written out."""
    model = MODELS["tied Bernoulli"]()
    strategy = NEM(model, iterations=2, e_step="greff2017")
    x = images(3)
    state = strategy.unroll(x)[-1]
    p, p0, gamma, target = state.mean.squeeze(-1), torch.tensor(0.1), state.gamma, x.squeeze(-1).unsqueeze(1)
    cross_entropy = -(target * p.log() + (1 - target) * (1 - p).log())
    divergence = p0 * (p0 / p).log() + (1 - p0) * ((1 - p0) / (1 - p)).log()
    expected = (gamma * cross_entropy + 0.5 * (1 - gamma) * divergence).sum((1, 2))
    found = NEMLoss().loss_at(strategy, state, x)
    torch.testing.assert_close(found, expected)
    parameters = [*model.parameters(), *strategy.parameters()]
    gradients = (torch.autograd.grad(loss.sum(), parameters, retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(*gradients)


def test_n_em_loss_of_normal_pixels_is_equation_6():
    model = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Normal(0.5), 3, pixel_prior=0.2)
    strategy = RNNEM(model, iterations=2)
    x = images(3)
    state = strategy.unroll(x)[-1]
    mean, gamma = state.mean.squeeze(-1), state.gamma
    log_p = torch.distributions.Normal(mean, 0.5).log_prob(x.squeeze(-1).unsqueeze(1))
    divergence = (0.2 - mean) ** 2 / (2 * 0.25)
    torch.testing.assert_close(
        NEMLoss().loss_at(strategy, state, x), (-gamma * log_p + (1 - gamma) * divergence).sum((1, 2))
    )


def test_with_consistent_responsibilities_n_em_loss_is_minus_elbo_but_for_entropy_and_constants():
    model = MODELS["owned Bernoulli"]()
    strategy = RNNEM(model, iterations=2)
    x = images(3)
    state = strategy.unroll(x)[-1]
    entropy = torch.special.entr(state.gamma).sum((1, 2))
    log_mixing = 12 * torch.tensor(1 / 3).log()
    torch.testing.assert_close(
        NEMLoss().loss_at(strategy, state, x), -ELBO().loss_at(strategy, state, x).neg().add(-entropy - log_mixing)
    )


def test_weights_of_iterations():
    assert ELBO("last").step_weights(3) == [0, 0, 1]
    assert ELBO("all").step_weights(4) == [0.25] * 4
    assert ELBO("ramp").step_weights(3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert ELBO([0, 2, 2]).step_weights(3) == [0, 0.5, 0.5]
    strategy = RNNEM(MODELS["owned Bernoulli"](), iterations=3)
    x = images(2)
    states = strategy.unroll(x)
    each = torch.stack([strategy.elbo(state).mean() for state in states])
    torch.testing.assert_close(ELBO("ramp")(strategy, states, x).loss, -(each * torch.arange(1, 4) / 6).sum())


BAD = {
    "no iterations": (lambda m: RNNEM(m, iterations=0), "iterations must be at least 1"),
    "negative noise": (lambda m: RNNEM(m, noise=BitFlip(-0.1)), r"\[0, 1\]"),
    "too much noise": (lambda m: RNNEM(m, noise=MaskedUniform(1.5)), r"\[0, 1\]"),
    "unknown recurrence": (lambda m: RNNEM(m, recurrence="lstm"), "sigmoid, gated"),
    "unknown E-step": (lambda m: NEM(m, e_step="hard"), "consistent"),
    "no step": (lambda m: NEM(m, step_size=0.0), "step_size"),
    "encoder for other images": (lambda m: RNNEM(m, encoder=encoders.MLP((5, 5, 1))), "for images of shape"),
    "empty encoder": (lambda m: encoders.MLP((5, 5, 1), hidden=()), "hidden"),
    "unknown weights": (lambda m: ELBO("first"), "weights"),
    "negative weights": (lambda m: ELBO([1, -1]), "weights"),
    "no weight": (lambda m: ELBO([0, 0]), "weights"),
    "no restarts": (lambda m: RNNEM(m).infer(images(1), restarts=0), "restarts"),
    "no iterations at inference": (lambda m: RNNEM(m).infer(images(1), iterations=0), "iterations"),
    "restarts from one start": (
        lambda m: RNNEM(m).infer(images(1), restarts=2, gamma=torch.ones(1, 3, 12)),
        "all be the same",
    ),
    "gamma of another shape": (lambda m: RNNEM(m).infer(images(1), gamma=torch.ones(1, 2, 12)), "gamma has shape"),
    "weights for other iterations": (
        lambda m: ELBO([1, 1])(RNNEM(m, iterations=3), RNNEM(m, iterations=3).unroll(images(1)), images(1)),
        "2 weights were given for 3 iterations",
    ),
    "N-EM's loss on the plain mixture": (
        lambda m: NEMLoss()(RNNEM(m), RNNEM(m).unroll(images(1)), images(1)),
        "pixel prior",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_work_is_refused(name):
    action, message = BAD[name]
    model = MODELS["plain Bernoulli"]()
    with pytest.raises(StrategyError, match=message):
        action(model)


def test_a_start_that_ends_in_nan_is_not_the_best():
    merit = torch.tensor([[1.0, math.nan, 3.0], [math.nan, -5.0, 4.0], [2.0, -6.0, math.nan]])
    assert best_starts(merit.flatten(), 3).tolist() == [6, 4, 5]
    assert best_starts(torch.full((4,), math.nan), 2).tolist() == [0, 1]


@pytest.mark.parametrize("K", [1, 3])
def test_random_gamma_are_responsibilities_even_where_every_draw_is_zero(K, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "normal_", torch.Tensor.zero_)
    gamma = RNNEM(MODELS["owned Bernoulli"](K=K)).init(images(2)).gamma
    torch.testing.assert_close(gamma.sum(1), torch.ones(2, 12))
