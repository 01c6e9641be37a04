"""RNN-EM: the M-step learned as a recurrent network (Greff, van Steenkiste & Schmidhuber 2017)."""

from torch import Tensor

from pnem.inference.encoders import Encoder
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.recurrent import RecurrentStrategy
from pnem.models import SpatialMixture

__all__ = ["RNNEM"]


class RNNEM(RecurrentStrategy):
    """EM whose M-step is a recurrent cell shared by all components:

        θ_k ← cell(encoder(γ_k (x − E[x | ψ_k])), θ_k)

    The input is the γ-weighted error of the prediction: for Bernoulli and unit-variance Normal pixels, ∂Q/∂ψ of the
    plain mixture. Where N-EM takes a step along it, the cell learns what to do with it.

    Args:
        model: the generative model.
        encoder: the network between the error and the cell; None for the pixels themselves.
        recurrence: ``"sigmoid"``, as in the original, or ``"gated"``.
        layer_norm: whether the cell is layer-normalised.
        iterations, noise, e_step, gamma_gradient, task, initial: see `FilteringStrategy`.

    Raises:
        StrategyError: an unknown recurrence, an encoder for other images, or as `FilteringStrategy`.
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
        task: str = "static",
        initial: str = "random",
    ):
        super().__init__(
            model,
            features=model.latent_features,
            encoder=encoder,
            recurrence=recurrence,
            layer_norm=layer_norm,
            iterations=iterations,
            noise=noise,
            e_step=e_step,
            gamma_gradient=gamma_gradient,
            task=task,
            initial=initial,
        )

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.recur(state, x_in, state.theta)
