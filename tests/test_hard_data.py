"""Data that cost digits or have no variance: numbers stay finite, and are those of the declared model."""

import pytest
import torch
from cases import COVARIANCES, mixture

from pnem.inference import ClassicalEM
from pnem.models import MultivariateNormal, StudentT

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning"),
]
SEEDED = torch.randn(1, 51, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FAR = torch.cat([SEEDED[:, 1:], torch.full_like(SEEDED[:, :1], 1e12)], 1)
HARD = {
    "duplicates": torch.ones_like(SEEDED),
    "a constant column": torch.stack([torch.arange(30.0), torch.ones(30)], -1)[None].double(),
    "fewer points than components": torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]).double(),
    "one far item": FAR,
    "one item, far in one channel": torch.cat([SEEDED, torch.tensor([[[1e12, 0.0]]]).double()], 1),
    "far from zero": SEEDED + 1e6,
    "far from zero in single precision": (SEEDED + 1e6).float(),
    "two images": FAR.expand(2, -1, -1),
}


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("hard", HARD)
def test_hard_data_give_finite_and_honest_numbers(hard, covariance, kind, missing):
    x = HARD[hard].clone()
    if missing:
        x[:, 1:-1:3, 1] = torch.nan
    model = mixture(kind(covariance), 3, mixing="per_image").to(x.dtype)
    strategy = ClassicalEM(model)
    posterior = strategy.infer(x, restarts=2)
    for value in (posterior.theta, posterior.gamma, posterior.elbo_trace, model.mixing):
        assert bool(value.isfinite().all())
    if x.dtype == torch.float64:
        torch.testing.assert_close(
            posterior.log_evidence, model.log_evidence(x, posterior.theta), rtol=1e-6, atol=1e-4 * x.shape[1]
        )


@pytest.mark.parametrize("far", [1e6, 1e12])
@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
def test_one_far_item_does_not_change_what_the_others_get(kind, far):
    """With a component for the far item, the rest is fitted as without it."""
    x = torch.cat([torch.randn(1, 200, 2), torch.full((1, 1, 2), far)], 1)
    gamma = torch.zeros(1, 2, 201)
    gamma[0, 0, :200], gamma[0, 1, 200] = 1, 1
    likelihood = kind("full")
    both = ClassicalEM(mixture(likelihood, 2), iterations=200).infer(x, gamma=gamma)
    alone = ClassicalEM(mixture(likelihood, 1), iterations=200).infer(x[:, :200])
    mean, lower = likelihood.moments(both.theta[0, 0])
    expected_mean, expected_lower = likelihood.moments(alone.theta[0, 0])
    torch.testing.assert_close(mean, expected_mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(lower, expected_lower, atol=1e-2, rtol=0)
    assert bool((both.elbo_trace.diff(dim=0) > -1e-6).all())


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("covariance", COVARIANCES)
@pytest.mark.parametrize("kind", [MultivariateNormal, StudentT])
@pytest.mark.parametrize("far", [1e5, 1e7, 1e9])
def test_clusters_far_apart_keep_their_shape(far, kind, covariance, missing):
    x = torch.cat([torch.randn(1, 300, 2), torch.randn(1, 300, 2) + far], 1)
    if missing:
        x[0, ::5, 1] = torch.nan
    model = mixture(kind(covariance), 2)
    posterior = ClassicalEM(model, iterations=100, tol=1e-9).infer(x, restarts=3)
    _, lower = model.likelihood.moments(posterior.theta[0])
    torch.testing.assert_close(lower @ lower.mT, torch.eye(2).expand(2, 2, 2), atol=0.3, rtol=0)
    assert posterior.elbo_trace[-1].item() == pytest.approx(model.log_evidence(x, posterior.theta).item(), abs=1e-2)
    assert bool((posterior.elbo_trace.diff(dim=0) > -1e-3).all())


def test_a_large_mean_loses_no_digits_in_single_precision():
    x = torch.randn(1, 500, 2)
    gamma = torch.rand(1, 2, 500).softmax(1)
    near, far = mixture(MultivariateNormal(), 2), mixture(MultivariateNormal(), 2).float()
    # Steps of 1/16 are exact in single precision at 10^6.
    x = (x * 16).round() / 16
    expected = ClassicalEM(near, iterations=5, tol=0).infer(x, gamma=gamma).log_evidence
    got = ClassicalEM(far, iterations=5, tol=0).infer((x + 1e6).float(), gamma=gamma.float()).log_evidence
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_clusters_far_apart_keep_their_scale_in_single_precision(covariance):
    x = torch.cat([torch.randn(1, 200, 2), torch.randn(1, 200, 2) + 1e4], 1).float()
    model = mixture(MultivariateNormal(covariance), 2).float()
    posterior = ClassicalEM(model).infer(x, restarts=2)
    assert posterior.theta.dtype == posterior.elbo_trace.dtype == torch.float32
    _, lower = model.likelihood.moments(posterior.theta[0])
    torch.testing.assert_close(lower @ lower.mT, torch.eye(2).float().expand(2, 2, 2), atol=0.3, rtol=0)
