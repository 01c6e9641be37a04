"""Data: whatever holds the arrays, a batch is the same numbers; what can't be a batch is refused by name."""

import os
import pickle
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pixels import FEATURES, GROUPS, Array, arrays, assert_same, pixel_by_pixel
from torch.utils.data import DataLoader, Subset, default_convert

from pnem.data import Batch, ImageDataset, fingerprint, write_hdf5
from pnem.errors import DataError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "images.h5"


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    read: list[int] = []
    get = h5py.Dataset.__getitem__

    def spy(dataset: h5py.Dataset, *args: Any, **kwargs: Any) -> Any:
        rows = get(dataset, *args, **kwargs)
        read.append(rows.nbytes)
        return rows

    monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
    return read


def sources(features: Array, groups: Array, path: Path) -> Iterator[ImageDataset]:
    yield ImageDataset(features, groups)
    yield ImageDataset(features.tolist(), groups.tolist())
    yield ImageDataset(torch.from_numpy(features), torch.from_numpy(groups))
    write_hdf5(path, {"training": (features, groups)})
    for memory_limit in (2**30, 0):
        yield ImageDataset.from_hdf5(path, memory_limit=memory_limit)
    with h5py.File(path) as file:
        for memory_limit in (2**30, 0):
            yield ImageDataset(file["training/features"], file["training/groups"], memory_limit=memory_limit)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_all_sources_give_the_same_pixels(data: st.DataObject) -> None:
    T, N, H, W, C = (data.draw(st.integers(1, 4), label=name) for name in "TNHWC")
    dtype = data.draw(st.sampled_from(["bool", "uint8", "int32", "float32", "float64"]))
    features, groups = arrays(T, N, H, W, C, dtype, seed=data.draw(st.integers(0, 99)))
    indices = data.draw(st.lists(st.integers(-N, N - 1), min_size=1, max_size=6))
    expected = pixel_by_pixel(features, groups, indices)
    with tempfile.TemporaryDirectory() as folder:
        for dataset in sources(features, groups, Path(folder, "images.h5")):
            assert (len(dataset), dataset.num_frames, dataset.image_shape) == (N, T, (H, W, C))
            assert dataset.has_groups
            batch = dataset.__getitems__(indices)
            assert batch.x.dtype == torch.float32
            assert_same(batch, expected)
            one = dataset[indices[0]]
            assert one.x.shape == ((H * W, C) if T == 1 else (T, H * W, C))
            assert one.groups is not None
            assert_same(
                Batch(one.x.unsqueeze(-3), one.groups.unsqueeze(-2)), pixel_by_pixel(features, groups, indices[:1])
            )


@pytest.mark.parametrize("memory_limit", [2**30, 0])
@pytest.mark.parametrize("storage", [{}, {"chunks": True}, {"chunks": (1, 3, 4, 3, 1), "compression": "gzip"}])
@pytest.mark.parametrize("group_dtype", ["bool", "uint8", "int64", "float32", ">f8"])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float16", "float32", ">f8"])
def test_any_storage_reads_the_same(path: Path, dtype: str, group_dtype: str, storage: Any, memory_limit: int) -> None:
    features, groups = (a % 2 for a in arrays())
    with h5py.File(path, "w") as file:
        file.create_dataset("test/features", data=features.astype(dtype), **storage)
        file.create_dataset("test/groups", data=groups.astype(group_dtype), **storage)
    batch = ImageDataset.from_hdf5(path, "test", memory_limit=memory_limit).__getitems__([7, 2, 2, 9])
    assert_same(batch, pixel_by_pixel(features, groups, [7, 2, 2, 9]))


def test_pixels_are_in_row_order_with_channels_last() -> None:
    features = np.arange(24).reshape(1, 1, 3, 4, 2)
    torch.testing.assert_close(ImageDataset(features)[0].x, torch.arange(24.0).reshape(12, 2))


def test_bfloat16_and_gradients_do_not_matter() -> None:
    x = torch.rand(1, 2, 3, 3, 1, dtype=torch.bfloat16, requires_grad=True)
    batch = ImageDataset(x).__getitems__([0, 1])
    assert not batch.x.requires_grad
    torch.testing.assert_close(batch.x, x.detach().float().reshape(2, 9, 1))


