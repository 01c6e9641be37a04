"""The variational autoencoder, against closed forms where the model is linear."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import factors, images
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from scipy.linalg import subspace_angles

import pnem
from pnem.data import ImageDataset
from pnem.errors import StrategyError
from pnem.inference import ELBO, VAE, ClassicalEM, encoders
from pnem.models import Bernoulli, DiagonalNormal, MixtureOfNormals, Normal, SpatialMixture, decoders

SHAPE = (3, 4, 1)


def textbook(prior="standard_normal", K=1, **options):
    model = SpatialMixture(decoders.MLP(5, SHAPE, hidden=(9,)), Bernoulli(), K, prior=prior)
    return model, VAE(model, encoder=encoders.MLP(SHAPE, hidden=(9,)), **options)


def rows(count=1000, seed=0):
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(2, 6)) * [[2.0], [1.0]]
    return torch.from_numpy(rng.normal(size=(count, 2)) @ loadings + 0.5 * rng.normal(size=(count, 6)) + 1)[:, None]


def train(model, strategy, x, steps=2500, lr=0.03):
    optimizer = torch.optim.Adam([*model.parameters(), *strategy.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        ELBO()(strategy, strategy.unroll(x), x).loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_linear_vae_reaches_probabilistic_pca(fitted_linear_vae):
    """Lucas et al. 2019: no local maximum of the linear VAE's ELBO is below the maximum of the likelihood."""
    x, model, strategy = fitted_linear_vae
    best = factors(isotropic=True)
    em = ClassicalEM(best, iterations=2000, tol=1e-9)
    exact = em.fit(x).elbo_trace[-1].item() / len(x)
    reached = ClassicalEM(model).infer(x).elbo_trace.mean().item()
    elbo = torch.stack([strategy.elbo(strategy.unroll(x)[-1]) for _ in range(100)]).mean().item()
    assert exact - 0.05 < reached <= exact + 1e-6
    assert exact - 0.05 < elbo <= exact + 0.01
    angles = subspace_angles(model.decoder.linear.weight.detach().numpy(), best.decoder.linear.weight.detach().numpy())
    assert angles.max() < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_linear_vae_finds_the_exact_posterior(fitted_linear_vae):
    x, model, strategy = fitted_linear_vae
    q, exact = strategy.infer(x).q, ClassicalEM(model).infer(x).q
    assert (q.mean - exact.mean).abs().max() < 0.15
    torch.testing.assert_close(q.variance.mean(0), exact.variance.mean(0), rtol=0.1, atol=0.0)


@pytest.fixture(scope="module")
def fitted_linear_vae():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    x = rows()
    model = factors(isotropic=True)
    strategy = VAE(model, encoder=encoders.Identity((1, 1, 6)))
    train(model, strategy, x)
    torch.set_default_dtype(torch.float32)
    return x, model.requires_grad_(False), strategy.requires_grad_(False).eval()


@pytest.mark.usefixtures("float64")
def test_elbo_is_the_reconstruction_less_the_divergence_of_two_normals():
    _, strategy = textbook()
    x = images(4)
    state = strategy.unroll(x)[-1]
    reconstruction = dist.Bernoulli(logits=state.psi[:, 0]).log_prob(x).sum((-2, -1))
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(state.location, state.scale), torch.distributions.Normal(0.0, 1.0)
    ).sum((-2, -1))
    torch.testing.assert_close(strategy.elbo(state), reconstruction - divergence)


@pytest.mark.usefixtures("float64")
def test_loss_of_one_component_is_pyros_mean_field_elbo():
    """With one component nothing is enumerated, so that Pyro's ELBO with closed-form KL applies."""
    model, strategy = textbook()
    x = images(4)
    torch.manual_seed(1)
    states = strategy.unroll(x)
    theta = states[-1].q.rsample()
    ours = strategy.elbo(strategy.evaluate(states[-1], theta, x)).sum()

    def plain(x):
        pyro.module("model", model)
        with pyro.plate("images", len(x), dim=-2):
            with pyro.plate("components", 1, dim=-1):
                theta = pyro.sample("theta", dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1))
            with pyro.plate("pixels", 12, dim=-1):
                pyro.sample("x", dist.Bernoulli(logits=model.decode(theta).squeeze(1)).to_event(1), obs=x)

    torch.manual_seed(1)
    stock = TraceMeanField_ELBO().differentiable_loss(plain, strategy, x)
    torch.testing.assert_close(-ours, stock)


