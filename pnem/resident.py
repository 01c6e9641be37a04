"""Data that stay on the device where they are trained on."""

from collections.abc import Sequence
from operator import index as whole

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pnem.data import Batch, ImageDataset
from pnem.loading import batches, check_images
from pnem.models import SpatialMixture

__all__ = ["DeviceDataset", "resident"]

# Of the device's free memory; most of it is for the states of the unroll.
SHARE = 4
# On the way to the device, as batches.
LOADED_BYTES = 2**26
# Dtypes in which images stay as they are in the file; all others take float32, in which batches come anyway.
KEPT = {"bool": torch.bool, "uint8": torch.uint8, "int8": torch.int8, "int16": torch.int16, "float16": torch.float16}


class DeviceDataset(Dataset[Batch]):
    """The minibatches of an `ImageDataset`, bit for bit, put together on a device that holds all its images.

    Images take there what they take in the file (never more than float32) and groups a byte a pixel where that is
    enough. They are checked here and not again: nothing waits for the device when a batch is asked for.

    Args:
        dataset: the images, which are read once.
        device: where they go.
        model: that they are for.
        source: what errors call them.

    Raises:
        DataError: images cannot be read, or are not such as the model can have produced; groups are no whole numbers.

    >>> from pnem.models import Bernoulli, decoders
    >>> images = ImageDataset(torch.ones(1, 5, 3, 4, 1))
    >>> model = SpatialMixture(decoders.Linear(2, (3, 4, 1)), Bernoulli(), 2)
    >>> data = DeviceDataset(images, torch.device("cpu"), model, "ones")
    >>> data.__getitems__([4, 0]).x.shape
    torch.Size([2, 12, 1])
    """

    def __init__(self, dataset: ImageDataset, device: torch.device, model: SpatialMixture, source: str) -> None:
        self.device = device
        count, first = len(dataset), dataset[:1]
        self._axis = first.x.ndim - 3
        self._x = _room(first.x, self._axis, count, _image_dtype(dataset), device)
        self._groups = None
        if first.groups is not None:
            self._groups = _room(first.groups, self._axis, count, torch.uint8, device)
        start = 0
        for x, groups in batches(dataset, max(1, LOADED_BYTES // sum(t.nbytes for t in first if t is not None))):
            check_images(model, x, source)
            size = x.shape[self._axis]
            self._x.narrow(self._axis, start, size).copy_(x)
            if groups is not None and self._groups is not None:
                if groups.max() > torch.iinfo(self._groups.dtype).max:
                    self._groups = self._groups.long()
                self._groups.narrow(self._axis, start, size).copy_(groups)
            start += size

    def __len__(self) -> int:
        return self._x.shape[self._axis]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The images at `indices`, in that order, as one batch on the device."""
        index = torch.tensor([whole(i) for i in indices])
        if ((index < -len(self)) | (index >= len(self))).any():
            raise IndexError(f"indices {index.min()} to {index.max()} asked of a dataset of {len(self)} images")
        # From pinned memory the copy does not wait for the device.
        index = index % len(self)
        index = (index.pin_memory() if self.device.type == "cuda" else index).to(self.device, non_blocking=True)
        groups = None if self._groups is None else self._groups.index_select(self._axis, index).long()
        return Batch(self._x.index_select(self._axis, index).float(), groups)


def resident(
    dataset: ImageDataset, device: torch.device, model: SpatialMixture, source: str
) -> ImageDataset | DeviceDataset:
    """The data on a CUDA device, if they take at most a quarter of its free memory; elsewhere as they are.

    Raises:
        DataError: as `DeviceDataset` does.
    """
    if device.type != "cuda" or _bytes_on_device(dataset) > torch.cuda.mem_get_info(device)[0] // SHARE:
        return dataset
    return DeviceDataset(dataset, device, model, source)


def _image_dtype(dataset: ImageDataset) -> torch.dtype:
    return KEPT.get(np.dtype(dataset.dtype).name, torch.float32)


def _bytes_on_device(dataset: ImageDataset) -> int:
    H, W, C = dataset.image_shape
    pixels = len(dataset) * dataset.num_frames * H * W
    return pixels * (C * _image_dtype(dataset).itemsize + dataset.has_groups)


def _room(like: Tensor, axis: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((*like.shape[:axis], count, *like.shape[axis + 1 :]), dtype=dtype, device=device)
