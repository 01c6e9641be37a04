"""``pnem animate``: a sequence as a run goes through it, as a GIF or MP4."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["animate"]


def animate(
    run: Annotated[Path, typer.Argument(help="A run directory, as pnem train wrote it.", metavar="RUN")],
    data: Annotated[Path, typer.Argument(help="An HDF5 file of sequences, as pnem data writes it.", metavar="DATA")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .gif or .mp4 to write, which must not exist: RUN.gif, here, when left out. An .mp4 takes ffmpeg."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="training, validation or test.")] = "test",
    index: Annotated[int, typer.Option(help="Which sequence, from 0.", min=0)] = 0,
    frames: Annotated[int | None, typer.Option(help="See only the first so many frames.", min=1)] = None,
    rollout: Annotated[
        int, typer.Option(help="Frames to predict after those seen, predictions fed back; 0 for none.", min=0)
    ] = 0,
    fps: Annotated[int, typer.Option(help="Steps per second.", min=1, max=50)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the initial γ.", min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Animate a sequence: each frame, how the run divides it, what each component predicts, and the next frame.

    With a rollout the frames that follow in the data, if any, are drawn beside it.

    Example: `pnem animate runs/flying data.h5 --out flying.gif --frames 21 --rollout 10`
    """
    import torch

    from pnem.data import ImageDataset
    from pnem.devices import forked_rng
    from pnem.errors import DataError, RunError
    from pnem.files import check_new
    from pnem.loading import check_images, open_split
    from pnem.plots import animation
    from pnem.plots.animation import check_format
    from pnem.run import load

    out = Path(f"{run.resolve().name}.gif") if out is None else out
    check_new(out)
    check_format(out)
    fitted = load(run, device=device)
    if not fitted.strategy.is_sequential:
        raise RunError(f"{run} infers static images: give a run that was trained on sequences")
    available = open_split(data, split, fitted.strategy)
    seen, least = available.num_frames if frames is None else frames, 1 + fitted.strategy.steps_ahead
    if not least <= seen <= available.num_frames:
        raise DataError(
            f"--frames is {seen}, but the sequences of {data} have {available.num_frames} frames, and "
            f"{fitted.strategy.task} takes at least {least}: give a number from {least} to {available.num_frames}"
        )
    if index >= len(available):
        raise DataError(
            f"--index is {index}, but split {split!r} of {data} has {len(available)} sequences: give one from 0 to "
            f"{len(available) - 1}"
        )
    # Nothing else of the split is read.
    stored = ImageDataset.from_hdf5(data, split, with_groups=False, memory_limit=0)
    sequence = fitted.images(stored[index : index + 1].x)
    check_images(fitted.model, sequence, f"{data}, split {split!r}")
    x, future = sequence[:seen], sequence[seen:]
    with forked_rng(fitted.device):
        torch.manual_seed(seed)
        posterior = fitted.infer(x)
        rolled = fitted.rollout(posterior, x, rollout) if rollout else None
    film = animation(
        x,
        posterior,
        fitted.settings.image_shape,
        model=fitted.model,
        rolled=rolled,
        future=future if rollout and len(future) else None,
        frames_per_second=fps,
    )
    film.save(out, progress=True)
    Console().print(
        f"wrote {len(film)} steps to {out}, {out.stat().st_size / 1000:.0f} kB",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
