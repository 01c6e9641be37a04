"""Animations and filmstrips of sequences: what is drawn is what was seen and inferred, frame by frame."""

import base64
import functools
import itertools
import re
from io import BytesIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.animation import FFMpegWriter
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pnem import plots
from pnem.data import flying_shapes
from pnem.errors import DataError, RunError
from pnem.inference import RNNEM, Posterior, State
from pnem.models import Bernoulli, Normal, SpatialMixture, decoders
from pnem.plots.panels import UNKNOWN

B, T, N = 2, 6, 4


class Made(NamedTuple):
    """Sequences x (T, B, D, C), what an untrained run finds in them, and N frames that follow."""

    x: Tensor
    posterior: Posterior
    shape: tuple[int, int, int]
    model: SpatialMixture
    rolled: State | None
    future: Tensor

    def animated(self, **options: Any) -> plots.Animation:
        """The animation of the sequences alone."""
        return plots.animation(self.x, self.posterior, self.shape, model=self.model, **options)

    def predicted(self, *, rollout: bool = False) -> Tensor:
        """What the components predict together."""
        assert self.rolled is not None
        return self.model.prediction(self.rolled.psi if rollout else self.posterior.psi)


@functools.cache
def made(K: int = 3, shape: tuple[int, int, int] = (5, 6, 1), task: str = "prediction", normal: bool = False) -> Made:
    torch.manual_seed(0)
    likelihood = Normal(0.5) if normal else Bernoulli()
    model = SpatialMixture(decoders.Linear(4, shape), likelihood, K, pixel_prior=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    strategy = RNNEM(model, iterations=2, task=task)
    frames = torch.rand(T + N, B, shape[0] * shape[1], shape[2]).round()
    frames = 6 * frames - 2 if normal else frames
    x, future = frames[:T], frames[T:]
    posterior = strategy.infer(x)
    assert posterior.state is not None
    rolled = strategy.rollout(posterior.state, x[-1], N) if task == "prediction" else None
    return Made(x, posterior, shape, model, rolled, future)


def drawn(figure: Figure, label: str) -> np.ndarray:
    """The array of the one image with this label."""
    (image,) = [image for image in figure.axes[0].images if image.get_label() == label]
    return np.asarray(image.get_array())


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def assert_shows(figure: Figure, label: str, values: Tensor, shape: tuple[int, int, int] = (5, 6, 1)) -> None:
    expected = values.reshape(shape).expand(-1, -1, 3).clamp(0, 1)
    np.testing.assert_allclose(drawn(figure, label), expected, atol=1e-6, err_msg=label)


def boxes(figure: Figure) -> list[Any]:
    """Where the texts of a figure are."""
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]


