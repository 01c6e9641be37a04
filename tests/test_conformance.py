"""What every strategy promises, on every kind of model (design: conformance)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BY_SVI, MODELS, ONE_START, PROPER, STRATEGIES, assert_all_moved, images, pair, snapshot
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import Adam

import pnem
from pnem.compilation import compiler_warnings_ignored
from pnem.data import ImageDataset
from pnem.errors import StrategyError
from pnem.inference import ELBO, NEMLoss

# Strategies that are to converge take a few steps only.
pytestmark = pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")
every_strategy = pytest.mark.parametrize("strategy_name", STRATEGIES)
every_model = pytest.mark.parametrize("model_name", MODELS)


def start(strategy_name: str, count: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Initial γ for `infer` on that many images, where the strategy starts from some."""
    return {} if strategy_name in ONE_START else {"gamma": torch.rand(count, 3, 12, dtype=dtype).softmax(1)}


def restarts(strategy_name: str) -> int:
    return 1 if strategy_name in ONE_START else 2


def splits(count: int, shape=(3, 4, 1)) -> dict[str, ImageDataset]:
    features = images(count, shape).float().reshape(1, count, *shape)
    groups = torch.randint(0, 3, (1, count, *shape[:2], 1))
    return {name: ImageDataset(features.numpy(), groups.numpy()) for name in ("training", "validation", "test")}


