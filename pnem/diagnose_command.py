"""``pnem diagnose``: is a run's inference any good, what is it losing, and what goes wrong."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["diagnose"]


def diagnose(
    run: Annotated[Path, typer.Argument(help="A run directory, as pnem train wrote it.", metavar="RUN")],
    data: Annotated[
        Path, typer.Argument(help="An HDF5 file as pnem data writes it; groups may be missing.", metavar="DATA")
    ],
    split: Annotated[str, typer.Option(help="training, validation or test.")] = "test",
    limit: Annotated[int, typer.Option(help="Use only the first so many images.")] = 1000,
    budget: Annotated[
        float, typer.Option(help="Seconds that it may take; the fewer, the fewer images the slow parts are of.")
    ] = 150.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.", min=1)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the initial γ and of draws from q(θ).", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    figures: Annotated[
        Path | None, typer.Option(help="Also write figures into this directory; it must not exist.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write all numbers to this file.")] = None,
) -> None:
    """Diagnose a run: the terms of its ELBO, what inference loses and to what, whether its numbers can be relied on.

    Findings say what goes wrong, by how much, and what to try.

    Example: `pnem diagnose runs/rnn-em shapes.h5 --figures figures`
    """
    from pnem.diagnostics import diagnose as diagnosis_of
    from pnem.files import check_new, write_atomically
    from pnem.run import load

    for path in (figures, json_file):
        if path is not None:
            check_new(path)
    start = time.perf_counter()
    found = diagnosis_of(
        load(run, device=device),
        data,
        split=split,
        limit=limit,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    console = Console()
    console.print(found)
    console.print(f"took {time.perf_counter() - start:.0f} s of {budget:.0f} s", highlight=False)
    if json_file is not None:
        write_atomically(json_file, found.to_json().encode())
    if figures is not None:
        figures.mkdir(parents=True)
        for name, figure in found.figures().items():
            figure.savefig(figures / f"{name}.png")
