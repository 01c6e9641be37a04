"""Pictures as a small GIF."""

from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["gif"]

Array = NDArray[Any]

# Of the 256 colours, those that are the most common ones of the sample.
KEPT = 64
# Of each channel: finer differences are not seen, and noise of that size would make the file several times larger.
LEVELS = 64
STEP = 255 / (LEVELS - 1)


def gif(pictures: Iterable[Array], sample: Sequence[Array], milliseconds: int) -> bytes:
    """A GIF that repeats for ever.

    Channels are rounded to 64 levels. All pictures have the same 256 colours, and none is dithered: what does not
    change stays the same, and takes no space.

    Args:
        pictures: RGB, (height, width, 3) uint8, all of one size.
        sample: some of them, from which the colours are chosen.
        milliseconds: how long each is shown.

    >>> stripes = np.zeros((2, 4, 6, 3), dtype=np.uint8)
    >>> stripes[0, 1], stripes[1, 2] = 255, 255
    >>> Image.open(BytesIO(gif(stripes, stripes, 250))).n_frames
    2
    """
    colours = _colours(Image.fromarray(np.rint(_levels(np.concatenate(sample)) * STEP).astype(np.uint8)))
    first, *others = (_in_these(colours, picture) for picture in pictures)
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)
    return buffer.getvalue()


def _levels(picture: Array) -> Array:
    """The level of each channel."""
    return np.rint(np.arange(256) / STEP).astype(np.int32)[picture]


def _colours(image: Image.Image) -> Array:
    """The most common colours of an image, and of the others what median cuts find: (at most 256, 3) uint8."""
    counts = image.getcolors(image.width * image.height)
    assert counts is not None
    common = [colour for _, colour in sorted(counts, reverse=True)[:KEPT]]
    cut = image.quantize(256 - len(common), method=Image.Quantize.MEDIANCUT).getpalette()
    assert cut is not None
    return np.concatenate([np.array(common), np.reshape(cut, (-1, 3))]).astype(np.uint8)


def _in_these(colours: Array, picture: Array) -> Image.Image:
    """A picture with each of its colours replaced by the nearest of `colours`."""
    # Not by Image.quantize, which is so coarse that white would become grey.
    codes = _levels(picture) @ np.array([LEVELS**2, LEVELS, 1], dtype=np.int32)
    found = np.flatnonzero(np.bincount(codes.ravel()))
    levels = np.stack(np.unravel_index(found, (LEVELS,) * 3), -1)
    table = colours.astype(np.float32)
    nearest = (np.square(table).sum(-1) - 2 * (levels * STEP).astype(np.float32) @ table.T).argmin(-1)
    place = np.zeros(found[-1] + 1, dtype=np.uint8)
    place[found] = nearest
    image = Image.fromarray(place[codes])
    image.putpalette(colours.tobytes())
    return image
