"""Pictures of classical mixtures: what is drawn is the data and the model's own density, whatever the data."""

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from pnem import plots
from pnem.errors import DataError
from pnem.inference import ClassicalEM, Posterior
from pnem.models import (
    Bernoulli,
    Binomial,
    Categorical,
    Likelihood,
    MultivariateNormal,
    Poisson,
    SpatialMixture,
    StudentT,
    decoders,
)
from pnem.plots import mixtures

pytestmark = pytest.mark.filterwarnings("ignore::pnem.inference.ConvergenceWarning")

Case = tuple[Tensor, SpatialMixture, Posterior]


def fitted(x: np.ndarray, likelihood: Likelihood, K: int = 2) -> Case:
    items = torch.from_numpy(np.asarray(x, dtype=float)).unsqueeze(0)
    decoder = decoders.Constant(likelihood.num_parameters(items.shape[-1]))
    model = SpatialMixture(decoder, likelihood, K, mixing="learned").double()
    return items, model, ClassicalEM(model, iterations=20).infer(items, restarts=2)


def normal(C: int, N: int = 400, covariance: str = "full", K: int = 2) -> Case:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, C)) @ np.tril(np.ones((C, C))) + 5 * rng.integers(0, 2, (N, 1))
    return fitted(x, MultivariateNormal(covariance), K)


def counts(C: int, likelihood: Likelihood, largest: int) -> Case:
    rng = np.random.default_rng(0)
    p = 0.2 + 0.6 * rng.integers(0, 2, (300, 1))
    return fitted(rng.binomial(largest, p, (300, C)), likelihood)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].texts]


def title(figure: Figure) -> str:
    return figure.axes[0].get_title(loc="right")


