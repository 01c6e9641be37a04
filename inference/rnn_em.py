"""RNN-EM: the M-step learned as a recurrent network (Greff, van Steenkiste & Schmidhuber 2017)."""

from torch import Tensor

from pnem.inference.encoders import Encoder, Identity
from pnem.inference.errors import StrategyError
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.recurrences import CELLS
from pnem.inference.strategy import Strategy, require_pixels
from pnem.models import SpatialMixture

__all__ = ["RNNEM"]


class RNNEM(Strategy):
    """EM whose M-step is a recurrent cell shared by all components:

        θ_k ← cell(encoder(γ_k (x − E[x | ψ_k])), θ_k)

    The input is the γ-weighted error of the prediction: for Bernoulli and unit-variance Normal pixels, ∂Q/∂ψ of the
    plain mixture. Where N-EM takes a step along it, the cell learns what to do with it.

    Args:
        model: the generative model.
        encoder: the network between the error and the cell; None for the pixels themselves.
        recurrence: ``"sigmoid"``, as in the original, or ``"gated"``.
        layer_norm: whether the cell is layer-normalised.
        iterations, noise, e_step, gamma_gradient: see `Strategy`.

    Raises:
        StrategyError: an unknown recurrence, an encoder for other images, or as `Strategy`.
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        encoder: Encoder | None = None,
        recurrence: str = "sigmoid",
        layer_norm: bool = False,
        iterations: int = 10,
        noise: Noise | None = None,
        e_step: str = "consistent",
        gamma_gradient: bool = True,
    ):
        super().__init__(model, iterations=iterations, noise=noise, e_step=e_step, gamma_gradient=gamma_gradient)
        require_pixels(model, "RNNEM")
        if recurrence not in CELLS:
            raise StrategyError(f"unknown recurrence {recurrence!r}: choose one of {', '.join(CELLS)}")
        H, W, _ = model.decoder.image_shape
        image_shape = H, W, model.num_channels
        self.encoder = Identity(image_shape) if encoder is None else encoder
        if self.encoder.image_shape != image_shape:
            raise StrategyError(
                f"the encoder is for images of shape {self.encoder.image_shape}, the model for {image_shape}"
            )
        self.cell = CELLS[recurrence](self.encoder.out_features, model.latent_features, layer_norm=layer_norm)

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        error = state.gamma.unsqueeze(-1) * (x_in.unsqueeze(-3) - state.mean)
        return self.cell(self.encoder(error), state.theta)
