"""Data larger than memory: the same fit in chunks, and online EM."""

import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from cases import FAMILIES, factors, items, mixture
from test_factor_analysis import table
from test_missing_values import holes

from pnem.data import Rows
from pnem.errors import DataError, ModelError, StrategyError
from pnem.inference import ClassicalEM, OnlineEM
from pnem.models import MultivariateNormal, NormalInverseWishart, Poisson, SpatialMixture, StudentT, decoders

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_add_up_to_the_whole(family, missing):
    x = items(family, D=200, C=3)
    x = holes(x) if missing else x
    model = mixture(FAMILIES[family](), 3, 3)
    theta = ClassicalEM(model, iterations=2).fit(x).theta
    start = model.log_mixing.detach().clone()
    fits = []
    for data in (x, x[0].split(37)):
        model.set_log_mixing(start[None])
        fits.append(ClassicalEM(model, iterations=6, tol=0).fit(data, theta=theta))
    torch.testing.assert_close(fits[0].elbo_trace, fits[1].elbo_trace)
    torch.testing.assert_close(model.likelihood.mean(fits[0].theta), model.likelihood.mean(fits[1].theta))


def test_factor_analysis_streams_too():
    rows = torch.from_numpy(table())
    whole, streamed = factors(), factors()
    a = ClassicalEM(whole, iterations=3000, tol=1e-12).fit(rows[:, None])
    b = ClassicalEM(streamed, iterations=3000, tol=1e-12).fit(rows.split(70))
    assert a.elbo_trace[-1].item() == pytest.approx(b.elbo_trace[-1].item(), abs=1e-5)


@pytest.mark.parametrize("initial", ["k-means++", "random", "points"])
def test_a_stream_starts_from_a_sample(initial):
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    x = (centres.repeat_interleave(100, 0) + torch.randn(300, 2))[torch.randperm(300)]
    model = mixture(MultivariateNormal())
    fit = ClassicalEM(model, iterations=300, initial=initial).fit(x.split(64), restarts=10)
    assert fit.converged
    assert torch.cdist(model.likelihood.mean(fit.theta[0]), centres).min(0).values.max() < 0.5


def test_rows_of_a_file(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(1000, 3))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
    rows = Rows(tmp_path / "x.h5", chunk=300)
    assert len(rows) == 1000
    np.testing.assert_array_equal(torch.cat(list(rows)), x)
    shuffled = torch.cat(list(Rows(tmp_path / "x.h5", "x", chunk=300, shuffle=True))).numpy()
    assert not np.array_equal(shuffled, x)
    np.testing.assert_array_equal(np.sort(shuffled, 0), np.sort(x, 0))
    model = mixture(MultivariateNormal(), 2, 3)
    theta = ClassicalEM(model, iterations=1).fit(torch.from_numpy(x)[None]).theta
    model.set_log_mixing(torch.zeros(1, 2))
    fit = ClassicalEM(model, iterations=4, tol=0).fit(rows, theta=theta, progress=True)
    model.set_log_mixing(torch.zeros(1, 2))
    expected = ClassicalEM(model, iterations=4, tol=0).fit(torch.from_numpy(x)[None], theta=theta)
    torch.testing.assert_close(fit.theta, expected.theta)
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("shuffle", [False, True])
def test_columns_order_and_samples_of_rows(tmp_path, shuffle):
    x = np.arange(3000.0).reshape(1000, 3)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
    rows = Rows(tmp_path / "x.h5", columns=[2, 0], chunk=300, shuffle=shuffle)
    assert rows.names == ("x2", "x0")
    np.testing.assert_array_equal(torch.cat(list(rows.in_order())), x[:, [2, 0]])
    np.testing.assert_array_equal(np.sort(torch.cat(list(rows)), 0), x[:, [2, 0]])
    few = rows.sample(400).numpy()
    assert len(few) == len(np.unique(few[:, 0])) == 400
    assert np.isin(few[:, 0], x[:, 2]).all()
    np.testing.assert_array_equal(few[:, 0] - few[:, 1], 2)
    # Of every chunk about its share: four standard deviations of the hypergeometric count.
    assert np.histogram(few[:, 1], [0, 900, 1800, 2700, 3000])[0] == pytest.approx([120, 120, 120, 40], abs=29)
    np.testing.assert_array_equal(rows.sample(5000), x[:, [2, 0]])


