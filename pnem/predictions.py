"""Predictions of a run as an HDF5 file."""

import os
from pathlib import Path
from typing import Any

import h5py

from pnem.data import ImageDataset
from pnem.data.writing import SafeFile
from pnem.errors import DataError
from pnem.run import Run

__all__ = ["write_predictions"]


def write_predictions(run: Run, data: str | Path, out: str | Path, *, split: str = "test", **options: Any) -> int:
    """Infers a split batch by batch and writes it; returns the number of images N.

    Datasets: ``gamma`` (N, K, H, W), ``labels`` (N, H, W), the component most responsible, and ``psi`` (N, K, H, W, C),
    each component's predicted mean.

    Args:
        run: a fitted run.
        data: an HDF5 file; it needs no groups.
        out: the file to write.
        split: the split to infer.
        **options: ``limit, restarts, iterations, batch_size, seed, progress`` of `Run.infer_batches`.

    Raises:
        DataError: `out` exists or cannot be written, or the data do not fit the run.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists already: choose another name")
    images = {split: ImageDataset.from_hdf5(data, split, with_groups=False)}
    options["split"] = split
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    H, W, C = run.settings.image_shape
    K = run.model.num_components
    count = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with SafeFile(temporary, "x+") as sink, h5py.File(sink, "w") as file:
            shapes = {"gamma": ((K, H, W), "f4"), "labels": ((H, W), "i2"), "psi": ((K, H, W, C), "f4")}
            datasets = {
                name: file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(64, *shape))
                for name, (shape, dtype) in shapes.items()
            }
            for _, posterior in run.infer_batches(images, **options):
                values = {"gamma": posterior.gamma, "labels": posterior.labels, "psi": posterior.mean}
                size = len(posterior.gamma)
                for name, dataset in datasets.items():
                    dataset.resize(count + size, axis=0)
                    dataset[count:] = values[name].cpu().numpy().reshape(size, *shapes[name][0])
                count += size
                sink.check()
            file.flush()
            sink.check()
        temporary.replace(out)
    except OSError as error:
        raise DataError(
            f"cannot write {out} ({error.strerror or error}): check that its folder has space left"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return count
