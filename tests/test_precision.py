"""The benchmark of precisions: its emulation rounds as bfloat16 does, and it runs."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

SCRIPT = str(Path(__file__).parent / "benchmarks" / "precision.py")


class Products(TorchDispatchMode):
    """Notes what products of matrices are computed in."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in ("mm.", "bmm.")):
            self.dtypes.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batched", [False, True])
def test_emulated_products_are_those_of_bfloat16_forwards_and_backwards(batched):
    emulated = runpy.run_path(SCRIPT)["EmulatedProducts"]
    torch.manual_seed(0)
    shapes = [(2, 6, 40), (2, 40, 7)] if batched else [(6, 40), (7, 40), (7,)]
    function = torch.bmm if batched else F.linear
    inputs = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]

    def values():
        result = function(*inputs)
        return [result, *torch.autograd.grad(result.float().square().sum(), inputs)]

    with Products() as taken, emulated():
        found = values()
    # One forwards, two backwards.
    assert taken.dtypes == [torch.float32] * 3
    for ours, theirs in zip(found, values(), strict=True):
        assert ours.dtype == torch.bfloat16
        # Sums in another order may be rounded to the next number.
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)


def test_emulation_leaves_float32_as_it_is():
    emulated = runpy.run_path(SCRIPT)["EmulatedProducts"]
    a = torch.randn(5, 5)
    with emulated():
        found = a @ a
    assert torch.equal(found, a @ a)


@pytest.mark.parametrize("options", [[], ["--emulate"]])
def test_the_benchmark_runs_small(tmp_path, capsys, options):
    path = tmp_path / "found.json"
    main = runpy.run_path(SCRIPT)["main"]
    assert main(["--small", "--seeds", "2", "--json", str(path), *options]) == 0
    shown = capsys.readouterr().out
    for title in ("AMI", "ARI", "log evidence", "bfloat16 − float32"):
        assert title in shown
    found = json.loads(path.read_text())
    assert {name: len(results) for name, results in found.items()} == {"float32": 2, "bfloat16": 2}
    for full, reduced in zip(*found.values(), strict=True):
        assert full["log_evidence"] != reduced["log_evidence"] == pytest.approx(full["log_evidence"], rel=0.05)
