"""pnem em on tables that stay in their file: the results of a fit in memory, and memory that does not grow."""

import json
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
from test_em_command import K2, call, results, two_groups

from pnem import em_results
from pnem.data import Rows, Table, open_items, tables
from pnem.errors import DataError

EXACT = ["--tol", "1e-13", "--iterations", "5000"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams") / "x.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        x = two_groups(30_000)[0].to_numpy()
        file["x"] = x
        file["holes"] = np.where((rng.random(x.shape) < 0.1) & [True, False], np.nan, x)
        file["counts"] = rng.poisson(np.where(np.arange(3000)[:, None] % 3 == 2, 30, 3), (3000, 3))
    return path


def assert_equal_up_to(one, other, tolerance):
    """Two nests of dicts, lists and numbers."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal_up_to(a, b, tolerance)
    else:
        assert one == pytest.approx(other, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize(
    ("dataset", "options"),
    [
        ("x", []),
        ("x", ["--columns", "x1"]),
        ("x", ["--columns", "x1,x0", "--covariance", "diagonal"]),
        ("holes", ["--covariance", "diagonal"]),
        ("counts", ["--likelihood", "poisson"]),
    ],
)
def test_a_stream_ends_where_a_table_in_memory_does(stored, tmp_path, dataset, options):
    found = {}
    for way in ("--stream", "--no-stream"):
        out = tmp_path / way.strip("-")
        call(stored, "--dataset", dataset, *K2, *options, *EXACT, "--restarts", 3, way, "--out", out)
        found[way] = results(out)
        assert found[way][1]["settings"]["stream"] is (way == "--stream")
    (labels, a), (others, b) = found.values()
    assert list(a) == list(b)
    assert (a["columns"], a["items"], a["likelihood"]) == (b["columns"], b["items"], b["likelihood"])
    assert_equal_up_to(a["components"], b["components"], 1e-6)
    assert a["bound"]["nats_per_item"] == pytest.approx(b["bound"]["nats_per_item"], abs=1e-11)
    assert list(labels) == list(others)
    assert (labels["row"] == np.arange(a["items"])).all()
    np.testing.assert_allclose(labels["gamma_0"], others["gamma_0"], atol=1e-5)
    files = [sorted(path.name for path in (tmp_path / way).iterdir()) for way in ("stream", "no-stream")]
    assert files[0] == files[1]


@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_online_em_gets_there_too(stored, tmp_path, way):
    printed = call(stored, "--dataset", "x", *K2, "--online", way, "--out", tmp_path / "o").stdout
    assert "passes" in printed
    labels, parameters = results(tmp_path / "o")
    assert parameters["settings"]["online"] is True
    np.testing.assert_array_equal(labels["label"], (np.arange(30_000) % 3 == 2).astype(int))
    first, second = parameters["components"]
    assert first["weight"] == pytest.approx(2 / 3, abs=0.02)
    assert list(first["mean"].values()) == pytest.approx([0, 0], abs=0.06)
    assert list(second["mean"].values()) == pytest.approx([6, 4], abs=0.06)


def test_a_large_table_is_a_stream_unless_it_is_not_to_be(stored, monkeypatch):
    assert isinstance(open_items(stored, dataset="x"), Table)
    assert isinstance(open_items(stored, dataset="x", stream=True), Rows)
    # The bytes of (30_000, 2) in double precision.
    monkeypatch.setattr(tables, "MEMORY_LIMIT", 480_000)
    assert isinstance(open_items(stored, dataset="x"), Table)
    monkeypatch.setattr(tables, "MEMORY_LIMIT", 479_999)
    rows = open_items(stored, dataset="x", columns=["x1"], shuffle=True)
    assert isinstance(rows, Rows)
    assert (rows.names, rows.shuffle, rows.num_items) == (("x1",), True, 30_000)
    assert isinstance(open_items(stored, dataset="x", stream=False), Table)
    with pytest.raises(DataError, match="--no-stream"):
        open_items(stored, dataset="x", weight="x0")


def test_labels_come_in_the_order_of_the_rows_in_pieces(tmp_path, monkeypatch):
    """Chunks, and pieces of them, that do not divide the rows; online EM sees them in another order."""
    x, group = two_groups(1000)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = x
    monkeypatch.setattr("pnem.data.rows.CHUNK", 300)
    monkeypatch.setattr("pnem.em_fit.PIECE", 70)
    for name, options in (("a", ["--stream"]), ("b", ["--stream", "--online"]), ("c", [])):
        call(tmp_path / "x.h5", *K2, *options, "--out", tmp_path / name)
        labels, parameters = results(tmp_path / name)
        assert labels["row"].tolist() == list(range(1000))
        np.testing.assert_array_equal(labels["label"], group)
        assert (tmp_path / name / "labels.csv").read_text().count("row") == 1
        assert parameters["items"] == 1000


def test_a_picture_of_a_stream_says_that_it_is_of_a_sample(stored, monkeypatch, tmp_path):
    drawn = []
    for name in ("mixture_1d", "mixture_2d"):
        monkeypatch.setattr(em_results.plots, name, _recording(getattr(em_results.plots, name), drawn))
    call(stored, "--dataset", "x", *K2, "--stream", "--out", tmp_path / "a")
    call(stored, "--dataset", "x", *K2, "--stream", "--columns", "x0", "--out", tmp_path / "b")
    call(stored, "--dataset", "x", *K2, "--out", tmp_path / "c")
    says = [figure.get_supxlabel() for figure in drawn]
    assert says == ["data: a sample of 20,000 of 30,000 rows"] * 2 + [""]


def _recording(draw, drawn):
    def recorded(*args, **options):
        drawn.append(draw(*args, **options))
        return drawn[-1]

    return recorded


def test_what_cannot_be_streamed_is_one_line_and_leaves_nothing_behind(stored, tmp_path):
    (tmp_path / "x.csv").write_text("a\n1\n2\n")
    with h5py.File(tmp_path / "bad.h5", "w") as file:
        file["infinite"], file["empty"] = [[1.0, 2], [np.inf, 3]], [[1.0, 2], [np.nan, np.nan]]
    for arguments, message in [
        ([tmp_path / "x.csv", "--stream"], "only those are streamed"),
        ([stored, "--dataset", "x", "--stream", "--weights", "x0"], "leave --weights out"),
        ([stored, "--dataset", "x", "--stream", "--columns", "x7"], "no column 'x7'"),
        ([stored, "--dataset", "x", "--stream", "--likelihood", "poisson"], "whole numbers from 0"),
        ([tmp_path / "bad.h5", "--dataset", "infinite", "--stream"], "finite"),
        ([tmp_path / "bad.h5", "--dataset", "empty", "--stream"], "no value at all"),
    ]:
        assert message in call(*arguments, *K2, "--out", tmp_path / "o", code=1).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.h5", "x.csv"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_labels(tmp_path):
    path, N = tmp_path / "x.h5", 1_000_000
    with h5py.File(path, "w") as file:
        file["few"] = np.random.default_rng(0).normal(size=(N // 10, 1)).astype("f4")
        file["x"] = np.random.default_rng(0).normal(size=(N, 1)).astype("f4")
    program = (
        "import resource, sys, warnings; warnings.simplefilter('ignore')\n"
        "from typer.testing import CliRunner; from pnem.cli import app\n"
        "result = CliRunner().invoke(app, ['em', *sys.argv[1:]])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    options = ["--components", "4", "--restarts", "1", "--iterations", "2", "--stream"]
    few, many = (
        int(
            subprocess.check_output(
                [sys.executable, "-c", program, path, "--dataset", name, *options, "--out", tmp_path / name], text=True
            )
        )
        for name in ("few", "x")
    )
    # In kilobytes: the responsibilities alone are 32 MB, their table 56 MB.
    assert many < few + 20_000
    assert json.loads((tmp_path / "x/parameters.json").read_text())["items"] == N
    assert sum(len(piece) for piece in pd.read_csv(tmp_path / "x/labels.csv", chunksize=2**16)) == N
