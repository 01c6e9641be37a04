"""The experiments that the README quotes, in a version of a minute; their numbers are measured elsewhere."""

import json
import runpy
from pathlib import Path

import pytest

from pnem.errors import RunError

SCRIPT = str(Path(__file__).parent / "benchmarks" / "sequences.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "names", "starts"),
    [
        (
            "autoencoder",
            ["RNN-EM, K = objects", "recurrent autoencoder, K = 1"],
            {"flying4-k4": "flying3-k3", "flying4-k1": "flying3-k1"},
        ),
        ("mnist", ["mnist-20", "mnist-500", "mnist-all"], {"mnist-500": "mnist-20", "mnist-all": "mnist-500"}),
        ("balls", ["RNN-EM", "R-NEM"], {}),
    ],
)
def test_an_experiment_runs_and_goes_on_where_it_was(experiment, names, starts, tmp_path, capsys):
    main = runpy.run_path(SCRIPT)["main"]
    command = [experiment, "--small", "--epochs", "1", "--out", str(tmp_path), "--threads", "1", "--device", "cpu"]
    command += ["--objects", "3", "4"] if experiment == "autoencoder" else []
    assert main(command) == 0
    found = json.loads((tmp_path / f"{experiment}.json").read_text())
    assert list(found) == names
    assert "training" in capsys.readouterr().out
    assert main(command) == 0
    assert "training" not in capsys.readouterr().out
    assert json.loads((tmp_path / f"{experiment}.json").read_text()) == found
    for later, first in starts.items():
        begun = json.loads((tmp_path / later / "settings.json").read_text())["training"]["start_from"]
        assert Path(begun).name == first


@pytest.mark.slow
def test_data_and_runs_of_other_settings_are_not_taken_for_those_asked_for(tmp_path):
    main = runpy.run_path(SCRIPT)["main"]
    command = ["autoencoder", "--objects", "3", "--epochs", "1", "--out", str(tmp_path), "--threads", "1"]
    assert main([*command, "--small"]) == 0
    with pytest.raises(SystemExit, match=r"holds \[64, 32, 32\] sequences, not \[500, 1000, 1000\]"):
        main([*command, "--train", "500"])
    with pytest.raises(RunError, match="seed = 0, but now it is 1"):
        main([*command, "--small", "--seed", "1"])
    with pytest.raises(SystemExit):
        main([*command, "--objects", "0"])
