"""Splits that stay in their file: the same images, each once, read once, in bounded memory, and nothing left behind."""

import gc
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fitting import arrays as binary_arrays
from fitting import train
from hypothesis import given
from hypothesis import strategies as st
from pixels import arrays, assert_same
from test_training import assert_same_run

from pnem.data import ImageDataset, streaming, write_hdf5
from pnem.data.streaming import read_ahead
from pnem.errors import DataError
from pnem.loading import EpochShuffle, batches

UNLIMITED = 2**30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.h5"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk is a block, and four of them a buffer, so that small files have many."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 1)
    monkeypatch.setattr(streaming, "READ_BYTES", 1)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "read-ahead" in thread.name]


def stored(path: Path, N: int = 100, *, T: int = 1, split: str = "training", **storage: Any) -> Path:
    """A file of images, in chunks of 7 unless told otherwise."""
    storage = storage or {"chunks": 7}
    with h5py.File(path, "a") as file:
        for name, array in zip(("features", "groups"), arrays(T=T, N=N), strict=True):
            chunks = storage.get("chunks")
            shape = {} if chunks is None else {"chunks": (1, min(chunks, N), *array.shape[2:])}
            file.create_dataset(f"{split}/{name}", data=array, **storage | shape)
    return path


def opened(path: Path, memory_limit: int = 0, **options: Any) -> ImageDataset:
    return ImageDataset.from_hdf5(path, memory_limit=memory_limit, **options)


