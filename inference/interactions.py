"""What every component learns from the others, pair by pair (van Steenkiste, Chang, Greff & Schmidhuber 2018)."""

import torch
from torch import Tensor, nn

from pnem.inference.errors import StrategyError
from pnem.models.networks import mlp

__all__ = ["Interactions"]

# The width of the hidden layer between a pair's embedding and its attention, as in the original.
ATTENTION_FEATURES = 100


class Interactions(nn.Module):
    """The effects of all other components on each:

        θ̂_k = enc(θ_k)          ξ_{k,i} = emb([θ̂_k, θ̂_i])          E_k = Σ_{i≠k} α_{k,i} eff(ξ_{k,i})

    with the attention α_{k,i} = σ(att(ξ_{k,i})), or 1 without. The networks are the same for all components and pairs,
    so permuting the components permutes the result. A component alone has no effects on it: E = 0. It costs
    O(K² F²), whatever the number of pixels.

    Args:
        in_features: M, the size of θ_k.
        features: F, the size of θ̂, ξ and E, and of one layer each of enc, emb and eff (ReLU).
        attention: whether effects are weighted by an attention between 0 and 1.
        layer_norm: whether the layers are layer-normalised.

    Raises:
        StrategyError: `features` is not a whole number of at least 1.

    >>> encoded, effects = Interactions(5, 16)(torch.zeros(2, 4, 5))
    >>> encoded.shape, effects.shape
    (torch.Size([2, 4, 16]), torch.Size([2, 4, 16]))
    """

    def __init__(self, in_features: int, features: int, *, attention: bool = True, layer_norm: bool = False):
        super().__init__()
        if not isinstance(features, int) or features < 1:
            raise StrategyError(f"interaction_features must be at least 1, and whole, but is {features}")
        self.encoder = mlp((in_features, features), activation_name="relu", layer_norm=layer_norm)
        # W [θ̂_k, θ̂_i] is a sum of two products, each of which is needed only K times, not K² times.
        self.focus = nn.Linear(features, features)
        self.context = nn.Linear(features, features, bias=False)
        self.norm = nn.LayerNorm(features) if layer_norm else nn.Identity()
        self.effect = mlp((features, features), activation_name="relu", layer_norm=layer_norm)
        self.attention: nn.Sequential | None = None
        if attention:
            hidden = mlp((features, ATTENTION_FEATURES), activation_name="tanh", layer_norm=layer_norm)
            self.attention = nn.Sequential(hidden, nn.Linear(ATTENTION_FEATURES, 1), nn.Sigmoid())

    def forward(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """θ (..., K, M) -> θ̂ and E, each (..., K, F)."""
        encoded = self.encoder(theta)
        pairs = self.norm(self.focus(encoded).unsqueeze(-2) + self.context(encoded).unsqueeze(-3)).relu()
        effects = self.effect(pairs)
        if self.attention is not None:
            effects = self.attention(pairs) * effects
        itself = torch.eye(theta.shape[-2], dtype=torch.bool, device=theta.device).unsqueeze(-1)
        return encoded, effects.masked_fill(itself, 0.0).sum(-2)
