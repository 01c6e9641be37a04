"""The suites: what is measured at which sizes, and running them."""

import platform
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pnem.bench.cases import CASES, Size
from pnem.bench.growth import time_growth
from pnem.bench.kernels import time_kernels
from pnem.bench.mixtures import MixtureSize, time_mixtures
from pnem.bench.overheads import time_fit, time_pyro
from pnem.bench.peaks import Peaks, measure_peaks
from pnem.bench.report import Report, Row
from pnem.bench.steps import time_case
from pnem.devices import forked_rng, resolve_device
from pnem.errors import DeviceError, RunError

__all__ = ["PARTS", "SUITES", "run"]


@dataclass(frozen=True)
class Suite:
    """How large everything is.

    Attributes:
        size: of images and networks, but for the batch.
        batches: of the training steps; growth, Pyro and `fit` are measured at the first.
        compiled: the cases that are also compiled.
        matrix, copied: rows of the square matrices, and bytes, by which the machine's peak is measured.
        steps: of the shortest epoch of `fit`.
        mixtures: of classical EM.
    """

    size: Size = field(default_factory=Size)
    batches: tuple[int, ...] = (64,)
    compiled: Collection[str] = tuple(CASES)
    matrix: int = 2048
    copied: int = 2**28
    steps: int = 4
    mixtures: MixtureSize = field(default_factory=MixtureSize)


SUITES = {
    "cpu": Suite(),
    "gpu": Suite(batches=(64, 1024), matrix=8192, copied=2**30, steps=20, mixtures=MixtureSize(items=1_000_000)),
}


def _small(suite: Suite) -> Suite:
    """The same with everything tiny, and one case compiled, for compiling takes most of the time."""
    return replace(
        suite,
        size=Size(height=8, width=8, K=2, T=2),
        batches=tuple(4 * (i + 1) for i in range(len(suite.batches))),
        compiled=("rnn-em",),
        matrix=128,
        copied=2**20,
        steps=1,
        mixtures=MixtureSize(items=400, C=3, K=2, iterations=2, restarts=2),
    )


@dataclass(frozen=True)
class Setting:
    """What all parts share: keyword arguments of theirs."""

    repetitions: int
    device: torch.device
    seed: int


def _steps(suite: Suite, setting: Setting, peaks: Peaks) -> Iterator[Row]:
    for batch in suite.batches:
        for name in CASES:
            size = replace(suite.size, batch=batch)
            yield from time_case(name, size, peaks, compiled=name in suite.compiled, **vars(setting))


def _kernels(suite: Suite, setting: Setting, peaks: Peaks) -> Iterator[Row]:
    size = replace(suite.size, batch=suite.batches[-1])
    return time_kernels(size, compiled=bool(suite.compiled), **vars(setting))


def _pyro(suite: Suite, setting: Setting, peaks: Peaks) -> Iterator[Row]:
    return time_pyro(replace(suite.size, batch=suite.batches[0]), **vars(setting))


def _fit(suite: Suite, setting: Setting, peaks: Peaks) -> Iterator[Row]:
    return time_fit(replace(suite.size, batch=suite.batches[0]), suite.steps, **vars(setting))


def _growth(suite: Suite, setting: Setting, peaks: Peaks) -> Iterator[Row]:
    return time_growth(replace(suite.size, batch=suite.batches[-1]), **vars(setting))


def _mixtures(suite: Suite, setting: Setting, peaks: Peaks) -> Iterator[Row]:
    return time_mixtures(suite.mixtures, **vars(setting))


PARTS: dict[str, Callable[[Suite, Setting, Peaks], Iterator[Row]]] = {
    "steps": _steps,
    "kernels": _kernels,
    "pyro": _pyro,
    "fit": _fit,
    "growth": _growth,
    "mixtures": _mixtures,
}
"""What is measured after the machine's peak."""


def run(
    suite: str = "cpu",
    *,
    device: str | None = None,
    small: bool = False,
    only: Collection[str] = (),
    repetitions: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    say: Callable[[str], object] | None = None,
) -> Report:
    """Measures the machine's peak, and then what pnem makes of it.

    Torch's global random state and number of threads are left as they were.

    Args:
        suite: ``"cpu"`` or ``"gpu"``.
        device: the suite's own when None: ``"cuda"`` for the gpu suite, which ``"cpu"`` runs on the CPU.
        small: everything tiny, to see that all runs.
        only: names in `PARTS`; all when empty.
        repetitions: rounds, in each of which all that is compared is timed once; 7 when None, or 2 if `small`.
        threads: of the CPU; torch's own number when None.
        seed: of weights, images and noise.
        say: told of every row as soon as it is there.

    Raises:
        RunError: an unknown suite or part, or repetitions or threads below 1.
        DeviceError: there is no such device, or it is none for the suite.
    """
    if suite not in SUITES:
        raise RunError(f"unknown suite {suite!r}: choose one of {', '.join(SUITES)}")
    unknown = [name for name in only if name not in PARTS]
    if unknown:
        raise RunError(f"unknown part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    for name, value in (("repetitions", repetitions), ("threads", threads)):
        if value is not None and value < 1:
            raise RunError(f"{name} must be at least 1, but is {value}")
    chosen, repetitions = _device(suite, device), repetitions or (2 if small else 7)
    scale = _small(SUITES[suite]) if small else SUITES[suite]
    setting, threads_before = Setting(repetitions, chosen, seed), torch.get_num_threads()
    hardware = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _processor()
    with forked_rng(chosen):
        torch.manual_seed(seed)
        torch.set_num_threads(threads or threads_before)
        try:
            used = torch.get_num_threads()
            report = Report(suite, str(chosen), small, repetitions, seed, hardware, torch.__version__, used)
            peaks, rows = measure_peaks(chosen, scale.matrix, scale.copied, repetitions)
            report.rows.extend(rows)
            for name, part in PARTS.items():
                for row in part(scale, setting, peaks) if not only or name in only else ():
                    report.rows.append(row)
                    if say is not None:
                        say(": ".join([*row.section.splitlines()[:1], ", ".join(filter(None, row.cells()[:2]))]))
        finally:
            torch.set_num_threads(threads_before)
    return report


def _device(suite: str, name: str | None) -> torch.device:
    if suite == "gpu" and name is None and not torch.cuda.is_available():
        raise DeviceError(
            f"the gpu suite needs a CUDA device that torch {torch.__version__} can use, and this machine has none: "
            "choose the cpu suite, or give --device cpu to run the gpu suite on the CPU"
        )
    device = resolve_device(name or {"gpu": "cuda"}.get(suite, "cpu"))
    if suite == "cpu" and device.type != "cpu":
        raise DeviceError(f"the cpu suite runs on the CPU, not on {name}: choose the gpu suite")
    return device


def _processor() -> str:
    """The processor's name, and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
