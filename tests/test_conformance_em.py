"""What EM in closed form promises, with every rule it has (design: conformance)."""

import io

import pyro
import pytest
import torch
from cases import CLASSICAL, factors, items
from pyro.infer import TraceEnum_ELBO

from pnem.errors import ModelError
from pnem.inference import ClassicalEM, OnlineEM
from pnem.models.config import build, describe

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]
every_rule = pytest.mark.parametrize("rule", CLASSICAL)
every_strategy = pytest.mark.parametrize("strategy", [ClassicalEM, OnlineEM])
DRAWN = torch.randn(80, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TABLE = DRAWN[:, :2] @ torch.tensor([[1.0, 2.0, 0.0, -1.0], [0.5, 0.0, 1.0, 1.0]]).double() + DRAWN[:, 2:]


def data(rule: str, **shape: int) -> torch.Tensor:
    return items(rule.removesuffix(", prior"), **shape)


def start(model, x):
    B, D, K = len(x), x.shape[1], model.num_components
    return torch.rand(B, K, D, generator=torch.Generator().manual_seed(3)).softmax(1)


@every_rule
@every_strategy
def test_everything_that_is_fitted_moves(strategy, rule):
    model = CLASSICAL[rule](K=3)
    before = model.mixing.detach().clone()
    x = data(rule)
    em = strategy(model, iterations=3)
    theta = em.init(x, start(model, x)).theta
    fit = em.fit(x, theta=theta)
    assert bool((fit.theta != theta).any())
    assert not torch.equal(model.mixing, before)
    torch.testing.assert_close(model.log_mixing.detach(), fit.log_mixing[0])


@every_strategy
@pytest.mark.parametrize("isotropic", [False, True])
def test_every_parameter_of_a_linear_decoder_moves(strategy, isotropic):
    model = factors(4, isotropic=isotropic)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    strategy(model, iterations=3).fit(TABLE[:, None])
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert bool((parameter != old).any()), name
        assert bool(parameter.isfinite().all()), name


@every_rule
@pytest.mark.parametrize(
    ("B", "K", "D", "C"), [(1, 3, 20, 1), (2, 1, 20, 2), (3, 2, 20, 3), (1, 1, 1, 1), (2, 2, 1, 2)]
)
def test_shapes_hold_at_the_edges(rule, B, K, D, C):
    model, x = CLASSICAL[rule](K=K, C=C, mixing="per_image"), data(rule, B=B, D=D, C=C)
    strategy = ClassicalEM(model, iterations=5)
    if D == 1 and "prior" not in rule and model.latent_features > C * (3 if rule == "categorical" else 1):
        # The variance of a single item, without a floor or a prior.
        with pytest.raises(ModelError, match="larger floor"):
            strategy.infer(x)
        return
    posterior = strategy.infer(x, restarts=2)
    assert posterior.theta.shape == (B, K, model.latent_features)
    assert posterior.psi.shape == (B, K, D, model.latent_features)
    assert posterior.mean.shape == (B, K, D, C)
    assert posterior.gamma.shape == (B, K, D)
    assert posterior.labels.shape == (B, D)
    assert posterior.reconstruction.shape == x.shape
    assert posterior.log_mixing.shape == model.mixing.shape == (B, K)
    assert posterior.elbo_trace.shape[1:] == (B,)
    torch.testing.assert_close(posterior.gamma.sum(1), torch.ones(B, D))
    assert bool(posterior.log_evidence.isfinite().all())


@every_rule
@pytest.mark.parametrize("mixing", ["learned", "uniform", "per_image"])
def test_the_elbo_is_pyros(rule, mixing):
    if mixing == "uniform" and "prior" in rule:
        pytest.skip("a prior on mixing weights needs weights that are fitted")
    x, model = data(rule, B=2), CLASSICAL[rule](mixing=mixing)
    strategy = ClassicalEM(model, iterations=4)
    for state in [strategy.init(x, start(model, x)), *strategy.unroll(x, start(model, x))[:2]]:
        model.set_log_mixing(state.log_mixing)
        stock = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.guide_at(state), x)
        assert strategy.elbo(state).sum().item() == pytest.approx(stock, rel=1e-10)
    pyro.set_rng_seed(1)
    posterior = strategy.infer(x)
    at_the_end = strategy.fit(x, theta=posterior.theta, iterations=1).elbo_trace[0].sum().item()
    pyro.set_rng_seed(1)
    assert -TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy, x) == pytest.approx(at_the_end, rel=1e-10)


