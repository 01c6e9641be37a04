"""``pnem data``: the data sets that pnem generates or takes from other packages, as HDF5 files."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["data_app"]

data_app = typer.Typer(help="Write data sets in the N-EM authors' HDF5 layout.", no_args_is_help=True)

OutputPath = Annotated[Path, typer.Argument(help="The file to write; it must not exist.")]


@data_app.command("static-shapes")
def static_shapes(
    path: OutputPath,
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


Frames = Annotated[int, typer.Option(help="Frames per sequence, at least 2.")]
Size = Annotated[int, typer.Option(help="Height and width in pixels.")]
Train = Annotated[int, typer.Option(help="Training sequences.")]
Valid = Annotated[int, typer.Option(help="Validation sequences.")]
Test = Annotated[int, typer.Option(help="Test sequences.")]
Seed = Annotated[int, typer.Option(help="Seed of the generator.", min=0)]


@data_app.command("flying-shapes")
def flying_shapes(
    path: OutputPath,
    objects: Annotated[int, typer.Option(help="Shapes per sequence.")] = 3,
    frames: Frames = 21,
    size: Size = 28,
    train: Train = 50_000,
    valid: Valid = 10_000,
    test: Test = 10_000,
    seed: Seed = 0,
) -> None:
    """Sequences of outlined squares and triangles that fly straight and bounce off the borders.

    Example: `pnem data flying-shapes flying.h5 --objects 3`
    """
    from pnem.data import write_flying_shapes

    write_flying_shapes(
        path,
        num_objects=objects,
        num_frames=frames,
        size=size,
        train=train,
        valid=valid,
        test=test,
        seed=seed,
        progress=True,
    )
    _report(path, train, valid, test, "sequences")


@data_app.command("mnist")
def mnist(
    path: OutputPath,
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


def _report(path: Path, train: int, valid: int, test: int, what: str = "images") -> None:
    text = f"wrote {train} training, {valid} validation and {test} test {what} to {path}"
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