def test_groups_may_repeat_over_channels() -> None:
    features, groups = arrays(C=3)
    repeated = ImageDataset(features, np.repeat(groups, 3, axis=-1))
    assert_same(repeated.__getitems__([1, 4]), pixel_by_pixel(features, groups, [1, 4]))


def test_images_may_come_without_groups(path: Path) -> None:
    features, groups = arrays()
    write_hdf5(path, {"training": (features, None), "test": (features, groups)})
    assert ImageDataset.from_hdf5(path, "test", with_groups=None).has_groups
    for dataset in (
        ImageDataset(features),
        ImageDataset.from_hdf5(path, with_groups=False),
        ImageDataset.from_hdf5(path, with_groups=None),
        ImageDataset.from_hdf5(path, "test", with_groups=False),
    ):
        assert not dataset.has_groups
        assert dataset[3].groups is None
        assert_same(dataset.__getitems__([3]), pixel_by_pixel(features, groups, [3])._replace(groups=None))


def test_a_batch_is_a_copy() -> None:
    features, groups = arrays(dtype="float32")
    dataset = ImageDataset(features, groups.astype("int64"))
    x, labels = dataset[0]
    x.fill_(9)
    assert labels is not None
    labels.fill_(9)
    assert_same(dataset.__getitems__([0]), pixel_by_pixel(*arrays(dtype="float32"), [0]))


@pytest.mark.parametrize("limit", [1, 7, 10, 99])
@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_a_limit_keeps_the_first_images(path: Path, limit: int, memory_limit: int) -> None:
    features, groups = arrays()
    write_hdf5(path, {"training": (features, groups)})
    opened = ImageDataset.from_hdf5(path, limit=limit, memory_limit=memory_limit)
    for dataset in (opened, opened.limited(99), ImageDataset.from_hdf5(path).limited(limit)):
        N = min(limit, 10)
        assert len(dataset) == N
        assert_same(dataset.__getitems__(range(N)), pixel_by_pixel(features, groups, list(range(N))))
        assert_same(dataset.__getitems__([-1]), pixel_by_pixel(features, groups, [N - 1]))
        with pytest.raises(IndexError, match=str(N)):
            dataset[N]


