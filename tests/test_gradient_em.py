"""Gradient EM: never downhill, to the fixed points of exact M-steps, and EM's own gradient for the decoder."""

import pytest
import torch
from cases import images
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro.infer import TraceEnum_ELBO

import pnem
from pnem.data import ImageDataset
from pnem.errors import RunError, StrategyError
from pnem.inference import ELBO, ClassicalEM, GradientEM, NEMLoss
from pnem.models import (
    Bernoulli,
    Binomial,
    Categorical,
    Likelihood,
    MultivariateNormal,
    Normal,
    Poisson,
    SpatialMixture,
    decoders,
)

pytestmark = pytest.mark.usefixtures("float64")

SHAPE = (4, 4)
DECODERS = {
    "constant": lambda P: decoders.Constant(P),
    "linear": lambda P: decoders.Linear(3, (*SHAPE, P)),
    "sigmoid": lambda P: decoders.Linear(3, (*SHAPE, P), bias=False, input_activation="sigmoid"),
    "mlp": lambda P: decoders.MLP(3, (*SHAPE, P), hidden=(8,)),
    "relu, layer norm": lambda P: decoders.MLP(3, (*SHAPE, P), hidden=(8, 8), activation="relu", layer_norm=True),
    "convolutional": lambda P: decoders.Convolutional(3, (*SHAPE, P), hidden=(8,), channels=(4, 3)),
}
LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "normal": lambda: Normal(0.3),
    "poisson": Poisson,
    "binomial": lambda: Binomial(4),
    "categorical": lambda: Categorical(3),
    "multivariate normal": lambda: MultivariateNormal("full"),
}


def mixture(decoder: str, likelihood: Likelihood, K: int, *, C: int = 2, **kwargs) -> SpatialMixture:
    return SpatialMixture(DECODERS[decoder](likelihood.num_parameters(C)), likelihood, K, **kwargs)


def draw(likelihood: Likelihood, B: int, D: int, C: int = 2) -> torch.Tensor:
    """Items of three kinds, all in the likelihood's support."""
    level = torch.randint(0, 3, (B, D, 1)).expand(B, D, C)
    if isinstance(likelihood, Normal | MultivariateNormal):
        return torch.randn(B, D, C) + 3 * level
    if isinstance(likelihood, Poisson):
        return torch.poisson(1 + 5.0 * level)
    if isinstance(likelihood, Bernoulli):
        return torch.bernoulli(0.2 + 0.3 * level)
    if isinstance(likelihood, Binomial):
        return torch.distributions.Binomial(4, 0.2 + 0.3 * level).sample()
    return (torch.randint(0, 3, (B, D, C)) + level).div(2, rounding_mode="floor").double()


def q_of_the_declared_model(model: SpatialMixture, x, theta, gamma):
    return (gamma * model.log_joint(x, theta)).sum((-2, -1)) + model.log_prior(theta)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    K=st.integers(1, 4),
    prior=st.sampled_from(["flat", "standard_normal"]),
    ownership=st.sampled_from([None, 0.5, 1.0]),
    steps=st.integers(2, 6),
    log_step_size=st.integers(-4, 6),
)
def test_the_log_joint_never_falls(decoder, likelihood, seed, K, prior, ownership, steps, log_step_size):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    kind = LIKELIHOODS[likelihood]()
    owned = {} if ownership is None else {"pixel_prior": 1.0, "ownership": ownership}
    model = mixture(decoder, kind, K, prior=prior, **owned)
    strategy = GradientEM(model, iterations=8, steps=steps, step_size=10.0**log_step_size)
    posterior = strategy.infer(draw(kind, 2, 16))
    elbo = posterior.elbo_trace
    assert bool(elbo.isfinite().all())
    assert bool((elbo.diff(dim=0) >= -1e-10 * elbo[1:].abs()).all())


@pytest.mark.parametrize("ownership", [None, 0.5, 1.0])
@pytest.mark.parametrize("decoder", DECODERS)
def test_q_and_its_gradient_are_those_of_the_declared_model(decoder, ownership):
    owned = {} if ownership is None else {"pixel_prior": 0.0, "ownership": ownership}
    model = mixture(decoder, Bernoulli(), 3, prior="standard_normal", mixing="learned", **owned)
    model.mixing_logits.data = torch.tensor([0.3, -0.5, 1.0])
    strategy = GradientEM(model)
    x, theta = images(2, (*SHAPE, 2)), torch.randn(2, 3, model.latent_features, requires_grad=True)
    gamma = torch.rand(2, 3, 16).softmax(1)
    state = strategy.init(x, gamma)
    expected = q_of_the_declared_model(model, x, theta, gamma)
    q, gradient = strategy._value_and_gradient(theta.detach(), state, x)
    torch.testing.assert_close(q.sum(-1), expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), theta)[0])
    # Fisher's identity: at the posterior γ it is the gradient of log p(x, θ).
    state = state._replace(gamma=model.responsibilities(x, theta).detach())
    log_p = (model.log_evidence(x, theta) + model.log_prior(theta)).sum()
    _, gradient = strategy._value_and_gradient(theta.detach(), state, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(log_p, theta)[0])


