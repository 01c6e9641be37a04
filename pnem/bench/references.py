"""RNN-EM and N-EM written by hand in PyTorch, without pnem: what its training steps are compared with."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HandWrittenNEM", "HandWrittenRNNEM"]


class HandWrittenRNNEM(nn.Module):
    """RNN-EM on the ownership model with Bernoulli pixels and a pixel prior of 0: a linear decoder, a sigmoid cell.

    Args:
        D, K, M, T: pixels, components, latent features, iterations.
        flip: the probability with which input noise flips a pixel.
        ownership: the weight of the ownership term.
    """

    def __init__(self, D: int, K: int, M: int, T: int, *, flip: float, ownership: float):
        super().__init__()
        self.inputs = nn.Linear(D, M)
        self.recurrent = nn.Linear(M, M, bias=False)
        self.decoder = nn.Linear(M, D)
        self.K, self.T, self.flip, self.ownership = K, T, flip, ownership

    def loss(self, x: Tensor) -> Tensor:
        """Minus the ELBO of images x (B, D), weighted by t/T over iterations, in nats per image."""
        x, x_in, gamma = _start(x, self.K, self.flip)
        theta = x.new_zeros(len(x), self.K, self.recurrent.in_features)
        mean = torch.zeros_like(gamma)
        loss = x.new_zeros(())
        for t in range(1, self.T + 1):
            theta = torch.sigmoid(self.inputs(gamma * (x_in - mean)) + self.recurrent(theta))
            psi = self.decoder(theta)
            mean = psi.sigmoid()
            log_joint = _log_joint(x, psi, self.ownership)
            gamma = log_joint.softmax(1)
            loss = loss - t * log_joint.logsumexp(1).sum(1).mean()
        return loss / (self.T * (self.T + 1) / 2)


class HandWrittenNEM(nn.Module):
    """N-EM with its own loss (Greff et al. 2017, eq. 6) and the consistent E-step: a tied decoder, a learned step size.

    Args:
        D, K, M, T, flip, ownership: as of `HandWrittenRNNEM`.
    """

    def __init__(self, D: int, K: int, M: int, T: int, *, flip: float, ownership: float):
        super().__init__()
        self.decoder = nn.Linear(M, D, bias=False)
        self.log_step_size = nn.Parameter(torch.zeros(()))
        self.K, self.T, self.flip, self.ownership = K, T, flip, ownership

    def loss(self, x: Tensor) -> Tensor:
        """N-EM's loss of images x (B, D), weighted by t/T over iterations, in nats per image."""
        x, x_in, gamma = _start(x, self.K, self.flip)
        weight, step_size, w = self.decoder.weight, self.log_step_size.exp(), self.ownership
        theta = x.new_zeros(len(x), self.K, weight.shape[1])
        mean = torch.zeros_like(gamma)
        loss = x.new_zeros(())
        for t in range(1, self.T + 1):
            gradient = gamma * (x_in - mean) - w * (1 - gamma) * mean
            s = theta.sigmoid()
            theta = theta + step_size * s * (1 - s) * (gradient @ weight)
            psi = self.decoder(theta.sigmoid())
            mean = psi.sigmoid()
            gamma = _log_joint(x, psi, w).softmax(1)
            log_p0 = -F.softplus(psi)
            terms = gamma * (x * psi + log_p0) + w * (1 - gamma) * log_p0
            loss = loss - t * terms.sum((1, 2)).mean()
        return loss / (self.T * (self.T + 1) / 2)


def _start(x: Tensor, K: int, flip: float) -> tuple[Tensor, Tensor, Tensor]:
    """The images (B, 1, D), the same with noise, and random responsibilities (B, K, D)."""
    x = x.unsqueeze(1)
    x_in = torch.where(torch.rand_like(x) < flip, 1 - x, x)
    gamma = torch.randn(len(x), K, x.shape[-1], dtype=x.dtype, device=x.device).abs()
    return x, x_in, gamma / gamma.sum(1, keepdim=True)


def _log_joint(x: Tensor, psi: Tensor, w: float) -> Tensor:
    """log 1/K + log p(x | ψ_k) + w Σ_{j≠k} log p(0 | ψ_j): (B, K, D)."""
    log_p0 = -F.softplus(psi)
    return x * psi + (1 - w) * log_p0 + w * log_p0.sum(1, keepdim=True) - math.log(psi.shape[1])