def log_weight(model, state, x):
    """log p(x, θ) − log q(θ) of the image at a fresh draw from the state's q, z summed out: (B,)."""
    theta = state.q.rsample()
    log_q = 0.0 if isinstance(state.q, dist.Delta) else state.q.log_prob(theta)
    return model.log_evidence(x, theta) + model.log_prior(theta) - log_q


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_last_step_elbo_equals_stock_pyro(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(4)
    torch.manual_seed(1)
    states = strategy.unroll(x)
    ours = log_weight(model, states[-1], x).sum()
    torch.manual_seed(1)
    stock = TraceEnum_ELBO(max_plate_nesting=2).differentiable_loss(model, strategy, x)
    torch.testing.assert_close(-ours, stock)
    losses = ELBO("last")(strategy, states, x)
    torch.testing.assert_close(losses.loss, -losses.elbo.mean())
    if strategy_name not in PROPER:
        torch.testing.assert_close(losses.loss * 4, stock)


@every_strategy
@pytest.mark.usefixtures("float64")
def test_the_guide_draws_from_the_last_q_of_an_unroll(strategy_name):
    strategy = pair("owned Bernoulli", strategy_name)[1]
    x = images(4)
    torch.manual_seed(3)
    unrolled = strategy.guide_at(strategy.unroll(x)[-1])()
    torch.manual_seed(3)
    torch.testing.assert_close(strategy(x), unrolled, rtol=0, atol=0)


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_elbo_of_every_iteration_equals_stock_pyro_at_its_guide(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(4)
    for state in strategy.unroll(x):
        torch.manual_seed(3)
        stock = -TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.guide_at(state), x)
        torch.manual_seed(3)
        assert log_weight(model, state, x).sum().item() == pytest.approx(stock, rel=1e-10)
        if strategy_name not in PROPER:
            assert strategy.elbo(state).sum().item() == pytest.approx(stock, rel=1e-10)


@every_model
@pytest.mark.parametrize("strategy_name", sorted(PROPER))
@pytest.mark.usefixtures("float64")
def test_elbo_is_the_mean_of_the_log_weights(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(2)
    with torch.no_grad():
        state = strategy.unroll(x)[-1]
        elbos = torch.stack([strategy.elbo(strategy.evaluate(state, state.q.sample(), x)) for _ in range(4000)])
        weights = torch.stack([log_weight(model, state, x) for _ in range(4000)])
    error = ((elbos.var(0) + weights.var(0)) / 4000).sqrt()
    assert bool(((elbos.mean(0) - weights.mean(0)).abs() < 4 * error).all())


@every_model
@every_strategy
def test_every_parameter_gets_a_gradient(model_name, strategy_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(4)
    ELBO("all")(strategy, strategy.unroll(x), x).loss.backward()
    for name, parameter in [*model.named_parameters(), *strategy.named_parameters()]:
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


@every_strategy
def test_svi_trains_every_parameter(strategy_name):
    model, strategy = pair("owned Normal", strategy_name)
    before = snapshot(model, strategy)
    svi = SVI(model, strategy, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=2))
    for _ in range(2):
        svi.step(images(4))
    assert_all_moved(before, model, strategy)


@every_strategy
def test_pyros_elbo_module_trains_every_parameter_with_torch_optim(strategy_name):
    model, strategy = pair("owned Normal", strategy_name)
    before = snapshot(model, strategy)
    with pyro.settings.context(module_local_params=True):
        loss = TraceEnum_ELBO(max_plate_nesting=2)(model, strategy)
        # The strategy holds the model without owning it, so that no parameter comes twice.
        optimizer = torch.optim.Adam([*model.parameters(), *strategy.parameters()], lr=0.01)
        assert len({id(p) for p in loss.parameters()}) == len(list(loss.parameters())) == len(before)
        for _ in range(2):
            optimizer.zero_grad()
            loss(images(4)).backward()
            optimizer.step()
    assert_all_moved(before, model, strategy)


@every_strategy
@pytest.mark.parametrize("model_name", ["owned Bernoulli", "owned Normal"])
def test_fit_trains_every_parameter_and_the_run_round_trips(model_name, strategy_name, tmp_path):
    model, strategy = pair(model_name, strategy_name)
    before = snapshot(model, strategy)
    run = pnem.fit(
        model, strategy, splits(24), epochs=2, batch_size=8, device="cpu", progress=False, out=tmp_path / "run"
    )
    assert_all_moved(before, model, strategy)
    again = pnem.load(tmp_path / "run")
    x = images(5)
    torch.manual_seed(2)
    first = run.infer(x, restarts=restarts(strategy_name))
    torch.manual_seed(2)
    second = again.infer(x, restarts=restarts(strategy_name))
    for a, b in zip(first[:6], second[:6], strict=True):
        assert torch.equal(a, b)
    held_out = splits(6)
    assert again.evaluate(held_out) == pytest.approx(run.evaluate(held_out), abs=0, nan_ok=True)
    assert again.history.to_dict("list").keys() == run.history.to_dict("list").keys()


@every_strategy
@pytest.mark.parametrize(
    ("B", "K", "shape"), [(1, 3, (3, 4, 1)), (2, 1, (3, 4, 1)), (2, 3, (1, 1, 1)), (2, 2, (2, 3, 3)), (1, 1, (1, 1, 1))]
)
def test_shapes_hold_at_the_edges(strategy_name, B, K, shape):
    for model_name in MODELS:
        model, strategy = pair(model_name, strategy_name, shape, K)
        x, D = images(B, shape), shape[0] * shape[1]
        posterior = strategy.infer(x, restarts=restarts(strategy_name))
        T = strategy.iterations
        assert posterior.theta.shape == (B, K, 5)
        assert posterior.psi.shape == posterior.mean.shape == (B, K, D, shape[2])
        assert posterior.gamma.shape == (B, K, D)
        assert posterior.log_evidence.shape == (B,)
        assert posterior.labels.shape == (B, D)
        assert posterior.reconstruction.shape == x.shape
        assert posterior.elbo_trace.shape == (T, B)
        assert posterior.trace.theta.shape == (T, B, K, 5)
        torch.testing.assert_close(posterior.gamma.sum(1), torch.ones(B, D))
        assert bool(posterior.log_evidence.isfinite().all())
        stock = TraceEnum_ELBO(max_plate_nesting=2).loss(model, strategy.eval(), x)
        assert stock == stock
        pyro.clear_param_store()


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_permuting_the_initial_components_permutes_the_result(model_name, strategy_name, draw):
    """And their draws, where θ is drawn."""
    if model_name in ("plain Bernoulli", "owned Normal"):
        pytest.skip("learned mixing weights tell components apart")
    if strategy_name in ONE_START:
        pytest.skip("there are no initial components to permute")
    _, strategy = pair(model_name, strategy_name)
    x, gamma = images(3), torch.rand(3, 3, 12).softmax(1)
    order = [2, 0, 1]
    draw()
    straight = strategy.infer(x, gamma=gamma)
    draw(lambda noise: noise[:, order])
    permuted = strategy.infer(x, gamma=gamma[:, order])
    torch.testing.assert_close(permuted.theta, straight.theta[:, order])
    torch.testing.assert_close(permuted.gamma, straight.gamma[:, order])
    torch.testing.assert_close(permuted.log_evidence, straight.log_evidence)


@every_strategy
def test_images_of_a_batch_do_not_touch_each_other(strategy_name, draw):
    if strategy_name in BY_SVI:
        pytest.skip("in a batch of another size it draws other numbers; see test_pyro_guide.py")
    _, strategy = pair("owned Bernoulli", strategy_name)
    x, given = images(3), start(strategy_name, 3)
    draw()
    together = strategy.infer(x, **given)
    draw(lambda noise: noise[1:2])
    alone = strategy.infer(x[1:2], **{name: value[1:2] for name, value in given.items()})
    torch.testing.assert_close(together.gamma[1:2], alone.gamma)


@every_model
@every_strategy
def test_single_precision_agrees_with_double(model_name, strategy_name, draw):
    if strategy_name in BY_SVI:
        pytest.skip("in another precision, or on another device, it draws other numbers")
    model, strategy = pair(model_name, strategy_name)
    x, given = images(3), start(strategy_name, 3)
    draw()
    single = strategy.infer(x, **given)
    model.double(), strategy.double()
    draw()
    double = strategy.infer(x.double(), **{name: value.double() for name, value in given.items()})
    assert double.gamma.dtype == torch.float64
    torch.testing.assert_close(single.log_evidence.double(), double.log_evidence, rtol=1e-4, atol=1e-4)


@every_strategy
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(strategy_name, draw):
    if strategy_name in BY_SVI:
        pytest.skip("in another precision, or on another device, it draws other numbers")
    model, strategy = pair("owned Bernoulli", strategy_name)
    x, given = images(3).double(), start(strategy_name, 3, torch.float64)
    model.double(), strategy.double()
    draw()
    cpu = strategy.infer(x, **given)
    model.cuda(), strategy.cuda()
    draw()
    gpu = strategy.infer(x.cuda(), **{name: value.cuda() for name, value in given.items()})
    torch.testing.assert_close(gpu.gamma.cpu(), cpu.gamma)
    torch.testing.assert_close(gpu.log_evidence.cpu(), cpu.log_evidence)


@every_strategy
@pytest.mark.slow
def test_compiled_losses_and_gradients_equal_eager(strategy_name):
    """Traced whole and differentiated ahead of time; the code generator behind it is torch's own to test."""
    if strategy_name in BY_SVI:
        pytest.skip("Pyro's SVI cannot be traced")
    # A function may be compiled only so many times in a process.
    torch.compiler.reset()
    model, strategy = pair("owned Bernoulli", strategy_name)
    model.double(), strategy.double()
    objective = ELBO("ramp") if strategy_name in PROPER else NEMLoss("ramp")
    x = images(4).double()
    gradients = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        model.zero_grad(), strategy.zero_grad()

        def loss(state, x_in, x):
            return objective(strategy, strategy.iterate(state, x_in, x), x).loss

        torch.manual_seed(4)
        with compiler_warnings_ignored():
            value = wrap(loss)(*strategy.start(x), x)
        value.backward()
        gradients.append([value, *(p.grad.clone() for m in (model, strategy) for p in m.parameters())])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-10)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_images_in_another_precision_are_refused_with_what_to_do(strategy_name, dtype):
    _, strategy = pair("owned Bernoulli", strategy_name)
    with pytest.raises(StrategyError, match=r"computes in torch.float32: give x.to\(torch.float32\)"):
        strategy.infer(images(2).to(dtype))
