"""What pnem computes otherwise than autograd would, timed beside its plain form, forwards and backwards."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pnem.bench.cases import Size
from pnem.bench.clock import Spread, alternately
from pnem.bench.report import Row
from pnem.bench.steps import WARM_UP
from pnem.compilation import compiler_warnings_ignored, missing_compiler
from pnem.models import Bernoulli, SpatialMixture, decoders
from pnem.models.decoders import upsample_convolve

__all__ = ["plain_e_step", "plain_upsample_convolve", "time_kernels"]

Kernel = Callable[..., tuple[Tensor, ...]]


def plain_e_step(model: SpatialMixture, x: Tensor, psi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """E[x | ψ], γ and log p(x | θ) of `SpatialMixture.predict_and_explain`, as autograd differentiates them."""
    log_joint = model.log_joint_at(x, psi)
    return model.likelihood.mean(psi), log_joint.softmax(-2), log_joint.logsumexp(-2).sum(-1)


def plain_upsample_convolve(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`upsample_convolve` as it reads: y repeated 2×2, zeros around it, a convolution."""
    k = weight.shape[-1]
    padded = F.pad(F.interpolate(y, scale_factor=2), ((k - 1) // 2, k // 2) * 2)
    return F.conv2d(padded, weight, bias)


def time_kernels(size: Size, *, repetitions: int, device: torch.device, seed: int, compiled: bool) -> Iterator[Row]:
    """A row for each of them, plain and as pnem has it, eager and, of the E-step, compiled."""
    torch.manual_seed(seed)
    model = SpatialMixture(decoders.Linear(8, size.image_shape), Bernoulli(), size.K, pixel_prior=0.0, ownership=0.5)
    model.to(device)
    B, D = size.batch, size.height * size.width
    x = (torch.rand(B, D, 1, device=device) < 0.1).float()
    psi = torch.randn(B, size.K, D, 1, device=device, requires_grad=True)

    def closed_e_step(psi: Tensor) -> tuple[Tensor, ...]:
        mean, _, gamma, log_evidence = model.predict_and_explain(x, psi)
        return mean, gamma, log_evidence

    y = torch.randn(B * size.K, 32, size.height // 2, size.width // 2, device=device, requires_grad=True)
    weight, bias = torch.randn(1, 32, 4, 4, device=device, requires_grad=True), torch.zeros(1, device=device)
    kernels: dict[str, tuple[Sequence[Tensor], dict[str, Kernel]]] = {
        "E-step": ([psi], {"plain": lambda psi: plain_e_step(model, x, psi), "pnem": closed_e_step}),
        "upsampling and convolution": (
            [y, weight],
            {
                "plain": lambda y, weight: (plain_upsample_convolve(y, weight, bias),),
                "pnem": lambda y, weight: (upsample_convolve(y, weight, bias),),
            },
        ),
    }
    for name, (inputs, forms) in kernels.items():
        torch.compiler.reset()
        ways = {form: _both_ways(kernel, inputs) for form, kernel in forms.items()}
        # Convolutions are the same compiled, which takes minutes for the plain form.
        if name == "E-step" and compiled and missing_compiler(device) is None:
            for form, kernel in forms.items():
                ways[f"{form}, compiled"] = _both_ways(torch.compile(kernel, fullgraph=True), inputs)
        with compiler_warnings_ignored():
            alternately(ways, WARM_UP, device)
        seconds = alternately(ways, repetitions, device)
        for way in ways:
            plain = way.replace("pnem", "plain")
            speeds = {} if way == plain else {"plain": Spread.of(seconds[plain] / seconds[way])}
            section = f"{name}, forwards and backwards\nK {size.K}, batch {size.batch}"
            yield Row(section, way, Spread.of(1000 * seconds[way]), speeds=speeds)


def _both_ways(kernel: Kernel, inputs: Sequence[Tensor]) -> Callable[[], None]:
    def run() -> None:
        outputs = kernel(*inputs)
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])

    return run
