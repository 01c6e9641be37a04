"""What every strategy that filters promises on sequences (design: conformance)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import MODELS, PROPER, SEQUENTIAL, assert_all_moved, images, sequences, snapshot
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.optim import Adam

import pnem
from pnem.compilation import compiler_warnings_ignored
from pnem.data import ImageDataset
from pnem.inference import ELBO, NEMLoss, State

every_strategy = pytest.mark.parametrize("strategy_name", SEQUENTIAL)
every_model = pytest.mark.parametrize("model_name", MODELS)
every_task = pytest.mark.parametrize("task", ["denoising", "prediction"])
T = 4


def pair(model_name, strategy_name, task, *shape_and_k):
    model = MODELS[model_name](*shape_and_k, proper=strategy_name in PROPER)
    return model, SEQUENTIAL[strategy_name](model, iterations=T, task=task)


def given(task):
    """The frames that are not scored."""
    return int(task == "prediction")


def frames(task):
    """As many as training takes."""
    return T + given(task)


def all_parameters(*modules):
    return [(name, parameter) for module in modules for name, parameter in module.named_parameters()]


@every_task
@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_elbo_over_all_frames_equals_stock_pyro(model_name, strategy_name, task):
    model, strategy = pair(model_name, strategy_name, task)
    x = sequences(frames(task), 3)
    torch.manual_seed(1)
    states = strategy.unroll(x)
    guide = State.combine(torch.stack, states)
    theta = guide.q.rsample()
    log_q = 0.0 if isinstance(guide.q, dist.Delta) else guide.q.log_prob(theta)
    targets = x[given(task) :]
    evidence = torch.stack([model.log_evidence(frame, th) for frame, th in zip(targets, theta, strict=True)])
    ours = (evidence + model.log_prior(theta) - log_q).sum()
    torch.manual_seed(1)
    stock = TraceEnum_ELBO(max_plate_nesting=3).differentiable_loss(model, strategy, x, given=given(task))
    torch.testing.assert_close(-ours, stock)
    if strategy_name not in PROPER:
        losses = ELBO("all")(strategy, states, x)
        torch.testing.assert_close(losses.loss * 3 * T, stock)
        torch.testing.assert_close(losses.loss, -losses.elbo.mean())


@every_model
@every_strategy
@pytest.mark.usefixtures("float64")
def test_denoising_a_sequence_that_stands_still_is_inference_on_an_image(model_name, strategy_name, draw):
    _, strategy = pair(model_name, strategy_name, "denoising")
    image, gamma = images(3), torch.rand(3, 3, 12).softmax(1)
    draw()
    along = strategy.infer(image.expand(T, -1, -1, -1), gamma=gamma)
    strategy.task = "static"
    draw()
    still = strategy.infer(image, gamma=gamma)
    torch.testing.assert_close(along.theta, still.trace.theta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(along.log_evidence, still.trace.log_evidence, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(along.elbo_trace, still.elbo_trace, rtol=1e-10, atol=1e-10)


@every_task
@every_strategy
def test_every_parameter_gets_a_gradient(strategy_name, task):
    for model_name in MODELS:
        model, strategy = pair(model_name, strategy_name, task)
        x = sequences(frames(task), 4)
        ELBO("all")(strategy, strategy.unroll(x), x).loss.backward()
        for name, parameter in all_parameters(model, strategy):
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool((parameter.grad != 0).any()), name


@every_task
@every_strategy
def test_svi_and_pyros_elbo_module_train_every_parameter(strategy_name, task):
    model, strategy = pair("owned Normal", strategy_name, task)
    before = snapshot(model, strategy)
    svi = SVI(model, strategy, Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=3))
    for _ in range(2):
        svi.step(sequences(frames(task), 4), given=given(task))
    assert_all_moved(before, model, strategy)
    pyro.clear_param_store()

    before = snapshot(model, strategy)
    with pyro.settings.context(module_local_params=True):
        loss = TraceEnum_ELBO(max_plate_nesting=3)(model, strategy)
        optimizer = torch.optim.Adam([*model.parameters(), *strategy.parameters()], lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss(sequences(frames(task), 4), given=given(task)).backward()
            optimizer.step()
    assert_all_moved(before, model, strategy)


@every_task
@every_strategy
def test_fit_trains_every_parameter_and_the_run_round_trips(strategy_name, task, tmp_path):
    model, strategy = pair("owned Bernoulli", strategy_name, task)
    before = snapshot(model, strategy)
    features = sequences(frames(task), 24).float().unflatten(2, (3, 4))
    groups = torch.randint(0, 3, features.shape)
    data = {name: ImageDataset(features, groups) for name in ("training", "validation")}
    run = pnem.fit(model, strategy, data, epochs=2, batch_size=8, device="cpu", progress=False, out=tmp_path / "run")
    assert_all_moved(before, model, strategy)
    assert bool(run.history["valid_ari"].notna().all())
    again = pnem.load(tmp_path / "run")
    assert again.strategy.task == task
    x = sequences(frames(task) + 2, 5)
    torch.manual_seed(2)
    first = run.infer(x, restarts=2)
    torch.manual_seed(2)
    second = again.infer(x, restarts=2)
    for a, b in zip(first[:7], second[:7], strict=True):
        assert torch.equal(a, b)


@every_task
@every_strategy
@pytest.mark.parametrize(
    ("B", "K", "shape"), [(1, 3, (3, 4, 1)), (2, 1, (3, 4, 1)), (2, 3, (1, 1, 1)), (2, 2, (2, 3, 3)), (1, 1, (1, 1, 1))]
)
def test_shapes_hold_at_the_edges(strategy_name, task, B, K, shape):
    for model_name in MODELS:
        model, strategy = pair(model_name, strategy_name, task, shape, K)
        x, D, S = sequences(6, B, shape), shape[0] * shape[1], 6 - given(task)
        posterior = strategy.infer(x, restarts=2)
        assert posterior.theta.shape == (S, B, K, 5)
        assert posterior.psi.shape == posterior.mean.shape == (S, B, K, D, shape[2])
        assert posterior.gamma.shape == (S, B, K, D)
        assert posterior.log_evidence.shape == posterior.elbo_trace.shape == (S, B)
        assert posterior.labels.shape == (S, B, D)
        assert posterior.reconstruction.shape == (S, B, D, shape[2])
        assert posterior.trace is None
        assert posterior.state.theta.shape == (B, K, 5)
        assert model.prediction(posterior.psi, posterior.log_mixing).shape == (S, B, D, shape[2])
        torch.testing.assert_close(posterior.gamma.sum(-2), torch.ones(S, B, D))
        assert bool(posterior.log_evidence.isfinite().all())


@every_task
@every_strategy
@pytest.mark.usefixtures("float64")
def test_a_state_carries_on_where_a_call_ended(strategy_name, task, draw):
    _, strategy = pair("owned Bernoulli", strategy_name, task)
    x, gamma = sequences(7, 3), torch.rand(3, 3, 12).softmax(1)
    # What is reported at the mean of q(θ) draws nothing, so that both go through the same draws.
    draw()
    whole = strategy.infer(x, gamma=gamma)
    draw()
    first = strategy.infer(x[:4], gamma=gamma)
    rest = strategy.infer(x[4 - given(task) :], state=first.state)
    assert torch.equal(torch.cat([first.theta, rest.theta]), whole.theta)
    assert torch.equal(torch.cat([first.gamma, rest.gamma]), whole.gamma)
    assert torch.equal(rest.state.theta, whole.state.theta)


@every_task
@every_strategy
@pytest.mark.usefixtures("float64")
def test_permuting_the_initial_components_permutes_the_result(strategy_name, task, draw):
    _, strategy = pair("owned Bernoulli", strategy_name, task)
    x, gamma, order = sequences(5, 3), torch.rand(3, 3, 12).softmax(1), [2, 0, 1]
    draw()
    straight = strategy.infer(x, gamma=gamma)
    draw(lambda noise: noise[:, order])
    permuted = strategy.infer(x, gamma=gamma[:, order])
    torch.testing.assert_close(permuted.theta, straight.theta[:, :, order])
    torch.testing.assert_close(permuted.gamma, straight.gamma[:, :, order])
    torch.testing.assert_close(permuted.log_evidence, straight.log_evidence)


@every_strategy
@pytest.mark.usefixtures("float64")
def test_sequences_of_a_batch_do_not_touch_each_other_and_no_frame_sees_a_later_one(strategy_name, draw):
    _, strategy = pair("owned Bernoulli", strategy_name, "prediction")
    x, gamma = sequences(5, 3), torch.rand(3, 3, 12).softmax(1)
    draw()
    together = strategy.infer(x, gamma=gamma)
    draw(lambda noise: noise[1:2])
    alone = strategy.infer(x[:, 1:2], gamma=gamma[1:2])
    torch.testing.assert_close(together.gamma[:, 1:2], alone.gamma)
    changed = x.clone()
    changed[3] = 1 - changed[3]
    draw()
    other = strategy.infer(changed, gamma=gamma)
    # Step 2 predicts frame 3 from those before it; its γ compares with frame 3, and step 3 has seen it.
    assert torch.equal(other.psi[:3], together.psi[:3])
    assert not torch.equal(other.gamma[2], together.gamma[2])
    assert not torch.equal(other.psi[3], together.psi[3])


@every_task
@every_model
@every_strategy
def test_single_precision_agrees_with_double(model_name, strategy_name, task, draw):
    model, strategy = pair(model_name, strategy_name, task)
    x, gamma = sequences(5, 3), torch.rand(3, 3, 12).softmax(1)
    draw()
    single = strategy.infer(x, gamma=gamma)
    model.double(), strategy.double()
    draw()
    double = strategy.infer(x.double(), gamma=gamma.double())
    assert double.gamma.dtype == torch.float64
    torch.testing.assert_close(single.log_evidence.double(), double.log_evidence, rtol=1e-4, atol=1e-4)


@every_task
@every_strategy
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(strategy_name, task, draw):
    model, strategy = pair("owned Bernoulli", strategy_name, task)
    model.double(), strategy.double()
    x, gamma = sequences(5, 3).double(), torch.rand(3, 3, 12).softmax(1).double()
    draw()
    cpu = strategy.infer(x, gamma=gamma)
    model.cuda(), strategy.cuda()
    draw()
    gpu = strategy.infer(x.cuda(), gamma=gamma.cuda())
    torch.testing.assert_close(gpu.gamma.cpu(), cpu.gamma)
    torch.testing.assert_close(gpu.log_evidence.cpu(), cpu.log_evidence)


@every_strategy
@pytest.mark.slow
def test_compiled_losses_and_gradients_equal_eager(strategy_name):
    torch.compiler.reset()
    model, strategy = pair("owned Bernoulli", strategy_name, "prediction")
    model.double(), strategy.double()
    objective = ELBO("all") if strategy_name in PROPER else NEMLoss("all")
    x = sequences(frames("prediction"), 4).double()
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
