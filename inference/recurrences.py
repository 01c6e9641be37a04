"""Recurrent cells: how a component's θ takes in what the encoder saw."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["CELLS", "Cell", "GatedCell", "SigmoidCell"]


class Cell(nn.Module, ABC):
    """θ' = cell(input, θ): input (..., E), θ (..., M) -> (..., M)."""

    @abstractmethod
    def __init__(self, in_features: int, features: int, *, layer_norm: bool):
        super().__init__()

    @abstractmethod
    def forward(self, inputs: Tensor, theta: Tensor) -> Tensor:
        """(..., E), (..., M) -> (..., M)."""


class SigmoidCell(Cell):
    """θ' = σ(norm(W [input, θ] + b)), the recurrence of the original RNN-EM."""

    def __init__(self, in_features: int, features: int, *, layer_norm: bool):
        super().__init__(in_features, features, layer_norm=layer_norm)
        self.inputs = nn.Linear(in_features, features)
        self.recurrent = nn.Linear(features, features, bias=False)
        self.norm = nn.LayerNorm(features) if layer_norm else nn.Identity()

    def forward(self, inputs: Tensor, theta: Tensor) -> Tensor:  # noqa: D102
        return self.norm(self.inputs(inputs) + self.recurrent(theta)).sigmoid()


class GatedCell(Cell):
    """A gated recurrent unit (Cho et al. 2014), its gates and candidate layer-normalised if asked."""

    def __init__(self, in_features: int, features: int, *, layer_norm: bool):
        super().__init__(in_features, features, layer_norm=layer_norm)
        self.inputs = nn.Linear(in_features, 3 * features)
        self.recurrent = nn.Linear(features, 3 * features)
        self.input_norm = nn.LayerNorm(3 * features) if layer_norm else nn.Identity()
        self.recurrent_norm = nn.LayerNorm(3 * features) if layer_norm else nn.Identity()

    def forward(self, inputs: Tensor, theta: Tensor) -> Tensor:  # noqa: D102
        reset_in, update_in, candidate_in = self.input_norm(self.inputs(inputs)).chunk(3, -1)
        reset_re, update_re, candidate_re = self.recurrent_norm(self.recurrent(theta)).chunk(3, -1)
        candidate = torch.tanh(candidate_in + (reset_in + reset_re).sigmoid() * candidate_re)
        return torch.lerp(candidate, theta.to(candidate.dtype), (update_in + update_re).sigmoid().to(candidate.dtype))


CELLS: dict[str, type[Cell]] = {"sigmoid": SigmoidCell, "gated": GatedCell}
