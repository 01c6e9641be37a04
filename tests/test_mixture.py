import contextlib
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import MODELS, images
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import Predictive, TraceEnum_ELBO, infer_discrete

from pnem.errors import ModelError
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.models.mixture import _of_owner

pytestmark = pytest.mark.usefixtures("float64")
every_model = pytest.mark.parametrize("name", MODELS)


def delta_guide(theta: torch.Tensor):
    def guide(*_: object) -> None:
        with pyro.plate("images", len(theta), dim=-2), pyro.plate("components", theta.shape[1], dim=-1):
            pyro.sample("theta", dist.Delta(theta, event_dim=1))

    return guide


@every_model
@pytest.mark.parametrize(
    ("shape", "K", "B"), [((3, 4, 1), 3, 4), ((1, 1, 1), 2, 1), ((2, 3, 3), 1, 2), ((2, 2, 2), 4, 1)]
)
def test_log_evidence_equals_pyros_enumeration(name, shape, K, B):
    model = MODELS[name](shape, K)
    x, theta = images(B, shape), torch.randn(B, K, 5)
    pyro_elbo = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, delta_guide(theta), x)
    ours = model.log_evidence(x, theta) + model.log_prior(theta)
    assert ours.shape == (B,)
    assert ours.sum().item() == pytest.approx(pyro_elbo, rel=1e-12)


@every_model
def test_responsibilities_equal_pyros_marginals(name):
    model = MODELS[name]()
    x, theta = images(4), torch.randn(4, 3, 5)
    marginals = TraceEnum_ELBO(max_plate_nesting=2).compute_marginals(model, delta_guide(theta), x)
    expected = marginals["z"].probs.expand(4, 12, 3).transpose(1, 2)
    torch.testing.assert_close(model.responsibilities(x, theta), expected, rtol=1e-10, atol=1e-12)


@every_model
def test_log_joint_and_evidence_equal_brute_force_over_every_assignment(name):
    K, D = 2, 4
    model = MODELS[name]((2, 2, 1), K)
    x, theta = images(1, (2, 2, 1)), torch.randn(1, K, 5)
    totals = []
    for z in itertools.product(range(K), repeat=D):
        conditioned = poutine.condition(model, {"theta": theta, "z": torch.tensor([z])})
        trace = poutine.trace(conditioned).get_trace(x)
        total = trace.log_prob_sum() - model.log_prior(theta).sum()
        log_joint = model.log_joint(x, theta)[0, list(z), range(D)].sum()
        torch.testing.assert_close(total, log_joint)
        totals.append(total)
    torch.testing.assert_close(torch.stack(totals).logsumexp(0), model.log_evidence(x, theta)[0])


def test_ownership_adds_what_every_other_component_says_of_the_pixel_prior():
    model = MODELS["owned Normal"]()
    plain = SpatialMixture(model.decoder, model.likelihood, 3)
    x, theta = images(2), torch.randn(2, 3, 5)
    psi, sigma = model.decode(theta), model.likelihood.sigma
    unowned = dist.Normal(psi, sigma).log_prob(torch.tensor(0.2)).sum(-1)
    expected = plain.log_joint(x, theta) + torch.stack(
        [unowned[:, [j for j in range(3) if j != k]].sum(1) for k in range(3)], 1
    )
    torch.testing.assert_close(model.log_joint(x, theta), expected)


def test_expectation_under_a_bernoulli_pixel_prior_is_exact():
    model = MODELS["tied Bernoulli"]()
    psi = torch.randn(2, 3, 12, 1)
    p = dist.Bernoulli(logits=psi)
    expected = 0.1 * p.log_prob(torch.tensor(1.0)) + 0.9 * p.log_prob(torch.tensor(0.0))
    torch.testing.assert_close(model.log_unowned(psi), expected.squeeze(-1))


@every_model
def test_gradient_of_the_evidence_is_that_of_q_at_fixed_responsibilities(name):
    """Fisher's identity."""
    model = MODELS[name]()
    x, theta = images(3), torch.randn(3, 3, 5)
    gamma = model.responsibilities(x, theta).detach()
    of_evidence = torch.func.grad(lambda t: model.log_evidence(x, t).sum())(theta)
    of_q = torch.func.grad(lambda t: (gamma * model.log_joint(x, t)).sum())(theta)
    torch.testing.assert_close(of_evidence, of_q)