class TestPanels:
    @pytest.mark.parametrize(("task", "ahead"), [("prediction", 1), ("denoising", 0)])
    def test_a_step_shows_its_frame_and_what_is_of_the_frame_that_it_is_scored_on(self, task: str, ahead: int) -> None:
        given = made(task=task)
        film = given.animated(image=1)
        assert len(film) == T - ahead
        prediction = given.model.prediction(given.posterior.psi)
        for s in range(len(film)):
            figure = film.draw(s)
            assert_shows(figure, "seen", given.x[s, 1])
            assert_shows(figure, "truth", given.x[s + ahead, 1])
            assert_shows(figure, "prediction", prediction[s, 1])
            for k in range(3):
                assert_shows(figure, f"component {k}", given.posterior.mean[s, 1, k])
            blend = given.posterior.gamma[s, 1].numpy().T @ plots.component_colours(3)
            np.testing.assert_allclose(drawn(figure, "γ"), blend.reshape(5, 6, 3), atol=1e-6)
            written = texts(figure)
            assert {f"frame {s + 1}", f"of frame {s + 1 + ahead}", f"frame {s + 1 + ahead}"} <= set(written)
            name = {"prediction": "next-frame prediction", "denoising": "denoising"}[task]
            assert written[0] == f"{name}, step {s + 1} of {T - ahead}"

    def test_in_a_rollout_predictions_are_fed_back(self) -> None:
        given = made()
        assert given.rolled is not None
        film = given.animated(rolled=given.rolled, future=given.future[:2])
        assert len(film) == T - 1 + N
        rolled = given.predicted(rollout=True)
        for j in range(N):
            figure = film.draw(T - 1 + j)
            assert_shows(figure, "seen", rolled[j - 1, 0] if j else given.x[-1, 0])
            assert_shows(figure, "prediction", rolled[j, 0])
            assert_shows(figure, "component 1", given.rolled.mean[j, 0, 1])
            written = texts(figure)
            assert written[0] == f"rollout, step {j + 1} of {N}: nothing seen after frame {T}"
            assert ("predicted" if j else "input") in written
            assert {f"frame {T + j}", f"of frame {T + j + 1}", "of the prediction"} <= set(written)
            if j < 2:
                assert_shows(figure, "truth", given.future[j, 0])
                assert "truth" in written
            else:
                np.testing.assert_array_equal(drawn(figure, "truth"), np.full((5, 6, 3), UNKNOWN))
                assert {"not known", f"frame {T + j + 1}"} <= set(written)
        assert texts(film.draw(0))[0].startswith("next-frame")

    def test_a_rollout_may_be_longer_or_shorter_than_what_is_known(self) -> None:
        given = made()
        assert given.rolled is not None
        film = given.animated(rolled=given.rolled.map(lambda value: value[:1]), future=given.future)
        assert len(film) == T
        assert_shows(film.draw(T - 1), "truth", given.future[0, 0])
        assert "not known" in texts(given.animated(rolled=given.rolled).draw(T - 1))

    def test_three_channels_are_rgb(self) -> None:
        given = made(shape=(5, 6, 3))
        figure = given.animated().draw(2)
        assert_shows(figure, "seen", given.x[2, 0], (5, 6, 3))
        assert_shows(figure, "component 2", given.posterior.mean[2, 0, 2], (5, 6, 3))

    def test_values_outside_0_to_1_are_scaled_by_the_frames(self) -> None:
        given = made(normal=True)
        figure = given.animated().draw(1)
        assert_shows(figure, "truth", (given.x[2, 0] + 2) / 6)
        assert_shows(figure, "component 0", (given.posterior.mean[1, 0, 0] + 2) / 6)

    def test_sequences_may_have_images_of_two_dimensions(self) -> None:
        given = made()
        square = given._replace(x=given.x.unflatten(2, (5, 6)))
        assert_shows(square.animated().draw(3), "truth", given.x[4, 0])

    @pytest.mark.parametrize("K", [1, 3, 7, 10])
    @pytest.mark.parametrize("shape", [(28, 28, 1), (64, 64, 3), (24, 64, 1), (64, 24, 1)])
    def test_nothing_is_cut_off_or_overlaps(self, K: int, shape: tuple[int, int, int]) -> None:
        given = made(2)
        H, W, C = shape
        gamma = torch.ones(120, B, K, H * W) / K
        mean = torch.zeros(120, B, K, H * W, C)
        state = State(gamma, mean, mean, gamma, gamma, torch.zeros(120, B), torch.zeros(120, B, K))
        posterior = Posterior.from_states([state.map(lambda v: v[:110])], torch.zeros(110, B), keep_trace=False)
        film = plots.animation(
            torch.zeros(111, B, H * W, C), posterior, shape, model=given.model, rolled=state.map(lambda v: v[110:])
        )
        figure = film.draw(115)
        width, height = np.rint(figure.get_size_inches() * figure.dpi)
        assert (width % 2, height % 2) == (0, 0)
        for a, b in itertools.combinations(boxes(figure), 2):
            assert not a.overlaps(b)
        for box in [*boxes(figure), *(patch.get_window_extent() for patch in figure.axes[0].patches)]:
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0
        for image in figure.axes[0].images:
            box = image.get_window_extent()
            assert box.width / W == pytest.approx(round(box.width / W))
            assert box.height / H == pytest.approx(round(box.width / W))
            assert box.x0 == pytest.approx(round(box.x0), abs=1e-6)
            assert not any(box.overlaps(other) for other in boxes(figure))
        colours = [to_rgb(patch.get_facecolor()) for patch in figure.axes[0].patches]
        assert colours == [tuple(colour) for colour in plots.component_colours(K)]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(T, B, 29, 1)}, r"x has shape \(6, 2, 29, 1\).*image_shape"),
            ({"x": torch.zeros(B, 30, 1)}, r"sequences \(T, B, D, C\)"),
            ({"x": torch.zeros(0, B, 30, 1)}, "x has shape"),
            ({"image_shape": (5, 6, 3)}, "image_shape"),
            ({"x": torch.zeros(T + 2, B, 30, 1)}, r"posterior.mean has shape \(5, 2, 3, 30, 1\).*S = T - 1 or T"),
            ({"x": torch.zeros(T, B + 1, 30, 1)}, "posterior.mean"),
            ({"posterior": RNNEM(made().model).infer(made().x[0])}, "posterior.mean.*give sequences"),
            ({"image": 2}, "image must be integers from 0 to 1"),
            ({"image": -1}, "image must be"),
            ({"frames_per_second": 0}, "frames_per_second must be whole, and from 1 to 50"),
            ({"frames_per_second": 2.5}, "frames_per_second must be"),
            ({"future": made().future}, "future is drawn beside a rollout"),
            ({"rolled": made().rolled, "future": torch.zeros(N, B + 1, 30, 1)}, "future has 3 sequences"),
            ({"rolled": made().rolled, "future": torch.zeros(N, B, 29, 1)}, "future has shape"),
            ({"rolled": made().posterior.state}, "rolled.mean"),
            ({"posterior": made(task="denoising").posterior, "rolled": made().rolled}, "only predictions roll out"),
        ],
    )
    def test_bad_input_is_named(self, change: dict[str, Any], message: str) -> None:
        given = made()
        arguments = {"x": given.x, "posterior": given.posterior, "image_shape": given.shape, "model": given.model}
        with pytest.raises(DataError, match=message):
            plots.animation(**(arguments | change))

    @pytest.mark.parametrize("step", [-1, T - 1])
    def test_there_are_no_other_steps(self, step: int) -> None:
        with pytest.raises(DataError, match="step must be from 0 to 4"):
            made().animated().draw(step)


