"""Sequences: what filtering, rollouts and training over time promise beyond the conformance suite."""

import gc
from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import sequences
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

import pnem
from pnem.data import ImageDataset
from pnem.errors import DataError, ModelError, RunError, StrategyError
from pnem.inference import ELBO, NEM, RNNEM, VAE, BitFlip, IterativeVI, Posterior, SemiAmortised
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.settings import TrainingSettings
from pnem.training_module import TrainingModule


def mixture(K: int = 3, **options) -> SpatialMixture:
    return SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), K, **{"pixel_prior": 0.0} | options)


def predictor(K: int = 3, iterations: int = 4, **options) -> RNNEM:
    return RNNEM(mixture(K), iterations=iterations, **{"task": "prediction"} | options)


def data(frames: int = 5, count: int = 16) -> dict[str, ImageDataset]:
    features = sequences(frames, count).float().unflatten(2, (3, 4))
    groups = torch.randint(0, 3, features.shape)
    return {name: ImageDataset(features, groups) for name in ("training", "validation", "test")}


class TestModel:
    @pytest.mark.usefixtures("float64")
    def test_the_density_of_a_sequence_is_that_of_its_frames(self):
        model, x = mixture(), sequences(3, 2)
        theta = torch.randn(3, 2, 3, 5)

        def guide(x):
            with pyro.plate("time", 3, dim=-3), pyro.plate("images", 2, dim=-2), pyro.plate("components", 3, dim=-1):
                pyro.sample("theta", dist.Delta(theta, event_dim=1))

        stock = -TraceEnum_ELBO(max_plate_nesting=3).loss(model, guide, x)
        expected = sum(model.log_evidence(x[t], theta[t]).sum().item() for t in range(3))
        assert stock == pytest.approx(expected, rel=1e-12)

    def test_mixing_weights_per_image_are_those_of_sequences(self):
        model = mixture(mixing="per_image")
        model.set_log_mixing(torch.randn(2, 3).log_softmax(-1))
        model.check(sequences(3, 2))
        with pytest.raises(ModelError, match="x holds 3 images"):
            model.check(sequences(2, 3))

    @pytest.mark.usefixtures("float64")
    def test_a_prior_on_mixing_weights_counts_once_for_all_frames(self):
        model = mixture(mixing="learned", mixing_concentration=3.0)
        strategy, x = RNNEM(model, iterations=4, task="prediction"), sequences(5, 3)
        torch.manual_seed(1)
        loss = ELBO("all")(strategy, strategy.unroll(x), x).loss
        torch.manual_seed(1)
        stock = TraceEnum_ELBO(max_plate_nesting=3).loss(model, strategy, x, given=1)
        assert loss.item() * 4 * 3 == pytest.approx(stock, rel=1e-12)

    def test_generates_sequences(self):
        model = mixture()
        trace = poutine.trace(model).get_trace(num_images=2, num_frames=4)
        assert trace.nodes["theta"]["value"].shape == (4, 2, 3, 5)
        assert trace.nodes["z"]["value"].shape == (4, 2, 12)
        assert trace.nodes["x"]["value"].shape == (4, 2, 12, 1)

    def test_a_prediction_is_the_mean_of_the_component_that_claims_the_pixel(self):
        psi = torch.tensor([[[-3.0], [2.0]], [[1.0], [0.0]]])
        claimed = mixture(2).prediction(psi)
        torch.testing.assert_close(claimed, torch.tensor([[1.0], [2.0]]).sigmoid())
        shared = mixture(2, pixel_prior=None).prediction(psi, torch.tensor([0.25, 0.75]).log())
        torch.testing.assert_close(shared, 0.25 * psi[0].sigmoid() + 0.75 * psi[1].sigmoid())
        grey = SpatialMixture(decoders.Linear(5, (1, 2, 1)), Normal(1.0), 2, pixel_prior=0.0).prediction(psi)
        torch.testing.assert_close(grey, torch.tensor([[-3.0], [2.0]]))

    @pytest.mark.parametrize(
        ("x", "given", "message"),
        [
            (sequences(2, 1), 2, "leave none to score"),
            (sequences(2, 1)[0], 1, "leave none"),
            (torch.zeros(1, 1, 1, 12, 1), 0, "sequences"),
        ],
    )
    def test_refuses_what_leaves_nothing_to_score(self, x, given, message):
        with pytest.raises(ModelError, match=message):
            mixture()(x, given=given)