@every_model
def test_generates_images_and_discrete_posteriors(name):
    model = MODELS[name]()
    drawn = Predictive(model, num_samples=7)(num_images=2)
    assert drawn["x"].shape == (7, 2, 12, 1)
    assert drawn["z"].shape == (7, 2, 12)
    x, theta = images(2), torch.randn(2, 3, 5)
    conditioned = poutine.condition(model, {"theta": theta})
    decoded = infer_discrete(conditioned, first_available_dim=-3, temperature=0)
    z = poutine.trace(decoded).get_trace(x).nodes["z"]["value"]
    gamma = model.responsibilities(x, theta)
    # Where ownership makes dark pixels a tie, any of the best components will do.
    torch.testing.assert_close(gamma.gather(1, z.unsqueeze(1)).squeeze(1), gamma.amax(1))


def test_generated_pixels_respect_ownership():
    """Given θ, z follows π_k / p(x₀ | ψ_k): a component that is sure of a lit pixel makes it."""
    model = SpatialMixture(decoders.Linear(2, (1, 1, 1)), Bernoulli(), 2, pixel_prior=0.0)
    with torch.no_grad():
        model.decoder.linear.weight.copy_(torch.tensor([[1.0, 0.0]]))
        model.decoder.linear.bias.zero_()
    theta = torch.tensor([[[3.0, 0.0], [-3.0, 0.0]]])
    p = torch.tensor([3.0, -3.0]).sigmoid()
    weights = 0.5 / (1 - p)
    drawn = Predictive(poutine.condition(model, {"theta": theta}), num_samples=4000)(num_images=1)
    expected = (weights / weights.sum() * p).sum()
    assert drawn["x"].mean().item() == pytest.approx(expected.item(), abs=4 * (0.25 / 4000) ** 0.5)


@given(B=st.integers(1, 3), K=st.integers(1, 4), H=st.integers(1, 3), W=st.integers(1, 3), C=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_shapes_and_bounds(B, K, H, W, C):
    model = SpatialMixture(decoders.Linear(2, (H, W, C)), Bernoulli(), K, pixel_prior=0.0)
    x, theta = images(B, (H, W, C)), torch.randn(B, K, 2)
    gamma = model.responsibilities(x, theta)
    assert gamma.shape == (B, K, H * W)
    torch.testing.assert_close(gamma.sum(1), torch.ones(B, H * W))
    assert model.log_evidence(x, theta).shape == (B,)
    assert model.log_prior(theta).tolist() == [0.0] * B


@pytest.mark.parametrize("likelihood", [Bernoulli(), Normal(0.3), Normal((0.3, 0.7)), Normal(2.0, learn_sigma=True)])
def test_likelihood_agrees_with_its_own_distribution(likelihood):
    likelihood.double()
    x, psi = images(2, (2, 2, 2)), torch.randn(2, 4, 2)
    distribution = likelihood.distribution(psi)
    torch.testing.assert_close(likelihood.log_prob(x, psi), distribution.log_prob(x))
    torch.testing.assert_close(likelihood.mean(psi), distribution.mean)
    score = torch.func.grad(lambda p: likelihood.log_prob(x, p).sum())(psi)
    torch.testing.assert_close(likelihood.score(x, likelihood.mean(psi)), score)
    assert bool((likelihood.saturated_log_prob(x) >= likelihood.log_prob(x, psi)).all())


def best_evidence(drawing: list[bool], w: float) -> float:
    """max over p of log p(x = 1 | ψ) where the components marked draw the pixel with probability p, others never."""
    p = torch.linspace(1e-4, 1 - 1e-4, 9999)[:, None, None, None]
    drawn = torch.tensor(drawing)[:, None, None]
    psi = torch.where(drawn, p.logit(), torch.tensor(-40.0))
    model = SpatialMixture(decoders.Linear(2, (1, 1, 1)), Bernoulli(), len(drawing), pixel_prior=0.0, ownership=w)
    return model.log_joint_at(torch.ones(1, 1), psi).logsumexp(-2).max().item()


@pytest.mark.parametrize(("w", "divides"), [(0.3, False), (0.36, True), (0.5, True), (1.0, True)])
def test_division_pays_above_a_third(w, divides):
    alone, all_four = best_evidence([True, False, False, False], w), best_evidence([True] * 4, w)
    assert alone == pytest.approx(-math.log(4), abs=1e-3)
    p = 1 / (1 + 3 * w)
    assert all_four == pytest.approx(math.log(p) + 3 * w * math.log(1 - p), abs=1e-6)
    assert (alone > all_four) == divides


@pytest.mark.parametrize(("w", "nats"), [(1.0, 0.693), (0.5, 0.262)])
def test_half_ownership_charges_less_for_an_overlap(w, nats):
    charge = best_evidence([True, False, False, False], w) - best_evidence([True, True, False, False], w)
    assert charge == pytest.approx(nats, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_components": 0}, "num_components must be at least 1"),
        ({"prior": "laplace"}, "prior must be"),
        ({"mixing": "sticky"}, "mixing must be"),
        ({"ownership": -1.0}, "ownership must be"),
        ({"pixel_prior": 1.5}, r"\[0, 1\]"),
    ],
)
def test_a_model_that_cannot_work_is_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        SpatialMixture(decoders.Linear(2, (2, 2, 1)), Bernoulli(), **{"num_components": 2, **arguments})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 1), r"\(B, D=4, C=1\)"),
        (torch.zeros(4, 1), "shape"),
        (torch.full((1, 4, 1), torch.inf), "NaN or infinite"),
        (torch.full((1, 4, 1), torch.nan), "no value at all|NaN or infinite"),
        (torch.full((1, 4, 1), 2.0), "Normal likelihood"),
    ],
)
def test_images_that_do_not_fit_are_refused(x, message):
    model = SpatialMixture(decoders.Linear(2, (2, 2, 1)), Bernoulli(), 2)
    with pytest.raises(ModelError, match=message):
        model.log_joint(x, torch.zeros(len(x), 2, 2))
    with pytest.raises(ModelError, match=message):
        model(x)