class TestGif:
    def test_has_a_picture_for_each_step_in_the_figures_pixels(self, tmp_path: Any) -> None:
        film = made().animated(frames_per_second=5)
        film.save(tmp_path / "a.gif")
        with Image.open(tmp_path / "a.gif") as gif:
            assert (gif.n_frames, gif.info["duration"], gif.info["loop"]) == (T - 1, 200, 0)  # type: ignore[attr-defined]
            assert gif.size == tuple(np.rint(film.figure.get_size_inches() * film.figure.dpi))
        film.save(tmp_path / "half.gif", dpi=90)
        with Image.open(tmp_path / "half.gif") as half:
            assert half.size == pytest.approx(np.array(gif.size) / 2, abs=1)

    def test_pictures_have_the_colours_of_the_data(self) -> None:
        given = made()
        film = given.animated()
        gif = Image.open(BytesIO(film._gif(None, False)))
        for s in (0, 3):
            gif.seek(s)
            pixels = np.asarray(gif.convert("RGB"))
            figure = film.draw(s)
            assert (pixels[:4] == 255).all()
            for image in figure.axes[0].images:
                box = image.get_window_extent()
                rows = np.arange(5) * box.height / 5 + box.height / 10
                columns = np.arange(6) * box.width / 6 + box.width / 12
                middles = pixels[np.ix_((len(pixels) - box.y1 + rows).astype(int), (box.x0 + columns).astype(int))]
                # Channels are rounded to 64 levels.
                np.testing.assert_allclose(middles, 255 * np.asarray(image.get_array()), atol=3)

    def test_twenty_steps_are_small(self) -> None:
        sequences = flying_shapes(1, num_frames=21, seed=0)
        x = torch.from_numpy(sequences.features).float().reshape(21, 1, 784, 1)
        owned = [torch.from_numpy(sequences.groups == k + 1).float().reshape(21, 1, 28, 28) for k in range(3)]
        # Blurred, and of a background that changes a little all the time, as networks predict.
        mean = functional.avg_pool2d(torch.stack(owned, 2).flatten(0, 1), 3, 1, 1)[1:].reshape(20, 1, 3, 784)
        mean = 0.05 + 0.9 * mean + 0.02 * torch.rand(20, 1, 3, 784, generator=torch.Generator().manual_seed(0))
        gamma, psi = mean.mul(9).softmax(-2), mean.logit().unsqueeze(-1)
        state = State(gamma, mean.unsqueeze(-1), psi, gamma, gamma.log(), torch.zeros(20, 1), torch.zeros(20, 1, 3))
        posterior = Posterior.from_states([state], torch.zeros(20, 1), keep_trace=False)
        content = plots.animation(x, posterior, (28, 28, 1), model=made().model)._gif(None, False)
        assert len(content) < 500_000

    def test_a_notebook_shows_it_without_script(self) -> None:
        given = made()
        html = given.animated(rolled=given.rolled)._repr_html_()
        found = re.fullmatch(r'<img src="data:image/gif;base64,([\w+/=]+)" alt="([^"]+)" style="[^"]+">', html)
        assert found is not None
        assert Image.open(BytesIO(base64.b64decode(found[1]))).n_frames == T - 1 + N  # type: ignore[attr-defined]
        assert re.search("5 steps.*rollout of 4 frames.*3 components", found[2])

    def test_does_not_depend_on_the_users_settings_nor_change_them(self) -> None:
        settings = dict(matplotlib.rcParams)
        expected = made().animated()._gif(None, False)
        assert dict(matplotlib.rcParams) == settings
        assert pyplot.get_fignums() == []
        with pyplot.style.context(["dark_background", {"font.size": 20, "savefig.bbox": "tight", "savefig.dpi": 30}]):
            assert made().animated()._gif(None, False) == expected

    @pytest.mark.parametrize("name", ["a.png", "a", "gif"])
    def test_other_endings_are_named_before_anything_is_drawn(self, tmp_path: Any, name: str) -> None:
        film = made().animated()
        film._draw = None  # type: ignore[assignment]
        with pytest.raises(DataError, match=r"written as \.gif or \.mp4"):
            film.save(tmp_path / name)

    def test_where_there_is_no_ffmpeg_that_is_said_before_anything_is_drawn(self, tmp_path: Any) -> None:
        film = made().animated()
        film._draw = None  # type: ignore[assignment]
        with (
            matplotlib.rc_context({"animation.ffmpeg_path": "no-such-program"}),
            pytest.raises(DataError, match=r"install it, or write a \.gif"),
        ):
            film.save(tmp_path / "a.mp4")

    def test_bad_dpi_and_folders_are_named(self, tmp_path: Any) -> None:
        with pytest.raises(DataError, match="dpi must be positive"):
            made().animated().save(tmp_path / "a.gif", dpi=0)
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="cannot write"):
            made().animated().save(tmp_path / "file" / "a.gif")

    @pytest.mark.skipif(not FFMpegWriter.isAvailable(), reason="needs ffmpeg")
    def test_an_mp4_is_written_by_ffmpeg(self, tmp_path: Any) -> None:
        film = made().animated()
        before = film._gif(None, False)
        film.save(tmp_path / "a.mp4", dpi=97)
        assert (tmp_path / "a.mp4").read_bytes()[4:8] == b"ftyp"
        assert film._gif(None, False) == before
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]

    def test_an_ffmpeg_that_fails_leaves_nothing(self, tmp_path: Any) -> None:
        (tmp_path / "ffmpeg").write_text("#!/bin/sh\ncat > /dev/null\nexit 3\n")
        (tmp_path / "ffmpeg").chmod(0o755)
        with (
            matplotlib.rc_context({"animation.ffmpeg_path": str(tmp_path / "ffmpeg")}),
            pytest.raises(DataError, match="ffmpeg failed"),
        ):
            made().animated().save(tmp_path / "a.mp4")
        assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]


