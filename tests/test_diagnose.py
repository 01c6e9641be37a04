"""All diagnostics of a run: in a given time, as tables, figures and JSON, and at the command line."""

import json
import math

import pytest
import torch
from fitting import SHAPE, arrays, data_file, splits, train
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

import pnem
from pnem.cli import app
from pnem.data import ImageDataset
from pnem.diagnostics import budget as budget_module
from pnem.diagnostics import collapse, diagnose, elbo_terms
from pnem.diagnostics.budget import Budget
from pnem.errors import DataError, RunError
from pnem.inference import VAE, PyroGuide, encoders
from pnem.models import Bernoulli, SpatialMixture, decoders

SMALL = {"limit": 12, "budget": None}


@pytest.fixture(scope="module")
def rnn_em():
    return train(epochs=1)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    model = SpatialMixture(decoders.MLP(3, SHAPE, hidden=(8,)), Bernoulli(), 1, prior="standard_normal")
    strategy = VAE(model, encoder=encoders.MLP(SHAPE, hidden=(8,)))
    return pnem.fit(model, strategy, splits(), epochs=1, batch_size=8, device="cpu", progress=False)


@pytest.fixture(scope="module")
def of_rnn_em(rnn_em):
    return diagnose(rnn_em, splits(), **SMALL)


@pytest.fixture(scope="module")
def of_vae(vae):
    return diagnose(vae, splits(), **SMALL)


def printed(found, width=100):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(found)
    return captured.get()


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


class TestBudget:
    @pytest.fixture
    def clock(self, monkeypatch):
        clock = Clock()
        monkeypatch.setattr(budget_module, "time", clock)
        return clock

    def run(self, clock, budget, count, size, seconds_per_image, **options):
        done = 0
        for piece in budget.in_time(budget.pieces(count, size), **options):
            assert piece.start == done
            done = piece.stop
            clock.now += seconds_per_image * (piece.stop - piece.start)
        return done

    def test_all_is_done_without_one(self, clock):
        assert self.run(clock, Budget(None), 1000, 100, 10.0) == 1000

    @pytest.mark.parametrize("seconds_per_image", [0.01, 0.1, 0.5])
    def test_it_is_kept_and_used(self, clock, seconds_per_image):
        done = self.run(clock, Budget(100.0), 10_000, 100, seconds_per_image)
        assert clock.now <= 100.0
        assert done == 10_000 or (done + 100) * seconds_per_image > 100.0

    def test_the_first_piece_comes_in_any_case(self, clock):
        assert self.run(clock, Budget(1.0), 1000, 100, 60.0) == 10

    def test_a_part_leaves_the_rest_to_the_next(self, clock):
        budget = Budget(100.0)
        assert self.run(clock, budget, 10_000, 10, 1.0, until=0.4) == 40
        assert self.run(clock, budget, 10_000, 10, 1.0) == 60

    @pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
    def test_must_be_positive(self, seconds):
        with pytest.raises(DataError, match="positive number of seconds"):
            Budget(seconds)


