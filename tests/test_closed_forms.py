"""Gradients that are written out, against what autograd makes of the plain functions."""

import pytest
import torch
from torch.nn import functional as F

from pnem.models.closed_forms import assignments, bernoulli_terms


def plain_assignments(log_joint):
    return log_joint.softmax(-2), log_joint.logsumexp(-2)


def plain_bernoulli_terms(logits):
    return logits.sigmoid(), -F.softplus(logits)


CASES = pytest.mark.parametrize(
    ("closed", "plain"),
    [(assignments, plain_assignments), (bernoulli_terms, plain_bernoulli_terms)],
    ids=["assignments", "Bernoulli terms"],
)


def values(scale=3.0):
    return (scale * torch.randn(2, 3, 5, dtype=torch.float64)).requires_grad_()


@CASES
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_values_and_gradients_are_those_of_the_plain_form(closed, plain, scale):
    x = values(scale)
    weights = [torch.randn_like(output) for output in plain(x)]
    found = [[*outputs, *torch.autograd.grad(outputs, x, weights)] for outputs in (form(x) for form in (closed, plain))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@CASES
def test_gradients_of_gradients(closed, plain):
    assert torch.autograd.gradcheck(closed, values())
    assert torch.autograd.gradgradcheck(closed, values())


@CASES
def test_through_function_transforms(closed, plain):
    """As strategies differentiate within a step, whose gradient training takes."""

    def loss(form, x):
        return sum(output.square().sum() for output in form(x))

    x = values()
    found = [
        torch.func.vmap(torch.func.grad(lambda y, form=form: loss(form, y) + torch.func.grad(loss, 1)(form, y).sum()))(
            x
        )
        for form in (closed, plain)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_only_one_output_may_be_used():
    x = values()
    for output, expected in ((0, torch.zeros_like(x)), (1, assignments(x)[0])):
        (gradient,) = torch.autograd.grad(assignments(x)[output].sum(), x)
        torch.testing.assert_close(gradient, expected)


def test_components_that_nothing_can_come_from():
    """log π = −∞."""
    x = torch.tensor([[0.5], [-torch.inf]], dtype=torch.float64, requires_grad=True)
    gamma, log_evidence = assignments(x)
    assert gamma.squeeze(-1).tolist() == [1, 0]
    (gradient,) = torch.autograd.grad(log_evidence.sum(), x)
    assert gradient.squeeze(-1).tolist() == [1, 0]