FIGURES: dict[str, Callable[[], Figure]] = {
    "mixture_1d": lambda: plots.mixture_1d(*normal(1)),
    "mixture_1d, counts": lambda: plots.mixture_1d(*counts(1, Poisson(), 9)),
    "mixture_2d": lambda: plots.mixture_2d(*normal(2)),
    "bound": lambda: plots.bound(torch.tensor([[-3.0, -4.0], [-2.0, -3.0]])),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
class TestEveryFigure:
    def test_leaves_no_trace_in_matplotlib_or_in_what_it_draws(self, make: Callable[[], Figure]) -> None:
        settings, state = dict(matplotlib.rcParams), torch.get_rng_state()
        figure = make()
        assert pyplot.get_fignums() == []
        assert dict(matplotlib.rcParams) == settings
        torch.set_rng_state(state)
        png = figure._repr_png_()  # type: ignore[attr-defined]
        assert pyplot.imread(BytesIO(png), format="png").shape[2] == 4

    def test_looks_the_same_under_the_users_style(self, make: Callable[[], Figure]) -> None:
        torch.manual_seed(0)
        expected = make()._repr_png_()  # type: ignore[attr-defined]
        torch.manual_seed(0)
        with pyplot.style.context(["dark_background", {"xtick.labelsize": 30, "lines.linewidth": 9}]):
            assert make()._repr_png_() == expected  # type: ignore[attr-defined]

    def test_can_be_saved(self, make: Callable[[], Figure], tmp_path: Path) -> None:
        for name in ("figure.png", "figure.pdf", "figure.svg"):
            make().savefig(tmp_path / name)
            assert (tmp_path / name).stat().st_size > 1000


class TestDensities:
    def test_lines_are_the_weighted_densities_and_their_sum(self) -> None:
        x, model, fit = normal(1)
        axes = plots.mixture_1d(x, model, fit, names=["time [ms]"]).axes[0]
        *components, total = axes.lines
        grid = np.asarray(total.get_xdata())
        mean, lower = model.likelihood.moments(fit.theta[0])
        expected = [
            model.mixing[k].item() * stats.norm.pdf(grid, mean[k, 0].item(), lower[k, 0, 0].item()) for k in range(2)
        ]
        for line, density in zip(components, expected, strict=True):
            np.testing.assert_allclose(np.asarray(line.get_ydata()), density, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(np.asarray(total.get_ydata()), sum(expected), rtol=1e-9)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("time [ms]", "density  [1/ms]")

    def test_bars_are_a_density_of_weighted_items(self) -> None:
        x, model, fit = normal(1)
        weight = torch.rand(400).double()
        bars = plots.mixture_1d(x, model, fit, weight=weight).axes[0].patches
        assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(1)
        edges = [bar.get_x() for bar in bars] + [bars[-1].get_x() + bars[-1].get_width()]
        expected, _ = np.histogram(x[0, :, 0], edges, weights=weight, density=True)
        np.testing.assert_allclose([bar.get_height() for bar in bars], expected)

    def test_a_component_much_narrower_than_the_data_keeps_its_peak(self) -> None:
        rng = np.random.default_rng(0)
        x = np.concatenate([rng.normal(0, 1e-3, 200), rng.normal(500, 300, 200)])[:, None]
        case = fitted(x, MultivariateNormal("full", floor=0.0))
        narrow = max(plots.mixture_1d(*case).axes[0].lines[:2], key=lambda line: np.max(line.get_ydata()))
        _, lower = case[1].likelihood.moments(case[2].theta[0])
        k = int(lower[:, 0, 0].argmin())
        peak = case[1].mixing[k].item() / (lower[k, 0, 0].item() * np.sqrt(2 * np.pi))
        assert np.max(narrow.get_ydata()) == pytest.approx(peak, rel=1e-3)

    def test_a_far_item_or_equal_items_make_no_trouble(self) -> None:
        for figure in (
            plots.mixture_1d(*fitted(np.r_[np.zeros(50), 1e12][:, None], MultivariateNormal("full", floor=1.0))),
            plots.mixture_1d(*fitted(np.ones((20, 1)), MultivariateNormal("full"))),
            plots.mixture_2d(*fitted(np.ones((20, 2)), MultivariateNormal("full"), 1)),
        ):
            axes = figure.axes[0]
            assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
            assert axes.get_xlim()[0] < axes.get_xlim()[1]
            for line in axes.lines:
                assert np.isfinite(np.asarray(line.get_ydata(), dtype=float)).all()


class TestOutliers:
    def test_the_picture_is_of_the_components_and_says_what_it_leaves_out(self) -> None:
        rng = np.random.default_rng(0)
        x = torch.from_numpy(rng.normal(size=(1, 500, 2)))
        model = SpatialMixture(decoders.Constant(6), StudentT(), 1, mixing="learned").double()
        fit = ClassicalEM(model).infer(x)
        x[0, :3, 0] = 1e6
        figure = plots.mixture_2d(x, model, fit)
        assert title(figure) == "3 items far from every component lie outside the picture"
        np.testing.assert_array_equal(figure.axes[0].collections[0].get_offsets(), x[0, 3:])
        x, model, fit = normal(1)
        x[0, :40] = -1e6
        figure = plots.mixture_1d(x, model, fit)
        assert title(figure).startswith("40 items far")
        bars = figure.axes[0].patches
        assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(0.9)


class TestCounts:
    @pytest.mark.parametrize(
        ("likelihood", "largest"), [(Poisson(), 9), (Binomial(9), 9), (Bernoulli(), 1), (Categorical(4), 3)]
    )
    def test_stems_are_weighted_probabilities_and_bars_frequencies(self, likelihood: Likelihood, largest: int) -> None:
        x, model, fit = counts(1, likelihood, largest)
        axes = plots.mixture_1d(x, model, fit).axes[0]
        values = x[0, :, 0].numpy()
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(1)
        for bar in axes.patches:
            centre = bar.get_x() + bar.get_width() / 2
            assert bar.get_height() == pytest.approx((values == round(centre)).mean())
        support = np.arange(len(axes.lines[0].get_xdata()))
        for k, line in enumerate(axes.lines):
            here = torch.from_numpy(support.astype(float)).view(1, -1, 1)
            expected = model.log_joint(here, fit.theta)[0, k].exp().detach().numpy()
            np.testing.assert_allclose(np.asarray(line.get_ydata()), expected, rtol=1e-9)
        assert axes.get_ylabel() == "probability"

    def test_many_values_are_lines(self) -> None:
        *components, total = plots.mixture_1d(*counts(1, Poisson(), 900)).axes[0].lines
        assert len(components) == 2
        np.testing.assert_allclose(
            np.asarray(total.get_ydata()), sum(np.asarray(line.get_ydata()) for line in components)
        )

    def test_grey_values_are_expected_bits(self) -> None:
        x = np.random.default_rng(0).random((50, 1))
        bars = plots.mixture_1d(*fitted(x, Bernoulli())).axes[0].patches
        np.testing.assert_allclose([bar.get_height() for bar in bars], [1 - x.mean(), x.mean()])

    def test_equal_items_are_one_disc(self) -> None:
        x, model, fit = counts(2, Poisson(), 6)
        (scatter,) = plots.mixture_2d(x, model, fit).axes[0].collections
        places, number = np.unique(x[0].numpy(), axis=0, return_counts=True)
        np.testing.assert_array_equal(scatter.get_offsets(), places)
        sizes = np.asarray(scatter.get_sizes())  # type: ignore[attr-defined]
        np.testing.assert_allclose(sizes / sizes.max(), number / number.max())


class TestScatter:
    def test_colours_are_mixed_by_the_responsibilities(self) -> None:
        x, model, fit = normal(2)
        (scatter,) = plots.mixture_2d(x, model, fit).axes[0].collections
        np.testing.assert_array_equal(scatter.get_offsets(), x[0])
        expected = model.responsibilities(x, fit.theta)[0].detach().numpy().T @ plots.component_colours(2)
        np.testing.assert_allclose(np.asarray(scatter.get_facecolor())[:, :3], expected, atol=1e-9)

    @pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
    def test_ellipses_are_one_and_two_standard_deviations_away(self, covariance: str) -> None:
        x, model, fit = normal(2, covariance=covariance)
        axes = plots.mixture_2d(x, model, fit).axes[0]
        mean, lower = (value.numpy() for value in model.likelihood.moments(fit.theta[0]))
        lines = {line.get_label(): line.get_xydata() for line in axes.lines}
        assert len(lines) == 4
        for k in range(2):
            for radius in (1, 2):
                white = np.linalg.solve(lower[k], (np.asarray(lines[f"component {k}, {radius}σ"]) - mean[k]).T)
                np.testing.assert_allclose(np.linalg.norm(white, axis=0), radius, rtol=1e-9)
        assert [text.get_text() for text in axes.texts] == ["0", "1"]
        np.testing.assert_allclose([text.get_position() for text in axes.texts], mean)

    def test_student_ellipses_are_those_of_the_scale_matrix(self) -> None:
        x, model, fit = fitted(np.random.default_rng(0).standard_t(3, (300, 2)), StudentT(), 1)
        line = plots.mixture_2d(x, model, fit).axes[0].lines[0]
        location, lower = (value[0].numpy() for value in model.likelihood.moments(fit.theta[0]))
        white = np.linalg.solve(lower, (np.asarray(line.get_xydata()) - location).T)
        np.testing.assert_allclose(np.linalg.norm(white, axis=0), 1, rtol=1e-9)
        one = plots.mixture_1d(*fitted(x[0, :, :1].numpy(), StudentT(), 1)).axes[0]
        assert one.get_ylabel() == "density"

    def test_counts_have_ellipses_by_their_variances_and_categories_none(self) -> None:
        x, model, fit = counts(2, Poisson(), 6)
        axes = plots.mixture_2d(x, model, fit).axes[0]
        rate = fit.theta[0].exp().numpy()
        edge = np.asarray(axes.lines[0].get_xydata()) - rate[0]
        np.testing.assert_allclose(np.abs(edge).max(0), np.sqrt(rate[0]), rtol=1e-3)
        assert not plots.mixture_2d(*counts(2, Categorical(4), 3)).axes[0].lines

    def test_missing_values_are_left_out_and_said(self) -> None:
        x, model, fit = normal(2)
        x[0, :7, 0] = torch.nan
        x[0, 7, 1] = torch.nan
        figure = plots.mixture_2d(x, model, fit)
        assert title(figure) == "8 of 400 items have a missing value and are not drawn"
        np.testing.assert_array_equal(figure.axes[0].collections[0].get_offsets(), x[0, 8:])
        one, model, fit = normal(1)
        one[0, :3] = torch.nan
        assert title(plots.mixture_1d(one, model, fit)).startswith("3 of 400")

    def test_of_many_items_a_sample_is_drawn_and_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mixtures, "MOST_POINTS", 100)
        x, model, fit = normal(2)
        figures = [plots.mixture_2d(x, model, fit) for _ in range(2)]
        assert title(figures[0]) == "100 of 400 items are drawn"
        first, second = (np.asarray(figure.axes[0].collections[0].get_offsets()) for figure in figures)
        np.testing.assert_array_equal(first, second)
        assert {tuple(point) for point in first} <= {tuple(point) for point in x[0].numpy()}

    def test_discs_are_as_large_as_the_weights(self) -> None:
        x, model, fit = normal(2)
        weight = torch.arange(400.0)
        (scatter,) = plots.mixture_2d(x, model, fit, weight=weight).axes[0].collections
        sizes = np.asarray(scatter.get_sizes())  # type: ignore[attr-defined]
        np.testing.assert_allclose(sizes / sizes.max(), weight[1:] / 399)

    def test_the_legend_has_the_weights_of_components_but_not_of_very_many(self) -> None:
        x, model, fit = normal(2)
        weights = [f"component {k}, π = {weight:.3f}" for k, weight in enumerate(model.mixing.tolist())]
        assert legend(plots.mixture_2d(x, model, fit)) == [*weights, "1σ and 2σ"]
        assert "and 4 more" in legend(plots.mixture_2d(*normal(2, K=15, covariance="spherical")))


class TestInput:
    def test_one_of_several_fits_is_drawn(self) -> None:
        x = torch.randn(3, 50, 1).double() + torch.tensor([0.0, 50, 100]).view(3, 1, 1)
        likelihood = MultivariateNormal("full")
        model = SpatialMixture(decoders.Constant(2), likelihood, 2, mixing="per_image").double()
        fit = ClassicalEM(model, iterations=5).infer(x)
        for image in range(3):
            low, high = plots.mixture_1d(x, model, fit, image=image).axes[0].get_xlim()
            assert low < x[image].min() <= x[image].max() < high
        assert plots.mixture_1d(x[1].numpy(), model, fit, image=1).axes[0].get_xlim()[0] > 40

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(5, 2)}, r"x has shape \(5, 2\).*\(D, 1\)"),
            ({"x": torch.zeros(5)}, "x has shape"),
            ({"x": torch.zeros(2, 5, 1)}, "x has shape"),
            ({"x": torch.full((5, 1), torch.nan)}, "none of these 5 items"),
            ({"weight": torch.zeros(400)}, "none of these 400 items"),
            ({"weight": torch.ones(3)}, r"weight has shape \(3,\).*\(400,\)"),
            ({"names": ["a", "b"]}, r"names are \['a', 'b'\]"),
            ({"image": 1}, "image=1"),
            ({"image": -1}, "image=-1"),
        ],
    )
    def test_bad_input_is_named(self, change: dict[str, object], message: str) -> None:
        x, model, fit = normal(1)
        arguments = {"x": x, "model": model, "fit": fit, **change}
        with pytest.raises(DataError, match=message):
            plots.mixture_1d(**arguments)  # type: ignore[arg-type]

    def test_pixels_that_differ_are_refused(self) -> None:
        x, _, fit = normal(1)
        model = SpatialMixture(decoders.Linear(2, (20, 20, 1)), Bernoulli(), 2)
        with pytest.raises(DataError, match="Constant decoder"):
            plots.mixture_1d(x, model, fit)


