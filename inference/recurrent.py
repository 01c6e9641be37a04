"""What RNN-EM and iterative VI share: a recurrent cell that learns from prediction errors."""

import torch
from torch import Tensor

from pnem.inference.checks import require_pixels
from pnem.inference.encoders import Encoder, Identity, check_encoder
from pnem.inference.errors import StrategyError
from pnem.inference.filtering import FilteringStrategy
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.recurrences import CELLS
from pnem.models import SpatialMixture

__all__ = ["RecurrentStrategy"]


class RecurrentStrategy(FilteringStrategy):
    """Base of strategies whose M-step is a recurrent cell, the same for all components:

        memory_k ← cell([encoder(γ_k (x − E[x | ψ_k])), v_k], memory_k)

    Subclasses say what vectors v_k the cell sees beside the γ-weighted error, and what the memory is read as: θ_k
    itself, or the parameters of q(θ_k).

    Args:
        model: the generative model.
        features: H, the size of memory_k.
        vector_features: the size of v_k.
        encoder: the network between the error and the cell; None for the pixels themselves.
        recurrence: ``"sigmoid"`` or ``"gated"``.
        layer_norm: whether the cell is layer-normalised.
        iterations, noise, e_step, gamma_gradient, task, initial: see `FilteringStrategy`.

    Raises:
        StrategyError: an unknown recurrence, an encoder for other images, a constant decoder, or as
            `FilteringStrategy`.
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        features: int,
        vector_features: int = 0,
        encoder: Encoder | None,
        recurrence: str,
        layer_norm: bool,
        iterations: int,
        noise: Noise | None,
        e_step: str,
        gamma_gradient: bool,
        task: str,
        initial: str,
    ):
        super().__init__(
            model,
            iterations=iterations,
            noise=noise,
            e_step=e_step,
            gamma_gradient=gamma_gradient,
            task=task,
            initial=initial,
        )
        require_pixels(model, type(self).__name__)
        if recurrence not in CELLS:
            raise StrategyError(f"unknown recurrence {recurrence!r}: choose one of {', '.join(CELLS)}")
        H, W, _ = model.decoder.image_shape
        image_shape = H, W, model.num_channels
        self.encoder = Identity(image_shape) if encoder is None else encoder
        check_encoder(self.encoder, image_shape)
        self.cell = CELLS[recurrence](self.encoder.out_features + vector_features, features, layer_norm=layer_norm)

    def recur(self, state: State, x_in: Tensor, memory: Tensor, *vectors: Tensor) -> Tensor:
        """The memory (B, K, H) after the cell has seen the errors of a state, and vectors (B, K, ...)."""
        error = state.gamma.unsqueeze(-1) * (x_in.unsqueeze(-3) - state.mean)
        inputs = self.encoder(error)
        return self.cell(torch.cat([inputs, *vectors], -1) if vectors else inputs, memory)
