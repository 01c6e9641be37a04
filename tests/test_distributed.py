"""Several processes: what one would find, found by all; and whatever happens to one of them, all end."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import processes
import pytest
import torch
from fitting import arrays, data_file, splits, weights
from processes import EM_CASES, RecordedFlips, em_data, em_fit, em_on_shares, harmed, train, within

import pnem
from pnem.data import ImageDataset
from pnem.distributed import in_processes
from pnem.errors import DataError, DeviceError, RunError, StrategyError
from pnem.inference import ELBO, RNNEM, ClassicalEM
from pnem.loading import batches
from pnem.models import Bernoulli, SpatialMixture, decoders

CPUS = [torch.device("cpu")] * 2
two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes need two CPU cores")


@pytest.fixture(autouse=True)
def _no_hanging(request):
    with within(600 if request.node.get_closest_marker("slow") else 200):
        yield
    assert not multiprocessing.active_children()


def assert_close_runs(a, b):
    ours, theirs = (run.history.drop(columns="seconds") for run in (a, b))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=False, rtol=1e-12, atol=1e-13)
    for x, y in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-13)


def test_the_shares_of_all_processes_are_the_batches_of_one():
    data = ImageDataset(*arrays(27))
    for seed in (4, None):
        joint = list(batches(data, 8, shuffle_seed=seed).batch_sampler)
        shares = [batches(data, 8, shuffle_seed=seed, share=(rank, 4)) for rank in range(4)]
        for rank, loader in enumerate(shares):
            taken = list(loader.batch_sampler)
            assert taken == [batch[rank::4] for batch in joint if len(batch) > rank]
            assert len(loader) == len(taken)
    # Of the last 3 images, the fourth process has none.
    assert [len(loader) for loader in shares] == [4, 4, 4, 3]


@two_cores
@pytest.mark.parametrize(
    "settings",
    [{"gradient_clip": 0.01}, pytest.param({"truncation": 2}, marks=pytest.mark.slow)],
    ids=["clipped", "truncated"],
)
def test_two_processes_learn_what_one_does_with_the_joint_batch(tmp_path, settings):
    one = train(**settings)
    two = train(tmp_path / "run", devices=2, **settings)
    assert_close_runs(one, two)
    assert_close_runs(pnem.load(tmp_path / "run"), one)
    written = pd.read_csv(tmp_path / "run/history.csv")
    assert len(written) == 2
    assert len(list((tmp_path / "run").rglob("*.ckpt"))) == 2


@pytest.mark.slow
@two_cores
def test_two_processes_compile_and_go_on_with_what_one_has_begun(tmp_path):
    whole = train(compile=True)
    train(tmp_path / "run", epochs=1)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    # As a pnem that knew of one device only has written them.
    del settings["training"]["devices"], settings["training"]["nodes"]
    (tmp_path / "run/settings.json").write_text(json.dumps(settings))
    assert_close_runs(train(tmp_path / "run", resume=True, devices=2, compile=True), whole)


def recorded(path: Path, rank: int) -> list[str]:
    return Path(f"{path}.{rank}").read_text().splitlines()


@pytest.mark.slow
@two_cores
def test_processes_have_their_own_noise_and_repeat_it_when_resumed(tmp_path):
    settings = {"K": 3, "noise": RecordedFlips(0.3, str(tmp_path / "noise")), "devices": 2}
    whole = train(tmp_path / "whole", **settings)
    first, second = (recorded(tmp_path / "noise", rank) for rank in (0, 1))
    assert len(first) == len(second) == 6
    assert not set(first) & set(second)
    train(tmp_path / "cut", epochs=1, **settings)
    resumed = train(tmp_path / "cut", resume=True, **settings)
    assert recorded(tmp_path / "noise", 0) == 2 * first
    pd.testing.assert_frame_equal(resumed.history.drop(columns="seconds"), whole.history.drop(columns="seconds"))
    assert all(torch.equal(x, y) for x, y in zip(weights(resumed), weights(whole), strict=True))


@two_cores
@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        ("error", DataError, "^these images are broken$"),
        pytest.param("bug", LookupError, "a bug", marks=pytest.mark.slow),
        pytest.param("kill", RunError, "process 1 of 2 was killed by SIGKILL.*memory", marks=pytest.mark.slow),
    ],
)
def test_what_ends_one_process_ends_all_and_is_said(tmp_path, harm, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", devices=2, data=harmed(harm, 1, 1))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def _hears_ctrl_c():
    """As a terminal's programs do; those that a shell starts in the background ignore it."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@two_cores
@pytest.mark.usefixtures("_hears_ctrl_c")
def test_ctrl_c_ends_all_and_another_number_of_devices_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        # Asked for once step 4 is done, for which both processes have ended epoch 1.
        train(tmp_path / "run", devices=2, data=harmed("interrupt", 1, 5))
    data = {"training": ImageDataset(*arrays()), "validation": ImageDataset(*arrays())}
    assert_close_runs(train(tmp_path / "run", resume=True, data=data), train(data=data))


