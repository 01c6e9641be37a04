"""pnem em: what it finds is what was put in, what it writes agrees with itself, and mistakes leave nothing behind."""

import json
import math
import subprocess
import sys

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from pnem.cli import app
from pnem.components import LIKELIHOODS, describe_component, make_likelihood
from pnem.em_results import new_directory
from pnem.errors import ModelError, RunError


def call(*arguments, code=0):
    words = ["em", *map(str, arguments)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output
    if code:
        assert "Traceback" not in result.output
    if code == 1:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    return result


def results(out):
    return pd.read_csv(out / "labels.csv"), json.loads((out / "parameters.json").read_text())


def two_groups(N=20_000, seed=0):
    """Rows of two normals of known parameters, a third of them in the second."""
    rng = np.random.default_rng(seed)
    group = (np.arange(N) % 3 == 2).astype(int)
    x = np.where(group[:, None] == 0, rng.normal([0, 0], [1, 0.5], (N, 2)), rng.normal([6, 4], [0.3, 1], (N, 2)))
    return pd.DataFrame(x, columns=["length [cm]", "width"]), group


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("em") / "data.csv"
    two_groups(300)[0].to_csv(path, index=False)
    return path


def test_help_has_an_example():
    assert "Example: pnem em" in CliRunner().invoke(app, ["em", "--help"]).output.replace("`", "")


def test_known_parameters_are_recovered(tmp_path):
    frame, group = two_groups()
    frame.to_csv(tmp_path / "data.csv", index=False)
    printed = call(tmp_path / "data.csv", "--components", 2, "--out", tmp_path / "out").stdout
    assert "length [cm]" in printed
    assert "nats per item" in printed
    labels, parameters = results(tmp_path / "out")
    np.testing.assert_array_equal(labels["label"], group)
    first, second = parameters["components"]
    # Within four standard errors of what drew them.
    assert first["weight"] == pytest.approx(2 / 3, abs=1e-4)
    assert list(first["mean"].values()) == pytest.approx([0, 0], abs=0.035)
    assert list(second["mean"].values()) == pytest.approx([6, 4], abs=0.05)
    np.testing.assert_allclose(first["covariance"], np.diag([1, 0.25]), atol=0.05)
    np.testing.assert_allclose(second["covariance"], np.diag([0.09, 1]), atol=0.07)
    # And closer still those of the rows of the group itself, for the groups hardly overlap.
    rows = frame[group == 0].to_numpy()
    assert list(first["mean"].values()) == pytest.approx(rows.mean(0).tolist(), abs=1e-4)
    np.testing.assert_allclose(first["covariance"], np.cov(rows.T, bias=True), atol=2e-4)


def test_files_agree_with_each_other_and_with_the_model(data, tmp_path):
    out = tmp_path / "out"
    call(data, "--components", 3, "--out", out, "--seed", 3)
    assert sorted(path.name for path in out.iterdir()) == ["bound.csv", "labels.csv", "mixture.png", "parameters.json"]
    labels, parameters = results(out)
    gamma = labels[[f"gamma_{k}" for k in range(3)]].to_numpy()
    np.testing.assert_array_equal(labels["row"], np.arange(300))
    np.testing.assert_array_equal(labels["label"], gamma.argmax(1))
    np.testing.assert_array_equal(labels["probability"], gamma.max(1))
    np.testing.assert_allclose(gamma.sum(1), 1)
    x, parts = torch.tensor(pd.read_csv(data).to_numpy()), parameters["components"]
    log_joint = np.stack(
        [
            math.log(part["weight"])
            + torch.distributions.MultivariateNormal(
                torch.tensor(list(part["mean"].values()), dtype=x.dtype),
                torch.tensor(part["covariance"], dtype=x.dtype),
            )
            .log_prob(x)
            .numpy()
            for part in parts
        ]
    )
    joint = np.exp(log_joint)
    np.testing.assert_allclose(gamma, (joint / joint.sum(0)).T, atol=1e-8)
    assert [part["weight"] for part in parts] == sorted((part["weight"] for part in parts), reverse=True)
    bound = pd.read_csv(out / "bound.csv")
    assert bound["nats_per_item"].is_monotonic_increasing or bound["nats_per_item"].diff().min() > -1e-12
    assert bound["iteration"].tolist() == list(range(1, len(bound) + 1))
    assert parameters["bound"]["nats_per_item"] == bound["nats_per_item"].iloc[-1]
    assert np.log(joint.sum(0)).mean() == pytest.approx(bound["nats_per_item"].iloc[-1], abs=1e-5)
    assert parameters["bound"]["converged"] is True
    assert parameters["settings"]["seed"] == 3


def test_the_same_seed_writes_the_same(data, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        call(data, "--components", 4, "--restarts", 1, "--initial", "random", "--seed", seed, "--out", tmp_path / name)
    for name in ("labels.csv", "bound.csv", "parameters.json", "mixture.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a/bound.csv").read_bytes() != (tmp_path / "c/bound.csv").read_bytes()


def test_degrees_of_freedom_are_recovered_and_printed(tmp_path):
    x = np.random.default_rng(0).standard_t(3, (20_000, 1)) * 2 + 10
    pd.DataFrame(x, columns=["x"]).to_csv(tmp_path / "x.csv", index=False)
    options = ["--likelihood", "student-t", "--components", 1, "--restarts", 1, "--tol", 1e-11]
    printed = call(tmp_path / "x.csv", *options, "--out", tmp_path / "o").stdout
    (part,) = results(tmp_path / "o")[1]["components"]
    df, location, scale = scipy.stats.t.fit(x)
    assert part["degrees_of_freedom"] == pytest.approx(df, rel=2e-3)
    assert part["location"]["x"] == pytest.approx(location, abs=2e-3)
    assert part["scale_matrix"][0][0] == pytest.approx(scale**2, rel=2e-3)
    assert "ν" in printed
    assert f"{part['degrees_of_freedom']:.4g}" in printed
    assert (tmp_path / "o/mixture.png").exists()


@pytest.mark.parametrize(
    ("options", "draw", "key", "expected"),
    [
        (["--likelihood", "poisson"], lambda rng, z: rng.poisson(2 + 18 * z), "rate", [2, 20]),
        (
            ["--likelihood", "bernoulli"],
            lambda rng, z: rng.random(z.shape) < 0.05 + 0.9 * z,
            "probability",
            [0.05, 0.95],
        ),
        (
            ["--likelihood", "binomial", "--trials", "20"],
            lambda rng, z: rng.binomial(20, 0.1 + 0.7 * z),
            "probability",
            [0.1, 0.8],
        ),
    ],
)
def test_counts(tmp_path, options, draw, key, expected):
    rng = np.random.default_rng(0)
    z = (np.arange(6000) % 3 == 2)[:, None].astype(float)
    values = draw(rng, np.tile(z, (1, 8))).astype(int)
    pd.DataFrame(values, columns=list("abcdefgh")).to_csv(tmp_path / "x.csv", index=False)
    printed = call(tmp_path / "x.csv", *options, "--components", 2, "--out", tmp_path / "out").stdout
    assert "no picture: the data have 8 columns" in printed
    labels, parameters = results(tmp_path / "out")
    assert (labels["label"] == z[:, 0]).mean() > 0.99
    for part, value in zip(parameters["components"], expected, strict=True):
        np.testing.assert_allclose(list(part[key].values()), value, rtol=0.25)
    assert not (tmp_path / "out/mixture.png").exists()


def test_categories_of_one_column_are_drawn(tmp_path):
    (tmp_path / "x.csv").write_text("kind\n" + "0\n1\n2\n2\n" * 20)
    call(
        tmp_path / "x.csv", "--likelihood", "categorical", "--categories", 3, "--components", 1, "--out", tmp_path / "o"
    )
    _, parameters = results(tmp_path / "o")
    assert parameters["components"][0]["probabilities"]["kind"] == pytest.approx([0.25, 0.25, 0.5])
    assert (tmp_path / "o/mixture.png").stat().st_size > 5000


def test_weights_count_rows_as_often(tmp_path):
    frame, _ = two_groups(120)
    frame["w"] = np.arange(120) % 3
    frame.to_csv(tmp_path / "w.csv", index=False)
    frame.loc[frame.index.repeat(frame["w"])].drop(columns="w").to_csv(tmp_path / "repeated.csv", index=False)
    call(tmp_path / "w.csv", "--weights", "w", "--components", 2, "--out", tmp_path / "a", "--tol", 1e-10)
    call(tmp_path / "repeated.csv", "--components", 2, "--out", tmp_path / "b", "--tol", 1e-10)
    (labels, a), (_, b) = results(tmp_path / "a"), results(tmp_path / "b")
    assert len(labels) == 120
    assert a["columns"] == ["length [cm]", "width"]
    assert a["total_weight"] == b["items"]
    assert a["bound"]["nats_per_item"] == pytest.approx(b["bound"]["nats_per_item"], rel=1e-9)
    for one, other in zip(a["components"], b["components"], strict=True):
        np.testing.assert_allclose(one["covariance"], other["covariance"], rtol=1e-4, atol=1e-6)


def test_hdf5_and_chosen_columns(data, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = pd.read_csv(data).to_numpy()
        file["b"] = np.zeros((3, 3))
    options = ["--components", 2, "--covariance", "diagonal", "--no-plot"]
    call(tmp_path / "x.h5", "--dataset", "a", "--columns", "x1", *options, "--out", tmp_path / "one")
    call(data, "--columns", "width", *options, "--out", tmp_path / "two")
    assert (tmp_path / "one/labels.csv").read_bytes() == (tmp_path / "two/labels.csv").read_bytes()
    assert not (tmp_path / "one/mixture.png").exists()


def test_no_convergence_is_one_line_on_stderr(data, tmp_path):
    result = call(data, *K2, "--iterations", 2, "--initial", "random", "--out", tmp_path / "out")
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: after 2 iterations the evidence still rises")
    assert results(tmp_path / "out")[1]["bound"] | {"nats_per_item": 0, "nats": 0} == {
        "nats_per_item": 0,
        "nats": 0,
        "iterations": 2,
        "converged": False,
    }


K2 = ["--components", "2"]
BAD = {
    "text": ("a,b\n1,x\n", K2, "column 'b' holds text"),
    "empty": ("", K2, "is empty"),
    "no rows": ("a,b\n", K2, "no rows below its header"),
    "infinite": ("a,b\n1,2\ninf,3\n", K2, "'a' is infinite in row 1"),
    "all missing": ("a,b\n1,2\n,NA\n", K2, "row 1 (counted from 0) has no value"),
    "ragged": ("a,b\n1,2\n3\n", K2, "line 3 has 1 cells"),
    "unknown column": ("a,b\n1,2\n", [*K2, "--columns", "a,c"], "no column 'c'"),
    "negative counts": ("a\n1\n-2\n", [*K2, "--likelihood", "poisson"], "whole numbers from 0, but x goes from -2"),
    "fractions": ("a\n1\n1.5\n", [*K2, "--likelihood", "poisson"], "not all of them whole"),
    "above n": (
        "a\n1\n4\n",
        [*K2, "--likelihood", "binomial", "--trials", "3"],
        "from 0 up to 3, but x goes from 1 to 4",
    ),
    "above 1": ("a\n1\n2\n", [*K2, "--likelihood", "bernoulli"], "must lie in [0, 1]"),
    "unknown code": ("a\n1\n3\n", [*K2, "--likelihood", "categorical", "--categories", "3"], "up to 2"),
    "no trials": ("a\n1\n", [*K2, "--likelihood", "binomial"], "give trials (--trials)"),
    "bad trials": ("a\n1\n", [*K2, "--likelihood", "binomial", "--trials", "0"], "trials must be at least 1"),
    "covariance": ("a\n1\n", [*K2, "--covariance", "round"], "but is 'round'"),
    "foreign option": (
        "a\n1\n",
        [*K2, "--likelihood", "poisson", "--covariance", "full"],
        "which is for gaussian, student-t",
    ),
    "likelihood": ("a\n1\n", [*K2, "--likelihood", "normal"], "choose one of gaussian,"),
    "K < 1": ("a\n1\n", ["--components", "0"], "num_components must be at least 1"),
    "negative weights": ("a,w\n1,1\n2,-1\n", [*K2, "--weights", "w"], "'w' is -1 in row 1"),
    "no weights": ("a,w\n1,0\n2,0\n", [*K2, "--weights", "w"], "must not all be 0"),
    "no such weights": ("a\n1\n", [*K2, "--weights", "w"], "no column 'w'"),
    "tol": ("a\n1\n", [*K2, "--tol", "-1"], "tol must be at least 0"),
    "iterations": ("a\n1\n", [*K2, "--iterations", "0"], "iterations must be at least 1"),
    "restarts": ("a\n1\n", [*K2, "--restarts", "0"], "restarts must be at least 1"),
    "initial": ("a\n1\n", [*K2, "--initial", "kmeans"], "initial must be one of"),
    "floor": ("a\n1\n", [*K2, "--floor", "-1"], "floor must be"),
    "collapse": ("a\n1\n1\n", [*K2, "--floor", "0"], "use a larger floor"),
    "device": ("a\n1\n", [*K2, "--device", "tpu"], "unknown device"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_and_leave_nothing_behind(tmp_path, case):
    text, options, message = BAD[case]
    (tmp_path / "x.csv").write_text(text)
    assert message in call(tmp_path / "x.csv", *options, "--out", tmp_path / "new/out", code=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_mistakes_about_files(data, tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.zeros((1, 2, 3, 4, 1))
    assert "does not exist" in call(tmp_path / "no.csv", *K2, "--out", tmp_path / "o", code=1).stderr
    assert "no two-dimensional" in call(tmp_path / "x.h5", *K2, "--out", tmp_path / "o", code=1).stderr
    wrong_rank = call(tmp_path / "x.h5", *K2, "--dataset", "images", "--out", tmp_path / "o", code=1).stderr
    assert "give two axes" in wrong_rank
    (tmp_path / "mine").mkdir()
    assert "exists already" in call(data, *K2, "--out", tmp_path / "mine", code=1).stderr
    assert not list((tmp_path / "mine").iterdir())
    assert "cannot write" in call(data, *K2, "--out", data / "inside", code=1).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "x.h5"]


def test_usage_errors_have_exit_code_2(data):
    assert "--components" in call(data, code=2).output
    assert "--components" in call(data, "--components", "two", code=2).output
    assert "--seed" in call(data, *K2, "--seed", "-1", code=2).output


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing(data, tmp_path):
    command = f"ulimit -f 4; {sys.executable} -m pnem.cli em {data} --components 2 --out {tmp_path / 'out'}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("error: cannot write")
    assert not list(tmp_path.iterdir())


def test_a_directory_is_whole_or_absent(tmp_path):
    def interrupted():
        with new_directory(tmp_path / "deep/er/out") as directory:
            (directory / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    with new_directory(tmp_path / "deep/out") as directory:
        (directory / "file").write_text("whole")
        assert not (tmp_path / "deep/out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(RunError, match="exists already"), new_directory(tmp_path / "deep/out"):
        pass


class TestComponents:
    @pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
    def test_a_normal_is_described_by_its_moments(self, covariance):
        normal = make_likelihood("gaussian", covariance=covariance)
        matrix = {"diagonal": [[4.0, 0], [0, 9]], "spherical": [[4.0, 0], [0, 4]]}.get(covariance, [[4.0, 1], [1, 9]])
        psi = normal.psi(torch.tensor([12.3456, 0.0]).double(), torch.tensor(matrix).double())
        described = describe_component(normal, psi, ["a", "b"])
        assert described.parameters["mean"] == pytest.approx({"a": 12.3456, "b": 0})
        np.testing.assert_allclose(described.parameters["covariance"], matrix, atol=1e-12)
        assert described.cells[0] == "12.35 ± 2.00"

    def test_categories_beyond_four_name_the_likeliest(self):
        for count, cell in ((3, "0.25 0.25 0.50"), (6, "5 (0.50)")):
            p = torch.full((count,), 0.5 / (count - 1), dtype=torch.float64)
            p[-1] = 0.5
            described = describe_component(make_likelihood("categorical", categories=count), p.log(), ["a"])
            assert described.parameters["probabilities"]["a"] == pytest.approx(p.tolist())
            assert described.cells == [cell]

    def test_required_options_are_options(self):
        for kind in LIKELIHOODS.values():
            assert set(kind.required) <= set(kind.options)
        with pytest.raises(ModelError, match="unknown likelihood"):
            make_likelihood("cauchy")


def test_tables_fit_a_narrow_terminal(data, tmp_path):
    frame = pd.read_csv(data)
    pd.concat([frame.add_suffix(f" {i}") for i in range(4)], axis=1).to_csv(tmp_path / "wide.csv", index=False)
    printed = call(tmp_path / "wide.csv", *K2, "--covariance", "diagonal", "--out", tmp_path / "o").stdout
    assert "4 more columns are in parameters.json" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 120


def test_missing_cells_are_marginalised(tmp_path):
    frame, group = two_groups(600)
    frame.iloc[::4, 0] = np.nan
    frame.to_csv(tmp_path / "x.csv", index=False)
    call(tmp_path / "x.csv", *K2, "--out", tmp_path / "o")
    labels, parameters = results(tmp_path / "o")
    assert (labels["label"] == group).mean() > 0.98
    assert list(parameters["components"][1]["mean"].values()) == pytest.approx([6, 4], abs=0.3)
