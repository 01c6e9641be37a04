"""``pnem compare``: runs compared on the same images, as tables, JSON and a figure."""

from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pnem.errors import RunError

__all__ = ["compare"]


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Run directories, at least two, and last an HDF5 file with images.", metavar="RUN... DATA"),
    ],
    split: Annotated[str, typer.Option(help="training, validation or test.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Use only the first so many images.")] = None,
    measures: Annotated[
        str,
        typer.Option(
            help="all; marginal: without ELBO and gaps, for models with different proper priors; grouping: AMI, ARI "
            "and cost, for any models."
        ),
    ] = "all",
    importance_samples: Annotated[
        int, typer.Option(help="Draws of θ for each image, by which log p(x) is estimated: at least 30.")
    ] = 500,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds that it may take: fewer images are used then. By default all are.", metavar="SECONDS"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the initial γ and of all draws.", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write scores and differences to this file.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Also draw them into this file: .png, .pdf or .svg.")] = None,
) -> None:
    """Compare runs on the same images: log p(x), ELBO and what it loses, grouping, cost, and paired differences.

    All images take long: log p(x) and gaps are found image by image. Give a `--limit` or a `--budget`.

    Runs whose nats do not compare are refused: `--measures grouping` compares any.

    Example: `pnem compare runs/vae runs/iterative-vi digits.h5 --budget 120 --figure comparison.pdf`
    """
    from pnem import diagnostics
    from pnem.files import write_atomically
    from pnem.run import load

    *directories, data = paths
    _check_paths(directories, data, json_file, figure)
    runs = {name: load(directory, device=device) for name, directory in _named(directories).items()}
    result = diagnostics.compare(
        runs,
        data,
        split=split,
        limit=limit,
        measures=measures,
        samples=importance_samples,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
        progress=True,
    )
    Console().print(result)
    if json_file is not None:
        write_atomically(json_file, result.to_json().encode())
    if figure is not None:
        from pnem import plots

        content = BytesIO()
        plots.comparison(result).savefig(content, format=figure.suffix[1:])
        write_atomically(figure, content.getvalue())


def _check_paths(directories: list[Path], data: Path, json_file: Path | None, figure: Path | None) -> None:
    """Raises `RunError` for what had better be known before a long computation."""
    from pnem.files import check_new

    if data.is_dir():
        wrong = f"the last argument, {data}, is a directory"
    elif len(directories) < 2:
        wrong = (
            f"{len(directories) or 'no'} run director{'y' if len(directories) == 1 else 'ies'} before the data {data}"
        )
    else:
        wrong = ""
    if wrong:
        raise RunError(
            f"{wrong}: give at least two run directories and last the HDF5 file, as in "
            "pnem compare runs/A runs/B data.h5"
        )
    for file in (json_file, figure):
        if file is not None:
            check_new(file)
    if figure is not None and figure.suffix not in (".png", ".pdf", ".svg"):
        raise RunError(f"{figure} has the suffix {figure.suffix!r}: figures are written as .png, .pdf or .svg")


def _named(directories: list[Path]) -> dict[str, Path]:
    """The directories by the shortest ends of their paths by which they differ."""
    resolved = [directory.resolve() for directory in directories]
    for path in resolved:
        if resolved.count(path) > 1:
            raise RunError(f"{path} was given {resolved.count(path)} times: give each run once")
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = [str(Path(*path.parts[-length:])) for path in resolved]
        if len({*names}) == len(names):
            break
    return dict(zip(names, directories, strict=True))
