"""k̂ of importance weights: known tails, the exact posterior, and weights that no tail can be fitted to."""

import math

import pytest
import torch
from cases import factors

from pnem.diagnostics import psis_k_hat
from pnem.errors import DataError
from pnem.inference import ClassicalEM
from pnem.inference.marginal_likelihood import log_weights


@pytest.mark.parametrize("k", [-0.5, 0.3, 0.7, 1.0, 2.0])
def test_the_shape_of_a_generalised_pareto_tail_is_found(k):
    weights = (torch.rand(4000, 100, dtype=torch.float64) ** -k - 1) / k
    found = psis_k_hat(weights.log())
    # The fit of a tail of n has a standard deviation of (1 + k) / √n, and a prior worth 10 weights at 0.5.
    n = 3 * 4000**0.5
    expected, deviation = (n * k + 10 * 0.5) / (n + 10), (1 + k) / n**0.5
    assert found.dtype == torch.float64
    assert found.std().item() == pytest.approx(deviation, rel=0.5)
    assert found.mean().item() == pytest.approx(expected, abs=4 * deviation / 10 + 0.03)


def test_a_wider_q_than_the_posterior_has_no_trouble_and_a_narrower_one_does():
    """q = N(0, s²) for p = N(0, 1): for s < 1 k = 1 − s²; for s > 1 the largest weight is that of θ = 0, and k = −2."""
    theta = torch.randn(4000, 50, dtype=torch.float64)
    for scale, low, high in ((2.0, -2.0, -1.5), (0.5, 0.55, 0.9)):
        draws = scale * theta
        found = psis_k_hat(-0.5 * draws.square() + 0.5 * theta.square() + math.log(scale))
        assert low < found.mean().item() < high


def test_weights_of_any_scale_and_order_have_the_same_tail_and_are_left_as_they_were():
    weights = torch.randn(200, 3, dtype=torch.float64)
    before = weights.clone()
    found = psis_k_hat(weights)
    assert torch.equal(weights, before)
    torch.testing.assert_close(psis_k_hat(weights[torch.randperm(200)] - 1234.0), found)
    assert psis_k_hat(weights.float().requires_grad_()).shape == (3,)


def test_each_image_is_by_itself():
    weights = torch.randn(100, 4) * torch.tensor([0.1, 2.0, 10.0, 50.0])
    together = psis_k_hat(weights)
    torch.testing.assert_close(together, torch.cat([psis_k_hat(column) for column in weights.split(1, 1)]))
    assert bool((together.diff() > 0).all())


def test_equal_weights_have_the_lightest_tail_there_is():
    assert bool((psis_k_hat(torch.full((100, 2), -7.0)) == -math.inf).all())
    # So has a largest weight that many draws share.
    for count in (20, 21, 40):
        shared = torch.randn(100, 2).clamp_max(0.0)
        shared[:count] = 1.0
        assert bool((psis_k_hat(shared) == -math.inf).all())
    few = torch.randn(100, 2, dtype=torch.float64)
    few[:5] = 4.0
    assert bool(psis_k_hat(few).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exact_posterior_has_equal_weights(dtype):
    model = factors(C=300, M=2).to(dtype)
    x = 2 * torch.randn(5, 1, 300, dtype=dtype)
    with torch.no_grad():
        q = ClassicalEM(model).infer(x).q
        weights = torch.cat(list(log_weights(model, q, x, 500, 100)))
    assert weights.shape == (500, 5)
    assert bool((psis_k_hat(weights) == -math.inf).all())


def test_a_handful_of_draws_with_all_the_weight_is_the_heaviest_tail():
    underflow = torch.full((100, 1), -900.0)
    underflow[:3, 0] = torch.tensor([0.0, 1.0, 2.0])
    zeros = torch.full((100, 1), -math.inf)
    zeros[:3, 0] = torch.tensor([0.0, 1.0, 2.0])
    assert psis_k_hat(torch.cat([underflow, zeros, 500 * torch.randn(100, 1)], 1)).tolist() == [math.inf] * 3


def test_weights_that_are_zero_belong_to_the_body():
    weights = torch.randn(200, 1)
    weights[:100] = -math.inf
    assert math.isfinite(psis_k_hat(weights).item())


def test_a_weight_that_is_nan_is_not_hidden():
    weights = torch.randn(100, 3)
    weights[3, 0], weights[4, 1] = math.nan, math.inf
    assert psis_k_hat(weights).isnan().tolist() == [True, True, False]


def test_too_few_weights_are_refused():
    assert psis_k_hat(torch.randn(30, 2)).isfinite().all()
    for shape in ((29, 2), (100,), (2, 100, 3)):
        with pytest.raises(DataError, match=r"needs \(L, B\), L ≥ 30 weights"):
            psis_k_hat(torch.randn(shape))
    with pytest.raises(DataError, match="must be a tensor, but is of type ndarray"):
        psis_k_hat(torch.randn(100, 2).numpy())