class TestFilter:
    def test_is_lazy_and_what_infer_finds(self):
        strategy, x = predictor().eval(), sequences(6, 2)
        taken = []

        def frames() -> Iterator[Tensor]:
            for frame in x:
                taken.append(frame)
                yield frame

        torch.manual_seed(3)
        states = strategy.filter(frames())
        first = next(states)
        assert len(taken) == 2
        rest = list(states)
        torch.manual_seed(3)
        posterior = strategy.infer(x)
        assert torch.equal(torch.stack([first.theta, *(state.theta for state in rest)]), posterior.theta)
        assert not first.theta.requires_grad

    @pytest.mark.parametrize("task", ["prediction", "denoising"])
    def test_memory_does_not_grow_over_500_frames(self, task):
        strategy = predictor(task=task)
        generator = torch.Generator().manual_seed(0)

        def frames() -> Iterator[Tensor]:
            for _ in range(501):
                yield (torch.rand(2, 12, 1, generator=generator) < 0.5).float()

        def held() -> int:
            gc.collect()
            return sum(value.numel() for value in gc.get_objects() if type(value) in (Tensor, torch.nn.Parameter))

        sizes = {t: held() for t, _ in enumerate(strategy.filter(frames())) if t in (5, 250, 499)}
        assert len(sizes) == 3
        # What other tests have left behind may go meanwhile.
        assert sizes[5] >= sizes[250] >= sizes[499], sizes

    def test_refuses_frames_that_do_not_go_together(self):
        strategy = predictor()
        with pytest.raises(StrategyError, match=r"frame 2 has shape \(3, 12, 1\), the first \(2, 12, 1\)"):
            list(strategy.filter([torch.zeros(2, 12, 1), torch.zeros(2, 12, 1), torch.zeros(3, 12, 1)]))
        with pytest.raises(ModelError, match="D=12"):
            list(strategy.filter([torch.zeros(2, 12, 1), torch.zeros(2, 15, 1)]))
        with pytest.raises(StrategyError, match="prediction takes at least 2 frames"):
            list(strategy.filter([torch.zeros(2, 12, 1)]))
        with pytest.raises(StrategyError, match="goes through sequences"):
            list(predictor(task="static").filter([torch.zeros(2, 12, 1)]))


