"""Predictions of a run as an HDF5 file."""

import contextlib
import os
from pathlib import Path
from typing import Any

import h5py
import pyro.distributions as dist
from torch import Tensor

from pnem.data import ImageDataset
from pnem.data.writing import SafeFile
from pnem.errors import DataError
from pnem.inference import Posterior
from pnem.run import Run

__all__ = ["write_predictions"]


def write_predictions(run: Run, data: str | Path, out: str | Path, *, split: str = "test", **options: Any) -> int:
    """Infers a split batch by batch and writes it; returns the number of images or sequences N.

    Datasets: ``gamma`` (N, K, H, W); ``labels`` (N, H, W), the component most responsible; ``psi`` (N, K, H, W, C),
    each component's predicted mean; ``theta`` (N, K, M), the mean of q(θ); and where q(θ) is a normal distribution
    with independent entries ``theta_scale`` (N, K, M), their standard deviations. Of sequences all have a leading axis
    of S steps, as `Posterior` has them, and ``prediction`` (S, N, H, W, C) is what the components predict together
    without seeing the frame.

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
    count, axis = 0, int(run.strategy.is_sequential)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with SafeFile(temporary, "x+") as sink, h5py.File(sink, "w") as file:
            for _, posterior in run.infer_batches(images, **options):
                for name, tensor in _contents(posterior, run).items():
                    values = tensor.cpu().numpy()
                    steps, shape = values.shape[:axis], values.shape[axis + 1 :]
                    if name not in file:
                        layout = {"maxshape": (*steps, None, *shape), "chunks": (*(1 for _ in steps), 64, *shape)}
                        file.create_dataset(name, (*steps, 0, *shape), "i2" if name == "labels" else "f4", **layout)
                    file[name].resize(count + values.shape[axis], axis=axis)
                    file[name][(*(slice(None) for _ in steps), slice(count, None))] = values
                count += posterior.gamma.shape[axis]
                sink.check()
            file.flush()
            sink.check()
        temporary.replace(out)
    except OSError as error:
        raise DataError(
            f"cannot write {out} ({error.strerror or error}): check that its folder has space left"
        ) from error
    finally:
        # Where the folder is a file, there is nothing to take away.
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)
    return count


def _contents(posterior: Posterior, run: Run) -> dict[str, Tensor]:
    grid = run.settings.image_shape[:2]
    contents = {
        "gamma": posterior.gamma.unflatten(-1, grid),
        "labels": posterior.labels.unflatten(-1, grid),
        "psi": posterior.mean.unflatten(-2, grid),
        "theta": posterior.theta,
    }
    if isinstance(posterior.q, dist.Independent) and isinstance(posterior.q.base_dist, dist.Normal):
        contents["theta_scale"] = posterior.q.stddev
    if run.strategy.is_sequential:
        contents["prediction"] = run.model.prediction(posterior.psi, posterior.log_mixing).unflatten(-2, grid)
    return contents
