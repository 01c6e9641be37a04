"""``pnem data``: the data sets that pnem generates or takes from other packages, as HDF5 files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["data_app"]

data_app = typer.Typer(help="Write data sets in the N-EM authors' HDF5 layout.", no_args_is_help=True)


@data_app.command("static-shapes")
def static_shapes(
    path: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    objects: Annotated[int, typer.Option(help="Shapes per image.")] = 3,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 28,
    train: Annotated[int, typer.Option(help="Training images.")] = 50_000,
    valid: Annotated[int, typer.Option(help="Validation images.")] = 10_000,
    test: Annotated[int, typer.Option(help="Test images.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the generator.", min=0)] = 0,
) -> None:
    """Binary images of outlined squares and triangles.

    Example: `pnem data static-shapes shapes.h5 --objects 3 --size 28`
    """
    from pnem.data import write_static_shapes

    write_static_shapes(path, num_objects=objects, size=size, train=train, valid=valid, test=test, seed=seed)
    _report(path, train, valid, test)


@data_app.command("mnist")
def mnist(
    path: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")],
    train: Annotated[int, typer.Option(help="Training images.")] = 4_000,
    valid: Annotated[int, typer.Option(help="Validation images.")] = 500,
    test: Annotated[int, typer.Option(help="Test images; 5,000 in all splits are the most.")] = 500,
    binarise: Annotated[
        bool, typer.Option("--binarise/--grey", help="Draw each pixel once by its grey value, or keep that, in [0, 1].")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the splits and of the binarisation.", min=0)] = 0,
) -> None:
    """MNIST digits, 500 of each class, without true groups (needs pnem\\[mnist]).

    Example: `pnem data mnist digits.h5`
    """
    from pnem.data import write_mnist

    write_mnist(path, train=train, valid=valid, test=test, binarise=binarise, seed=seed)
    _report(path, train, valid, test)


def _report(path: Path, train: int, valid: int, test: int) -> None:
    text = f"wrote {train} training, {valid} validation and {test} test images to {path}"
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
