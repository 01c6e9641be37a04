"""``pnem generalise``: a run on other numbers of objects and components."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pnem.files import check_new

__all__ = ["generalise"]


def generalise(
    run: Annotated[Path, typer.Argument(help="A run directory, as pnem train wrote it.", metavar="RUN")],
    data: Annotated[list[Path], typer.Argument(help="HDF5 files with true groups.", metavar="DATA...")],
    components: Annotated[
        list[int], typer.Option("--components", "-k", help="K to infer with; give it once for each.", min=1)
    ],
    split: Annotated[str, typer.Option(help="training, validation or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Use only the first so many images or sequences.")] = None,
    restarts: Annotated[int, typer.Option(help="Starts; the one with the best ELBO is kept.")] = 1,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images or sequences at once.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the initial γ and of draws from q(θ).", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")] = None,
) -> None:
    """Score a run on data with other numbers of objects, with other numbers of components than it was trained with.

    Example: `pnem generalise runs/flying flying3.h5 flying4.h5 -k 3 -k 4 -k 5`
    """
    from pnem.generalisation import generalise as measure
    from pnem.run import load

    if json_file is not None:
        check_new(json_file)
    found = measure(
        load(run, device=device),
        {str(path): path for path in data},
        components,
        split=split,
        limit=limit,
        restarts=restarts,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    Console().print(found)
    if json_file is not None:
        found.to_json(json_file)
