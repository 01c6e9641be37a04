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
    colours = _colours(Image.fromarray(_rounded(np.concatenate(sample))))
    first, *others = (_in_these(colours, _rounded(picture)) for picture in pictures)
    buffer = BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)
    return buffer.getvalue()


def _rounded(picture: Array) -> Array:
    step = 255 / (LEVELS - 1)
    return np.rint(np.rint(np.arange(256) / step) * step).astype(np.uint8)[picture]


def _colours(image: Image.Image) -> Array:
    """The most common colours of an image, and of the others what median cuts find: (at most 256, 3)."""
    counts = image.getcolors(image.width * image.height)
    assert counts is not None
    common = [colour for _, colour in sorted(counts, reverse=True)[:KEPT]]
    cut = image.quantize(256 - len(common), method=Image.Quantize.MEDIANCUT).getpalette()
    return np.concatenate([np.array(common), np.reshape(cut, (-1, 3))])


def _in_these(colours: Array, picture: Array) -> Image.Image:
    """A picture with each of its colours replaced by the nearest of `colours`."""
    # Not by Image.quantize, which rounds colours first, so that white would become grey.
    codes, where = np.unique(picture.reshape(-1, 3).astype(np.int32) @ (1 << 16, 1 << 8, 1), return_inverse=True)
    found = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], -1).astype(np.float32)
    nearest = (np.square(colours).sum(-1) - 2 * found @ colours.T.astype(np.float32)).argmin(-1)
    image = Image.fromarray(nearest.astype(np.uint8)[where].reshape(picture.shape[:2]))
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image
