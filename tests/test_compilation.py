"""Compiled training: where it is chosen, and what is said where it cannot be done."""

import warnings

import pytest
import torch
from fitting import SHAPE, splits, train, weights
from torch._dynamo.exc import Unsupported

import pnem
from pnem import compilation
from pnem.compilation import WORTH_IT_ON_A_CPU, WORTH_IT_ON_A_GPU, compiled, should_compile
from pnem.errors import DeviceError
from pnem.inference import PyroGuide
from pnem.models import Bernoulli, SpatialMixture, decoders

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LONG = {"iterations": WORTH_IT_ON_A_GPU, "pixels": WORTH_IT_ON_A_CPU}
SHORT = {"iterations": 100, "pixels": 1e5}


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture
def a_compiler(monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
def test_automatic_compilation_is_for_long_trainings(a_compiler, device):
    assert should_compile("auto", device, **LONG)
    assert not should_compile("auto", device, **SHORT)
    assert should_compile(True, device, **SHORT)
    assert not should_compile(False, device, **LONG)


def test_without_a_compiler_automatic_compilation_says_so_once_and_trains_on(no_compiler):
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler no-such-compiler: install one") as caught:
        assert not should_compile("auto", CPU, **LONG)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not should_compile("auto", CPU, **SHORT)


def test_compilation_asked_for_without_a_compiler_is_refused(no_compiler, tmp_path):
    with pytest.raises(DeviceError, match=r"compile=True, but there is no C\+\+ compiler .* leave compile out"):
        train(tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


def test_a_gpu_needs_triton(a_compiler, monkeypatch):
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="install the package triton"):
        should_compile(True, GPU, **SHORT)


def untraceable(x):
    raise Unsupported("a call that cannot be traced\nand where")


@pytest.fixture
def failing_compiler(monkeypatch):
    monkeypatch.setattr(compilation.torch, "compile", lambda function, **_: untraceable)


def test_automatic_compilation_that_fails_goes_on_without(failing_compiler):
    double = compiled(lambda x: 2 * x, required=False, device=CPU)
    with pytest.warns(UserWarning, match="without being compiled, which failed: a call that cannot be traced$"):
        assert double(2) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(3) == 6


def test_compilation_asked_for_that_fails_is_an_error(failing_compiler):
    with pytest.raises(DeviceError, match=r"cannot be compiled \(a call that cannot be traced\): leave compile out"):
        compiled(lambda x: x, required=True, device=CPU)(1)


@pytest.mark.slow
def test_a_strategy_that_cannot_be_traced_says_so(tmp_path):
    """Pyro's SVI within a step."""
    torch.manual_seed(0)
    model = SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), 3, prior="standard_normal")
    with pytest.raises(DeviceError, match="cannot be compiled"):
        pnem.fit(
            model,
            PyroGuide(model, steps=3),
            splits(),
            epochs=1,
            batch_size=8,
            compile=True,
            progress=False,
            device="cpu",
        )


@pytest.mark.slow
def test_a_long_training_is_compiled_by_itself_and_learns_the_same(monkeypatch):
    monkeypatch.setattr(compilation, "WORTH_IT_ON_A_CPU", 1)
    asked = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: asked.append(kwargs) or compile_(*args, **kwargs))
    automatic = train(epochs=1, precision="float64")
    assert asked == [{"fullgraph": True, "mode": None}]
    eager = train(epochs=1, precision="float64", compile=False)
    assert len(asked) == 1
    for a, b in zip(weights(eager), weights(automatic), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_captured_training_equals_eager_training_on_a_gpu():
    captured, eager = (train(epochs=2, precision="float64", device="cuda", compile=flag) for flag in (True, False))
    for a, b in zip(weights(eager), weights(captured), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
