"""Gradient ascent with a line search for each row of a batch, one trial at a time."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Ascent"]

# The part of the rise that the slope promises which a step must keep (Armijo).
SUFFICIENT = 1e-4
# A step that goes far wrong, into an overflow say, is cut at most to this part.
CUT = 1e-4


class Ascent(NamedTuple):
    """Where each ascent stands.

    Attributes:
        point: (..., P).
        value: (...), the objective there.
        gradient: (..., P).
        size: (...), the length t of the next trial.

    >>> def parabola(point):
    ...     return -point.square().sum(-1), -2 * point
    >>> ascent = Ascent(torch.ones(1, 2), *parabola(torch.ones(1, 2)), torch.tensor([3.0]))
    >>> for _ in range(4):
    ...     ascent = ascent.tried(parabola)
    >>> bool(ascent.value > -1e-6)
    True
    """

    point: Tensor
    value: Tensor
    gradient: Tensor
    size: Tensor

    def tried(
        self, value_and_gradient: Callable[[Tensor], tuple[Tensor, Tensor]], metric: Tensor | float = 1.0
    ) -> "Ascent":
        """After one trial, at point + t · metric · gradient.

        Where the objective rises enough (Armijo 1966) the step is taken and the next t is the shorter one of Barzilai &
        Borwein (1988); elsewhere the point stays and the next t is where a parabola through what was seen is highest.
        The metric, (..., P) and positive, is the inverse of the one that distances are measured in.
        """
        point, value, gradient, size = self
        direction = metric * gradient
        trial = point + size.unsqueeze(-1) * direction
        value_there, gradient_there = value_and_gradient(trial)
        promised = size * (gradient * direction).sum(-1)
        rose = (value_there >= value + SUFFICIENT * promised) & value_there.isfinite()
        rose = rose & gradient_there.isfinite().all(-1)
        turn = gradient - gradient_there
        bend = size * (direction * turn).sum(-1)
        # Where the objective is not concave along the step, nothing says how far is too far.
        longer = torch.where(bend > 0, bend / (metric * turn * turn).sum(-1), 4 * size)
        shorter = size * (0.5 * promised / (value + promised - value_there)).nan_to_num(0.0).clamp(CUT, 0.5)
        return Ascent(
            torch.where(rose.unsqueeze(-1), trial, point),
            torch.where(rose, value_there, value),
            torch.where(rose.unsqueeze(-1), gradient_there, gradient),
            torch.where(rose, longer, shorter),
        )
