"""What inference found, for ArviZ: the values, the names, and that both majors of ArviZ take them without a warning."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import CLASSICAL, MODELS, PROPER, STRATEGIES, factors, images, items, pair
from fitting import SETTINGS, SHAPE, arrays, splits
from test_conformance_terms import quietly

import pnem
from pnem.diagnostics import inference_data as adapter
from pnem.diagnostics import terms_at, to_arviz
from pnem.errors import ModelError, RunError, StrategyError
from pnem.inference import NUTS, RNNEM, VAE, ClassicalEM, GradientEM, Posterior, importance_weighted_bound
from pnem.models import Bernoulli, SpatialMixture, decoders

WORKFLOW = Path(__file__).with_name("arviz_workflow.py")


def exact(D=20):
    """Factor analysis of D pixels, where q(θ) is p(θ | x)."""
    model = factors(C=2, M=2, D=D)
    x = model.decode(torch.randn(3, 1, 2)).squeeze(1).detach() + torch.randn(3, D, 2)
    return model, ClassicalEM(model), x


def sampled(draws=20, B=2):
    model = MODELS["owned Normal"](proper=True)
    strategy = NUTS(model, chains=2, warmup=10, draws=draws, max_tree_depth=3)
    x = images(B)
    return strategy, quietly(strategy.infer, x), x


def value(data, group, name):
    return torch.from_numpy(data[group][name].values)


@pytest.mark.usefixtures("float64")
def test_draws_of_an_exact_posterior():
    model, strategy, x = exact()
    posterior = strategy.infer(x)
    data = to_arviz(posterior, x, strategy=strategy, chains=3, draws=400)
    theta = value(data, "posterior", "theta")
    assert data["posterior"]["theta"].dims == ("chain", "draw", "image", "component", "latent")
    assert theta.shape == (3, 400, 3, 1, 2)
    assert theta.dtype == torch.float64
    flat, deviation = theta.flatten(0, 1), posterior.q.variance.sqrt()
    assert bool(((flat.mean(0) - posterior.q.mean).abs() < 4.5 * deviation / 1200**0.5).all())
    assert bool(((flat.std(0) / deviation - 1).abs() < 4.5 / 2400**0.5).all())
    per_pixel = model.log_joint(
        x[:, None].expand(3, 1200, 20, 2).reshape(-1, 20, 2), flat.transpose(0, 1).flatten(0, 1)
    )
    expected = per_pixel.logsumexp(-2).reshape(3, 3, 400, 20).permute(1, 2, 0, 3)
    torch.testing.assert_close(value(data, "log_likelihood", "x"), expected.detach())
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "image", "pixel")
    torch.testing.assert_close(value(data, "observed_data", "x"), x)
    # At the exact posterior every importance weight is p(x).
    stats = data["sample_stats"]
    assert bool((value(data, "sample_stats", "elbo").std((0, 1)) < 1e-9).all())
    log_marginal = importance_weighted_bound(model, strategy, x, samples=2, posterior=posterior).log_marginal
    torch.testing.assert_close(value(data, "sample_stats", "elbo")[0, 0], log_marginal)
    np.testing.assert_allclose(stats["lp"], stats["log_prior"] + stats["log_evidence"])
    # What is predicted has the moments of p(x' | x) = N(W m + b, W V Wᵀ + Σ).
    predicted = value(data, "posterior_predictive", "x").flatten(0, 1).flatten(-2)
    linear = model.decoder.linear
    covariance = posterior.q.base_dist.covariance_matrix.reshape(3, 2, 2)
    mean = (posterior.theta[:, 0] @ linear.weight.T + linear.bias).detach()
    variance = torch.einsum("im,bmn,in->bi", linear.weight, covariance, linear.weight) + 1
    error = (variance / 1200).sqrt().detach()
    assert bool(((predicted.mean(0) - mean).abs() < 4.5 * error).all())
    assert bool(((predicted.var(0) / variance - 1).abs() < 4.5 * (2 / 1200) ** 0.5).all())


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("strategy_name", sorted(PROPER))
def test_every_strategy_with_a_density(strategy_name, model_name):
    model, strategy = pair(model_name, strategy_name)
    x = images(2)
    posterior = quietly(strategy.infer, x)
    data = to_arviz(posterior, x, strategy=strategy, chains=2, draws=3, responsibilities="draws")
    theta, gamma = value(data, "posterior", "theta"), value(data, "responsibilities", "gamma")
    assert theta.dtype == gamma.dtype == torch.float32
    assert data["responsibilities"]["gamma"].dims == ("chain", "draw", "image", "component", "pixel")
    for c in range(2):
        for d in range(3):
            torch.testing.assert_close(gamma[c, d], model.responsibilities(x, theta[c, d]).detach())
            log_evidence = model.log_evidence(x, theta[c, d]).detach()
            torch.testing.assert_close(value(data, "log_likelihood", "x")[c, d].sum(-1), log_evidence)
            state = strategy.evaluate(strategy.init(x), theta[c, d], x)._replace(distribution=posterior.q)
            terms = terms_at(strategy, state)
            for name in ("elbo", "expected_log_joint", "divergence", "reconstruction"):
                found = value(data, "sample_stats", name)[c, d]
                torch.testing.assert_close(found, getattr(terms, name).detach(), rtol=1e-5, atol=1e-4)
    log_weight = value(data, "sample_stats", "lp") - posterior.q.log_prob(theta).detach()
    torch.testing.assert_close(value(data, "sample_stats", "elbo"), log_weight, rtol=1e-5, atol=1e-4)
    has_trace = posterior.trace is not None and posterior.trace.location is not None
    assert ("iterations" in data) == has_trace
    if has_trace:
        iterations = data["iterations"]
        assert iterations["elbo"].dims == ("iteration", "image")
        assert list(iterations["iteration"].values) == list(range(1, len(posterior.trace.theta) + 1))
        np.testing.assert_allclose(iterations["log_evidence"][-1], posterior.log_evidence, rtol=1e-5)


@pytest.mark.usefixtures("float64")
def test_images_are_predicted_as_the_model_generates_them():
    """Ownership included: p(z | θ) of the declared model, by enumeration."""
    model = MODELS["owned Bernoulli"](proper=True)
    strategy, x, theta = GradientEM(model, iterations=1), images(2), 3 * torch.randn(2, 3, 5)
    posterior = strategy.infer(x, keep_trace=False)._replace(theta=theta, q=dist.Delta(theta, event_dim=2))
    data = to_arviz(posterior, x, strategy=strategy, width=1e-6, draws=500)
    psi = model.decode(posterior.theta)
    weights = (model.log_mixing[:, None] - model.ownership * model.log_unowned(psi)).softmax(-2)
    expected = (weights[..., None] * psi.sigmoid()).sum(-3).detach()
    plain = psi.sigmoid().mean(-3)
    found = value(data, "posterior_predictive", "x")
    assert set(found.unique().tolist()) == {0.0, 1.0}
    error = (expected * (1 - expected) / 2000).sqrt()
    assert bool(((found.mean((0, 1)) - expected).abs() < 4.5 * error).all())
    assert bool(((found.mean((0, 1)) - plain).abs() > 4.5 * error).any())
    gamma = model.responsibilities(x, theta).detach()
    torch.testing.assert_close(value(data, "responsibilities", "gamma"), gamma, rtol=0, atol=1e-4)
    assert data["responsibilities"]["gamma"].dims == ("image", "component", "pixel")


@pytest.mark.usefixtures("float64")
def test_a_sampler_has_its_own_chains():
    strategy, posterior, x = sampled()
    data = to_arviz(posterior, x, strategy=strategy)
    torch.testing.assert_close(value(data, "posterior", "theta"), posterior.q.draws)
    diverging = data["sample_stats"]["diverging"]
    assert diverging.dims == ("chain", "draw")
    assert diverging.dtype == bool
    np.testing.assert_array_equal(diverging, posterior.q.diverging)
    theta = posterior.q.draws.flatten(0, 1)
    lp = strategy.model.log_evidence(x.repeat(40, 1, 1), theta.flatten(0, 1)).reshape(40, 2)
    lp = (lp + strategy.model.log_prior(theta)).detach().reshape(2, 20, 2)
    torch.testing.assert_close(value(data, "sample_stats", "lp"), lp)
    # Draws without a density have no log q(θ).
    assert not {"elbo", "divergence", "theta_entropy"} & set(data["sample_stats"])
    assert "iterations" not in data
    for options in ({"chains": 2}, {"draws": 20}, {"width": 0.1}):
        with pytest.raises(
            StrategyError, match=r"NUTS has chains and draws of its own, \(2, 20\): leave chains, draws"
        ):
            to_arviz(posterior, x, strategy=strategy, **options)
    together = Posterior.concatenate([posterior, posterior])
    twice = to_arviz(together, torch.cat([x, x]), strategy=strategy)
    torch.testing.assert_close(value(twice, "posterior", "theta"), posterior.q.draws.repeat(1, 1, 2, 1, 1))
    np.testing.assert_array_equal(twice["sample_stats"]["diverging"], posterior.q.diverging)
    shorter = quietly(NUTS(strategy.model, chains=2, warmup=5, draws=10, max_tree_depth=2).infer, x)
    with pytest.raises(StrategyError, match=r"different numbers of chains and draws, \[\(2, 10\), \(2, 20\)\]"):
        to_arviz(Posterior.concatenate([posterior, shorter]), torch.cat([x, x]), strategy=strategy)


@pytest.mark.usefixtures("float64")
def test_divergences_are_those_that_pyro_counts():
    """A funnel: pixels whose log-rate is θ, far from where a step of the adapted size can go."""
    model = MODELS["owned Normal"](proper=True)
    with torch.no_grad():
        model.decoder(torch.zeros(1, 3, 5))
        for parameter in model.decoder.parameters():
            parameter.mul_(20)
    strategy = NUTS(model, chains=2, warmup=2, draws=30, max_tree_depth=2)
    found = strategy.sample(images(1))
    assert found.diverging.shape == (2, 30)
    assert found.divergences == int(found.diverging.sum()) > 0


def test_a_delta_takes_a_width():
    model = MODELS["tied Bernoulli"]()
    strategy, x = RNNEM(model, iterations=3), images(2)
    posterior = strategy.infer(x)
    with pytest.raises(StrategyError, match=r"q\(θ\) is a Delta.*in the posterior itself.*elbo_terms.*give width"):
        to_arviz(posterior, x, strategy=strategy)
    data = to_arviz(posterior, x, strategy=strategy, width=0.3, draws=500)
    theta = value(data, "posterior", "theta").flatten(0, 1)
    assert bool(((theta.mean(0) - posterior.theta).abs() < 4.5 * 0.3 / 2000**0.5).all())
    assert bool(((theta.std(0) / 0.3 - 1).abs() < 4.5 / 4000**0.5).all())
    assert data.attrs["q"] == "Delta"
    assert data.attrs["draws"] == "independent, of a normal around q with width 0.3"
    assert data["iterations"]["elbo"].attrs == {"long_name": "plug-in log p(x, θ)", "units": "nats"}
    np.testing.assert_allclose(data["iterations"]["elbo"][-1], posterior.elbo_trace[-1], rtol=1e-5)


def test_arviz_loads_when_it_is_first_used():
    heavy = {"arviz", "xarray", "lightning", "matplotlib"}
    code = f"import sys, pnem.diagnostics; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_names_and_attributes():
    model = MODELS["owned Normal"](proper=True)
    strategy, x = STRATEGIES["iterative vi"](model), images(2)
    data = to_arviz(strategy.infer(x), x, strategy=strategy, draws=2)
    sizes = {"chain": 4, "draw": 2, "image": 2, "component": 3, "latent": 5, "pixel": 12, "channel": 1, "iteration": 3}
    for group in ("posterior", "posterior_predictive", "log_likelihood", "sample_stats", "responsibilities"):
        assert all(sizes[dim] == size for dim, size in data[group].sizes.items())
        assert set(data[group].coords) == set(data[group].sizes)
        assert data[group].attrs == data.attrs
    assert dict(data["iterations"].sizes) == {"iteration": 3, "image": 2}
    assert data["sample_stats"]["elbo"].attrs == {"long_name": "log p(x, θ) − log q(θ)", "units": "nats"}
    assert data.attrs["strategy"] == "IterativeVI"
    assert data.attrs["q"] == "Normal"
    assert data.attrs["draws"] == "independent, of q"
    assert data.attrs["inference_library_version"] == version("pnem")
    assert data.attrs["image_shape"] == [3, 4, 1]


@pytest.mark.usefixtures("float64")
def test_missing_values_are_left_out():
    model, strategy, x = exact(D=1)
    x[:, 0, 1] = torch.nan
    posterior = strategy.infer(x)
    data = to_arviz(posterior, x, strategy=strategy, draws=5)
    theta = value(data, "posterior", "theta")[1, 2]
    torch.testing.assert_close(value(data, "sample_stats", "log_evidence")[1, 2], model.log_evidence(x, theta).detach())
    assert bool(value(data, "posterior_predictive", "x").isfinite().all())


def test_constant_decoders_have_as_many_pixels_as_there_are():
    model = CLASSICAL["poisson"](prior="standard_normal", mixing="uniform")
    x = items("poisson", B=1, D=7).float()
    strategy = NUTS(model, chains=1, warmup=5, draws=8, max_tree_depth=3)
    data = to_arviz(quietly(strategy.infer, x), x, strategy=strategy)
    assert data["posterior_predictive"]["x"].shape == (1, 8, 1, 7, 2)
    assert data["responsibilities"]["gamma"].shape == (1, 3, 7)
    predicted = value(data, "posterior_predictive", "x")
    assert torch.equal(predicted, predicted.round())


@pytest.mark.slow
def test_a_run_infers_its_images():
    model = SpatialMixture(decoders.Linear(3, SHAPE), Bernoulli(), 1, prior="standard_normal")
    run = pnem.fit(model, VAE(model), splits(), **SETTINGS | {"epochs": 1})
    x = arrays(5)[0][0]
    torch.manual_seed(4)
    found = to_arviz(run, x.numpy(), draws=3)
    torch.manual_seed(4)
    flat = x.flatten(1, 2)
    expected = to_arviz(run.infer(x), flat, strategy=run.strategy, draws=3)
    for group, name in (("posterior", "theta"), ("posterior_predictive", "x"), ("observed_data", "x")):
        np.testing.assert_array_equal(found[group][name], expected[group][name])
    torch.testing.assert_close(value(found, "observed_data", "x"), flat)
    with pytest.raises(RunError, match=r"a run has a strategy.*run.using\(strategy\)"):
        to_arviz(run, x, strategy=run.strategy)


def test_bad_arguments():
    model = MODELS["tied Bernoulli"]()
    strategy, x = VAE(SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 1, prior="standard_normal")), images(2)
    posterior = strategy.infer(x)
    for options, message in (
        ({"draws": 0}, "draws must be at least 1"),
        ({"chains": 1.5}, "chains must be at least 1, and whole"),
        ({"responsibilities": "all"}, 'responsibilities must be "mean" or "draws", but is \'all\''),
        ({"width": 0.1}, "width is for strategies whose"),
        ({"strategy": None}, "does not know how it was inferred: give strategy"),
        ({"strategy": RNNEM(model)}, r"need \(B, K, M\) = \(2, 3, 5\).*the strategy that inferred them"),
    ):
        with pytest.raises(StrategyError, match=message):
            to_arviz(posterior, x, **{"strategy": strategy} | options)
    with pytest.raises(StrategyError, match=r"need \(B, K, M\) = \(3, 1, 5\)"):
        to_arviz(posterior, images(3), strategy=strategy)
    with pytest.raises(ModelError, match="12"):
        to_arviz(posterior, images(2, (3, 3, 1)), strategy=strategy)
    with pytest.raises(StrategyError, match="a Run or a Posterior, but is of type VAE"):
        to_arviz(strategy, x)
    flat = SpatialMixture(decoders.Linear(5, (3, 4, 1)), Bernoulli(), 3)
    with pytest.raises(StrategyError, match="drawing θ needs a proper prior"):
        to_arviz(RNNEM(flat).infer(x), x, strategy=RNNEM(flat), width=0.1)


def python_with_arviz_1(folder):
    """An interpreter with ArviZ 1.x: the one that is named, this one, or one made for the test; skips without any."""
    if named := os.environ.get("PNEM_ARVIZ1_PYTHON"):
        return named
    if int(version("arviz").partition(".")[0]) >= 1:
        return sys.executable
    new_enough = "import sys; sys.exit(sys.version_info < (3, 12))"
    versions = sorted(Path.home().glob(".pyenv/versions/3.1[2-9].*/bin/python"))
    names = [shutil.which(f"python3.{minor}") for minor in range(12, 20)] + [str(path) for path in versions]
    for name in filter(None, names):
        if subprocess.run([name, "-c", new_enough], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("ArviZ 1.x needs Python 3.12 or newer, and there is none")
    subprocess.run([name, "-m", "venv", folder], check=True)
    python = str(folder / "bin" / "python")
    packages = ["arviz==1.*", "matplotlib", "h5netcdf", "h5py"]
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:", *packages]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"ArviZ 1.x cannot be installed here: {made.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of an exact posterior and of NUTS for the same images and model, and of a strategy with a trace."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    model, strategy, x = exact()
    sampler = NUTS(model, chains=2, warmup=50, draws=200, max_tree_depth=4)
    iterative = STRATEGIES["iterative vi"](MODELS["owned Bernoulli"](proper=True))
    small = images(2)
    found = {
        "exact": to_arviz(strategy.infer(x), x, strategy=strategy),
        "nuts": to_arviz(quietly(sampler.infer, x), x, strategy=sampler),
        "iterative": to_arviz(iterative.infer(small), small, strategy=iterative, responsibilities="draws"),
    }
    for name, data in found.items():
        data.to_netcdf(folder / f"{name}.nc")
    return found, [str(folder / f"{name}.nc") for name in found]


def check_workflow(python, saved, tmp_path):
    found, files = saved
    home = {"MPLCONFIGDIR": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [python, str(WORKFLOW), adapter.__file__, *files]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | home)
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout)
    for name, data in found.items():
        theta = data["posterior"]["theta"]
        assert len(results[name]["rows"]) == theta[0, 0].size
        # All that the draws of one image know of its pixels is in the weights 1 / p(x_i | θ).
        log_likelihood = value(data, "log_likelihood", "x").double().flatten(0, 1)
        expected = (np.log(len(log_likelihood)) - (-log_likelihood).logsumexp(0)).sum().item()
        assert results[name]["elpd"] == pytest.approx(expected, abs=0.2)
    for name in ("exact", "nuts"):
        assert results[name]["r_hat"] < 1.05
        assert results[name]["k_hat"] < 0.7
    assert results["exact"]["elpd"] == pytest.approx(results["nuts"]["elpd"], abs=0.5)
    assert sorted(results["compare"]) == ["exact", "nuts"]
    return results


@pytest.mark.slow
def test_arviz_takes_it_without_a_warning(saved, tmp_path):
    results = check_workflow(sys.executable, saved, tmp_path)
    assert results["version"] == version("arviz")
    assert results["type"] == ("InferenceData" if results["version"].startswith("0.") else "DataTree")


@pytest.mark.slow
def test_arviz_1_takes_it_without_a_warning(saved, tmp_path):
    results = check_workflow(python_with_arviz_1(tmp_path / "venv"), saved, tmp_path)
    assert results["version"].startswith("1.")
    assert results["type"] == "DataTree"