class TestInfer:
    def test_takes_all_frames_or_as_many_as_asked(self):
        strategy, x = predictor(iterations=2), sequences(7, 3)
        assert len(strategy.infer(x).theta) == 6
        assert len(strategy.infer(x, iterations=4).theta) == 4
        assert len(predictor(task="denoising").infer(x).theta) == 7

    @pytest.mark.usefixtures("float64")
    def test_keeps_the_best_of_several_starts_of_each_sequence(self):
        strategy, x = predictor(), sequences(5, 3)
        torch.manual_seed(0)
        gammas = strategy.init(x[0].repeat(4, 1, 1)).gamma.unflatten(0, (4, 3))
        each = torch.stack([strategy.infer(x, gamma=gamma).elbo_trace for gamma in gammas])
        torch.manual_seed(0)
        best = strategy.infer(x, restarts=4)
        torch.testing.assert_close(best.elbo_trace.mean(0), each.mean(1).amax(0))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"x": torch.zeros(2, 12, 1)}, r"takes sequences \(T, B, D, C\), but x has shape \(2, 12, 1\)"),
            ({"x": torch.zeros(1, 2, 12, 1)}, "1 step of prediction take 2 frames, but x has 1"),
            ({"x": torch.zeros(4, 2, 12, 1), "iterations": 4}, "4 steps of prediction take 5 frames, but x has 4"),
            ({"x": torch.zeros(4, 2, 12, 1), "restarts": 0}, "restarts must be at least 1"),
            ({"x": [torch.zeros(2, 12, 1)] * 3}, "stack its frames"),
            ({"x": torch.zeros(4, 2, 12, 1).double()}, "computes in torch.float32"),
            ({"x": torch.zeros(4, 2, 12, 1), "gamma": torch.ones(2, 2, 12)}, "gamma has shape"),
        ],
    )
    def test_refuses_what_is_no_sequence_of_enough_frames(self, arguments, message):
        with pytest.raises(StrategyError, match=message):
            predictor().infer(**arguments)

    def test_images_and_sequences_are_not_mixed_up(self):
        with pytest.raises(StrategyError, match='task="prediction"'):
            predictor(task="static").infer(sequences(3, 2))
        with pytest.raises(StrategyError, match="for sequences"):
            predictor(task="static").infer(sequences(3, 2)[0], state=predictor().init(sequences(3, 2)[0]))
        with pytest.raises(StrategyError, match="one of static, denoising, prediction"):
            predictor(task="foretell")
        with pytest.raises(StrategyError, match="given=1"):
            predictor()(sequences(5, 2))
        with pytest.raises(StrategyError, match="give as many"):
            predictor()(sequences(6, 2), given=1)
        with pytest.raises(StrategyError, match="takes sequences"):
            SemiAmortised(predictor())

    def test_one_place_to_start_from(self):
        strategy, x = predictor(), sequences(4, 2)
        state = strategy.infer(x).state
        with pytest.raises(StrategyError, match="give one of them"):
            strategy.infer(x, state=state, gamma=torch.ones(2, 3, 12))
        with pytest.raises(StrategyError, match="given start"):
            strategy.infer(x, state=state, restarts=2)

    def test_a_state_of_other_sequences_is_refused(self):
        strategy, x = predictor(), sequences(4, 2)
        state = strategy.infer(x).state
        for other in (strategy.infer(x[:, :1]).state, predictor(5).infer(x).state, strategy.infer(x)):
            with pytest.raises(StrategyError, match="give the last state of the same sequences"):
                strategy.infer(x, state=other)
            with pytest.raises(StrategyError, match="give the last state of the same sequences"):
                strategy.rollout(other, x[-1], 2)
        with pytest.raises(StrategyError, match=r"computes in torch\.float32"):
            strategy.rollout(state, x[-1].double(), 2)
        with pytest.raises(StrategyError, match=r"images are \(B, D, C\)"):
            strategy.rollout(state, x, 2)

    def test_a_state_of_another_strategy_is_refused(self):
        model, x = mixture(prior="standard_normal"), sequences(4, 2)
        strategy = IterativeVI(model, hidden=5, task="prediction")
        others = {"no": RNNEM(model, task="prediction"), "6": IterativeVI(model, hidden=6, task="prediction")}
        for held, other in others.items():
            with pytest.raises(StrategyError, match=f"has {held} features of memory, but this strategy has 5"):
                strategy.infer(x, state=other.infer(x).state)

    @pytest.mark.parametrize("strategy_class", [RNNEM, IterativeVI])
    def test_posteriors_of_several_batches_go_together(self, strategy_class):
        strategy = strategy_class(mixture(prior="standard_normal"), iterations=4, task="prediction")
        x = sequences(5, 3)
        parts = [strategy.infer(x[:, :2]), strategy.infer(x[:, 2:])]
        whole = Posterior.concatenate(parts)
        for name in ("theta", "psi", "mean", "gamma", "log_evidence", "log_mixing", "elbo_trace"):
            assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], 1)), name
        assert torch.equal(whole.q.mean, whole.theta)
        assert torch.equal(whole.state.theta, torch.cat([part.state.theta for part in parts]))
        assert strategy.infer(x, state=whole.state).theta.shape == (4, 3, 3, 5)
        with pytest.raises(StrategyError, match=r"\(4, 2\), \(3, 1\)"):
            Posterior.concatenate([parts[0], strategy.infer(x[1:, 2:])])