class TestFilmstrip:
    def strip(self, given: Made, **options: Any) -> Figure:
        return plots.sequence_frames(given.x, given.posterior, given.shape, given.model, **options)

    @pytest.mark.parametrize(("task", "ahead"), [("prediction", 1), ("denoising", 0)])
    def test_a_column_has_all_that_is_of_its_frame(self, task: str, ahead: int) -> None:
        given = made(task=task)
        figure = self.strip(given, image=1)
        prediction = given.model.prediction(given.posterior.psi)
        for t in range(T):
            assert_shows(figure, f"frame {t + 1}", given.x[t, 1])
            if t >= ahead:
                assert_shows(figure, f"prediction {t + 1}", prediction[t - ahead, 1])
                blend = given.posterior.gamma[t - ahead, 1].numpy().T @ plots.component_colours(3)
                np.testing.assert_allclose(drawn(figure, f"γ {t + 1}"), blend.reshape(5, 6, 3), atol=1e-6)
        assert len(figure.axes[0].images) == 3 * T - 2 * ahead
        assert texts(figure) == ["frame", "prediction", "γ", *map(str, range(1, T + 1))]

    def test_a_rollout_stands_apart(self) -> None:
        given = made()
        figure = self.strip(given, rolled=given.rolled, future=given.future[:1])
        assert_shows(figure, f"frame {T + 1}", given.future[0, 0])
        for j in range(N):
            assert_shows(figure, f"prediction {T + 1 + j}", given.predicted(rollout=True)[j, 0])
        assert f"frame {T + 2}" not in [image.get_label() for image in figure.axes[0].images]
        assert texts(figure)[-1] == "rollout"

    def test_of_many_frames_some_are_drawn(self) -> None:
        given = made()
        state = given.posterior
        long = state._replace(**{n: getattr(state, n)[[0] * 99] for n in ("psi", "mean", "gamma", "log_mixing")})
        figure = self.strip(given._replace(x=given.x[[0] * 100], posterior=long))
        assert texts(figure)[3:] == [str(t) for t in range(1, 101, 9)]
        assert texts(self.strip(given, frames=[5, 2]))[3:] == ["2", "5"]

    @pytest.mark.parametrize("frames", [[0], [T + 1], [], [1.5]])
    def test_frames_that_there_are_not_are_named(self, frames: list[Any]) -> None:
        with pytest.raises(DataError, match="frames must be integers from 1 to 6"):
            self.strip(made(), frames=frames)

    def test_nothing_is_cut_off(self) -> None:
        given = made()
        figure = self.strip(given, rolled=given.rolled)
        width, height = figure.get_size_inches() * figure.dpi
        for box in boxes(figure):
            assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0
        for a, b in itertools.combinations(boxes(figure), 2):
            assert not a.overlaps(b)