@every_rule
@every_strategy
def test_permuting_the_initial_components_permutes_the_result(strategy, rule):
    model, order = CLASSICAL[rule](mixing="per_image"), [2, 0, 1]
    x, em = data(rule), strategy(model, iterations=4)
    gamma = start(model, x)
    torch.manual_seed(0)
    straight = em.infer(x, gamma=gamma)
    torch.manual_seed(0)
    permuted = em.infer(x, gamma=gamma[:, order])
    torch.testing.assert_close(permuted.psi, straight.psi[:, order])
    torch.testing.assert_close(permuted.gamma, straight.gamma[:, order])
    torch.testing.assert_close(permuted.log_mixing, straight.log_mixing[:, order])
    torch.testing.assert_close(permuted.log_evidence, straight.log_evidence)


@every_rule
def test_images_of_a_batch_do_not_touch_each_other(rule):
    model, x = CLASSICAL[rule](mixing="per_image"), data(rule, B=3)
    gamma = start(model, x)
    together = ClassicalEM(model, iterations=5, tol=0).infer(x, gamma=gamma)
    alone = ClassicalEM(model, iterations=5, tol=0).infer(x[1:2], gamma=gamma[1:2])
    torch.testing.assert_close(together.psi[1:2], alone.psi)
    torch.testing.assert_close(together.gamma[1:2], alone.gamma)


@every_rule
def test_single_precision_agrees_with_double(rule):
    x, model = data(rule), CLASSICAL[rule]()
    gamma = start(model, x)
    double = ClassicalEM(model, iterations=5, tol=0).infer(x, gamma=gamma)
    model.float()
    single = ClassicalEM(model, iterations=5, tol=0).infer(x.float(), gamma=gamma.float())
    assert single.gamma.dtype == single.theta.dtype == torch.float32
    torch.testing.assert_close(single.log_evidence.double(), double.log_evidence, rtol=1e-4, atol=1e-4)


@every_rule
def test_described_built_and_loaded_it_is_the_same(rule):
    x, model = data(rule), CLASSICAL[rule]()
    strategy = ClassicalEM(model, iterations=7, tol=1e-4, initial="points")
    posterior = strategy.infer(x)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    again = build(describe(model))
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert torch.equal(again.log_joint(x, posterior.theta), model.log_joint(x, posterior.theta))
    repeated = build(describe(strategy), again)
    assert (repeated.iterations, repeated.tol, repeated.initial) == (7, 1e-4, "points")


@pytest.mark.parametrize("isotropic", [False, True])
def test_factors_are_the_same_described_built_loaded_and_in_single_precision(isotropic):
    model = factors(4, isotropic=isotropic)
    strategy = ClassicalEM(model, iterations=50)
    strategy.fit(TABLE[:, None])
    posterior = strategy.infer(TABLE[:, None])
    assert posterior.theta.shape == (80, 1, 2)
    assert posterior.mean.shape == (80, 1, 1, 4)
    assert posterior.elbo_trace.shape == (1, 80)
    again = build(describe(model))
    again.load_state_dict(model.state_dict())
    repeated = build(describe(strategy), again).infer(TABLE[:, None])
    assert torch.equal(repeated.theta, posterior.theta)
    assert torch.equal(repeated.elbo_trace, posterior.elbo_trace)
    alone = strategy.infer(TABLE[3:4, None])
    torch.testing.assert_close(alone.theta, posterior.theta[3:4])
    again.float()
    single = build(describe(strategy), again).infer(TABLE[:, None].float())
    assert single.theta.dtype == torch.float32
    torch.testing.assert_close(single.elbo_trace.double(), posterior.elbo_trace, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_factors_on_a_gpu_agree_with_the_cpu():
    model = factors(4)
    strategy = ClassicalEM(model, iterations=3000, tol=1e-11)
    cpu = strategy.fit(TABLE[:, None]).elbo_trace[-1]
    model.cuda()
    torch.testing.assert_close(strategy.fit(TABLE[:, None].cuda()).elbo_trace[-1].cpu(), cpu, rtol=1e-6, atol=1e-4)


@every_rule
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(rule):
    x, model = data(rule), CLASSICAL[rule]()
    gamma = start(model, x)
    cpu = ClassicalEM(model, iterations=5, tol=0).infer(x, gamma=gamma)
    model.cuda()
    gpu = ClassicalEM(model, iterations=5, tol=0).infer(x.cuda(), gamma=gamma.cuda())
    torch.testing.assert_close(gpu.log_evidence.cpu(), cpu.log_evidence)
    torch.testing.assert_close(gpu.gamma.cpu(), cpu.gamma)