def test_indices_are_whole_and_inside() -> None:
    dataset = ImageDataset(*arrays())
    assert len(list(dataset)) == 10  # type: ignore[call-overload]
    for index in (10, -11):
        with pytest.raises(IndexError, match="10 images"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset.__getitems__([0.5])  # type: ignore[list-item]


def test_a_small_split_is_read_once(path: Path, bytes_read: list[int]) -> None:
    features, groups = arrays()
    write_hdf5(path, {"training": (features, groups)})
    limit = features.nbytes + groups.nbytes
    dataset = ImageDataset.from_hdf5(path, memory_limit=limit)
    assert bytes_read == []
    for _ in range(3):
        dataset.__getitems__([4, 2])
    dataset.limited(3)[0]
    assert bytes_read == [features.nbytes, groups.nbytes]


def test_a_large_split_is_never_read_at_once(path: Path, bytes_read: list[int]) -> None:
    features, groups = arrays(N=100)
    write_hdf5(path, {"training": (features, groups)})
    dataset = ImageDataset.from_hdf5(path, memory_limit=features.nbytes + groups.nbytes - 1)
    for indices in ([4, 2, 80, 4], [81, 5, 3]):
        bytes_read.clear()
        dataset.__getitems__(indices)
        assert sum(bytes_read) == len(set(indices)) * (features.nbytes + groups.nbytes) // 100


def test_neighbours_are_read_in_one_piece(path: Path, bytes_read: list[int]) -> None:
    features, groups = arrays(N=100)
    write_hdf5(path, {"training": (features, groups)})
    dataset = ImageDataset.from_hdf5(path, memory_limit=0)
    dataset.__getitems__([12, 10, 11, 50, 13])
    assert len(bytes_read) == 4


def test_the_limit_counts_only_the_images_used(path: Path, bytes_read: list[int]) -> None:
    features, groups = arrays(N=100)
    write_hdf5(path, {"training": (features, groups)})
    dataset = ImageDataset.from_hdf5(path, limit=10, memory_limit=(features.nbytes + groups.nbytes) // 10)
    dataset[0]
    assert bytes_read == [features.nbytes // 10, groups.nbytes // 10]


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_a_dataset_pickles_without_its_contents(path: Path, memory_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features, groups = arrays(N=1000)
    write_hdf5(path, {"training": (features, groups)})
    monkeypatch.chdir(path.parent)
    dataset = ImageDataset.from_hdf5(path.name, memory_limit=memory_limit)
    dataset[0]
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 2000
    monkeypatch.chdir("/")
    assert_same(pickle.loads(pickled).__getitems__([999]), pixel_by_pixel(features, groups, [999]))


# Forking a process that has threads is what a DataLoader does by default on Linux.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("memory_limit", [2**30, 0])
@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_open_the_file_for_themselves(path: Path, context: str, memory_limit: int) -> None:
    features, groups = arrays(N=40)
    write_hdf5(path, {"training": (features, groups)})
    dataset = ImageDataset.from_hdf5(path, memory_limit=memory_limit)
    dataset[0]
    loader = DataLoader(
        dataset, 4, num_workers=1, multiprocessing_context=context, collate_fn=default_convert, timeout=300
    )
    for b, batch in enumerate(loader):
        expected = pixel_by_pixel(features, groups, list(range(4 * b, 4 * b + 4)))
        assert_same(batch, expected)
        assert_same(dataset.__getitems__(range(4 * b, 4 * b + 4)), expected)


def test_a_file_is_opened_once_per_process(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hdf5(path, {"training": arrays()})
    dataset = ImageDataset.from_hdf5(path, with_groups=False, memory_limit=0)
    opened = []
    open_file = h5py.File

    def spy(*args: Any) -> Any:
        opened.append(os.getpid())
        return open_file(*args)

    monkeypatch.setattr(h5py, "File", spy)
    for process in (os.getpid(), os.getpid() + 1):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        dataset[0], dataset[1]
        assert opened[-1] == process
    assert len(opened) == 2


def test_subsets_fetch_batches() -> None:
    features, groups = arrays()
    loader = DataLoader(Subset(ImageDataset(features, groups), [8, 1, 5]), 3, collate_fn=default_convert)
    assert_same(next(iter(loader)), pixel_by_pixel(features, groups, [8, 1, 5]))


def test_a_given_h5py_dataset_is_reopened_when_its_file_was_closed(path: Path) -> None:
    features, groups = arrays()
    write_hdf5(path, {"training": (features, groups)})
    with h5py.File(path) as file:
        dataset = ImageDataset(file["training/features"], file["training/groups"], memory_limit=0)
    assert_same(dataset.__getitems__([3]), pixel_by_pixel(features, groups, [3]))


@pytest.mark.parametrize("change", [{"N": 9}, {"dtype": "int8"}])
def test_a_file_that_changed_is_refused(path: Path, change: Any) -> None:
    write_hdf5(path, {"training": arrays()})
    dataset = ImageDataset.from_hdf5(path)
    write_hdf5(path, {"training": arrays(**change)}, overwrite=True)
    with pytest.raises(DataError, match="changed"):
        dataset[0]


UNUSABLE = [
    pytest.param(FEATURES[0], None, "five axes", id="rank"),
    pytest.param(FEATURES, GROUPS[0], "five axes", id="groups-rank"),
    pytest.param(FEATURES, GROUPS[:, :9], r"\(1, 10, 4, 3, 2\) and groups \(1, 9, 4, 3, 1\)", id="shapes"),
    pytest.param(FEATURES, np.repeat(GROUPS, 3, axis=-1), "may have C = 1", id="channels"),
    pytest.param(FEATURES[:, :0], None, "at least one image", id="no-images"),
    pytest.param(FEATURES[:, :, :0], None, "empty", id="no-pixels"),
    pytest.param(FEATURES.astype("S1"), None, "dtype", id="strings"),
    pytest.param(FEATURES.astype(complex), None, "complex128", id="complex"),
    pytest.param(FEATURES, GROUPS.astype("S1"), "groups has dtype", id="groups-strings"),
]


@pytest.mark.parametrize(("features", "groups", "message"), UNUSABLE)
def test_unusable_arrays_are_refused_at_once(path: Path, features: Array, groups: Array | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageDataset(features, groups)
    with pytest.raises(DataError, match=message):
        write_hdf5(path, {"training": (features, groups)})
    assert not list(path.parent.iterdir())
    with h5py.File(path, "w") as file:
        file["training/features"] = features
        if groups is not None:
            file["training/groups"] = groups
    with pytest.raises(DataError, match=message) as caught:
        ImageDataset.from_hdf5(path, with_groups=groups is not None)
    assert str(path) in str(caught.value)
    assert "training" in str(caught.value)


def test_ragged_lists_are_refused() -> None:
    with pytest.raises(DataError, match="features is not an array"):
        ImageDataset([[[1, 2], [3]], [[1, 2], [3]]])
    frames = [np.zeros((2, height, 5, 1)) for height in (4, 4, 6)]
    with pytest.raises(DataError, match=r"frames of different shapes, \(2, 4, 5, 1\) and \(2, 6, 5, 1\): all frames"):
        ImageDataset(frames)


def test_an_array_without_a_shape_is_refused(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["training/features"] = h5py.Empty("f")
    with pytest.raises(DataError, match="five axes"):
        ImageDataset.from_hdf5(path, with_groups=False)


def spoiled(array: Array, value: float, dtype: str) -> Array:
    array = array.astype(dtype)
    array[0, 6, 1, 2, 0] = value
    return array


SPOILED = [
    pytest.param(spoiled(FEATURES, np.nan, "float32"), GROUPS, "NaN", id="NaN"),
    pytest.param(spoiled(FEATURES, -np.inf, "float64"), GROUPS, "infinity", id="infinity"),
    pytest.param(FEATURES, spoiled(GROUPS, -1, "int8"), "whole numbers from 0", id="negative"),
    pytest.param(FEATURES, spoiled(GROUPS, 0.5, "float32"), "whole numbers from 0", id="fraction"),
    pytest.param(FEATURES, spoiled(GROUPS, np.nan, "float32"), "whole numbers from 0", id="groups-NaN"),
    pytest.param(FEATURES, spoiled(GROUPS, 1e30, "float64"), "whole numbers from 0", id="groups-huge"),
    pytest.param(FEATURES, spoiled(GROUPS, 2**64 - 1, "uint64"), "whole numbers from 0", id="groups-wrap"),
    pytest.param(FEATURES, spoiled(np.repeat(GROUPS, 2, -1), 9, "uint8"), "differ between channels", id="channels"),
]


@pytest.mark.parametrize("memory_limit", [2**30, 0])
@pytest.mark.parametrize(("features", "groups", "message"), SPOILED)
def test_spoiled_values_are_refused_by_name(
    path: Path, features: Array, groups: Array, message: str, memory_limit: int
) -> None:
    with h5py.File(path, "w") as file:
        file["test/features"], file["test/groups"] = features, groups
    dataset = ImageDataset.from_hdf5(path, "test", memory_limit=memory_limit)
    dataset.__getitems__([0, 5, 7])
    for read in (dataset.__getitems__, ImageDataset(features, groups).__getitems__):
        with pytest.raises(DataError, match=f"image 6: .*{message}") as caught:
            read([9, 6, 0])
    with pytest.raises(DataError, match=f"{path}, split 'test', image 6: .*{message}") as caught:
        dataset[6]
    assert caught.value.__cause__ is None
    copy = path.with_name("copy.h5")
    with pytest.raises(DataError, match=f"split 'test', image 16: .*{message}"):
        write_hdf5(copy, {"test": [(features[:, n], groups[:, n]) for n in (slice(6), slice(6), slice(2, 10))]})
    assert not copy.exists()


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(DataError, match=r"image 6: .*float32"):
        ImageDataset(spoiled(FEATURES, 1e300, "float64"))[6]


@pytest.mark.parametrize("limit", [0, -1, 2.5, "all"])
def test_a_limit_is_a_whole_number_from_1(path: Path, limit: Any) -> None:
    write_hdf5(path, {"training": (FEATURES, GROUPS)})
    for use in (
        lambda: ImageDataset(FEATURES, limit=limit),
        lambda: ImageDataset(FEATURES).limited(limit),
        lambda: ImageDataset.from_hdf5(path, limit=limit),
    ):
        with pytest.raises(DataError, match=r"limit=.* at least 1"):
            use()


def test_a_missing_file_is_named(path: Path) -> None:
    with pytest.raises(DataError, match=f"{path} does not exist"):
        ImageDataset.from_hdf5(path)


@pytest.mark.parametrize("content", [b"", b"P5 28 28 255 ", b"\0" * 5000])
def test_a_foreign_file_is_named(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path} is not an HDF5 file"):
        ImageDataset.from_hdf5(path)


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path} is a folder: [^\n]*$"):
        ImageDataset.from_hdf5(tmp_path)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(path: Path, part: float) -> None:
    write_hdf5(path, {"training": (FEATURES, GROUPS)})
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(DataError, match=f"{path} cannot be opened .*truncated"):
        ImageDataset.from_hdf5(path)


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_a_damaged_array_is_named(path: Path, memory_limit: int) -> None:
    with h5py.File(path, "w") as file:
        array = file.create_dataset("training/features", data=FEATURES, chunks=FEATURES.shape, compression="gzip")
        start = array.id.get_chunk_info(0).byte_offset
    with path.open("r+b") as raw:
        raw.seek(start)
        raw.write(b"damaged!")
    dataset = ImageDataset.from_hdf5(path, with_groups=False, memory_limit=memory_limit)
    with pytest.raises(DataError, match=f"{path}, split 'training' cannot be read"):
        dataset[0]


def test_a_missing_split_lists_those_found(path: Path) -> None:
    write_hdf5(path, {"validation": (FEATURES, GROUPS), "test": (FEATURES, GROUPS)})
    with pytest.raises(DataError, match=r"no split 'training', only \['test', 'validation'\]"):
        ImageDataset.from_hdf5(path)


@pytest.mark.parametrize("missing", ["features", "groups"])
def test_a_missing_array_is_named(path: Path, missing: str) -> None:
    write_hdf5(path, {"training": (FEATURES, GROUPS)})
    with h5py.File(path, "a") as file:
        del file["training"][missing]
        file["training"].create_group("extra")
    with pytest.raises(DataError, match=f"split 'training' has no array '{missing}', only .*'extra'"):
        ImageDataset.from_hdf5(path)


def milliseconds_per_batch(dataset: ImageDataset, batches: int) -> float:
    """The median, in processor time, which other work on the machine changes little."""
    dataset[0]
    times = []
    for indices in np.random.default_rng(0).integers(0, len(dataset), (batches, 64)).tolist():
        start = time.process_time()
        dataset.__getitems__(indices)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)


@pytest.mark.slow
def test_random_batches_of_a_small_split_are_quick(path: Path) -> None:
    write_hdf5(path, {"training": arrays(N=50_000, H=28, W=28, C=1)})
    assert milliseconds_per_batch(ImageDataset.from_hdf5(path), 100) < 2


@pytest.mark.slow
def test_random_batches_of_long_sequences_take_no_second(path: Path) -> None:
    write_hdf5(path, {"training": arrays(T=21, N=300, H=64, W=64, C=1)})
    assert milliseconds_per_batch(ImageDataset.from_hdf5(path, memory_limit=0), 5) < 300


def test_the_fingerprint_is_of_the_images_wherever_and_however_they_are_stored(path, bytes_read):
    features, groups = np.random.default_rng(0).integers(0, 2, (1, 1000, 4, 5, 1), np.uint8), None
    write_hdf5(path, {"test": (features, groups)})
    of = fingerprint(ImageDataset(features))
    assert len(of) == 64
    assert fingerprint(ImageDataset(features.astype(bool))) == of
    assert fingerprint(ImageDataset(torch.from_numpy(features).double(), features[..., :1])) == of
    bytes_read.clear()
    assert fingerprint(ImageDataset.from_hdf5(path, "test", with_groups=False, memory_limit=0)) == of
    assert sum(bytes_read) <= 64 * features[0, 0].nbytes
    first, last = features.copy(), features.copy()
    first[0, 0, 0, 0], last[0, -1, -1, -1] = 1 - first[0, 0, 0, 0], 1 - last[0, -1, -1, -1]
    others = [first, last, features[:, ::-1], features[:, :999], features.reshape(1, 1000, 5, 4, 1)]
    assert len({of, *(fingerprint(ImageDataset(other)) for other in others)}) == 6
