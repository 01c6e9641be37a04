"""From a file or datasets to the batches that training and inference run on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from pnem.data import Batch, ImageDataset
from pnem.data.streaming import read_ahead
from pnem.errors import DataError, ModelError
from pnem.inference import FilteringStrategy, Strategy
from pnem.models import SpatialMixture

if TYPE_CHECKING:
    from pnem.resident import DeviceDataset

__all__ = ["Splits", "batches", "check_frames", "check_images", "open_split", "open_splits"]


@dataclass(frozen=True)
class Splits:
    """The splits of a data set, and where they came from."""

    datasets: Mapping[str, ImageDataset]
    source: str

    def limited(self, split: str, limit: int | None) -> ImageDataset:
        """A split, or its first `limit` images."""
        dataset = self.datasets[split]
        return dataset if limit is None else dataset.limited(limit)


def open_splits(
    data: str | Path | Mapping[str, ImageDataset],
    names: Sequence[str],
    strategy: Strategy,
    *,
    steps: int | None = None,
) -> Splits:
    """The named splits, with their groups where they have some, checked against the strategy and its model.

    Args:
        data: an HDF5 file, or datasets by name.
        names: of the splits.
        strategy: for images or for sequences.
        steps: that the strategy is to take through sequences; as few as it can when None.

    Raises:
        DataError: a split is missing, its images are not those the model is for, they are images where the strategy
            takes sequences or the reverse, or sequences are too short.
    """
    if isinstance(data, Mapping):
        missing = [name for name in names if name not in data]
        if missing:
            raise DataError(f"the data have splits {sorted(data)}, but {missing[0]!r} is needed")
        datasets, source = {name: data[name] for name in names}, "memory"
    elif not isinstance(data, str | Path):
        raise DataError(
            f"data are of type {type(data).__name__}: give the path of an HDF5 file, an ImageDataset(images, groups), "
            "or a mapping from the names of splits to them"
        )
    else:
        datasets, source = {name: ImageDataset.from_hdf5(data, name, with_groups=None) for name in names}, str(data)
    for name, dataset in datasets.items():
        _check_fits(dataset, f"{source}, split {name!r}", strategy.model)
        check_frames(dataset.num_frames, f"{source}, split {name!r}", strategy, steps or 1)
    return Splits(datasets, source)


def open_split(
    data: str | Path | ImageDataset | Mapping[str, ImageDataset],
    split: str,
    strategy: Strategy,
    *,
    steps: int | None = None,
) -> ImageDataset:
    """One split, checked as `open_splits` does."""
    data = {split: data} if isinstance(data, ImageDataset) else data
    return open_splits(data, [split], strategy, steps=steps).datasets[split]


def _check_fits(dataset: ImageDataset, source: str, model: SpatialMixture) -> None:
    expected = tuple(model.decoder.image_shape)
    if tuple(dataset.image_shape) != expected:
        raise DataError(
            f"{source} holds images of shape (H, W, C) = {tuple(dataset.image_shape)}, "
            f"but the model is for {expected}: use data of that shape, or build the model for these"
        )


def check_frames(frames: int, source: str, strategy: Strategy, steps: int) -> None:
    """Raises `DataError`, naming `source`, unless data of so many frames suit the strategy and its steps."""
    name, needed = type(strategy).__name__, steps + strategy.steps_ahead
    if not strategy.is_sequential:
        if frames != 1:
            remedy = 'task="prediction" or "denoising"' if isinstance(strategy, FilteringStrategy) else "RNNEM, say"
            raise DataError(
                f"{source} holds sequences of {frames} frames, but this {name} takes static images (T = 1): use a "
                "preset for sequences (--strategy rnn-em --preset flying-shapes, say), or a strategy that goes through "
                f"them ({remedy})"
            )
    elif frames == 1:
        raise DataError(
            f"{source} holds static images (T = 1), but this {name} with task={strategy.task!r} takes sequences: use a "
            'preset for static images (--strategy rnn-em, say), or build the strategy with task="static"'
        )
    elif frames < needed:
        raise DataError(
            f"{source} holds sequences of {frames} frames, but {steps} steps of {strategy.task} take {needed}: give "
            "longer sequences, or fewer iterations"
        )


def check_images(model: SpatialMixture, x: Tensor, source: str) -> None:
    """Raises `DataError`, naming `source`, unless images `x` (..., D, C) are such as the model can have produced."""
    try:
        model.check(x)
    except ModelError as error:
        raise DataError(f"{source}: {error}") from error


def batches(
    dataset: "ImageDataset | DeviceDataset",
    batch_size: int,
    *,
    shuffle_seed: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> "DataLoader[Batch]":
    """Batches in order, the last one perhaps smaller; or shuffled anew every epoch, all of the same size.

    With ``share=(rank, processes)`` the batches are those of all processes together, and this one takes its share of
    each; of a last one that is too small for all, some take none.

    Of a split that is not kept in memory a thread reads the next images while those before them are used; see
    `EpochShuffle` for how it is shuffled.
    """
    streaming = dataset.streaming if isinstance(dataset, ImageDataset) else None
    if shuffle_seed is None:
        sampler: Sampler[int] = SequentialSampler(dataset)
    elif streaming is None:
        sampler = EpochShuffle(len(dataset), shuffle_seed)
    else:
        sampler = EpochShuffle(len(dataset), shuffle_seed, block=streaming.block, buffer=streaming.buffer)
    loader = (DataLoader if streaming is None else _ReadAhead)(
        dataset,
        batch_sampler=Shares(sampler, batch_size, shuffle_seed is not None, *share),
        collate_fn=_as_it_is,
        # The loader draws a seed for its workers, and would take it from torch's global generator.
        generator=torch.Generator(),
    )
    if isinstance(loader, _ReadAhead) and streaming is not None:
        loader.portion = -(-(streaming.in_order if shuffle_seed is None else streaming.buffer) // batch_size)
    return loader


def _as_it_is(batch: Any) -> Any:
    return batch


class Shares(BatchSampler):
    """Of every batch what falls to one of so many processes."""

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool, rank: int, processes: int):
        super().__init__(sampler, batch_size, drop_last)
        self.rank = rank
        self.processes = processes

    def __len__(self) -> int:
        size = len(self.sampler)  # type: ignore[arg-type]
        return size // self.batch_size + (not self.drop_last and size % self.batch_size > self.rank)

    def __iter__(self) -> Iterator[list[int]]:
        shares = (batch[self.rank :: self.processes] for batch in super().__iter__())
        return filter(None, shares)


class _ReadAhead(DataLoader[Batch]):
    """Batches of a split that stays in its file, of which so many are read together."""

    portion: int

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return read_ahead(cast(ImageDataset, self.dataset), cast(BatchSampler, self.batch_sampler), self.portion)


class EpochShuffle(Sampler[int]):
    """A permutation that depends on the seed and the epoch alone, so that a resumed run repeats none.

    Any permutation is as likely as any other, unless there are more images than `buffer`. Then it is one that a file
    gives with every block read once: blocks of neighbours in random order, and the images of as many in a row as fill
    the buffer in random order among each other. A buffer is then a random draw of blocks, not of images: where
    neighbours in the file are alike (it is sorted by class, say) its composition varies as that of so few draws, and
    the file should be shuffled when it is written. Where they have nothing in common, all that is lost is that images
    of one block come in one buffer in every epoch.

    Args:
        size: images.
        seed: of all epochs.
        block: images that are neighbours in the file and read together.
        buffer: images, whole blocks of them, within which they are mixed; None for all.
    """

    def __init__(self, size: int, seed: int, *, block: int = 1, buffer: int | None = None):
        self.size = size
        self.seed = seed
        self.block = block
        self.buffer = size if buffer is None else buffer
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.buffer >= self.size:
            yield from torch.randperm(self.size, generator=generator).tolist()
            return
        blocks = torch.randperm(-(-self.size // self.block), generator=generator)
        # Of about the same size, lest the last ones be few and badly mixed.
        for buffer in blocks.tensor_split(-(-len(blocks) * self.block // self.buffer)):
            images = (buffer[:, None] * self.block + torch.arange(self.block)).flatten()
            images = images[images < self.size]
            yield from images[torch.randperm(len(images), generator=generator)].tolist()