class TestRollout:
    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("strategy_class", [RNNEM, NEM])
    @pytest.mark.parametrize(
        ("grey", "feedback", "binary"),
        [(0.0, None, True), (0.0, "mean", False), (0.1, None, False), (0.1, "mode", True)],
    )
    def test_feeds_its_predictions_back(self, strategy_class, grey, feedback, binary):
        strategy = strategy_class(mixture(), iterations=4, task="prediction")
        x = (sequences(5, 2) - grey).abs()
        state = strategy.infer(x).state
        rolled = strategy.rollout(state, x[-1], 3, feedback=feedback)
        assert rolled.theta.shape == (3, 2, 3, 5)
        frame = x[-1]
        for t in range(3):
            with torch.no_grad():
                theta = strategy.m_step(state, frame)
                prediction = strategy.model.decode(theta).sigmoid().amax(1)
                frame = (prediction > 0.5).double() if binary else prediction
                state = strategy.evaluate(state, theta, frame)
            torch.testing.assert_close(rolled.theta[t], theta)
            torch.testing.assert_close(rolled.gamma[t], state.gamma)
            torch.testing.assert_close(strategy.model.prediction(rolled.psi)[t], prediction)

    def test_of_normal_pixels_the_mode_is_the_mean(self):
        model = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Normal(0.3), 3)
        strategy, x = RNNEM(model, task="prediction", iterations=4), sequences(5, 2)
        state = strategy.infer(x).state
        mean, mode = (strategy.rollout(state, x[-1], 3, feedback=feedback) for feedback in ("mean", "mode"))
        assert torch.equal(mean.theta, mode.theta)

    def test_goes_on_from_a_rollout(self):
        strategy, x = predictor(), sequences(5, 2)
        state = strategy.infer(x).state
        whole = strategy.rollout(state, x[-1], 5)
        first = strategy.rollout(state, x[-1], 2)
        last = first.map(lambda value: value[-1])
        rest = strategy.rollout(last, strategy.model.prediction(last.psi).round(), 3)
        torch.testing.assert_close(torch.cat([first.theta, rest.theta]), whole.theta)

    def test_a_run_rolls_out_its_posterior(self):
        run = pnem.fit(*_pair(), data(), epochs=1, batch_size=8, device="cpu", progress=False)
        x = data()["test"][:3].x
        posterior = run.infer(x)
        rolled = run.rollout(posterior, x, 2)
        assert torch.equal(rolled.theta, run.strategy.rollout(posterior.state, x[-1], 2).theta)
        with pytest.raises(StrategyError, match="no state to go on from"):
            run.rollout(posterior._replace(state=None), x, 2)
        short = run.infer(x, iterations=2)
        with pytest.raises(StrategyError, match=r"x has 5 frames, but this posterior's steps end at frame 3,.*x\[:3\]"):
            run.rollout(short, x, 2)
        rolled = run.rollout(short, x[:3], 2)
        assert torch.equal(rolled.theta, run.rollout(short, x[2:3], 2).theta)
        with pytest.raises(StrategyError, match=r"a rollout takes sequences \(T, B, D, C\): .* as x\[-1:\]"):
            run.rollout(posterior, x[-1], 2)

    def test_refuses_more_than_fits_the_memory_and_other_tasks(self):
        strategy, x = predictor(), sequences(5, 2)
        state = strategy.infer(x).state
        with pytest.raises(StrategyError, match=r"a rollout of 1000 frames of 2 .* ask for at most [0-9]+ frames"):
            strategy.rollout(state, x[-1], 1000, memory_limit=100_000)
        with pytest.raises(StrategyError, match=r"may take 9\.54e-05 MiB: ask for fewer seq"):
            strategy.rollout(state, x[-1], 2, memory_limit=100)
        with pytest.raises(StrategyError, match="frames must be at least 1"):
            strategy.rollout(state, x[-1], 0)
        with pytest.raises(StrategyError, match='feedback must be "mean", "mode" or None, but is \'grey\''):
            strategy.rollout(state, x[-1], 2, feedback="grey")
        denoiser = predictor(task="denoising")
        with pytest.raises(StrategyError, match='task is "denoising"'):
            denoiser.rollout(denoiser.infer(x).state, x[-1], 2)


