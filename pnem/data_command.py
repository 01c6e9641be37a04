"""``pnem data``: the data sets that pnem generates or takes from other packages, as HDF5 files."""

from enum import StrEnum
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


@data_app.command("flying-mnist")
def flying_mnist(
    path: OutputPath,
    digits: Annotated[int, typer.Option(help="Digits per sequence.")] = 2,
    variations: Annotated[
        int | None,
        typer.Option(help="Distinct digits, the same in all splits (20, then 500 in stages). Default: all 5,000."),
    ] = None,
    frames: Frames = 21,
    digit_size: Annotated[int, typer.Option(help="Height and width of a digit in pixels.")] = 14,
    size: Size = 24,
    train: Train = 50_000,
    valid: Valid = 10_000,
    test: Test = 10_000,
    seed: Seed = 0,
) -> None:
    """Grey sequences of MNIST digits that fly straight and bounce off the borders (needs pnem\\[mnist]).

    Example: `pnem data flying-mnist digits.h5 --digits 2 --variations 20`
    """
    from pnem.data import write_flying_mnist

    write_flying_mnist(
        path,
        num_digits=digits,
        variations=variations,
        num_frames=frames,
        digit_size=digit_size,
        size=size,
        train=train,
        valid=valid,
        test=test,
        seed=seed,
        progress=True,
    )
    _report(path, train, valid, test, "sequences")


class Masses(StrEnum):
    """Whether the balls of a sequence weigh the same."""

    EQUAL = "equal"
    DIFFERENT = "different"


@data_app.command("bouncing-balls")
def bouncing_balls(
    path: OutputPath,
    balls: Annotated[int, typer.Option(help="Balls per sequence.")] = 4,
    most: Annotated[
        int | None, typer.Option(help="Between --balls and this many per sequence. Default: always --balls.")
    ] = None,
    masses: Annotated[Masses, typer.Option(help="Whether all weigh the same, or larger ones more.")] = Masses.EQUAL,
    curtain: Annotated[bool, typer.Option("--curtain", help="Hide a quarter of the image.")] = False,
    frames: Frames = 51,
    size: Size = 64,
    train: Train = 50_000,
    valid: Valid = 10_000,
    test: Test = 10_000,
    seed: Seed = 0,
) -> None:
    """Binary sequences of balls that bounce off walls and each other; 27 GiB in the default sizes.

    Example: `pnem data bouncing-balls balls.h5 --balls 6 --most 8 --train 1000 --valid 200 --test 200`
    """
    from pnem.data import write_bouncing_balls

    write_bouncing_balls(
        path,
        num_balls=balls if most is None else (balls, most),
        masses=masses.value,
        curtain=curtain,
        num_frames=frames,
        size=size,
        train=train,
        valid=valid,
        test=test,
        seed=seed,
        progress=True,
    )
    _report(path, train, valid, test, "sequences")


@data_app.command("occluder")
def occluder(
    path: OutputPath,
    objects: Annotated[int, typer.Option(help="Shapes per sequence.")] = 3,
    curtain: Annotated[int, typer.Option(help="Width of the curtain in pixels.")] = 12,
    frames: Frames = 21,
    size: Size = 28,
    train: Train = 50_000,
    valid: Valid = 10_000,
    test: Test = 10_000,
    seed: Seed = 0,
) -> None:
    """Flying shapes behind a moving curtain of the background's colour.

    Example: `pnem data occluder occluder.h5 --objects 3 --curtain 12`
    """
    from pnem.data import write_moving_occluder

    write_moving_occluder(
        path,
        num_objects=objects,
        curtain=curtain,
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