def test_numbers_are_those_of_the_parts(rnn_em, of_rnn_em):
    assert of_rnn_em.images == {"trace": 12, "gap": 12, "reliability": 12}
    x = rnn_em._ours(splits()["test"][:12].x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        terms = elbo_terms(rnn_em.model, rnn_em.strategy, x)
    torch.testing.assert_close(of_rnn_em.trace.terms.elbo, terms.elbo)
    assert of_rnn_em.trace.ami is not None


def test_it_is_the_same_for_the_same_seed_and_leaves_the_random_state(rnn_em, of_rnn_em):
    state = torch.get_rng_state()
    again = diagnose(rnn_em, splits(), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.to_json() == of_rnn_em.to_json()
    assert diagnose(rnn_em, splits(), seed=1, **SMALL).to_json() != of_rnn_em.to_json()


def test_what_there_is_none_of_is_said_to_be_absent(of_rnn_em, of_vae):
    assert of_rnn_em.reliability.k_hat is None
    assert "flat" in of_rnn_em.absent["k_hat"]
    assert "Delta" in of_rnn_em.absent["calibration"]
    assert of_vae.reliability.calibration is not None
    assert "one start" in of_vae.absent["elbo_spread"]
    # Twelve images are too few to tell.
    assert "at least 30 images" in of_vae.absent["collapse"]
    for found in (of_rnn_em, of_vae):
        assert not any("not asked" in why for why in found.absent.values())


@pytest.mark.parametrize("width", [60, 100, 160])
def test_printed_it_says_what_the_numbers_are(of_rnn_em, of_vae, width):
    text = printed(of_rnn_em, width)
    assert "plug-in log p(x, θ)" in text
    assert "H[q(z)]" in text
    assert "optimality gap" in text
    assert "AMI" in text
    text = printed(of_vae, width)
    assert "plug-in" not in text
    assert "KL(q(θ) ‖ p(θ))" in text
    assert "amortisation gap" in text
    assert max(map(cell_len, text.splitlines())) <= width


def test_json_holds_the_numbers(of_vae, of_rnn_em):
    found = json.loads(of_vae.to_json())
    assert found["elbo_is_bound"] is True
    assert found["gap"]["amortisation"]["mean"] == pytest.approx(of_vae.gap.amortisation.mean)
    assert found["iterations"][-1]["elbo"] == pytest.approx(of_vae.trace.terms.elbo[-1].mean().item())
    assert found["reliability"]["median_k_hat"] == pytest.approx(of_vae.reliability.k_hat.median().item())
    assert [finding["name"] for finding in found["findings"]] == [finding.name for finding in of_vae.findings]
    assert json.loads(of_rnn_em.to_json())["gap"]["optimality"]["mean"] > 0


def test_figures_are_those_of_what_is_there(of_vae, of_rnn_em):
    every = {"elbo-terms", "trace", "inference-gap"}
    # One component divides nothing, and a Delta has no weights and no ranks.
    assert set(of_rnn_em.figures()) == every | {"entropy-maps"}
    assert set(of_vae.figures()) == every | {"k-hat", "calibration-ranks"}


def test_a_budget_takes_images_off_the_slow_parts(vae):
    data = {"test": ImageDataset(*arrays(200))}
    found = diagnose(vae, data, budget=1e-6)
    assert found.images == {"trace": 10, "gap": 10, "reliability": 10}
    assert found.absent["collapse"] == "the budget allowed 10 images, but it needs 30: raise the budget"


def test_one_image_has_no_error_bars_and_one_component_no_confidence(vae):
    text = printed(diagnose(vae, splits(), limit=1))
    assert "1 test image " in text
    assert "no standard errors: there is one image" in text
    assert "no spread of the ELBO over restarts" in text
    assert "max γ" not in text


@pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")
def test_a_guide_that_fits_every_image_is_not_unrolled_for_its_gradients(vae, monkeypatch):
    strategy = PyroGuide(vae.model, "AutoNormal", steps=2)
    monkeypatch.setattr(strategy, "unroll", lambda *_: pytest.fail("an unroll fits all images anew"))
    found = diagnose(vae.using(strategy), splits(), limit=3, budget=None)
    assert len(found.reliability.k_hat) == 3
    assert "gradient_snr" in found.absent


def test_bad_input_is_refused(rnn_em):
    with pytest.raises(DataError, match="budget=0"):
        diagnose(rnn_em, splits(), budget=0)
    with pytest.raises(DataError, match="'test'"):
        diagnose(rnn_em, {"training": splits()["training"]})
    with pytest.raises(DataError, match="limit"):
        diagnose(rnn_em, splits(), limit=0)
    with pytest.raises(DataError, match="batch_size"):
        diagnose(rnn_em, splits(), batch_size=0)
    with pytest.raises(DataError, match=r"\(4, 4, 1\)"):
        diagnose(rnn_em, splits(shape=(4, 4, 1)))
    with pytest.raises(DataError, match="data are of type Tensor"):
        diagnose(rnn_em, arrays()[0])
    for function in (diagnose, collapse):
        with pytest.raises(RunError, match="run must be a Run, but is of type RNNEM"):
            function(rnn_em.strategy, splits())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    data = data_file(folder / "data.h5")
    train(folder / "run", data=data, epochs=1)
    return folder / "run", data


class TestCommand:
    def call(self, *arguments, code=0):
        result = CliRunner().invoke(app, ["diagnose", *map(str, arguments)], env={"COLUMNS": "120"})
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result.output

    def test_prints_and_writes(self, files, tmp_path):
        figures, numbers = tmp_path / "figures", tmp_path / "found.json"
        assert "optimality gap" in self.call(*files, "--limit", 12, "--figures", figures, "--json", numbers)
        assert json.loads(numbers.read_text())["run"] == "run"
        assert {path.name for path in figures.iterdir()} == {
            "elbo-terms.png",
            "trace.png",
            "entropy-maps.png",
            "inference-gap.png",
        }

    @pytest.mark.parametrize("option", ["--figures", "--json"])
    def test_overwrites_nothing(self, files, tmp_path, option):
        there = tmp_path / "there"
        there.write_text("kept")
        assert "exists already" in self.call(*files, option, there, code=1)
        assert there.read_text() == "kept"

    def test_says_what_is_wrong(self, files):
        for option in ("--figures", "--json"):
            assert "is not a folder that can be written to" in self.call(*files, option, files[1] / "new", code=1)
        assert "positive number of seconds" in self.call(*files, "--budget", -3, code=1)
        assert "no run directory" in self.call(files[0] / "none", files[1], code=1)
        assert "Example: " in self.call("--help")
