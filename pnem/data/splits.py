"""The training, validation and test split of generated sequences, written block by block."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pnem.data.arrays import check_whole
from pnem.data.writing import Chunk, write_hdf5

__all__ = ["write_splits"]

BLOCK_BYTES = 2**24
"""About how much memory the features of one block take, a byte each."""


class Sequences(Protocol):
    """A named tuple of arrays, features and groups among them; None where there is none."""

    def _asdict(self) -> dict[str, Any]: ...


def write_splits(
    path: str | os.PathLike[str],
    draw: Callable[[str, int, np.random.Generator], Sequences],
    *,
    train: int,
    valid: int,
    test: int,
    sequence_pixels: int,
    seed: int,
    overwrite: bool,
    progress: bool,
    attrs: Mapping[str, Any],
) -> None:
    """Draw the sequences of three splits and write them into one HDF5 file.

    Every split has its own stream of random numbers, spawned from `seed`, so its sequences do not depend on the sizes
    of the others. What `draw` returns besides features and groups is written next to them under its own name.

    Args:
        path: the file to write.
        draw: called with the name of a split, how many sequences to draw next, and the generator of the split.
        train: sequences in the split ``training``.
        valid: sequences in the split ``validation``.
        test: sequences in the split ``test``.
        sequence_pixels: T · H · W, which decides how many sequences are drawn at once.
        seed: from which the three streams are spawned.
        overwrite: replace an existing file.
        progress: whether to show a progress bar on standard error, if that is a terminal.
        attrs: HDF5 attributes of the file; `seed` is added.

    Raises:
        DataError: if a size is below 1 or the seed negative, and as `write_hdf5` does.
    """
    sizes = {
        "training": check_whole(train, "train"),
        "validation": check_whole(valid, "valid"),
        "test": check_whole(test, "test"),
    }
    streams = np.random.SeedSequence(check_whole(seed, "seed", 0)).spawn(len(sizes))
    block = max(1, BLOCK_BYTES // sequence_pixels)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()

    console = Console(stderr=True)
    # Elsewhere than on a terminal a bar would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("sequences", total=sum(sizes.values()))

        def blocks(split: str, stream: np.random.SeedSequence) -> Iterator[Chunk]:
            rng = np.random.default_rng(stream)
            for start in range(0, sizes[split], block):
                n = min(block, sizes[split] - start)
                known = {name: array for name, array in draw(split, n, rng)._asdict().items() if array is not None}
                yield known.pop("features"), known.pop("groups"), known
                bar.advance(task, n)

        splits = {split: blocks(split, stream) for split, stream in zip(sizes, streams, strict=True)}
        write_hdf5(path, splits, overwrite=overwrite, attrs={**attrs, "seed": seed})
