"""An animation of a strategy going through a sequence: what it sees, how it divides it, what it expects next."""

import base64
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.animation import FFMpegWriter
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich import get_console
from rich.progress import track
from torch import Tensor

from pnem.errors import DataError
from pnem.files import write_atomically
from pnem.plots.gif import gif
from pnem.plots.panels import panels
from pnem.plots.steps import Steps
from pnem.plots.style import STYLE

if TYPE_CHECKING:
    from pnem.inference.posterior import Posterior, State
    from pnem.models import SpatialMixture

__all__ = ["Animation", "animation", "check_format"]

# Frames that the colours of a GIF are chosen from.
SAMPLE = 8


@matplotlib.rc_context(STYLE)
def animation(
    x: Tensor,
    posterior: "Posterior",
    image_shape: tuple[int, int, int],
    *,
    model: "SpatialMixture",
    image: int = 0,
    rolled: "State | None" = None,
    future: Tensor | None = None,
    frames_per_second: int = 4,
) -> "Animation":
    """A sequence as a strategy goes through it, step by step.

    Each picture is of one step. Above: the frame that it saw; what the components predicted together without having
    seen it, `model.prediction`, of the next frame (of the same one, where the task is denoising); that frame in truth;
    and γ, which is of that frame, as a blend of the components' colours. Below: each component's prediction
    E[x | ψ_k], framed in its colour. In a rollout a step sees what the one before predicted, and γ is of the
    prediction; panels and title then say so. Frames are counted from 1.

    Grey levels and channels are those of `overview`.

    Args:
        x: the sequences, (T, B, D, C) or (T, B, H, W, C).
        posterior: what `Strategy.infer` found for them: of T - 1 steps for prediction, of T for denoising.
        image_shape: (H, W, C), with H · W = D.
        model: the model it was inferred with.
        image: which of the B sequences.
        rolled: what `Strategy.rollout` predicts after the last frame of x.
        future: the frames that in truth follow, (n, B, D, C) or (n, B, H, W, C), as many as are known.
        frames_per_second: steps per second, from 1 to 50.

    Raises:
        DataError: these do not fit together, there is no such sequence, or frames_per_second is out of range.
    """
    if not isinstance(frames_per_second, int) or not 1 <= frames_per_second <= 50:
        raise DataError(f"frames_per_second must be whole, and from 1 to 50, but is {frames_per_second}")
    steps = Steps(x, posterior, image_shape, model, image=image, rolled=rolled, future=future)
    figure, draw = panels(steps)
    return Animation(figure, draw, len(steps), frames_per_second, steps.describe())


class Animation:
    """A figure that changes, which a notebook shows as it moves.

    Attributes:
        figure: it, at the step drawn last.
    """

    def __init__(
        self, figure: Figure, draw: Callable[[int], None], num_steps: int, frames_per_second: int, description: str
    ):
        self.figure = figure
        self.frames_per_second = frames_per_second
        self.description = description
        self._draw = draw
        self._num_steps = num_steps

    def __len__(self) -> int:
        return self._num_steps

    def draw(self, step: int) -> Figure:
        """The figure at a step, counted from 0.

        Raises:
            DataError: there is no such step.
        """
        if not 0 <= step < len(self):
            raise DataError(f"step must be from 0 to {len(self) - 1}, but is {step}")
        self._draw(step)
        return self.figure

    def save(self, path: str | Path, *, dpi: float | None = None, progress: bool = False) -> None:
        """Writes it: a GIF, which repeats for ever, or by ffmpeg an MP4.

        Args:
            path: ends in ``.gif`` or ``.mp4``. A file that is there is replaced once the new one is complete.
            dpi: dots per inch; the figure's own, at which every pixel of an image is as large as any other, when None.
            progress: whether to show a progress bar.

        Raises:
            DataError: another ending, no ffmpeg for an MP4, or a dpi that is not positive.
            RunError: the file cannot be written.
        """
        path = Path(path)
        check_format(path)
        if dpi is not None and not dpi > 0:
            raise DataError(f"dpi must be positive, but is {dpi}")
        encode = self._gif if path.suffix.lower() == ".gif" else self._mp4
        write_atomically(path, encode(dpi, progress))

    def _repr_html_(self) -> str:
        # A GIF of its own rather than a player by script, which GitHub and other viewers take out.
        data = base64.b64encode(self._gif(None, False)).decode()
        return f'<img src="data:image/gif;base64,{data}" alt="{self.description}" style="max-width: 100%">'

    def _gif(self, dpi: float | None, progress: bool) -> bytes:
        sample = {step: self._rendered(step, dpi) for step in range(0, len(self), -(-len(self) // SAMPLE))}
        pictures = (sample[step] if step in sample else self._rendered(step, dpi) for step in self._in_turn(progress))
        return gif(pictures, [*sample.values()], round(1000 / self.frames_per_second))

    def _mp4(self, dpi: float | None, progress: bool) -> bytes:
        writer = FFMpegWriter(fps=self.frames_per_second, codec="h264")
        size = self.figure.get_size_inches()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "animation.mp4"
            try:
                with writer.saving(self.figure, str(path), dpi or self.figure.dpi):
                    for step in self._in_turn(progress):
                        self.draw(step)
                        writer.grab_frame()
            except (subprocess.CalledProcessError, OSError) as error:
                raise DataError(f"ffmpeg failed ({error}): write a .gif, or see whether ffmpeg has libx264") from error
            finally:
                # At another dpi the writer may have made the numbers of pixels even.
                self.figure.set_size_inches(*size)
            return path.read_bytes()

    def _in_turn(self, progress: bool) -> Iterable[int]:
        # Elsewhere than on a terminal a bar would leave an empty line.
        hidden = not (progress and get_console().is_terminal)
        return track(range(len(self)), "drawing", disable=hidden, transient=True)

    def _rendered(self, step: int, dpi: float | None) -> NDArray[Any]:
        buffer = BytesIO()
        # Cut to what is drawn, pictures would differ in size.
        with matplotlib.rc_context({"savefig.bbox": None}):
            self.draw(step).savefig(buffer, format="png", dpi=dpi or "figure", pil_kwargs={"compress_level": 1})
        return np.asarray(Image.open(buffer).convert("RGB"))


def check_format(path: Path) -> None:
    """Raises `DataError` unless animations can be written to a file of this name."""
    ending = path.suffix.lower()
    if ending not in (".gif", ".mp4"):
        raise DataError(f"{path} ends in {ending!r}, but animations are written as .gif or .mp4: choose such a name")
    if ending == ".mp4" and not FFMpegWriter.isAvailable():
        raise DataError(f"{path} needs ffmpeg, which is not found here: install it, or write a .gif")
