"""R-NEM: RNN-EM whose components interact in the recurrence (van Steenkiste, Chang, Greff & Schmidhuber 2018)."""

from torch import Tensor

from pnem.inference.encoders import Encoder
from pnem.inference.interactions import Interactions
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.recurrent import RecurrentStrategy
from pnem.models import SpatialMixture

__all__ = ["RNEM"]


class RNEM(RecurrentStrategy):
    """Relational neural EM: the recurrent cell of a component sees what the other components do to it:

        θ_k ← cell([encoder(γ_k (x − E[x | ψ_k])), θ̂_k, E_k], θ_k)

    where θ̂_k encodes θ_k and E_k sums the effects of the others on it, weighted by attention (`Interactions`). For
    objects that collide or hide one another, the next frame depends on pairs of them. Without θ̂ and E this is `RNNEM`.
    (In the paper the cell sees θ_k only through θ̂_k; that it also keeps θ_k lets it be gated.)

    The sizes of the original: M = 250, ``layer_norm=True``, and `encoders.Convolutional` and `decoders.Convolutional`
    for 64×64 images.

    Args:
        model: the generative model.
        encoder: the network between the error and the cell; None for the pixels themselves.
        recurrence: ``"sigmoid"``, as in the original, or ``"gated"``.
        layer_norm: whether the cell and the networks of the interactions are layer-normalised.
        interaction_features: F, the size of θ̂_k and E_k, and of the hidden layers between them.
        attention: whether effects are weighted by an attention between 0 and 1.
        iterations, noise, e_step, gamma_gradient, task, initial: see `FilteringStrategy`.

    Raises:
        StrategyError: an unknown recurrence, `interaction_features` below 1, an encoder for other images, or as
            `FilteringStrategy`.

    >>> import torch
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.MLP(8, (6, 6, 1)), Bernoulli(), 3, pixel_prior=0.0)
    >>> RNEM(model, interaction_features=16).infer(torch.zeros(2, 36, 1)).theta.shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self,
        model: SpatialMixture,
        *,
        encoder: Encoder | None = None,
        recurrence: str = "sigmoid",
        layer_norm: bool = False,
        interaction_features: int = 250,
        attention: bool = True,
        iterations: int = 10,
        noise: Noise | None = None,
        e_step: str = "consistent",
        gamma_gradient: bool = True,
        task: str = "static",
        initial: str = "random",
    ):
        interactions = Interactions(
            model.latent_features, interaction_features, attention=attention, layer_norm=layer_norm
        )
        super().__init__(
            model,
            features=model.latent_features,
            vector_features=2 * interaction_features,
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
        self.interactions = interactions

    def m_step(self, state: State, x_in: Tensor) -> Tensor:  # noqa: D102
        return self.recur(state, x_in, state.theta, *self.interactions(state.theta))
