"""The benchmark: what it counts, compares and writes is right; how long things take is not tested."""

import json
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from pnem import bench
from pnem.bench import mixtures
from pnem.bench.cases import CASES, HAND_WRITTEN, Size, build, hand_written, images
from pnem.bench.clock import Spread, alternately
from pnem.bench.growth import bends
from pnem.bench.memory import peak_memory
from pnem.bench.overheads import pyro_step
from pnem.bench.peaks import Peaks, measure_peaks
from pnem.bench.steps import VARIANTS, time_case, training_step
from pnem.bench.work import Work, count_work
from pnem.cli import app
from pnem.errors import DeviceError, RunError
from pnem.inference import ELBO

CPU = torch.device("cpu")
TINY = Size(height=4, width=5, K=3, T=3, batch=2)
PEAKS = Peaks({"float32": 1e9, "bfloat16": 2e9}, 1e9)


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result


def double(name, size=TINY):
    parts = build(name, size, CPU, seed=0)
    for module in parts[:2]:
        module.double()
    return parts, images(parts, size, CPU).double()


@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_the_hand_written_networks_have_pnems_loss_and_gradients(name):
    (model, strategy, objective), x = double(name)
    reference = hand_written((model, strategy, objective))
    strategy.train()
    for seed in range(2):
        torch.manual_seed(seed)
        ours = objective(strategy, strategy.unroll(x), x).loss
        torch.manual_seed(seed)
        theirs = reference.loss(x.squeeze(-1))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    layer = model.decoder.linear.weight
    torch.testing.assert_close(layer.grad, reference.decoder.weight.grad, rtol=1e-10, atol=1e-12)
    count = sum(p.numel() for part in (model, strategy) for p in part.parameters())
    assert sum(p.numel() for p in reference.parameters()) == count


@pytest.mark.parametrize("name", ["r-nem", "vae", "rnn-em, sequences"])
def test_other_strategies_have_no_reference(name):
    with pytest.raises(TypeError, match="no reference"):
        hand_written(build(name, TINY, CPU, seed=0))


@pytest.mark.parametrize("name", CASES)
def test_a_timed_step_trains_every_parameter_as_fit_does(name):
    parts = build(name, TINY, CPU, seed=0)
    x = images(parts, TINY, CPU)
    modules = parts[:2]
    before = [p.detach().clone() for module in modules for p in module.parameters()]
    step = training_step(parts, x, precision="float32", compile=False, gradient_clip=1.0)
    step()
    step()
    assert all(
        not torch.equal(old, new)
        for old, new in zip(before, (p for module in modules for p in module.parameters()), strict=True)
    )


@pytest.mark.usefixtures("float64")
def test_a_step_through_pyro_is_the_same_step():
    steps = {"plain": lambda parts, x: training_step(parts, x, precision="float64", compile=False), "pyro": pyro_step}
    weights = []
    for step in steps.values():
        parts, x = double("rnn-em")
        parts = parts._replace(objective=ELBO("last"))
        torch.manual_seed(0)
        step(parts, x)()
        weights.append([p for module in parts[:2] for p in module.parameters()])
    for plain, pyro in zip(*weights, strict=True):
        torch.testing.assert_close(plain, pyro, rtol=1e-6, atol=1e-9)


def test_products_are_counted_forwards_and_backwards():
    layer, x = torch.nn.Linear(30, 20), torch.ones(5, 30, requires_grad=True)
    work = count_work(lambda: layer(x).sum().backward())
    # Wx + b, and of as many operations each the gradients of x and W.
    assert work.flops == 3 * 2 * 5 * 30 * 20
    x_bytes, w_bytes, y_bytes, b_bytes = 4 * 5 * 30, 4 * 30 * 20, 4 * 5 * 20, 4 * 20
    assert work.bytes == 3 * (x_bytes + w_bytes + y_bytes) + b_bytes


# (Torch's own counter cannot follow gradients within a step, as N-EM's.)
@pytest.mark.parametrize("name", ["rnn-em", "vae", "semi-amortised vae"])
def test_products_of_a_step_are_those_that_torch_counts(name):
    parts = build(name, TINY, CPU, seed=0)
    step = training_step(parts, images(parts, TINY, CPU), precision="float32", compile=False)
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    assert count_work(step).flops == counter.get_total_flops() > 0


