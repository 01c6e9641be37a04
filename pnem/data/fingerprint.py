"""By what data sets are recognised, wherever they are stored."""

import hashlib

import numpy as np

from pnem.data.hdf5 import ImageDataset

__all__ = ["fingerprint"]

SAMPLED = 64


def fingerprint(data: ImageDataset) -> str:
    """SHA-256 of the number of images, their shape, and 64 of them from the first to the last: 64 hexadecimal digits.

    The images are hashed as models see them, in single precision, so that the same images have the same fingerprint in
    a file and in memory, whatever their dtype there. Groups do not enter.

    Raises:
        DataError: one of these images cannot be read, or has NaN or infinity.

    >>> images = np.arange(24).reshape(1, 4, 2, 3, 1) % 2
    >>> data, same = ImageDataset(images), ImageDataset(images.astype(np.float64))
    >>> fingerprint(data) == fingerprint(same), fingerprint(data) == fingerprint(ImageDataset(1 - images))
    (True, False)
    """
    count = len(data)
    sampled = np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).round().astype(int))
    digest = hashlib.sha256(f"{data.num_frames} {count} {data.image_shape}".encode())
    digest.update(data.__getitems__(sampled.tolist()).x.numpy().astype("<f4").tobytes())
    return digest.hexdigest()