def test_what_cannot_be_sent_to_processes_is_refused(tmp_path):
    class Local(ELBO):
        pass

    with pytest.raises(RunError, match=r"cannot be sent to other processes.*in a module"):
        in_processes(CPUS, train, Local())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"devices": 0}, RunError, "devices must be a whole number of at least 1"),
        ({"devices": 1.5}, RunError, "devices must be"),
        ({"nodes": 0}, RunError, "nodes must be a whole number of at least 1"),
        ({"devices": 3}, RunError, "a batch of 8 cannot be divided among 3 processes.*multiple of 3"),
        ({"devices": 2, "nodes": 3}, RunError, "among 6 processes"),
        ({"devices": 4096, "batch_size": 4096}, DeviceError, r"devices=4096.*this machine has \d+ CPU cores"),
        ({"nodes": 2}, RunError, "2 machines.*torchrun --nnodes 2 --nproc-per-node 1"),
        ({"devices": 2, "batch_size": 40}, DataError, "28 images, fewer than a batch of 40"),
        ({"devices": 2, "valid_limit": 1}, DataError, "validation split has 1 images, fewer than the 2 processes"),
        ({"devices": 2, "device": "cuda:0"}, DeviceError, "cuda"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_written(tmp_path, settings, error, message):
    if settings.get("devices") == 2 and error is DataError and (os.cpu_count() or 1) < 2:
        pytest.skip("two processes need two CPU cores")
    with pytest.raises(error, match=message):
        train(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@two_cores
def test_a_prior_on_shared_mixing_weights_is_refused(tmp_path):
    model = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 3, mixing="learned", mixing_concentration=2.0)
    with pytest.raises(RunError, match="prior on the mixing weights"):
        pnem.fit(model, RNNEM(model), splits(), out=tmp_path / "run", batch_size=8, devices=2, device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("devices", [1, 3])
def test_other_processes_than_torchrun_has_started_are_refused(monkeypatch, devices):
    environment = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=r"torchrun started 2 processes.*--nproc-per-node"):
        train(devices=devices, batch_size=6)


SCRIPT = """
import sys
import torch
from fitting import weights as weights_of
from processes import train
run = train(sys.argv[1] if len(sys.argv) > 1 else None, devices=2)
torch.save((run.history, weights_of(run)), f"{sys.argv[2]}.{torch.distributed.get_rank()}")
"""


def torchrun(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=cwd, env=environment, timeout=250, capture_output=True, text=True
    )


@pytest.mark.slow
@two_cores
def test_under_torchrun_every_process_gets_the_run_and_the_first_writes_it(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    result = torchrun("script.py", tmp_path / "run", tmp_path / "found", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (history, first), (same_history, second) = (
        torch.load(f"{tmp_path}/found.{rank}", weights_only=False) for rank in (0, 1)
    )
    pd.testing.assert_frame_equal(history, same_history, check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    stored = pnem.load(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(first, weights(stored), strict=True))
    assert_close_runs(stored, train())
    start = time.monotonic()
    again = torchrun("script.py", tmp_path / "run", tmp_path / "found", cwd=tmp_path)
    assert again.returncode != 0
    assert "exists already" in again.stderr
    assert time.monotonic() - start < 200


@pytest.mark.slow
@two_cores
def test_the_command_trains_on_two_devices(tmp_path):
    data_file(tmp_path / "data.h5")
    command = [sys.executable, "-m", "pnem.cli", "train", "data.h5", "--strategy", "rnn-em", "--out", "run"]
    options = ["--batch-size", "8", "--epochs", "1", "--components", "2", "--iterations", "2", "--device", "cpu"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(
        [*command, *options, "--devices", "2"],
        cwd=tmp_path,
        env=environment,
        timeout=250,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained 1 epochs") == 1
    assert len(pnem.load(tmp_path / "run").history) == 1


@pytest.fixture(scope="module")
def em():
    """What two processes have found in cases of EM, each with its share, and what they were told of invalid input."""
    with pytest.warns() as caught:
        result = in_processes(CPUS, em_on_shares)
    return *result, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("case", EM_CASES)
@pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")
def test_em_on_shares_finds_in_every_process_what_one_finds_in_all_items(em, case):
    alone = em_fit(case, em_data(case))
    for found in em[0][case]:
        for ours, theirs in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_em_on_shares_tells_all_processes_what_is_wrong_in_one(em):
    first, second = em[1]
    assert first == second
    for message, expected in zip(first, ["infinite", "at least one item", "do not fit alike", "OnlineEM"], strict=True):
        assert expected in message


def test_the_first_process_warns_for_all(em):
    assert em[2].count("something is odd") == 1


def test_em_on_shares_needs_a_process_group():
    with pytest.raises(StrategyError, match="init_process_group"):
        ClassicalEM(processes.em_model("full")).fit(em_data("full")["x"], distributed=True)
