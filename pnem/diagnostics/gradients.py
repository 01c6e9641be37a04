"""The signal-to-noise ratio of the gradient that training follows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pnem.diagnostics.checks import check_strategy
from pnem.errors import StrategyError
from pnem.inference import Strategy
from pnem.inference.checks import require_images
from pnem.inference.estimates import check_counts

__all__ = ["gradient_signal_to_noise"]


def gradient_signal_to_noise(strategy: Strategy, x: Tensor, repetitions: int = 20) -> dict[str, float]:
    r"""‖E[g]‖ / (tr Cov[g])^½ of the ELBO's gradient g, for each parameter tensor of the model and the strategy.

    g is of the mean ELBO over the images `x`, after the last iteration of an unroll as in training: with fresh draws of
    θ, initial γ and input noise, on the same images (Rainforth et al. 2018, "Tighter variational bounds are not
    necessarily better"). It is the noise of the estimator alone, not that of which images are in a minibatch; of B
    images the ratio is about √B that of one. Where it is far below 1, steps are mostly noise. Near an optimum of these
    images' own ELBO the signal vanishes, and the ratio with it.

    ‖ḡ‖² of R repetitions is larger than ‖E[g]‖² by tr Cov[g] / R on average, which is taken off: of a signal that the
    noise hides 0 is left. A gradient without noise has the ratio ∞.

    Args:
        strategy: the strategy; the model is its own.
        x: the images (B, D, C), as many as a minibatch has.
        repetitions: R, at least 2.

    Returns:
        The ratio for each tensor that is trained (`requires_grad`) and has a gradient that is not always zero, by its
        name after ``model.`` or ``strategy.``. Of strategies that have no parameters it is the model's alone.

    Raises:
        ModelError: `x` does not fit the model.
        StrategyError: repetitions < 2, no images, a strategy that cannot be unrolled, or an ELBO that depends on no
            parameter.

    >>> from pnem.inference import VAE
    >>> from pnem.models import Bernoulli, SpatialMixture, decoders
    >>> model = SpatialMixture(decoders.Linear(2, (4, 4, 1)), Bernoulli(), 1, prior="standard_normal")
    >>> sorted(gradient_signal_to_noise(VAE(model), torch.ones(8, 16, 1)))[:2]
    ['model.decoder.linear.bias', 'model.decoder.linear.weight']
    """
    check_counts(repetitions=repetitions)
    if repetitions < 2:
        raise StrategyError("repetitions must be at least 2: the noise of a single gradient cannot be seen")
    check_strategy(strategy)
    strategy.model.check(x, new=True)
    require_images(strategy.model, x)
    named = [
        (f"{prefix}.{name}", parameter)
        for prefix, module in (("model", strategy.model), ("strategy", strategy))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    means: dict[str, Tensor] = {}
    scatters: dict[str, float] = {}
    with torch.enable_grad(), _training(strategy.model, strategy):
        for count in range(1, repetitions + 1):
            elbo = strategy.elbo(strategy.unroll(x)[-1]).mean()
            if not elbo.requires_grad:
                break
            gradients = torch.autograd.grad(elbo, [parameter for _, parameter in named], allow_unused=True)
            for (name, _), gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    # Welford's recursion, for the squares of large gradients would cancel.
                    gradient = gradient.double()
                    shift = gradient - means.get(name, 0.0)
                    means[name] = means.get(name, 0.0) + shift / count
                    scatters[name] = scatters.get(name, 0.0) + (shift * (gradient - means[name])).sum().item()
    squares = {name: mean.square().sum().item() for name, mean in means.items()}
    ratios = {
        name: _ratio(square, scatters[name] / (repetitions - 1), repetitions)
        for name, square in squares.items()
        if square != 0 or scatters[name] != 0
    }
    if not ratios:
        raise StrategyError(f"no parameter is trained by the gradient of {type(strategy).__name__}'s ELBO")
    return ratios


def _ratio(square: float, variance: float, repetitions: int) -> float:
    if variance == 0:
        return math.inf
    # Not max, which would take 0 for NaN.
    signal = square - variance / repetitions
    return 0.0 if signal < 0 else math.sqrt(signal / variance)


@contextmanager
def _training(*modules: nn.Module) -> Iterator[None]:
    """Training mode, and afterwards each module's own."""
    before = [(module, module.training) for root in modules for module in root.modules()]
    for module, _ in before:
        module.training = True
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
