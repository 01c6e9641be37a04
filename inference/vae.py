"""The variational autoencoder: q(θ | x) from an encoder, in one pass (Kingma & Welling 2014; Rezende et al. 2014)."""

import torch
from torch import Tensor, nn

from pnem.inference.encoders import MLP, Encoder, check_encoder
from pnem.inference.errors import StrategyError
from pnem.inference.noise import Noise
from pnem.inference.posterior import State
from pnem.inference.variational import Normals, NormalStrategy
from pnem.models import SpatialMixture

__all__ = ["VAE"]


class VAE(NormalStrategy):
    r"""Amortised variational inference in one pass:

        q(θ | x) = Π_k N(μ_k(x), diag(s_k(x)²)),      [μ_1, log s_1, ..., μ_K, log s_K] = W encoder(x) + b

    With K = 1, Bernoulli pixels and a standard-normal prior it is the textbook VAE, with KL(q ‖ p) in closed form. With
    K > 1 one encoder gives all components at once, in an order that it learns.

    Args:
        model: the generative model, with a proper prior.
        encoder: from an image (H, W, C) to features; ``encoders.MLP`` with one layer of 512 when None.
        noise: see `Strategy`.

    Raises:
        StrategyError: a flat prior, a constant decoder, or an encoder for other images.

    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.MLP(20, (28, 28, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> posterior = VAE(model).infer(torch.zeros(2, 784, 1))
    >>> posterior.q.stddev.shape, posterior.elbo_trace.shape
    (torch.Size([2, 1, 20]), torch.Size([1, 2]))
    """

    def __init__(self, model: SpatialMixture, *, encoder: Encoder | None = None, noise: Noise | None = None):
        super().__init__(model, iterations=1, noise=noise)
        H, W, _ = model.decoder.image_shape
        image_shape = H, W, model.num_channels
        self.encoder = MLP(image_shape) if encoder is None else encoder
        check_encoder(self.encoder, image_shape)
        self.head = nn.Linear(self.encoder.out_features, 2 * model.num_components * model.latent_features)

    def find_q(self, state: State, x_in: Tensor) -> Normals:  # noqa: D102
        shape = (self.model.num_components, 2, self.model.latent_features)
        location, log_scale = self.head(self.encoder(x_in)).unflatten(-1, shape).unbind(-2)
        return Normals(location, torch.exp(log_scale.to(torch.promote_types(log_scale.dtype, torch.float32))))

    def check_infer(self, restarts: int, iterations: int, gamma: Tensor | None) -> None:
        """See `Strategy.check_infer`: q(θ) depends on the image alone, so there is one start and one iteration."""
        if restarts != 1 or iterations != 1 or gamma is not None:
            raise StrategyError(
                "a VAE's q(θ) depends on the image alone, in one pass: leave restarts, iterations and gamma out; "
                "SemiAmortised refines its q over iterations"
            )
