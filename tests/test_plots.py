"""Figures: what is drawn is what was inferred, nothing of Matplotlib's state changes, bad input is named."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from pnem import plots
from pnem.errors import DataError
from pnem.inference import Posterior, State
from pnem.plots import images, palette

B, K, H, W = 4, 3, 5, 6
D = H * W


def posterior_of(gamma: Tensor, mean: Tensor, elbo_trace: Tensor) -> Posterior:
    """The posterior whose iterations have these γ (T, B, K, D) and predictions (T, B, K, D, C)."""
    states = [
        State(g.sum(-1, keepdim=True), m, m, g, g.log(), g.sum((-2, -1)), g.mean(-1))
        for g, m in zip(gamma, mean, strict=True)
    ]
    return Posterior.from_states(states, elbo_trace, keep_trace=True)


def inferred(T: int = 4, C: int = 1, *, batch: int = B) -> Posterior:
    gamma, mean = torch.randn(T, batch, K, D).softmax(-2), torch.rand(T, batch, K, D, C)
    return posterior_of(gamma, mean, torch.randn(T, batch) - 100)


def drawn(axes: Axes, label: str) -> np.ndarray:
    """The array of the one image with this label."""
    (image,) = [image for image in axes.images if image.get_label() == label]
    return np.asarray(image.get_array())


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def history(**columns: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"epoch": range(1, 1 + max(map(len, columns.values()))), **columns})


FIGURES: list[Callable[[], Figure]] = [
    lambda: plots.overview(torch.rand(B, D, 1), inferred(), (H, W, 1), groups=torch.randint(0, 3, (B, D))),
    lambda: plots.training_curves(history(train_elbo=[-2.0, -1.0], valid_elbo=[-3.0, -2.0], valid_ari=[0.1, 0.5])),
    lambda: plots.elbo_by_iteration({"a": inferred(), "b": inferred(1)}),
]


@pytest.mark.parametrize("make", FIGURES, ids=["overview", "training_curves", "elbo_by_iteration"])
class TestEveryFigure:
    def test_leaves_no_trace_in_matplotlib(self, make: Callable[[], Figure]) -> None:
        settings = dict(matplotlib.rcParams)
        make()
        assert pyplot.get_fignums() == []
        assert dict(matplotlib.rcParams) == settings

    def test_shows_itself_in_a_notebook(self, make: Callable[[], Figure]) -> None:
        png = make()._repr_png_()  # type: ignore[attr-defined]
        height, width, _ = pyplot.imread(BytesIO(png), format="png").shape
        assert (width, height) == pytest.approx(make().get_size_inches() * plots.STYLE["figure.dpi"], abs=1)

    def test_can_be_saved(self, make: Callable[[], Figure], tmp_path: Path) -> None:
        for name in ("figure.png", "figure.pdf", "figure.svg"):
            make().savefig(tmp_path / name)
            assert (tmp_path / name).stat().st_size > 1000

    def test_looks_the_same_under_the_users_style(self, make: Callable[[], Figure]) -> None:
        torch.manual_seed(0)
        expected = make()._repr_png_()  # type: ignore[attr-defined]
        torch.manual_seed(0)
        with pyplot.style.context(["dark_background", {"xtick.labelsize": 30, "font.size": 20, "lines.linewidth": 9}]):
            assert make()._repr_png_() == expected  # type: ignore[attr-defined]


class TestOverview:
    def test_gamma_is_the_blend_of_the_components_colours(self) -> None:
        posterior = inferred()
        figure = plots.overview(torch.rand(B, D, 1), posterior, (H, W, 1), images=[2, 0])
        assert posterior.trace is not None
        for axes, image in zip(figure.axes, [2, 0], strict=True):
            for t in range(4):
                blend = posterior.trace.gamma[t, image].numpy().T @ plots.component_colours(K)
                np.testing.assert_allclose(drawn(axes, f"γ, iteration {t + 1}"), blend.reshape(H, W, 3), atol=1e-6)

    def test_one_channel_is_grey_from_0_to_1(self) -> None:
        x, posterior = torch.rand(B, D, 1) / 2, inferred()
        axes = plots.overview(x, posterior, (H, W, 1)).axes[1]
        grey = {"input": x[1], "component 2, iteration 4": posterior.mean[1, 2]}
        grey["reconstruction, iteration 4"] = (posterior.gamma[1].unsqueeze(-1) * posterior.mean[1]).sum(0)
        for label, values in grey.items():
            np.testing.assert_allclose(drawn(axes, label), values.view(H, W, 1).expand(-1, -1, 3), atol=1e-6)

    def test_three_channels_are_rgb(self) -> None:
        x, posterior = torch.rand(B, D, 3), inferred(C=3)
        axes = plots.overview(x, posterior, (H, W, 3)).axes[0]
        np.testing.assert_allclose(drawn(axes, "input"), x[0].view(H, W, 3), atol=1e-6)
        np.testing.assert_allclose(
            drawn(axes, "component 0, iteration 4"), posterior.mean[0, 0].view(H, W, 3), atol=1e-6
        )

    def test_of_other_channels_the_first_is_drawn_and_named(self) -> None:
        x = torch.rand(B, D, 2)
        axes = plots.overview(x, inferred(C=2), (H, W, 2)).axes[0]
        assert "input\nchannel 0" in texts(axes)
        np.testing.assert_allclose(drawn(axes, "input\nchannel 0")[..., 1], x[0, :, 0].view(H, W), atol=1e-6)

    def test_values_outside_0_to_1_are_scaled_by_the_inputs(self) -> None:
        x, posterior = torch.linspace(-2, 6, D).expand(B, D).unsqueeze(-1), inferred()
        axes = plots.overview(x, posterior, (H, W, 1), images=[0]).axes[0]
        np.testing.assert_allclose(drawn(axes, "input")[..., 0], (x[0].view(H, W) + 2) / 8, atol=1e-6)
        expected = (posterior.mean[0, 1].view(H, W) + 2) / 8
        np.testing.assert_allclose(drawn(axes, "component 1, iteration 4")[..., 0], expected, atol=1e-6)

    def test_values_that_are_not_finite_are_magenta(self) -> None:
        posterior = inferred()
        posterior.trace.mean[0, 0, 0, 7] = torch.nan  # type: ignore[union-attr]
        axes = plots.overview(torch.rand(B, D, 1), posterior, (H, W, 1)).axes[0]
        picture = drawn(axes, "component 0, iteration 1").reshape(D, 3)
        assert picture[7].tolist() == [1, 0, 1]
        assert (picture[:, 0] == picture[:, 1]).sum() == D - 1

    def test_rows_columns_and_blocks_are_named(self) -> None:
        figure = plots.overview(torch.rand(B, D, 1), inferred(), (H, W, 1), images=[3], iterations=[1, 4])
        (axes,) = figure.axes
        rows = ["input", "reconstruction", "γ", "component 0", "component 1", "component 2"]
        assert sorted(texts(axes)) == sorted(["image 3", "iteration", "1", "4", *rows])
        assert len(axes.images) == 1 + 2 * (2 + K)
        assert [to_rgb(bar.get_facecolor()) for bar in axes.patches] == [tuple(c) for c in plots.component_colours(K)]

    def test_by_default_three_images_and_all_of_ten_iterations(self) -> None:
        figure = plots.overview(torch.rand(B, D, 1), inferred(10), (H, W, 1))
        assert [texts(axes)[0] for axes in figure.axes] == ["image 0", "image 1", "image 2"]
        assert [text for text in texts(figure.axes[0]) if text.isdigit()] == [str(t) for t in range(1, 11)]

    @given(first=st.integers(1, 50), count=st.integers(1, 3000))
    def test_the_subset_of_iterations_has_the_first_and_the_last(self, first: int, count: int) -> None:
        chosen = images._subset(first, first + count - 1)
        assert (chosen[0], chosen[-1], len(chosen)) == (first, first + count - 1, min(count, 10))
        assert (np.diff(chosen) > 0).all()

    def test_every_cell_is_a_whole_number_of_pixels(self) -> None:
        figure = plots.overview(torch.rand(B, D, 1), inferred(), (H, W, 1))
        figure.draw_without_rendering()
        for axes in figure.axes:
            for image in axes.images:
                box = image.get_window_extent()
                assert box.width / W == pytest.approx(round(box.width / W))
                assert box.height / H == pytest.approx(round(box.width / W))

    def test_without_a_trace_the_last_iteration_is_drawn(self) -> None:
        posterior = inferred(7)._replace(trace=None)
        axes = plots.overview(torch.rand(B, D, 1), posterior, (H, W, 1)).axes[0]
        assert [text for text in texts(axes) if text.isdigit()] == ["7"]
        expected = posterior.mean[0, 0].view(H, W)
        np.testing.assert_allclose(drawn(axes, "component 0, iteration 7")[..., 0], expected, atol=1e-6)

    @pytest.mark.parametrize("shape", [(B, D), (B, H, W), (B, H, W, 1)])
    def test_groups_take_the_colours_of_their_components(self, shape: tuple[int, ...]) -> None:
        owner = torch.tensor([1, 0, 2])[torch.arange(D) % 3].expand(B, D)
        posterior = inferred()
        posterior.trace.gamma[-1] = torch.nn.functional.one_hot(owner, K).mT  # type: ignore[union-attr]
        groups = (torch.arange(D) % 3).expand(B, D).reshape(shape)
        axes = plots.overview(torch.rand(B, D, 1), posterior, (H, W, 1), groups=groups).axes[0]
        picture, colours = drawn(axes, "groups").reshape(D, 3), plots.component_colours(K)
        np.testing.assert_array_equal(picture[:3], [images.UNSCORED, colours[0], colours[2]])

    def test_more_groups_than_components_have_as_many_colours(self) -> None:
        groups = np.tile(np.arange(D) % 6, (B, 1))
        axes = plots.overview(torch.rand(B, D, 1), inferred(), (H, W, 1), groups=groups).axes[0]
        assert len(np.unique(drawn(axes, "groups").reshape(D, 3), axis=0)) == 6

    def test_tensors_may_require_gradients_and_be_half_precise(self) -> None:
        posterior, x = inferred(), torch.rand(B, D, 1, requires_grad=True)
        assert posterior.trace is not None
        trace = posterior.trace.map(lambda values: values.bfloat16().requires_grad_())
        plots.overview(x, posterior._replace(trace=trace), (H, W, 1))

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_tensors_may_be_on_a_gpu(self) -> None:
        x, posterior = torch.rand(B, D, 1), inferred()
        assert posterior.trace is not None
        trace = posterior.trace.map(lambda values: values.cuda())
        there = posterior._replace(elbo_trace=posterior.elbo_trace.cuda(), trace=trace)
        groups = torch.randint(0, 3, (B, D))
        figures = [
            plots.overview(x, posterior, (H, W, 1), groups=groups),
            plots.overview(x.cuda(), there, (H, W, 1), groups=groups.cuda()),
        ]
        assert figures[0]._repr_png_() == figures[1]._repr_png_()  # type: ignore[attr-defined]
        plots.elbo_by_iteration(there)

    def test_images_may_have_two_dimensions(self) -> None:
        x, posterior = torch.rand(B, D, 1), inferred()
        flat, square = (plots.overview(each, posterior, (H, W, 1)) for each in (x, x.reshape(B, H, W, 1)))
        for a, b in zip(flat.axes[0].get_images(), square.axes[0].get_images(), strict=True):
            np.testing.assert_array_equal(a.get_array(), b.get_array())

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 1), (200, 3, 2)])
    def test_one_image_one_component_one_iteration(self, shape: tuple[int, int, int]) -> None:
        pixels, C = shape[0] * shape[1], shape[2]
        posterior = posterior_of(torch.ones(1, 1, 1, pixels), torch.ones(1, 1, 1, pixels, C), torch.zeros(1, 1))
        assert len(plots.overview(torch.zeros(1, pixels, C), posterior, shape).axes) == 1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_shape": (H, W + 1, 1)}, r"image_shape \(H, W, C\) = \(5, 7, 1\) needs"),
            ({"image_shape": (H, W, 3)}, r"needs \(B, D, C\) = \(4, 30, 3\)"),
            ({"image_shape": (H, W)}, "image_shape"),
            ({"x": torch.rand(B + 1, D, 1)}, r"x has shape \(5, 30, 1\)"),
            ({"x": torch.rand(D, 1)}, "x has shape"),
            ({"images": [0, B]}, r"images must be integers from 0 to 3.*\[0, 4\]"),
            ({"images": [-1]}, "images must be"),
            ({"images": []}, "at least one"),
            ({"images": [0.5]}, "images must be integers"),
            ({"images": 1}, "images must be integers"),
            ({"iterations": [0]}, "iterations must be integers from 1 to 4"),
            ({"iterations": [5]}, "iterations must be integers from 1 to 4"),
            ({"groups": torch.zeros(B, D - 1)}, r"groups has shape \(4, 29\).*\(4, 30\)"),
            ({"groups": torch.zeros(B + 1, D)}, "groups has shape"),
            ({"posterior": inferred()._replace(trace=None), "iterations": [1]}, "keep_trace"),
        ],
    )
    def test_bad_input_is_named(self, change: dict[str, object], message: str) -> None:
        arguments = {"x": torch.rand(B, D, 1), "posterior": inferred(), "image_shape": (H, W, 1), **change}
        with pytest.raises(DataError, match=message):
            plots.overview(**arguments)  # type: ignore[arg-type]


class TestTrainingCurves:
    def test_panels_hold_the_columns_against_the_epoch(self) -> None:
        frame = history(train_elbo=[-3.0, -2.0, -1.0], valid_elbo=[-4.0, np.nan, -2.0], valid_ari=[0.1, 0.2, 0.9])
        elbo, ari = plots.training_curves(frame).axes
        assert [axes.get_ylabel() for axes in (elbo, ari)] == ["ELBO  [nats per image]", "validation ARI"]
        assert [axes.get_xlabel() for axes in (elbo, ari)] == ["epoch", "epoch"]
        training, validation = (line.get_xydata() for line in elbo.lines)
        np.testing.assert_array_equal(training, [[1, -3], [2, -2], [3, -1]])
        np.testing.assert_array_equal(validation, [[1, -4], [3, -2]])
        np.testing.assert_array_equal(ari.lines[0].get_ydata(), [0.1, 0.2, 0.9])
        assert ari.get_ylim() == (0, 1)

    def test_runs_are_compared_by_colour(self) -> None:
        runs = {"N-EM": history(train_elbo=[-1.0], valid_elbo=[-2.0]), "RNN-EM": history(train_elbo=[-1.0, -0.5])}
        figure = plots.training_curves(runs)
        (axes,) = figure.axes
        assert [text.get_text() for text in figure.legends[0].texts] == ["N-EM", "RNN-EM", "training", "validation"]
        colours = [line.get_color() for line in axes.lines]
        expected = plots.component_colours(2)[[0, 1, 0]]
        np.testing.assert_array_equal(colours, expected)

    def test_an_ari_below_0_is_shown(self) -> None:
        (axes,) = plots.training_curves(history(valid_ari=[-0.3, 0.5])).axes
        assert axes.get_ylim()[0] < -0.3

    def test_the_elbo_can_be_called_what_it_is(self) -> None:
        figure = plots.training_curves(history(train_elbo=[-1.0]), label="log evidence at θ")
        assert figure.axes[0].get_ylabel() == "log evidence at θ"
        assert figure.legends == []

    @pytest.mark.parametrize(
        ("frames", "message"),
        [
            (pd.DataFrame(), "history '' is empty"),
            ({"a": history(valid_ari=[0.5]), "b": history(valid_ari=[0.5])[:0]}, "history 'b' is empty"),
            ({}, "empty mapping"),
            (pd.DataFrame({"valid_ari": [0.5]}), 'no column "epoch"'),
            (history(train_loss=[1.0], valid_ari=[np.nan]), "nothing to draw.*train_elbo"),
        ],
    )
    def test_bad_input_is_named(self, frames: pd.DataFrame | dict[str, pd.DataFrame], message: str) -> None:
        with pytest.raises(DataError, match=message):
            plots.training_curves(frames)


class TestElboByIteration:
    def test_line_is_the_mean_and_band_the_middle_half(self) -> None:
        posterior = inferred(6, batch=9)
        figure = plots.elbo_by_iteration(posterior)
        (axes,) = figure.axes
        (line,), (band,) = axes.lines, axes.collections
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 7))
        np.testing.assert_allclose(np.asarray(line.get_ydata()), posterior.elbo_trace.mean(1), rtol=1e-6)
        quartiles = posterior.elbo_trace.double().quantile(torch.tensor([0.25, 0.75]).double(), dim=1)
        box = np.asarray(band.get_paths()[0].vertices)
        for t in range(6):
            np.testing.assert_allclose(np.unique(box[box[:, 0] == t + 1, 1]), quartiles[:, t], rtol=1e-6)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "log evidence at θ  [nats per image]")
        assert figure.legends == []

    def test_posteriors_are_named_and_one_iteration_is_a_point(self) -> None:
        figure = plots.elbo_by_iteration({"RNN-EM": inferred(3), "VAE": inferred(1)}, label="ELBO  [nats per image]")
        assert [text.get_text() for text in figure.legends[0].texts] == ["RNN-EM", "VAE"]
        assert [line.get_marker() for line in figure.axes[0].lines] == ["None", "o"]
        assert figure.axes[0].get_ylabel() == "ELBO  [nats per image]"

    def test_bad_input_is_named(self) -> None:
        with pytest.raises(DataError, match="empty mapping"):
            plots.elbo_by_iteration({})
        for shape in [(0, 3), (3, 0), (3,)]:
            with pytest.raises(DataError, match="elbo_trace of posterior 'a'"):
                plots.elbo_by_iteration({"a": inferred()._replace(elbo_trace=torch.zeros(shape))})


class TestComponentColours:
    def test_more_components_keep_the_colours_of_fewer(self) -> None:
        np.testing.assert_array_equal(plots.component_colours(30)[:12], plots.component_colours(12))

    def test_the_first_eight_are_okabe_and_itos(self) -> None:
        okabe_ito = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
        colours = {tuple(colour) for colour in plots.component_colours(8)}
        assert colours == {to_rgb(code) for code in okabe_ito}

    @pytest.mark.parametrize("count", [2, 8, 16, 24])
    def test_every_reader_tells_them_apart(self, count: int) -> None:
        # 0.02 in Oklab is about the least difference that people see between patches side by side.
        seen = palette._seen(np.vstack([plots.component_colours(count), [1, 1, 1]]))
        distances = np.linalg.norm(seen[:, :, None] - seen[:, None], axis=-1)
        assert distances[:, ~np.eye(count + 1, dtype=bool)].min() > 0.065

    def test_the_palette_cannot_be_changed_from_outside(self) -> None:
        plots.component_colours(3)[:] = 0
        assert plots.component_colours(3).any()

    def test_no_component_is_an_error(self) -> None:
        with pytest.raises(DataError, match="at least 1"):
            plots.component_colours(0)