@pytest.mark.parametrize("prior", ["flat", NormalInverseWishart(0.0, 1.0)])
def test_online_em_gets_where_em_gets(prior):
    centres = 3 * torch.randn(4, 2)
    x = centres[torch.randint(0, 4, (60_000,))] + torch.randn(60_000, 2)
    likelihood = MultivariateNormal()
    model = SpatialMixture(decoders.Constant(5), likelihood, 4, mixing="learned", prior=prior)
    torch.manual_seed(1)
    exact = ClassicalEM(model, iterations=300, tol=1e-7).fit(x[None], restarts=4)
    torch.manual_seed(1)
    online = OnlineEM(model, iterations=8, tol=1e-6).fit(x.split(10_000), restarts=4)
    reached = model.log_evidence(x[None], online.theta).item()
    assert reached / len(x) == pytest.approx(exact.elbo_trace[-1].item() / len(x), abs=2e-3)


@pytest.mark.parametrize("size", [4096, 4097, 8193])
def test_a_short_last_piece_weighs_little(size):
    x = torch.randn(1, size, 1)
    likelihood = MultivariateNormal()
    mean, lower = likelihood.moments(OnlineEM(mixture(likelihood, 1, 1)).fit(x).theta[0, 0])
    assert mean.item() == pytest.approx(x.mean().item(), abs=0.02)
    assert lower.item() == pytest.approx(x.std().item(), abs=0.02)


def test_online_steps_are_in_proportion_to_weights():
    x = torch.cat([torch.randn(1, 20_000, 1), torch.randn(1, 5, 1) + 9], 1)
    likelihood = MultivariateNormal()
    weight = (x[..., 0] > 6).double()
    mean = likelihood.mean(OnlineEM(mixture(likelihood, 1, 1)).fit(x, weight=weight).theta[0, 0])
    assert mean.item() == pytest.approx(9, abs=1.5)


def test_a_sparse_channel_of_a_stream_is_no_error():
    x = torch.randn(150_000, 2)
    x[2:, 1] = torch.nan
    fit = ClassicalEM(mixture(MultivariateNormal("diagonal"), 1), iterations=3).fit(x.split(50_000))
    assert bool(fit.theta.isfinite().all())


def test_empty_chunks_are_passed_over():
    chunks = [torch.randn(50, 2), torch.zeros(0, 2), torch.randn(50, 2)]
    assert ClassicalEM(mixture(StudentT(), 1), iterations=2).fit(chunks).theta.isfinite().all()


def test_online_em_shuffles_what_is_sorted():
    x = torch.cat([torch.randn(20_000, 1), torch.randn(20_000, 1) + 6])
    model = mixture(MultivariateNormal(), 2, 1)
    fit = OnlineEM(model).fit(x[None])
    assert model.likelihood.mean(fit.theta[0]).sort(0).values.flatten().tolist() == pytest.approx([0, 6], abs=0.1)
    posterior = OnlineEM(model).infer(x[None])
    torch.testing.assert_close(posterior.gamma, model.responsibilities(x[None], posterior.theta))
    weight = (x < 3).double().T
    fit = OnlineEM(model).fit(x[None], weight=weight)
    assert model.likelihood.mean(fit.theta[0]).abs().max() < 3