class TestCurves:
    def test_lines_are_the_values_and_bands_one_standard_error(self) -> None:
        values = {"RNN-EM": [np.nan, 0.5, 0.75], "N-EM": [0.25, 0.25, 0.5]}
        figure = plots.curves_by_step(values, {"N-EM": [0.125, 0.25, 0.125]})
        (axes,) = figure.axes
        for line, expected in zip(axes.lines, values.values(), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([[1, 2, 3], expected], 1))
        unknown, band = axes.collections
        assert not len(np.concatenate([path.vertices for path in unknown.get_paths()] or [[]]))
        box = np.asarray(band.get_paths()[0].vertices)
        for step, low, high in [(1, 0.125, 0.375), (2, 0.0, 0.5), (3, 0.375, 0.625)]:
            np.testing.assert_array_equal(np.unique(box[box[:, 0] == step, 1]), [low, high])
        assert [text.get_text() for text in figure.legends[0].texts] == ["RNN-EM", "N-EM"]
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_ylim()[1]) == ("step", "AMI", 1.0)

    def test_numbers_of_objects_are_the_ticks(self) -> None:
        (axes,) = plots.curves_by_objects({"K = 1": [95.0, 121.0]}, objects=[3, 5]).axes
        assert list(axes.get_xticks()) == [3, 5]
        np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[3, 95], [5, 121]])
        assert "nats per frame" in axes.get_ylabel()

    def test_horizons_count_from_1(self) -> None:
        (axes,) = plots.curves_by_horizon({"R-NEM": [50.0] * 20}).axes
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), np.arange(1, 21))
        assert axes.lines[0].get_marker() == "None"
        assert axes.get_ylabel() == "BCE  [nats per frame]"

    def test_long_names_have_room(self) -> None:
        figure = plots.curves_by_horizon(
            {f"recurrent autoencoder of equal size, K = {k}": [1.0, 2.0] for k in range(4)}
        )
        width, height = figure.get_size_inches() * figure.dpi
        box = figure.legends[0].get_window_extent()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= 0
        assert figure.axes[0].get_window_extent().height > height / 3

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (({},), "nothing to draw"),
            (({"a": []},), "at least one"),
            (({"a": [np.nan, np.nan]},), "not NaN"),
            (({"a": [[1.0]]},), "one number each"),
            (({"a": [1.0]}, {"b": [0.1]}), r"standard errors are given of \['b'\]"),
            (({"a": [1.0, 2.0]}, {"a": [0.1]}), r"shape \(2,\) and standard errors of shape \(1,\)"),
        ],
    )
    def test_bad_input_is_named(self, arguments: tuple[Any, ...], message: str) -> None:
        with pytest.raises(DataError, match=message):
            plots.curves_by_step(*arguments)
        with pytest.raises(DataError, match="at 3 places"):
            plots.curves_by_objects({"a": [1.0, 2.0]}, objects=[3, 4, 5])
