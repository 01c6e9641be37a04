"""The spatial mixture: one generative model of images made of parts, declared in Pyro."""

import contextlib
import math

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from pnem.models.closed_forms import assignments
from pnem.models.config import Configured
from pnem.models.decoders import Decoder
from pnem.models.errors import ModelError
from pnem.models.likelihoods import Likelihood
from pnem.models.parameters import register_parameters
from pnem.models.priors import LatentPrior, Prior, expected_log_density, normal_divergence

__all__ = ["SpatialMixture"]


class SpatialMixture(Configured, nn.Module):
    r"""A mixture of K components that explain the pixels of an image between them.

        θ_k ~ p(θ)          z_i ~ Categorical(π)          x_i | z_i = k ~ likelihood(ψ_{k,i}),   ψ_k = decoder(θ_k)

    **Ownership.** Given a pixel prior P₀, every component that does not own pixel i is observed to explain P₀ there:

        log p(x_i, z_i = k | ψ) = log π_k + log p(x_i | ψ_{k,i}) + w Σ_{j≠k} E_{P₀}[log p(x₀ | ψ_{j,i})]

    which is what makes components divide an image among them (the inter-cluster term of Greff et al. 2017, eq. 6,
    declared as part of the model). Without a pixel prior it is the plain mixture.

    It is an ordinary Pyro program: plates ``"images"`` (dim -2), ``"components"`` and ``"pixels"`` (dim -1); sites
    ``"theta"`` (event dim 1), ``"z"`` (enumerated in parallel), ``"x"`` (event dim 1); ``max_plate_nesting`` is 2.
    Sequences (T, B, D, C) add a plate ``"time"`` (dim -3), with θ and z of their own in every frame; then it is 3. How
    one frame's θ follows from another's is a matter of inference: of strategies that filter.

    Args:
        decoder: the network from θ to the pixels' parameters.
        likelihood: the distribution of a pixel given its parameters.
        num_components: K.
        prior: p(θ): ``"flat"`` (maximum likelihood), ``"standard_normal"``, or a `Prior`: `DiagonalNormal` and
            `MixtureOfNormals`, which are learned; for a constant decoder `NormalInverseWishart`.
        mixing: π: ``"uniform"``; ``"learned"``, the same for all images; or ``"per_image"``, for classical EM: uniform
            until it is fitted.
        mixing_concentration: α of a prior Dirichlet(α, ..., α) on fitted mixing weights, at least 1; 1 is flat.
        pixel_prior: the mean of P₀: Bernoulli(p) for Bernoulli pixels, a point at μ₀ for Normal ones; None for the
            plain mixture.
        ownership: w, the weight of the ownership term; N-EM's is 1. For Bernoulli pixels with P₀ = 0, an "on" pixel is
            more probable drawn by one component than by all from w ≈ ⅓ upwards, and one that two components draw
            costs 0.69 nats at w = 1, but 0.26 at w = ½: less ownership is more readiness to overlap.

    Raises:
        ModelError: K < 1, an unknown prior or mixing, a prior that does not fit the likelihood, a concentration below 1
            or of mixing weights that are not fitted, a weight that is negative or not finite, or a pixel prior
            outside the likelihood's support.

    >>> from pnem.models import Bernoulli, decoders
    >>> model = SpatialMixture(decoders.Linear(5, (8, 8, 1)), Bernoulli(), num_components=3, pixel_prior=0.0)
    >>> x, theta = torch.ones(2, 64, 1), torch.zeros(2, 3, 5)
    >>> model.responsibilities(x, theta).shape, model.log_evidence(x, theta).shape
    (torch.Size([2, 3, 64]), torch.Size([2]))
    """

    pixel_prior: Tensor | None

    def __init__(
        self,
        decoder: Decoder,
        likelihood: Likelihood,
        num_components: int,
        *,
        prior: str | Prior = "flat",
        mixing: str = "uniform",
        mixing_concentration: float = 1.0,
        pixel_prior: float | None = None,
        ownership: float = 1.0,
    ):
        super().__init__()
        if not isinstance(num_components, int) or num_components < 1:
            raise ModelError(f"num_components must be at least 1, and whole, but is {num_components}")
        if not isinstance(prior, Prior) and prior not in ("flat", "standard_normal"):
            raise ModelError(f'prior must be "flat", "standard_normal" or a Prior, but is {prior!r}')
        if mixing not in ("uniform", "learned", "per_image"):
            raise ModelError(f'mixing must be "uniform", "learned" or "per_image", but is {mixing!r}')
        if not 1 <= mixing_concentration < float("inf"):
            raise ModelError(f"mixing_concentration must be at least 1 and finite, but is {mixing_concentration}")
        if mixing_concentration > 1 and mixing == "uniform":
            raise ModelError('mixing_concentration is for fitted mixing weights: give mixing="learned" or "per_image"')
        if not 0 <= ownership < float("inf"):
            raise ModelError(f"ownership must be a finite weight of at least 0, but is {ownership}")
        self.decoder = decoder
        self.likelihood = likelihood
        self.num_components = num_components
        self.prior = prior
        self.mixing_kind = mixing
        self.mixing_concentration = float(mixing_concentration)
        self.ownership = float(ownership)
        if isinstance(prior, Prior):
            prior.check(decoder, likelihood)
        if pixel_prior is None:
            self.pixel_prior = None
        else:
            mean = torch.full((self.num_channels,), float(pixel_prior))
            likelihood.check(mean)
            self.register_buffer("pixel_prior", mean, persistent=False)
        logits = torch.zeros(num_components)
        if mixing == "learned":
            self.mixing_logits: Tensor = nn.Parameter(logits)
        else:
            self.register_buffer("mixing_logits", logits, persistent=False)

    @property
    def latent_features(self) -> int:
        """M, the size of θ_k."""
        return self.decoder.latent_features

    @property
    def num_pixels(self) -> int | None:
        """D, the pixels of an image; None where the decoder serves any number of them."""
        return self.decoder.num_pixels

    @property
    def num_channels(self) -> int:
        """C, the channels of a pixel."""
        return self.likelihood.num_channels(self.decoder.image_shape[2])

    @property
    def log_mixing(self) -> Tensor:
        """log π: (K,), or (B, K) where every image has its own."""
        return self.mixing_logits.log_softmax(-1)

    def set_log_mixing(self, log_mixing: Tensor) -> None:
        """Takes fitted log π, (B, K), as the model's own: one for all images, or one each, as the model has them."""
        with torch.no_grad():
            if self.mixing_kind == "learned":
                self.mixing_logits.copy_(log_mixing[0])
            elif self.mixing_kind == "per_image":
                self.mixing_logits = log_mixing.to(self.mixing_logits.dtype, copy=True)

    @property
    def mixing(self) -> Tensor:
        """π: (K,), or (B, K) where every image has its own."""
        return self.log_mixing.exp()

    def decode(self, theta: Tensor) -> Tensor:
        """ψ = f_φ(θ), in single precision at least, whatever the decoder computes in: (..., K, M) -> (..., K, D, P)."""
        psi = self.decoder(theta)
        return psi.to(torch.promote_types(psi.dtype, torch.float32))

    def log_joint(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x_i, z_i = k | θ) in nats, ownership included: x (B, D, C), theta (B, K, M) -> (B, K, D).

        Channels of x that are NaN are missing: x_i is then the others.

        Raises:
            ModelError: the shapes of x, θ and the model do not go together, or x holds NaN and there is ownership.
        """
        self.check(x, missing=True)
        if theta.shape[-2:] != (self.num_components, self.latent_features):
            raise ModelError(
                f"theta has shape {tuple(theta.shape)}, but this model needs "
                f"(B, K={self.num_components}, M={self.latent_features})"
            )
        psi = self.decode(theta)
        if bool(x.isnan().any()):
            if self.owned:
                raise ModelError("x holds NaN, for missing values, which a model with ownership cannot leave out")
            return self.log_mixing.unsqueeze(-1) + self.likelihood.log_marginal(x.unsqueeze(-3), psi)
        return self.log_joint_at(x, psi)

    def responsibilities(self, x: Tensor, theta: Tensor) -> Tensor:
        """γ_{k,i} = p(z_i = k | x_i, θ): x (B, D, C), theta (B, K, M) -> (B, K, D)."""
        return self.log_joint(x, theta).softmax(-2)

    def log_evidence(self, x: Tensor, theta: Tensor) -> Tensor:
        """log p(x | θ) = Σ_i log Σ_k p(x_i, z_i = k | θ), in nats per image: x (B, D, C), theta (B, K, M) -> (B,)."""
        return self.log_joint(x, theta).logsumexp(-2).sum(-1)

    def log_joint_at(self, x: Tensor, psi: Tensor, log_mixing: Tensor | None = None) -> Tensor:
        """`log_joint` from decoded parameters: x (..., D, C), psi (..., K, D, P), log π (..., K) -> (..., K, D).

        The model's own log π when None.
        """
        return self._joint(self.likelihood.log_probs(self._observed(x), psi), log_mixing)

    def predict_and_explain(
        self, x: Tensor, psi: Tensor, log_mixing: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What an E-step finds at decoded parameters: x (..., D, C), psi (..., K, D, P), log π (..., K).

        Returns:
            E[x | ψ], (..., K, D, C); `log_joint_at`, (..., K, D); γ, (..., K, D); and log p(x | θ), (...).
        """
        mean, log_probs = self.likelihood.mean_and_log_probs(self._observed(x), psi)
        log_joint = self._joint(log_probs, log_mixing)
        gamma, log_evidence = assignments(log_joint)
        return mean, log_joint, gamma, log_evidence.sum(-1)

    def _observed(self, x: Tensor) -> list[Tensor]:
        """What components explain: x (..., 1, D, C), and with ownership x₀."""
        return [x.unsqueeze(-3), *([self.pixel_prior] if self.pixel_prior is not None and self.owned else [])]

    def _joint(self, log_probs: list[Tensor], log_mixing: Tensor | None) -> Tensor:
        log_mixing = (self.log_mixing if log_mixing is None else log_mixing).unsqueeze(-1)
        if not self.owned:
            return log_mixing + log_probs[0]
        log_p, unowned = log_probs
        owned = torch.sub(log_p, unowned, alpha=self.ownership)
        return owned + self.ownership * unowned.sum(-2, keepdim=True) + log_mixing

    @property
    def owned(self) -> bool:
        """Whether the model has an ownership term."""
        return self.pixel_prior is not None and self.ownership > 0

    def log_unowned(self, psi: Tensor) -> Tensor:
        """E_{P₀}[log p(x₀ | ψ)] in nats per pixel: (..., K, D, P) -> (..., K, D).

        For Bernoulli pixels log p is linear in x₀, so that the expectation is its value at the mean of P₀.
        """
        if self.pixel_prior is None:
            raise ModelError("this mixture has no pixel prior: give SpatialMixture(..., pixel_prior=...)")
        return self.likelihood.log_prob(self.pixel_prior, psi)

    def prediction(self, psi: Tensor, log_mixing: Tensor | None = None) -> Tensor:
        """What the components predict together of an image that is not seen: (..., K, D, P) -> (..., D, C).

        With a pixel prior, pixel by pixel the mean of the component that is furthest from the pixel prior's: the one
        that claims the pixel. For Bernoulli pixels and a prior of 0 it is the largest mean, with which Greff et al.
        (2017) bound the cost of the next frame. Without a pixel prior it is Σ_k π_k E[x | ψ_k].
        """
        mean = self.likelihood.mean(psi)
        if self.pixel_prior is None:
            log_mixing = self.log_mixing if log_mixing is None else log_mixing
            return (log_mixing.exp()[..., None, None] * mean).sum(-3)
        claim = (mean - self.pixel_prior).abs().sum(-1, keepdim=True)
        return mean.take_along_dim(claim.argmax(-3, keepdim=True), -3).squeeze(-3)

    @property
    def has_proper_prior(self) -> bool:
        """Whether p(θ) is a density of θ that can be drawn from: not where it is flat, or on a likelihood's moments."""
        return self.prior == "standard_normal" or isinstance(self.prior, LatentPrior)

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(θ_k), with event shape (M,); where it is flat, a masked distribution of log-probability zero."""
        if isinstance(self.prior, Prior):
            return self.prior.distribution(self.likelihood, self.latent_features)
        normal = dist.Normal(self.mixing_logits.new_zeros(()), self.mixing_logits.new_ones(()), validate_args=False)
        normal = normal.expand([self.latent_features]).to_event(1)
        # A masked Normal keeps its site in the trace, but contributes nothing: a flat prior.
        return normal.mask(False) if self.prior == "flat" else normal

    def log_prior(self, theta: Tensor) -> Tensor:
        """log p(θ) in nats per image, zero where the prior is flat: (..., K, M) -> (...)."""
        # Pyro gives a masked density in the default dtype.
        return self.prior_distribution().log_prob(theta).sum(-1).to(theta.dtype)

    def prior_divergence(self, location: Tensor, scale: Tensor) -> Tensor | None:
        """KL(N(location, scale²) ‖ p(θ)) in nats per image: (..., K, M) -> (...); None where it has no closed form."""
        divergence = normal_divergence(location, scale, self.prior_distribution())
        return None if divergence is None else divergence.sum(-1)

    def expected_log_prior(self, location: Tensor, scale: Tensor) -> Tensor | None:
        """E[log p(θ)] of θ ~ N(location, scale²), in nats per image: (..., K, M) -> (...); None as there."""
        expected = expected_log_density(location, scale, self.prior_distribution())
        return None if expected is None else expected.sum(-1)

    def log_mixing_prior(self, log_mixing: Tensor) -> Tensor:
        """log p(π) in nats, zero where the prior is flat: (..., K) -> (...)."""
        K, alpha = self.num_components, self.mixing_concentration
        if alpha == 1:
            return log_mixing.new_zeros(log_mixing.shape[:-1])
        constant = math.lgamma(K * alpha) - K * math.lgamma(alpha)
        return constant + (alpha - 1) * log_mixing.sum(-1)

    def check(self, x: Tensor, *, missing: bool = False, new: bool = False) -> None:
        """Raises `ModelError` unless `x` is (..., D, C) with this model's pixels, finite, and in the support.

        With `missing`, NaN stands for a missing value; a pixel must have at least one that is there. Images are the
        ones that mixing weights per image were fitted to, but with `new`.
        """
        if not isinstance(x, Tensor):
            raise ModelError(f"x must be a tensor, but is of type {type(x).__name__}: give torch.as_tensor(x).float()")
        D, C = self.num_pixels, self.num_channels
        if x.dim() < 3 or x.shape[-1] != C or D not in (None, x.shape[-2]):
            H, W, _ = self.decoder.image_shape
            raise ModelError(
                f"x has shape {tuple(x.shape)}, but this model needs (B, {'D' if D is None else f'D={D}'}, C={C})"
                + ("" if D is None else f": images of {H}×{W} pixels, flattened row by row")
            )
        if not new and self.mixing_logits.dim() == 2 and len(self.mixing_logits) != x.shape[-3]:
            raise ModelError(
                f"x holds {x.shape[-3]} images, but this model's mixing weights were fitted to "
                f"{len(self.mixing_logits)}, one set for each: give those, or declare a new model"
            )
        if missing and not bool(x.isinf().any()):
            nothing = x.isnan().all(-1)
            if bool(nothing.any()):
                raise ModelError(
                    f"{int(nothing.sum())} items have no value at all, the first at index "
                    f"{nothing.nonzero()[0, -1].item()}: leave them out"
                )
        elif not bool(x.isfinite().all()):
            raise ModelError(f"x holds {int((~x.isfinite()).sum())} values that are NaN or infinite")
        self.likelihood.check(x)

    def _scored(self, x: Tensor, given: int) -> Tensor:
        """Images, or the frames of sequences after those that are given."""
        if x.dim() > 4:
            raise ModelError(f"x has shape {tuple(x.shape)}: give images (B, D, C), or sequences (T, B, D, C)")
        if given and not 0 < given < (len(x) if x.dim() == 4 else 0):
            raise ModelError(f"x has shape {tuple(x.shape)}, of which given={given} frames leave none to score")
        return x[given:]

    def forward(
        self,
        x: Tensor | None = None,
        num_images: int = 1,
        num_pixels: int = 1,
        num_frames: int | None = None,
        given: int = 0,
    ) -> Tensor:
        """The Pyro program: scores the images `x` (B, D, C) or sequences (T, B, D, C), or generates `num_images`.

        Args:
            x: what to score.
            num_images: how many images, or sequences, to generate.
            num_pixels: of a generated image, where the decoder leaves D open.
            num_frames: of generated sequences; None for images.
            given: the frames at the beginning of `x` that are not scored: the first, where frames are predicted from
                those before them.

        Raises:
            ModelError: `x` does not fit the model, or has no frame to score.

        z_i is drawn from p(z_i | θ) of the declared model, which ownership makes depend on ψ, and the ``"unowned"``
        factor carries the rest of the ownership term. The joint density is the declared one, and what is generated
        respects ownership.
        """
        register_parameters("model", self)
        if x is not None:
            self.check(x)
            x = self._scored(x, given)
            num_images, num_frames = x.shape[-3], len(x) if x.dim() > 3 else None
        if self.mixing_concentration > 1 and self.mixing_kind == "learned":
            pyro.factor("mixing_prior", self.log_mixing_prior(self.log_mixing))
        with contextlib.ExitStack() as plates:
            plates.enter_context(pyro.plate("images", num_images, dim=-2))
            if self.mixing_concentration > 1 and self.mixing_kind == "per_image":
                pyro.factor("mixing_prior", self.log_mixing_prior(self.log_mixing).unsqueeze(-1))
            if num_frames is not None:
                plates.enter_context(pyro.plate("time", num_frames, dim=-3))
            with pyro.plate("components", self.num_components, dim=-1):
                theta = pyro.sample("theta", self.prior_distribution())
            psi = self.decode(theta)
            D = self.num_pixels or (num_pixels if x is None else x.shape[-2])
            psi = psi.expand(*psi.shape[:-2], D, psi.shape[-1])
            log_weights = self.log_mixing.unsqueeze(-1).expand(psi.shape[:-1])
            with pyro.plate("pixels", D, dim=-1):
                if self.owned:
                    unowned = self.ownership * self.log_unowned(psi)
                    log_weights = log_weights - unowned
                    pyro.factor("unowned", unowned.sum(-2) + log_weights.logsumexp(-2))
                z = pyro.sample(
                    "z", dist.Categorical(logits=log_weights.transpose(-1, -2)), infer={"enumerate": "parallel"}
                )
                return pyro.sample("x", self.likelihood.distribution(_of_owner(psi, z)), obs=x)


def _of_owner(psi: Tensor, z: Tensor) -> Tensor:
    """ψ_{z_i} of every pixel: psi (..., K, D, P), z (..., D) -> (..., D, P).

    A view, where z is enumerated along the dimension before ψ's.
    """
    every = torch.arange(psi.shape[-3], device=z.device)
    if len(z) == z.numel() and z.dim() == psi.dim() - 1 and torch.equal(z.flatten(), every):
        return psi.movedim(-3, 0)
    return Vindex(psi.transpose(-2, -3))[..., z, :]
