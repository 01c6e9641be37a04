"""Functions whose gradients are written out in terms of their values.

Differentiated by themselves, softmax and logsumexp of one tensor, or softplus and sigmoid, each compute exponentials of
their own again on the way back. Here one goes back by what the other has found: a compiled E-step takes two thirds of
the time.
"""

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

__all__ = ["assignments", "bernoulli_terms"]


def assignments(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """The E-step: γ = softmax over K, and log Σ_k exp, from log_joint (..., K, D): (..., K, D) and (..., D).

    >>> import torch
    >>> gamma, log_evidence = assignments(torch.tensor([[0.25], [0.75]]).log())
    >>> gamma.squeeze(-1), log_evidence.exp().round(decimals=4)
    (tensor([0.2500, 0.7500]), tensor([1.]))
    """
    return _Assignments.apply(log_joint)


def bernoulli_terms(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The probability of 1, and the log-probability of 0 in nats.

    >>> import torch
    >>> bernoulli_terms(torch.zeros(1))
    (tensor([0.5000]), tensor([-0.6931]))
    """
    return _BernoulliTerms.apply(logits)


class _KeepsItsFirstValue(Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[0])


class _Assignments(_KeepsItsFirstValue):
    """∂γ_k = γ_k (∂l_k − Σ_j γ_j ∂l_j); ∂log Σ exp = Σ_k γ_k ∂l_k."""

    @staticmethod
    def forward(log_joint: Tensor) -> tuple[Tensor, Tensor]:
        largest = log_joint.amax(-2, keepdim=True)
        relative = (log_joint - largest).exp()
        total = relative.sum(-2, keepdim=True)
        return relative / total, (total.log() + largest).squeeze(-2)

    @staticmethod
    def backward(ctx: FunctionCtx, by_gamma: Tensor, by_log_evidence: Tensor) -> Tensor:
        (gamma,) = ctx.saved_tensors  # type: ignore[attr-defined]
        weighted = gamma * by_gamma
        return weighted + gamma * (by_log_evidence.unsqueeze(-2) - weighted.sum(-2, keepdim=True))


class _BernoulliTerms(_KeepsItsFirstValue):
    """∂p = p (1 − p) ∂ψ; ∂log(1 − p) = −p ∂ψ."""

    @staticmethod
    def forward(logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.sigmoid(), -F.softplus(logits)

    @staticmethod
    def backward(ctx: FunctionCtx, by_mean: Tensor, by_log_p0: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return p * ((1 - p) * by_mean - by_log_p0)
