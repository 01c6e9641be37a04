"""Data on the device: the batches are those of `ImageDataset`, checked once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import SHAPE, parts, splits, train
from fitting import arrays as binary_arrays
from pixels import arrays, assert_same
from test_training import assert_same_run

from pnem.data import ImageDataset, streaming, write_hdf5
from pnem.errors import DataError
from pnem.loading import batches
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.resident import DeviceDataset, resident
from pnem.training_module import TrainingModule

CPU = torch.device("cpu")


def model(likelihood=None) -> SpatialMixture:
    return SpatialMixture(decoders.Linear(2, (4, 3, 2)), Normal() if likelihood is None else likelihood, 2)


def moved(dataset: ImageDataset, device: torch.device = CPU, **options) -> DeviceDataset:
    return DeviceDataset(dataset, device, model(**options), "the images")


@pytest.fixture(params=[CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "uint16", "int32", "int64", "float16", "float32", "float64", ">f4"]
)
def test_batches_are_those_of_the_images_bit_for_bit(device, dtype, T):
    dataset = ImageDataset(*arrays(T=T, N=50, dtype=dtype))
    on_device = moved(dataset, device)
    assert len(on_device) == 50
    for seed in (None, 3):
        ours, theirs = (batches(data, 8, shuffle_seed=seed) for data in (on_device, dataset))
        for epoch in range(2):
            for loader in (ours, theirs):
                getattr(loader.batch_sampler.sampler, "set_epoch", lambda _: None)(epoch)
            found = list(ours)
            assert len(found) == len(theirs)
            for batch, expected in zip(found, theirs, strict=True):
                assert batch.x.device.type == batch.groups.device.type == device.type
                assert (batch.x.dtype, batch.groups.dtype) == (torch.float32, torch.int64)
                assert_same(batch._replace(x=batch.x.cpu(), groups=batch.groups.cpu()), expected)


def test_images_take_no_more_than_in_their_file():
    for dtype, size in (("bool", 1), ("uint8", 1), ("int16", 2), ("float16", 2), ("float32", 4), ("float64", 4)):
        assert moved(ImageDataset(arrays(dtype=dtype)[0]))._x.nbytes == size * 10 * 24


def test_groups_may_be_absent_or_more_than_a_byte_holds():
    features, groups = arrays(N=2000)
    groups = groups.astype("int64")
    groups[0, 1234, 1, 1, 0] = 300
    dataset = ImageDataset(features, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pnem.resident.LOADED_BYTES", 30_000)
        on_device = moved(dataset)
    assert_same(on_device.__getitems__(range(2000)), dataset[:])
    assert moved(ImageDataset(features)).__getitems__([3]).groups is None


def test_a_split_that_is_streamed_is_loaded_whole(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(streaming, "READ_BYTES", 1)
    features, groups = arrays(N=50)
    write_hdf5(tmp_path / "images.h5", {"training": (features, groups)})
    dataset = ImageDataset.from_hdf5(tmp_path / "images.h5", limit=37, memory_limit=0)
    assert_same(moved(dataset).__getitems__(range(37)), ImageDataset(features, groups)[:37])


def test_indices_are_inside_and_may_count_from_the_end():
    dataset = ImageDataset(*arrays())
    assert_same(moved(dataset).__getitems__([-1, 0]), dataset.__getitems__([-1, 0]))
    for index in (10, -11):
        with pytest.raises(IndexError, match="10 images"):
            moved(dataset).__getitems__([index])


def test_a_batch_is_a_copy():
    on_device = moved(ImageDataset(*arrays(dtype="float32")))
    first = on_device.__getitems__([0, 1])
    first.x.fill_(9)
    assert_same(on_device.__getitems__([2]), ImageDataset(*arrays(dtype="float32")).__getitems__([2]))
    assert not (on_device.__getitems__([0]).x == 9).all()


def test_images_are_checked_as_they_are_loaded():
    features = np.zeros((1, 3000, 4, 3, 2), "float32")
    features[0, 2999, 0, 0, 0] = 1.5
    with pytest.raises(DataError, match=r"the images: Bernoulli pixels must lie in \[0, 1\].*rescale"):
        moved(ImageDataset(features), likelihood=Bernoulli())
    features[0, 2999, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match=r"arrays, image 2999: features has NaN"):
        moved(ImageDataset(features))
    groups = np.zeros((1, 3000, 4, 3, 1), "int8")
    groups[0, 6] = -1
    with pytest.raises(DataError, match=r"image 6: groups"):
        moved(ImageDataset(np.zeros_like(features), groups))


def test_data_stay_where_they_are_on_a_cpu():
    dataset = splits()["training"]
    assert resident(dataset, CPU, parts()[0], "the training split") is dataset


def test_data_go_to_a_gpu_if_they_take_a_quarter_of_its_free_memory(monkeypatch):
    dataset = splits()["training"]
    size = 28 * 12 * (4 + 1)
    made = []
    monkeypatch.setattr("pnem.resident.DeviceDataset", lambda *given: made.append(given))
    for free, goes in ((4 * size, True), (4 * size - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10 * free))
        given = dataset, torch.device("cuda:0"), parts()[0], "the training split"
        assert (resident(*given) is dataset) is not goes
    assert len(made) == 1


def test_training_on_resident_data_is_training_on_the_images(monkeypatch):
    plain = train(epochs=2)
    monkeypatch.setattr("pnem.training.resident", DeviceDataset)
    moved = train(epochs=2, device="cpu")
    assert_same_run(moved, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_no_batch_waits_for_the_gpu(monkeypatch):
    device = torch.device("cuda", 0)
    dataset = ImageDataset(*binary_arrays())
    on_device = resident(dataset, device, parts()[0], "the training split")
    assert isinstance(on_device, DeviceDataset)
    loader = batches(on_device, 8, shuffle_seed=0)
    list(loader)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in loader:
            assert TrainingModule.on_before_batch_transfer(None, batch, 0) is batch
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_trains_on_resident_data():
    assert train(epochs=1, device="cuda").history["valid_elbo"].notna().all()
    features = torch.full((1, 28, *SHAPE), 1.5)
    with pytest.raises(DataError, match="the validation split: Bernoulli"):
        train(epochs=1, device="cuda", data=splits() | {"validation": ImageDataset(features)})
