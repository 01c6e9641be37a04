"""``pnem bench``: what training and inference cost on this machine, as one table."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["bench"]


def bench(
    suite: Annotated[str, typer.Option(help="cpu or gpu.")] = "cpu",
    device: Annotated[
        str | None, typer.Option(help="The suite's own by default; cpu runs the gpu suite on the CPU.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this part: steps, kernels, pyro, fit, growth or mixtures. May be given several times."),
    ] = None,
    small: Annotated[bool, typer.Option("--small", help="Everything tiny, to see that all runs.")] = False,
    repetitions: Annotated[
        int | None, typer.Option(help="Times that everything is timed; 7 by default, 2 if small.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU; torch's own number by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, images and noise.", min=0, max=2**32 - 1)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Measure training steps, eager, compiled and in bfloat16, against networks written by hand and the machine's peak.

    Also what Pyro and Lightning add, how time grows with the sizes, and classical EM against scikit-learn and, where it
    is installed, pomegranate. What is compared is timed alternately.

    Example: `pnem bench --json bench.json`
    """
    from pnem.bench import run
    from pnem.files import check_new, write_atomically

    if json_file is not None:
        check_new(json_file)
    progress = Console(stderr=True)
    report = run(
        suite,
        device=device,
        small=small,
        only=only or (),
        repetitions=repetitions,
        threads=threads,
        seed=seed,
        say=lambda text: progress.print(text, markup=False, highlight=False, soft_wrap=True),
    )
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # No line of the table is folded then.
        console.width = 140
    console.print(report)
    if json_file is not None:
        write_atomically(json_file, report.to_json().encode())