PRIORS = {
    "standard normal": lambda: "standard_normal",
    "diagonal normal": lambda: DiagonalNormal(5),
    "mixture": lambda: MixtureOfNormals(5, 3),
}


@pytest.mark.parametrize("prior", PRIORS)
def test_training_raises_the_elbo(prior):
    model, strategy = textbook(prior=PRIORS[prior](), K=2)
    x = images(32)
    before = strategy.infer(x).elbo_trace.mean()
    train(model, strategy, x, steps=150)
    assert strategy.infer(x).elbo_trace.mean() > before + 1


def test_convolutional_encoder_and_decoder_train_by_fit():
    shape = (8, 8, 1)
    decoder = decoders.Convolutional(4, shape, hidden=(16,), channels=(8, 4))
    model = SpatialMixture(decoder, Normal(0.5), 2, prior="standard_normal", pixel_prior=0.0)
    strategy = VAE(model, encoder=encoders.Convolutional(shape, channels=(4, 8), hidden=(16,)))
    features = images(32, shape).reshape(1, 32, *shape).numpy()
    data = dict.fromkeys(("training", "validation"), ImageDataset(features, features.astype(int)))
    run = pnem.fit(model, strategy, data, epochs=15, batch_size=16, device="cpu", progress=False, learning_rate=0.01)
    assert run.history["valid_elbo"].iloc[-1] > run.history["valid_elbo"].iloc[0] + 1


def test_posterior_is_at_the_mean_of_q():
    model, strategy = textbook(K=2)
    x = images(3)
    posterior = strategy.infer(x)
    assert torch.equal(posterior.theta, posterior.q.mean)
    torch.testing.assert_close(posterior.log_evidence, model.log_evidence(x, posterior.q.mean))
    torch.testing.assert_close(posterior.gamma, model.responsibilities(x, posterior.q.mean))
    assert posterior.q.sample((7,)).shape == (7, 3, 2, 5)


def test_input_noise_is_for_training_alone():
    _, strategy = textbook(noise=pnem.inference.BitFlip(0.5))
    x = images(3)
    assert torch.equal(strategy.infer(x).q.mean, strategy.infer(x).q.mean)
    assert not torch.equal(strategy.unroll(x)[-1].location, strategy.unroll(x)[-1].location)


def test_stock_svi_raises_the_elbo_too():
    model, strategy = textbook(K=2)
    x = images(16)
    svi = SVI(model, strategy, Adam({"lr": 0.02}), pyro.infer.TraceEnum_ELBO(max_plate_nesting=2))
    losses = [svi.step(x) for _ in range(100)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 10


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VAE(SpatialMixture(decoders.Linear(5, SHAPE), Bernoulli(), 1)), 'is "flat".*standard_normal'),
        (lambda: textbook(noise=None)[1].infer(images(2), restarts=3), "depends on the image alone.*SemiAmortised"),
        (lambda: textbook()[1].infer(images(2), iterations=2), "depends on the image alone"),
        (lambda: textbook()[1].infer(images(2), gamma=torch.ones(2, 1, 12)), "depends on the image alone"),
        (
            lambda: VAE(textbook()[0], encoder=encoders.MLP((4, 4, 1))),
            r"images of shape \(4, 4, 1\), the model for \(3, 4, 1\)",
        ),
        (lambda: VAE(textbook()[0], encoder=torch.nn.Linear(12, 9)), "pnem.inference.encoders.*but is a Linear"),
        (
            lambda: VAE(SpatialMixture(decoders.Constant(1), Bernoulli(), 2, prior="standard_normal")),
            "needs a decoder of images, not Constant",
        ),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(StrategyError, match=message):
        build()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e4])
def test_encoder_output_that_is_not_finite_names_the_remedy(bad):
    _, strategy = textbook()
    with torch.no_grad():
        strategy.head.bias[-1] = bad
    for call in (strategy.infer, strategy.unroll):
        with pytest.raises(StrategyError, match=r"not finite.*learning rate.*gradient_clip"):
            call(images(2))