def _pair(K: int = 3, **options):
    strategy = predictor(K, **options)
    return strategy.model, strategy


class TestTraining:
    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("truncation", [1, 2, 3, 4, 9])
    def test_truncated_gradients_flow_over_so_many_frames(self, truncation):
        model, strategy = _pair(noise=BitFlip(0.1))
        x, objective = sequences(5, 3), ELBO("ramp")
        module = TrainingModule(model, strategy, objective, TrainingSettings(truncation=truncation), 1)

        def gradients():
            return [parameter.grad.clone() for part in (model, strategy) for parameter in part.parameters()]

        torch.manual_seed(7)
        outcome = module.unroll.in_pieces(x)
        outcome.loss.backward()
        ours = gradients()
        model.zero_grad(), strategy.zero_grad()
        torch.manual_seed(7)
        state, x_in = strategy.start(x)
        states = []
        for t in range(4):
            state = state.map(Tensor.detach) if t and t % truncation == 0 else state
            state = strategy.step(state, x_in[t], x[t + 1])
            states.append(state)
        losses = objective(strategy, states, x)
        losses.loss.backward()
        torch.testing.assert_close(outcome.loss, losses.loss)
        torch.testing.assert_close(outcome.elbo, losses.elbo.mean())
        for a, b in zip(ours, gradients(), strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.usefixtures("float64")
    def test_truncated_gradients_where_the_last_frames_have_no_weight(self):
        model, strategy = _pair()
        x, gradients = sequences(5, 3), []
        for truncation, weights in ((2, (1.0, 1.0, 0.0, 0.0)), (None, (1.0, 1.0, 0.0, 0.0))):
            module = TrainingModule(model, strategy, ELBO(weights), TrainingSettings(truncation=truncation), 1)
            module.zero_grad()
            torch.manual_seed(7)
            module.unroll.in_pieces(x).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
        torch.testing.assert_close(*gradients)

    def test_fit_truncated_over_all_frames_is_fit_and_over_fewer_is_not(self):
        found = {}
        for truncation in (None, 4, 2):
            torch.manual_seed(0)
            pair, splits = _pair(), data()
            run = pnem.fit(*pair, splits, epochs=2, batch_size=8, device="cpu", progress=False, truncation=truncation)
            found[truncation] = torch.cat([p.detach().flatten() for p in run.strategy.parameters()])
        torch.testing.assert_close(found[4], found[None])
        assert not torch.allclose(found[2], found[None], atol=1e-6)

    def test_the_progress_bar_counts_nats_per_frame(self, capsys):
        pnem.fit(*_pair(), data(), epochs=1, batch_size=8, device="cpu", progress=True)
        shown = capsys.readouterr()
        assert "nats/frame" in shown.out + shown.err
        assert "nats/image" not in shown.out + shown.err

    def test_the_autoencoder_is_one_component(self):
        strategy, x = predictor(1), sequences(5, 2)
        posterior = strategy.infer(x)
        assert torch.equal(posterior.gamma, torch.ones(4, 2, 1, 12))
        torch.testing.assert_close(posterior.reconstruction, strategy.model.prediction(posterior.psi))

    def test_stages_start_from_the_weights_of_the_last_one(self, tmp_path):
        options = {"epochs": 1, "batch_size": 8, "device": "cpu", "progress": False}
        first = pnem.fit(*_pair(), data(), **options, out=tmp_path / "first")
        for start in (first, tmp_path / "first"):
            model, strategy = _pair(4)
            second = pnem.fit(model, strategy, data(), **options, learning_rate=1e-12, start_from=start)
            for old, new in zip(first.strategy.parameters(), second.strategy.parameters(), strict=True):
                torch.testing.assert_close(old, new)
            assert second.settings.training["start_from"] == str(tmp_path / "first")
        with pytest.raises(RunError, match=r"do not belong to this run's strategy: [^\n]*norm[^\n]*$"):
            pnem.fit(*_pair(layer_norm=True), data(), **options, start_from=first)
        with pytest.raises(RunError, match="there is no run directory"):
            pnem.fit(*_pair(), data(), **options, start_from=tmp_path / "none")
        model = _pair()[0]
        with pytest.raises(RunError, match="first was trained with RNNEM, not NEM: start from a run of the same"):
            pnem.fit(model, NEM(model, task="prediction", iterations=3), data(), **options, start_from=first)

    def test_another_number_of_components_has_the_same_weights(self):
        run = pnem.fit(*_pair(), data(), epochs=1, batch_size=8, device="cpu", progress=False)
        five, three = run.with_components(5), run.with_components(3)
        x = sequences(5, 2)
        assert five.infer(x).theta.shape == (4, 2, 5, 5)
        torch.manual_seed(1)
        expected = run.infer(x).gamma
        torch.manual_seed(1)
        assert torch.equal(three.infer(x).gamma, expected)
        assert run.model.num_components == 3
        with pytest.raises(ModelError, match="num_components must be at least 1"):
            run.with_components(0)
        model = mixture(mixing="learned")
        learned = pnem.fit(
            model, RNNEM(model, iterations=4, task="prediction"), data(), epochs=1, batch_size=8, progress=False
        )
        with pytest.raises(RunError, match="only models with uniform ones"):
            learned.with_components(5)

    def test_data_that_do_not_suit_the_task_are_refused(self):
        options = {"epochs": 1, "batch_size": 8, "device": "cpu", "progress": False}
        with pytest.raises(DataError, match="holds static images"):
            pnem.fit(*_pair(), data(1), **options)
        with pytest.raises(DataError, match="holds sequences of 5 frames, but this RNNEM takes static images"):
            pnem.fit(*_pair(task="static"), data(5), **options)
        with pytest.raises(DataError, match="sequences of 4 frames, but 4 steps of prediction take 5"):
            pnem.fit(*_pair(), data(4), **options)
        run = pnem.fit(*_pair(), data(), **options)
        with pytest.raises(DataError, match="holds static images"):
            run.evaluate(data(1))
        with pytest.raises(DataError, match=r"9 steps of prediction .* take sequences of 10 frames, but these have 5"):
            run.evaluate(data(5), iterations=9)

    def test_what_is_for_images_refuses_sequences(self):
        from pnem.diagnostics import collapse, compare, diagnose, elbo_terms, to_arviz

        run = pnem.fit(*_pair(), data(), epochs=1, batch_size=8, device="cpu", progress=False)
        x = sequences(5, 2)
        for call in (
            lambda: diagnose(run, data()),
            lambda: collapse(run, data()),
            lambda: compare({"a": run, "b": run}, data()),
            lambda: elbo_terms(run.model, run.strategy, x),
            lambda: to_arviz(run, x),
            lambda: run.using("gradient-em"),
        ):
            with pytest.raises(StrategyError, match="takes sequences"):
                call()
        model = SpatialMixture(decoders.MLP(2, (3, 4, 1)), Bernoulli(), 1, prior="standard_normal")
        static = pnem.fit(model, VAE(model), data(1), epochs=1, batch_size=8, device="cpu", progress=False)
        with pytest.raises(StrategyError, match="on sequences, but this VAE infers images"):
            static.rollout(static.infer(x[0]), x[0], 2)
        with pytest.raises(StrategyError, match="on sequences"):
            static.infer(x[0], state=run.infer(x).state)