def test_theta_of_another_model_is_refused():
    model = SpatialMixture(decoders.Linear(2, (2, 2, 1)), Bernoulli(), 2)
    with pytest.raises(ModelError, match="K=2, M=2"):
        model.log_joint(torch.zeros(1, 4, 1), torch.zeros(1, 3, 2))


@pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
def test_a_standard_deviation_that_is_none_is_refused(sigma):
    with pytest.raises(ModelError, match="sigma"):
        Normal(sigma)


def test_another_models_parameters_in_pyros_store_are_noticed():
    MODELS["owned Bernoulli"]()(images(1))
    with pytest.raises(ModelError, match="clear_param_store"):
        MODELS["owned Bernoulli"]()(images(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prior", ["flat", "standard_normal"])
def test_the_prior_keeps_the_precision_of_theta(prior):
    model = SpatialMixture(decoders.Linear(3, (2, 2, 1)), Bernoulli(), 2, prior=prior).float()
    assert model.log_prior(torch.zeros(1, 2, 3, dtype=torch.float32)).dtype == torch.float32


def test_images_that_are_no_tensor_are_refused():
    model = SpatialMixture(decoders.MLP(2, (3, 4, 1)), Bernoulli(), 2)
    with pytest.raises(ModelError, match=r"type ndarray: give torch\.as_tensor"):
        model.check(torch.zeros(5, 12, 1).numpy())


@pytest.mark.parametrize("frames", [(), (3,)])
def test_pyro_enumerates_owners_as_views(monkeypatch, frames):
    found = []

    def watched(psi, z):
        found.append((psi.data_ptr(), _of_owner(psi, z).data_ptr()))
        return _of_owner(psi, z)

    monkeypatch.setattr("pnem.models.mixture._of_owner", watched)
    model = SpatialMixture(decoders.Linear(3, (2, 3, 1)), Bernoulli(), 4, pixel_prior=0.0)
    theta, x = torch.randn(*frames, 2, 4, 3), torch.ones(*frames, 2, 6, 1)

    def guide(_):
        with contextlib.ExitStack() as plates:
            if frames:
                plates.enter_context(pyro.plate("time", *frames, dim=-3))
            plates.enter_context(pyro.plate("images", 2, dim=-2))
            plates.enter_context(pyro.plate("components", 4, dim=-1))
            pyro.sample("theta", dist.Delta(theta, event_dim=1))

    TraceEnum_ELBO(max_plate_nesting=2 + len(frames)).loss(model, guide, x)
    assert found[-1][0] == found[-1][1]


@pytest.mark.parametrize("frames", [(), (3,)])
def test_the_owners_parameters_are_a_view_where_z_is_enumerated(frames):
    psi = torch.randn(*frames, 2, 4, 5, 1)
    every = torch.arange(4)
    enumerated = _of_owner(psi, every.view(4, *[1 for _ in frames], 1, 1))
    assert enumerated.data_ptr() == psi.data_ptr()
    for k in every:
        drawn = _of_owner(psi, torch.full((*frames, 2, 5), k))
        assert torch.equal(enumerated[k], drawn)
        assert torch.equal(drawn, psi[..., k, :, :])
    z = torch.randint(4, (*frames, 2, 5))
    assert torch.equal(_of_owner(psi, z), psi.take_along_dim(z[..., None, :, None], -3).squeeze(-3))