class TestBound:
    def test_lines_are_nats_per_item(self) -> None:
        trace = torch.tensor([[-300.0, -200.0], [-250.0, -180.0], [-240.0, -175.0]])
        axes = plots.bound(trace, 100).axes[0]
        for b, line in enumerate(axes.lines):
            np.testing.assert_allclose(line.get_xydata(), np.c_[1:4, trace[:, b] / 100], rtol=1e-6)
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "bound  [nats per item]")
        assert plots.bound(torch.tensor([-1.0])).axes[0].lines[0].get_marker() == "o"

    def test_bad_input_is_named(self) -> None:
        for shape in [(0,), (3, 0), (2, 2, 2)]:
            with pytest.raises(DataError, match="elbo_trace has shape"):
                plots.bound(torch.zeros(shape))
        with pytest.raises(DataError, match="num_items must be positive"):
            plots.bound(torch.zeros(3), 0)


def test_dollars_in_names_are_no_mathematics():
    x = torch.randn(1, 50, 2)
    likelihood = MultivariateNormal()
    model = SpatialMixture(decoders.Constant(likelihood.num_parameters(2)), likelihood, 2, mixing="learned")
    fit = ClassicalEM(model, iterations=500, tol=1e-2).fit(x)
    figure = plots.mixture_2d(x, model, fit, names=["$a_b_c$", "cost $ per $"])
    assert figure.axes[0].get_xlabel() == "$a_b_c$"