@given(st.integers(1, 80), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_every_image_comes_once_an_epoch_and_from_a_few_blocks_at_a_time(size, block, blocks, epoch, seed):
    sampler, again = (EpochShuffle(size, seed, block=block, buffer=block * blocks) for _ in range(2))
    for shuffle in (sampler, again):
        shuffle.set_epoch(epoch)
    indices = list(sampler)
    assert indices == list(again)
    assert sorted(indices) == list(range(size))
    at = {index // block: [] for index in indices}
    for place, index in enumerate(indices):
        at[index // block].append(place)
    assert all(max(places) - min(places) < block * blocks for places in at.values())


def test_the_shuffle_depends_on_seed_and_epoch_and_mixes_the_images_of_a_buffer():
    def order(seed, epoch):
        sampler = EpochShuffle(1000, seed, block=10, buffer=100)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9
    # Neighbours in a uniform order of 100 images are of one block of 10 in one case of 11, and of 91 other cases none.
    blocks = np.array(order(0, 0)) // 10
    assert np.mean(blocks[1:] == blocks[:-1]) < 0.2
    # Buffers themselves are of blocks from anywhere.
    assert np.ptp(blocks[:100]) > 50


@pytest.mark.parametrize("options", [{}, {"block": 7, "buffer": 100}, {"block": 7, "buffer": 105}])
def test_what_fits_in_the_buffer_is_shuffled_as_it_always_was(options):
    sampler = EpochShuffle(100, 3, **options)
    sampler.set_epoch(2)
    assert list(sampler) == torch.randperm(100, generator=torch.Generator().manual_seed(3_000_011)).tolist()


def test_splits_in_memory_are_not_streamed(path):
    stored(path)
    assert ImageDataset(*arrays()).streaming is None
    for limit, count in ((UNLIMITED, None), (36 * 100, None), (36 * 50, 50)):
        dataset = opened(path, limit, limit=count)
        assert dataset.streaming is None
        assert list(batches(dataset, 8, shuffle_seed=1).batch_sampler.sampler) == list(EpochShuffle(len(dataset), 1))
    assert opened(path, 36 * 100 - 1).streaming is not None


STORAGES = [
    pytest.param({"chunks": 7}, id="chunks"),
    pytest.param({"chunks": 20, "compression": "gzip"}, id="gzip"),
    pytest.param({"chunks": 100}, id="one-chunk"),
    pytest.param({"chunks": 1}, id="single"),
    pytest.param({"chunks": None}, id="contiguous"),
]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("storage", STORAGES)
def test_streamed_batches_are_those_of_the_images_in_memory(path, storage, T, seed):
    stored(path, T=T, **storage)
    memory = ImageDataset(*arrays(T=T, N=100))
    for dataset in (opened(path), opened(path, limit=37), opened(path).limited(99), opened(path, with_groups=False)):
        for size in (1, 8, 64):
            loader = batches(dataset, size, shuffle_seed=seed)
            count, found = len(dataset), list(loader)
            assert len(found) == len(loader) == (count // size if seed is not None else -(-count // size))
            for batch, index in zip(found, loader.batch_sampler, strict=True):
                expected = memory.__getitems__(index)
                assert_same(batch, expected if dataset.has_groups else expected._replace(groups=None))


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_tiny_files_are_streamed(path, count):
    dataset = opened(stored(path, count))
    assert sum(batch.x.shape[0] for batch in batches(dataset, 64)) == count
    assert list(batches(dataset, 64, shuffle_seed=0)) == []
    assert len(list(batches(dataset, 1, shuffle_seed=0))) == count


def test_features_and_groups_may_be_in_different_chunks(path):
    features, groups = arrays(N=100)
    with h5py.File(path, "w") as file:
        file.create_dataset("training/features", data=features, chunks=(1, 9, 2, 3, 1))
        file.create_dataset("training/groups", data=groups.astype("int64"), chunks=(1, 4, 4, 3, 1))
    memory, loader = ImageDataset(features, groups), batches(opened(path), 8, shuffle_seed=0)
    for batch, index in zip(loader, loader.batch_sampler, strict=True):
        assert_same(batch, memory.__getitems__(index))


@pytest.mark.parametrize("seed", [None, *range(4)])
@pytest.mark.parametrize("size", [1, 8, 27, 64, 99])
@pytest.mark.parametrize("limit", [None, 95])
def test_every_chunk_is_read_once_an_epoch(path, monkeypatch, size, seed, limit):
    dataset = opened(stored(path), limit=limit)
    reads: list[tuple[str, int]] = []
    get = h5py.Dataset.__getitem__

    def spy(array, key):
        reads.append((array.name, key[1].start))
        assert key[1].stop - key[1].start == min(7, len(dataset) - key[1].start)
        return get(array, key)

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    for _ in batches(dataset, size, shuffle_seed=seed):
        pass
    # An image that no whole batch has room for may be the only one that a chunk was wanted for.
    assert len(reads) == len(set(reads))
    assert {start for _, start in reads} <= set(range(0, 100, 7))
    if seed is None:
        assert len(reads) == 2 * -(-len(dataset) // 7)


def test_shares_of_joint_batches_are_streamed_too(path):
    dataset = opened(stored(path))
    joint = list(batches(dataset, 9, shuffle_seed=1).batch_sampler)
    for rank in range(2):
        shares = [batch[rank::2] for batch in joint]
        for batch, index in zip(read_ahead(dataset, shares, 4), shares, strict=True):
            assert_same(batch, ImageDataset(*arrays(N=100)).__getitems__(index))


def test_epochs_follow_the_seed_alone_and_leave_torchs_random_state(path):
    loader = batches(opened(stored(path)), 8, shuffle_seed=5)
    state = torch.get_rng_state()
    first = [batch.x for batch in loader]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert all(torch.equal(a, b.x) for a, b in zip(first, loader, strict=True))
    loader.batch_sampler.sampler.set_epoch(1)
    assert not all(torch.equal(a, b.x) for a, b in zip(first, loader, strict=True))


def damaged(path: Path, chunk: int) -> Path:
    stored(path, chunks=10, compression="gzip")
    with h5py.File(path) as file:
        start = file["training/features"].id.get_chunk_info(chunk).byte_offset
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"damaged!")
    return path


@pytest.mark.parametrize("seed", [None, 0])
def test_a_damaged_chunk_is_named_where_it_is_needed(path, seed):
    good: list[Any] = []
    with pytest.raises(DataError, match=f"{path}, split 'training' cannot be read .*damaged"):
        good.extend(batches(opened(damaged(path, 9)), 10, shuffle_seed=seed))
    assert len(good) == 9 if seed is None else len(good) < 10


@pytest.mark.parametrize("seed", [None, 0])
def test_values_that_are_not_finite_are_refused_by_name(path, seed):
    features, groups = arrays(N=100, dtype="float32")
    features[0, 61, 1, 1, 0] = np.nan
    with h5py.File(path, "w") as file:
        file.create_dataset("training/features", data=features, chunks=(1, 7, 4, 3, 2))
        file.create_dataset("training/groups", data=groups, chunks=(1, 7, 4, 3, 1))
    with pytest.raises(DataError, match=f"{path}, split 'training', image 61: features has NaN"):
        list(batches(opened(path), 4, shuffle_seed=seed))


def test_a_file_that_is_gone_is_an_error(path):
    dataset = opened(stored(path))
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        list(batches(dataset, 8))


@pytest.mark.parametrize("seed", [None, 0])
def test_an_abandoned_iterator_ends_its_thread(path, seed):
    loader = batches(opened(stored(path)), 4, shuffle_seed=seed)
    for _ in loader:
        assert threads() != []
        break
    gc.collect()
    assert threads() == []
    with pytest.raises(KeyboardInterrupt):
        interrupt(loader)
    gc.collect()
    assert threads() == []
    iterator = iter(loader)
    next(iterator)
    del iterator
    # And a new one begins anew.
    assert len(list(loader)) == 25


def interrupt(loader: Any) -> None:
    for _ in loader:
        raise KeyboardInterrupt


def test_abandoning_does_not_wait_for_the_rest_of_the_buffer(path, monkeypatch):
    dataset = opened(stored(path, 400, chunks=1), memory_limit=4 * 36 * 40)
    began, go_on, reads = threading.Event(), threading.Event(), []
    read = ImageDataset.read

    def slow(self, start, stop):
        reads.append(start)
        if len(reads) > 40:
            began.set()
            assert go_on.wait(60)
        return read(self, start, stop)

    monkeypatch.setattr(ImageDataset, "read", slow)
    iterator = iter(batches(dataset, 4, shuffle_seed=0))
    next(iterator)
    assert began.wait(60)
    threading.Timer(0.2, go_on.set).start()
    iterator.close()
    assert len(reads) < 45


def test_memory_does_not_grow_and_stays_near_the_limit(path):
    features = np.zeros((1, 1500, 64, 64, 1), "uint8")
    write_hdf5(path, {"training": (features, features)})
    limit = features.nbytes
    loader = batches(opened(path, limit), 10, shuffle_seed=0)
    tracemalloc.start()
    try:
        peaks = []
        for epoch in range(5):
            loader.batch_sampler.sampler.set_epoch(epoch)
            for _ in loader:
                pass
            gc.collect()
            peaks.append(tracemalloc.get_traced_memory())
            tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()
    assert max(peak for _, peak in peaks[2:]) < 1.25 * limit
    assert peaks[-1][0] - peaks[2][0] < 20_000


def binary_file(path: Path, chunk: int = 3) -> Path:
    features, groups = (array.numpy().astype("uint8") for array in binary_arrays())
    with h5py.File(path, "w") as file:
        for split in ("training", "validation"):
            for name, array in (("features", features), ("groups", groups)):
                file.create_dataset(f"{split}/{name}", data=array, chunks=(1, chunk, 3, 4, 1), compression="gzip")
    return path


class Interrupting(ImageDataset):
    """A split that presses Ctrl-C when its batch number `at` is asked for."""

    countdown = 0

    def batch_of(self, *args: Any) -> Any:
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt
        return super().batch_of(*args)


def streamed(path: Path, kind: type[ImageDataset] = ImageDataset) -> dict[str, ImageDataset]:
    return {
        "training": kind.from_hdf5(path, "training", memory_limit=0),
        "validation": ImageDataset.from_hdf5(path, "validation", memory_limit=0),
    }


def test_an_interrupted_and_resumed_training_ends_as_an_uninterrupted_one(tmp_path, path):
    binary_file(path)
    whole = train(tmp_path / "whole", data=streamed(path))
    data = streamed(path, Interrupting)
    # After the batch of the fingerprint, 3 batches an epoch: in the middle of the second.
    data["training"].countdown = 1 + 5
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train(tmp_path / "cut", data=data)
    assert threads() == []
    assert_same_run(train(tmp_path / "cut", resume=True, data=streamed(path)), whole)
    assert len(whole.history) == 4


def test_a_training_on_what_fits_in_the_buffer_is_that_on_images_in_memory(path):
    data = streamed(binary_file(path, chunk=7))
    assert all(dataset.streaming.buffer == len(dataset) for dataset in data.values())
    memory = {name: ImageDataset(*binary_arrays()) for name in data}
    assert_same_run(train(data=data), train(data=memory))


def test_an_error_in_the_thread_ends_a_training_and_the_thread(tmp_path, path):
    binary_file(path)
    data = streamed(path)
    with h5py.File(path) as file:
        start = file["training/groups"].id.get_chunk_info(8).byte_offset
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"damaged!")
    with pytest.raises(DataError, match=r"split 'training' cannot be read"):
        train(tmp_path / "run", data=data, train_limit=26)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("chunk", [1, 20, 3125, 10**6])
@pytest.mark.parametrize("image_bytes", [24, 1568, 33_000, 420_000])
@pytest.mark.parametrize("limit", [0, 10**8, 2**30])
def test_buffers_are_several_blocks_of_whole_chunks_and_keep_to_the_limit(monkeypatch, chunk, image_bytes, limit):
    monkeypatch.undo()
    block, buffer, in_order = streaming.streaming(chunk, image_bytes, limit)
    assert block % chunk == 0
    assert block * image_bytes >= 2**18
    assert buffer % block == 0
    assert buffer >= 4 * block
    assert buffer == 4 * block or buffer * image_bytes <= max(limit // 4, 2**24)
    assert in_order >= block