def clusters(family: str) -> tuple[torch.Tensor, torch.Tensor, Likelihood]:
    """Items of three well separated kinds, (1, D, C), their kinds, (D,), and a likelihood."""
    kind = torch.arange(600) % 3
    likelihood = {
        "poisson": Poisson,
        "binomial": lambda: Binomial(10),
        "bernoulli": Bernoulli,
        "categorical": lambda: Categorical(3),
    }.get(family, lambda: MultivariateNormal(family))()
    pattern = torch.eye(3)[kind].repeat_interleave(2, -1)
    x = {
        "poisson": lambda: torch.poisson(torch.tensor([2.0, 8.0, 30.0])[kind, None].expand(-1, 2)),
        "binomial": lambda: torch.distributions.Binomial(10, 0.1 + 0.35 * kind[:, None].expand(-1, 2)).sample(),
        "bernoulli": lambda: torch.bernoulli(0.2 + 0.6 * pattern),
        "categorical": lambda: torch.where(torch.rand(600, 6) < 0.5, 2 * pattern, torch.randint(0, 3, (600, 6))),
    }.get(family, lambda: torch.randn(600, 2) @ torch.tensor([[1.0, 0.4], [-0.3, 0.6]]) + 6 * pattern[:, 1:3])()
    return x.double()[None], kind, likelihood


@pytest.mark.parametrize("family", ["poisson", "binomial", "bernoulli", "categorical", "spherical", "diagonal", "full"])
def test_from_one_start_it_reaches_the_evidence_of_exact_m_steps(family):
    x, kind, likelihood = clusters(family)
    gamma = 0.1 + 0.7 * torch.eye(3)[kind].T[None]

    def model() -> SpatialMixture:
        return mixture("constant", likelihood, 3, C=x.shape[-1])

    exact = ClassicalEM(model(), iterations=1000, tol=1e-12).infer(x, gamma=gamma)
    ours = GradientEM(model(), iterations=60).infer(x, gamma=gamma)
    assert ours.log_evidence.item() == pytest.approx(exact.log_evidence.item(), abs=1e-4)


def test_seeds_far_apart_are_a_good_start_for_items_without_places():
    x, _, likelihood = clusters("full")
    model = mixture("constant", likelihood, 3)
    best = ClassicalEM(model, iterations=200).infer(x, restarts=10).log_evidence.item()
    reached = GradientEM(model).infer(x.repeat(10, 1, 1)).log_evidence
    assert (reached - best).abs().median().item() < 1e-2


def test_one_linear_component_reaches_the_exact_posterior_mode():
    model = mixture("linear", Normal(0.5), 1, C=1, prior="standard_normal")
    x = torch.randn(5, 16, 1)
    W, b = model.decoder.linear.weight.detach(), model.decoder.linear.bias.detach()
    mode = torch.linalg.solve(W.T @ W / 0.25 + torch.eye(3), W.T @ (x.squeeze(-1) - b).T / 0.25).T
    posterior = GradientEM(model, iterations=30).infer(x)
    torch.testing.assert_close(posterior.theta.squeeze(1), mode, rtol=0, atol=1e-7)


def test_random_responsibilities_break_the_symmetry_of_equal_components():
    model = mixture("mlp", Normal(0.3), 3, C=1)
    x = draw(model.likelihood, 4, 16, 1)
    at_zero = model.log_evidence(x, torch.zeros(4, 3, 3))
    one = GradientEM(mixture("mlp", Normal(0.3), 1, C=1), iterations=50)
    one.model.decoder.load_state_dict(model.decoder.state_dict())
    several = GradientEM(model, iterations=50).infer(x)
    assert bool((several.theta.std(1).amax(-1) > 0.1).all())
    assert bool((several.log_evidence > at_zero + 1).all())
    assert bool((several.log_evidence > one.infer(x).log_evidence + 1).all())


@pytest.mark.parametrize(("step_size", "moves"), [(1e200, False), (1e5, True), (1.0, True)])
def test_a_search_that_fails_keeps_its_theta(step_size, moves):
    model = mixture("constant", Poisson(), 2)
    x = draw(model.likelihood, 3, 20)
    strategy = GradientEM(model, step_size=step_size, steps=4)
    state = strategy.init(x)
    theta = strategy.m_step(state, x)
    assert bool((theta == state.theta).all()) != moves
    assert bool(strategy.step(state, x, x).log_joint.isfinite().all())


class Unbounded(Normal):
    def log_probs(self, xs, psi):
        return [(0 * x + psi.exp()).sum(-1) for x in xs]