@pytest.mark.filterwarnings("error")
def test_online_em_learns_from_a_sorted_file(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = np.concatenate([np.random.default_rng(k).normal(k, 1, (20_000, 1)) for k in (0, 6)])
    rows = Rows(tmp_path / "x.h5", chunk=2**13, shuffle=True)
    # Every chunk is of both halves: 0.5 within six standard deviations of the share of 128 places.
    shares = [(chunk < 3).double().mean().item() for chunk in rows]
    assert shares == pytest.approx([0.5] * 5, abs=0.27)
    model = mixture(MultivariateNormal(), 2, 1)
    fit = OnlineEM(model, iterations=30).fit(rows)
    assert fit.converged
    assert model.likelihood.mean(fit.theta[0]).sort(0).values.flatten().tolist() == pytest.approx([0, 6], abs=0.1)
    assert fit.log_mixing.exp().flatten().tolist() == pytest.approx([0.5, 0.5], abs=0.1)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        table = file.create_dataset("x", (2_000_000, 8), "f4", chunks=(2**14, 8))
        for start in range(0, len(table), 250_000):
            table[start : start + 250_000] = np.random.default_rng(start).normal(size=(250_000, 8))
        file["few"] = table[:200_000]
    program = (
        "import resource, sys, warnings; warnings.simplefilter('ignore')\n"
        "from pnem.data import Rows\nfrom pnem.inference import ClassicalEM\n"
        "from pnem.models import MultivariateNormal, SpatialMixture, decoders\n"
        "normal = MultivariateNormal('diagonal')\n"
        "model = SpatialMixture(decoders.Constant(16), normal, 3, mixing='learned').double()\n"
        "ClassicalEM(model, iterations=2).fit(Rows(sys.argv[1], sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", program, str(tmp_path / "x.h5"), name], text=True))
        for name in ("few", "x")
    )
    # In kilobytes: the rows alone are 64 MB in single and 128 MB in double precision.
    assert many < few + 40_000


def test_chunks_that_cannot_work_are_refused():
    strategy = ClassicalEM(mixture(Poisson()))
    for chunks, error, message in [
        ((chunk for chunk in torch.ones(4, 5, 2)), StrategyError, "iterated only once"),
        ([], StrategyError, "no items"),
        ([torch.ones(1, 5, 2)], StrategyError, r"must be a tensor \(n, C\), but is \(1, 5, 2\)"),
        ([[1, 2]], StrategyError, "but is list"),
        (np.ones((5, 2)), StrategyError, "torch.as_tensor"),
        (None, StrategyError, "NoneType"),
        ([torch.ones(5, 2), -torch.ones(5, 2)], ModelError, "whole numbers from 0"),
        ([torch.ones(5, 3)], ModelError, "C=2"),
        ([torch.full((5, 2), torch.nan)], ModelError, "no value at all"),
    ]:
        with pytest.raises(error, match=message):
            strategy.fit(chunks)
    for given in ({"gamma": torch.ones(1, 3, 5)}, {"weight": torch.ones(1, 5)}):
        with pytest.raises(StrategyError, match="neither gamma nor weight"):
            strategy.fit([torch.ones(5, 2)], **given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"exponent": 0.5}, "exponent"), ({"exponent": 1.5}, "exponent"), ({"delay": -1.0}, "delay")],
)
def test_steps_that_do_not_converge_are_refused(arguments, message):
    with pytest.raises(StrategyError, match=message):
        OnlineEM(mixture(Poisson()), **arguments)


def test_files_that_cannot_work_are_refused(tmp_path):
    path = tmp_path / "x.h5"
    with pytest.raises(DataError, match="does not exist"):
        Rows(path)
    path.write_text("no")
    with pytest.raises(DataError, match="not an HDF5 file"):
        Rows(path)
    with h5py.File(path, "w") as file:
        file["images"], file["words"], file["none"] = np.zeros((2, 3, 4)), [[b"a"]], np.zeros((0, 3))
    for name, message in [("x", "no dataset"), ("images", "two axes"), ("words", "dtype"), ("none", "at least one")]:
        with pytest.raises(DataError, match=message):
            Rows(path, name)
    with h5py.File(path, "w") as file:
        file["only"] = np.zeros((2, 3))
    assert len(Rows(path)) == 2
    with pytest.raises(DataError, match="chunk"):
        Rows(path, chunk=0)
    for columns in ([], [3], [-1], [0.5]):
        with pytest.raises(DataError, match="columns"):
            Rows(path, columns=columns)