def test_reduced_precision_moves_half_the_bytes():
    layer, x = torch.nn.Linear(30, 20, bias=False), torch.ones(5, 30)
    full = count_work(lambda: layer(x))
    reduced = count_work(lambda: torch.autocast("cpu", torch.bfloat16)(layer)(x))
    assert reduced == Work(full.flops, full.bytes // 2)


def test_the_peak_that_takes_longer_binds():
    peaks = Peaks({"float32": 100.0}, 10.0)
    assert Work(1000, 10).share(20.0, peaks, "float32") == (0.5, "products")
    assert Work(1000, 1000).share(200.0, peaks, "float32") == (0.5, "bandwidth")


def test_peaks_are_the_best_of_all_repetitions():
    peaks, rows = measure_peaks(CPU, 64, 2**16, 3)
    assert [row.unit for row in rows] == ["GFLOP/s", "GFLOP/s", "GB/s"]
    for rate, row in zip([*peaks.products.values(), peaks.bandwidth], rows, strict=True):
        assert 1e9 * row.value.high <= rate * (1 + 1e-9)


def test_a_precision_without_instructions_is_not_run(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    slow, built = Peaks({"float32": 1e9, "bfloat16": 2e7}, 1e9), []
    monkeypatch.setattr(
        "pnem.bench.steps.training_step", lambda *a, **kw: built.append(kw["precision"]) or training_step(*a, **kw)
    )
    rows = {row.name: row for row in time_case("vae", TINY, slow, compiled=True, **SETTING)}
    assert rows["compiled, bfloat16"].value is None
    assert rows["compiled, bfloat16"].note.startswith("no instructions for bfloat16: its products are 50 times slower")
    assert rows["compiled"].note.startswith("there is no C++ compiler")
    assert rows["eager"].value is not None
    assert set(built) == {"float32"}


def test_peaks_of_slow_products_are_of_smaller_matrices(monkeypatch):
    monkeypatch.setattr("pnem.bench.peaks.LONGEST", 0.0)
    _, rows = measure_peaks(CPU, 256, 2**16, 1)
    assert [row.note.split(",")[0] for row in rows[:2]] == ["64×64"] * 2


def test_growth_of_linear_and_quadratic_times():
    sizes, noise = np.array([100, 200, 400]), np.array([[1.0], [2.0], [0.5]])
    np.testing.assert_allclose(bench.exponents(sizes, noise * sizes), 1)
    np.testing.assert_allclose(bench.exponents(sizes, noise * sizes**2), 2)
    assert (bench.exponents(sizes, 3 + noise * sizes) < 1).all()
    np.testing.assert_allclose(bends(sizes, 3 + noise * sizes), 1)
    assert (bends(sizes, 3 + noise * sizes**2) > 1.5).all()


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_mixtures_are_fitted_from_the_same_start_by_as_many_iterations(covariance):
    size = mixtures.MixtureSize(items=60, C=3, K=2, iterations=3)
    x, gamma = mixtures.items(size, seed=0)
    theirs = mixtures.scikit_learn(covariance, gamma, size)
    ours = mixtures.classical_em(covariance, size, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.fit(x)
        trace = ours.fit(torch.from_numpy(x)[None], gamma=torch.from_numpy(gamma).T[None]).elbo_trace
    assert theirs.n_iter_ == size.iterations
    # Theirs is of the parameters before its last M-step.
    np.testing.assert_allclose(trace[-1].item() / size.items, theirs.lower_bound_, rtol=1e-8)


def test_all_that_is_compared_is_called_in_turn():
    calls = []
    seconds = alternately({name: lambda name=name: calls.append(name) for name in "ab"}, 3, CPU)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.skipif(peak_memory(lambda: None, CPU) is None, reason="this system does not tell its peak memory")
def test_peak_memory_counts_what_is_freed_before_the_end():
    """Of tensors so large that the allocator asks the system for each, whatever was freed before."""
    megabytes = 2**18

    def function():
        for count in (200, 50):
            torch.ones(count * megabytes)

    assert 195 * 2**20 < peak_memory(function, CPU) < 230 * 2**20


def test_without_a_compiler_rows_say_so_and_the_others_are_there(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    rows = {row.name: row for row in time_case("rnn-em", TINY, PEAKS, compiled=True, **SETTING)}
    assert set(rows) == {*VARIANTS, "by hand"}
    assert rows["compiled"].value is rows["compiled, bfloat16"].value is None
    assert "no C++ compiler no-such-compiler" in rows["compiled"].note
    assert rows["eager"].speeds.keys() == {"by hand"}
    assert rows["eager"].value.repetitions == SETTING["repetitions"]


SETTING = {"repetitions": 2, "device": CPU, "seed": 0}
SPREAD = {"median", "low", "high", "repetitions"}


def check_json(path):
    """The schema: fields and types of every row."""
    stored = json.loads(path.read_text())
    assert stored["format"] == 1
    assert stored["torch"] == torch.__version__
    assert stored["hardware"]
    for row in stored["rows"]:
        assert list(row) == list(bench.Row.__dataclass_fields__)
        assert row["section"]
        assert row["unit"] in ("ms", "GFLOP/s", "GB/s", "% more", "exponent")
        assert (row["value"] is None) == row["note"].startswith(("no instructions", "there is no", "not installed"))
        for spread in [row["value"], *row["speeds"].values()]:
            if spread is not None:
                assert set(spread) == SPREAD
                assert spread["low"] <= spread["median"] <= spread["high"]
        if row["share"] is not None:
            assert row["binds"] in ("products", "bandwidth")
    return stored


def test_one_part_at_the_command_line(tmp_path):
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    options = ["bench", "--small", "--only", "mixtures", "--only", "growth", "--repetitions", 2, "--threads", 1]
    state = torch.get_rng_state()
    result = call(*options, "--json", path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    stored = check_json(path)
    assert stored["threads"] == 1
    names = [row["name"] for row in stored["rows"]]
    assert names[3:7] == ["in K", "in T", "in D", "in batch"]
    assert "scikit-learn" in names
    assert "scikit-learn" in result.stdout
    assert stored["hardware"].split()[0] in result.stdout
    assert "in K" in result.stderr
    assert "exists already" in call(*options, "--json", path, code=1).stderr


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_the_small_suites_run_through(tmp_path, suite):
    path = tmp_path / "bench.json"
    call("bench", "--suite", suite, "--device", "cpu", "--small", "--repetitions", 1, "--json", path)
    rows = check_json(path)["rows"]
    sections = {row["section"].splitlines()[0] for row in rows}
    assert sections >= {f"step of {name}" for name in CASES}
    assert len({row["section"] for row in rows if row["section"].startswith("step of rnn-em\n")}) == (
        2 if suite == "gpu" else 1
    )
    assert [row["name"] for row in rows if row["section"].startswith("fit")] == ["Lightning's share", "in N"]
    assert [row["name"] for row in rows if row["section"].startswith("Pyro")] == ["eager", "compiled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "tpu"], "unknown suite 'tpu': choose one of cpu, gpu"),
        (["--only", "em"], "unknown part 'em': choose of steps, kernels, pyro, fit, growth, mixtures"),
        (["--repetitions", 0], "repetitions must be at least 1"),
        (["--threads", 0], "threads must be at least 1"),
        (["--device", "tpu"], "unknown device"),
        (["--json", "/dev/null/x.json"], "cannot write"),
    ],
)
def test_mistakes_are_one_message(options, message):
    result = call("bench", "--small", *options, code=1)
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_gpu_suite_needs_a_gpu_or_the_word_to_run_on_the_cpu():
    with pytest.raises(DeviceError, match="--device cpu"):
        bench.run("gpu", small=True)
    with pytest.raises(DeviceError, match="CUDA devices"):
        bench.run("gpu", device="cuda", small=True)


def test_errors_are_typed():
    with pytest.raises(RunError):
        bench.run("tpu")
    with pytest.raises(DeviceError):
        bench.run("cpu", device="cuda" if torch.cuda.is_available() else "xpu")


def test_the_table_has_every_row():
    spread = Spread.of([1.0, 2.0, 3.0])
    rows = [
        bench.Row("step", "eager", spread, speeds={"by hand": spread}, images_per_second=1234567.8, memory=10 * 2**30),
        bench.Row("EM", "pnem, 10 starts at once", spread, speeds={"scikit-learn": spread}),
        bench.Row("step", "compiled", None, note="no compiler"),
        bench.Row("growth", "in K", Spread.of([1.0]), "exponent"),
    ]
    report = bench.Report("cpu", "cpu", False, 3, 7, "a machine", "2.0", 2, rows)
    console = Console(width=200)
    with console.capture() as captured:
        console.print(report)
    text = captured.get()
    for expected in (
        "compiled: no compiler",
        "2 (1.5 to 2.5) ms",
        "× by hand",
        "1,234,568",
        "10,240 MiB",
        "1 exponent",
        "seed 7",
        "2 CPU",
    ):
        assert expected in text
    assert json.loads(report.to_json())["rows"][3]["value"]["repetitions"] == 1
    narrow = Console(width=90)
    with narrow.capture() as captured:
        narrow.print(report)
    for expected in ("1,234,568", "scikit-learn", "10,240 MiB", "first"):
        assert expected in captured.get()