def test_an_unbounded_density_is_not_followed_to_infinity():
    model = mixture("constant", Unbounded(), 2)
    posterior = GradientEM(model, step_size=100.0).infer(torch.randn(2, 10, 2))
    assert bool(posterior.elbo_trace.isfinite().all())
    assert bool((posterior.log_evidence > 1e30).all())


def test_the_search_of_one_component_does_not_depend_on_the_others():
    model = mixture("mlp", Normal(0.3), 3, pixel_prior=0.0)
    x = draw(model.likelihood, 2, 16)
    strategy = GradientEM(model)
    state = strategy.init(x)
    theta = strategy.m_step(state, x)
    far = state._replace(theta=torch.cat([state.theta[:, :2], torch.randn(2, 1, 3)], 1))
    torch.testing.assert_close(strategy.m_step(far, x)[:, :2], theta[:, :2])


@pytest.mark.parametrize("objective", [ELBO("last"), NEMLoss("last")])
def test_training_follows_the_gradient_of_q_at_fixed_theta_and_gamma(objective):
    model = mixture("mlp", Normal(0.3, learn_sigma=True), 3, C=1, pixel_prior=0.0, mixing="learned")
    strategy, x = GradientEM(model, iterations=3), torch.randn(4, 16, 1)
    states = strategy.unroll(x)
    assert not states[-1].theta.requires_grad
    assert not states[-1].gamma.requires_grad
    # The N-EM loss leaves π out, and its divergences from P₀ have a σ of their own.
    learned = model if isinstance(objective, ELBO) else model.decoder
    parameters = list(learned.parameters())
    ours = torch.autograd.grad(objective(strategy, states, x).loss, parameters)
    q = q_of_the_declared_model(model, x, states[-1].theta, states[-1].gamma).mean()
    for gradient, expected in zip(ours, torch.autograd.grad(-q, parameters), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_it_works_with_and_without_autograd_and_leaves_no_gradients(context):
    model = mixture("convolutional", Bernoulli(), 3, pixel_prior=0.0)
    strategy, gamma = GradientEM(model), torch.rand(2, 3, 16).softmax(1)
    x = images(2, (*SHAPE, 2))
    with context():
        posterior = strategy.infer(x.clone(), gamma=gamma.clone())
    assert not posterior.theta.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(posterior.theta.clone(), strategy.unroll(x, gamma)[-1].theta)


def test_items_without_places_have_states_of_full_shape_that_pyro_scores_alike():
    model = mixture("constant", MultivariateNormal("full"), 3, mixing="learned")
    model.mixing_logits.data = torch.tensor([0.3, -0.5, 1.0])
    strategy, x = GradientEM(model), draw(model.likelihood, 2, 30)
    posterior = strategy.infer(x, restarts=3)
    assert posterior.psi.shape == (2, 3, 30, 5)
    assert posterior.mean.shape == (2, 3, 30, 2)
    assert posterior.log_mixing.tolist() == [model.log_mixing.tolist()] * 2
    stock = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.guide_at(posterior), x)
    assert posterior.log_evidence.sum().item() == pytest.approx(stock)


def test_the_fit_raises_the_evidence_and_needs_something_to_train():
    model = mixture("mlp", Bernoulli(), 2, C=1, pixel_prior=0.0)
    features = images(16, (*SHAPE, 1)).float().reshape(1, 16, *SHAPE, 1).numpy()
    data = {name: ImageDataset(features) for name in ("training", "validation")}
    options = {"batch_size": 8, "device": "cpu", "progress": False, "learning_rate": 0.02, "objective": ELBO("last")}
    run = pnem.fit(model, GradientEM(model, iterations=3), data, epochs=6, **options)
    assert run.history.valid_elbo.iloc[-1] > run.history.valid_elbo.iloc[0] + 1
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RunError, match=r"nothing to train.*infer"):
        pnem.fit(model, GradientEM(model), data, epochs=1, **options)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"step_size": 0.0}, "step_size must be positive and finite"),
        ({"step_size": -1.0}, "step_size must be positive and finite"),
        ({"step_size": float("inf")}, "step_size must be positive and finite"),
        ({"step_size": float("nan")}, "step_size must be positive and finite"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(StrategyError, match=message):
        GradientEM(mixture("linear", Bernoulli(), 2), **kwargs)


def test_what_a_component_cannot_fit_by_itself_is_refused():
    with pytest.raises(StrategyError, match=r"per_image.*ClassicalEM"):
        GradientEM(mixture("constant", Poisson(), 2, mixing="per_image"))
    with pytest.raises(StrategyError, match=r"tied.*ClassicalEM"):
        GradientEM(mixture("constant", MultivariateNormal("tied"), 2))


def test_a_given_gamma_must_fit_the_images():
    strategy = GradientEM(mixture("constant", Poisson(), 2))
    with pytest.raises(StrategyError, match=r"gamma has shape \(1, 2, 9\)"):
        strategy.infer(torch.ones(1, 10, 2), gamma=torch.full((1, 2, 9), 0.5))
