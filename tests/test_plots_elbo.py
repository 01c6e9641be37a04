"""Figures of the ELBO's terms, of traces and of entropies: what is drawn is what was computed."""

import itertools
import math
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from cases import CLASSICAL, MODELS, factors, images, items
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pnem import plots
from pnem.diagnostics import Terms, Trace, trace
from pnem.errors import DataError
from pnem.inference import RNNEM, VAE, ClassicalEM, ConvergenceWarning, GradientEM, Posterior, Strategy

B, K, H, W = 4, 3, 5, 6
D = H * W


def terms_of(T: int = 4, B: int = 3, *, is_bound: bool = True, **zero: bool) -> Terms:
    """Terms of mixed signs and sizes, which add up in both forms, without those named."""
    sizes = {"assignment_entropy": 20.0, "log_prior": -30.0, "theta_entropy": 5.0, "log_mixing_prior": -2.0}
    sizes |= {"assignment_divergence": 1.0}
    drawn = {name: size * (0.5 + torch.rand(T, B).double()) for name, size in sizes.items() if name not in zero}
    parts = {name: drawn.get(name, torch.zeros(T, B).double()) for name in sizes}
    divergence = -parts["log_prior"] - parts["theta_entropy"]
    reconstruction = torch.linspace(-900, -300, T).double()[:, None] + torch.randn(T, B).double()
    joint = reconstruction - parts["assignment_divergence"] - parts["assignment_entropy"]
    zeros = torch.zeros(T, B).double()
    return Terms(
        expected_log_joint=joint,
        reconstruction=reconstruction,
        divergence=divergence,
        log_evidence=reconstruction,
        monte_carlo_error=zeros,
        is_bound=is_bound,
        **parts,
    )


def quietly(function: Callable[..., Trace], *arguments: object) -> Trace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return function(*arguments)


def course(groups: bool = True) -> Trace:
    model = MODELS["tied Bernoulli"]()
    return trace(RNNEM(model, iterations=4), images(B), torch.randint(0, 3, (B, 12)) if groups else None)


def inferred(K: int = K, C: int = 1) -> Posterior:
    gamma, mean = torch.randn(B, K, D).softmax(-2), torch.rand(B, K, D, C)
    zeros = torch.zeros(B, K, 1)
    return Posterior(zeros, mean, mean, gamma, zeros[:, 0, 0], zeros[..., 0], zeros[None, :, 0, 0], None, None)  # type: ignore[arg-type]


def line(axes: Axes, label: str) -> np.ndarray:
    (found,) = [found for found in axes.lines if found.get_label() == label]
    return np.asarray(found.get_ydata())


def bars(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each bar begins, and how high it is."""
    (found,) = [found for found in axes.containers if found.get_label() == label]
    return np.array([bar.get_y() for bar in found]), np.array([bar.get_height() for bar in found])


def mean(values: Tensor) -> np.ndarray:
    return values.mean(-1).numpy()


FIGURES: dict[str, Callable[[], Figure]] = {
    "elbo_terms": lambda: plots.elbo_terms(terms_of()),
    "elbo_terms, one iteration": lambda: plots.elbo_terms(terms_of(1)),
    "entropy_maps": lambda: plots.entropy_maps(torch.rand(B, D, 1), inferred(), (H, W, 1)),
    "trace": lambda: plots.trace(course()),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
class TestEveryFigure:
    def test_leaves_no_trace_in_matplotlib(self, make: Callable[[], Figure]) -> None:
        settings = dict(matplotlib.rcParams)
        make()
        assert pyplot.get_fignums() == []
        assert dict(matplotlib.rcParams) == settings

    def test_shows_itself_in_a_notebook(self, make: Callable[[], Figure]) -> None:
        figure = make()
        height, width, _ = pyplot.imread(BytesIO(figure._repr_png_()), format="png").shape  # type: ignore[attr-defined]
        assert (width, height) == pytest.approx(figure.get_size_inches() * plots.STYLE["figure.dpi"], abs=1)

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


class TestElboTerms:
    def test_what_is_stacked_is_the_distance_from_the_fit_to_the_elbo(self) -> None:
        terms = terms_of()
        figure = plots.elbo_terms(terms)
        top, other_top, bottom, other_bottom = figure.axes
        for fit, added, name, values in (
            (top, bottom, "Q", terms.expected_log_joint),
            (other_top, other_bottom, "E[log p(x | θ)]", terms.reconstruction),
        ):
            np.testing.assert_allclose(line(fit, name), mean(values))
            np.testing.assert_allclose(line(fit, "ELBO"), mean(terms.elbo))
            heights = sum(bars(added, container.get_label())[1] for container in added.containers)
            np.testing.assert_allclose(line(fit, name) + heights, mean(terms.elbo))
            np.testing.assert_allclose(line(added, "sum of what is added"), heights)

    def test_bars_are_the_terms_and_never_overlap(self) -> None:
        terms = terms_of()
        _, _, left, right = plots.elbo_terms(terms).axes
        expected = {
            "H[q(z)]": terms.assignment_entropy,
            "E[log p(θ)]": terms.log_prior,
            "H[q(θ)]": terms.theta_entropy,
            "log p(π)": terms.log_mixing_prior,
        }
        assert [container.get_label() for container in left.containers] == list(expected)
        for name, values in expected.items():
            np.testing.assert_allclose(bars(left, name)[1], mean(values))
        np.testing.assert_allclose(bars(right, "−KL(q(θ) ‖ p(θ))")[1], -mean(terms.divergence))
        np.testing.assert_allclose(bars(right, "−KL(q(z) ‖ p(z | x, θ))")[1], -mean(terms.assignment_divergence))
        for axes in (left, right):
            for t in range(4):
                spans = sorted(
                    sorted((start[t], start[t] + height[t]))
                    for start, height in (bars(axes, container.get_label()) for container in axes.containers)
                )
                assert all(below[1] <= above[0] + 1e-9 for below, above in itertools.pairwise(spans))

    def test_a_delta_is_called_what_it_is(self) -> None:
        terms = terms_of(is_bound=False, theta_entropy=True, log_mixing_prior=True, assignment_divergence=True)
        figure = plots.elbo_terms(terms)
        names = [text.get_text() for text in figure.legends[0].texts]
        assert "plug-in log p(x, θ)" in names
        assert "ELBO" not in names
        assert [container.get_label() for container in figure.axes[3].containers] == ["log p(θ)"]
        np.testing.assert_allclose(bars(figure.axes[3], "log p(θ)")[1], mean(terms.log_prior))

    def test_what_is_zero_is_left_out(self) -> None:
        nothing = {"log_prior": True, "theta_entropy": True, "log_mixing_prior": True, "assignment_divergence": True}
        terms = terms_of(is_bound=False, **nothing)
        # Rounding is no term.
        terms = terms.map(lambda values: values + 1e-8)
        top, bottom = plots.elbo_terms(terms).axes
        assert top.get_title() == "free energy"
        assert [container.get_label() for container in bottom.containers] == ["H[q(z)]"]
        (axes,) = plots.elbo_terms(terms_of(is_bound=False, assignment_entropy=True, **nothing)).axes
        np.testing.assert_allclose(line(axes, "Q"), line(axes, "plug-in log p(x, θ)"))

    @pytest.mark.parametrize("shape", ["(1, B)", "(B,)"])
    def test_one_iteration_goes_from_the_fit_to_the_elbo_in_steps(self, shape: str) -> None:
        terms = terms_of(1)
        given = terms if shape == "(1, B)" else terms.map(lambda values: values[0])
        left, right = plots.elbo_terms(given).axes
        names = [text.get_text() for text in left.get_yticklabels()]
        assert names == ["Q", "H[q(z)]", "E[log p(θ)]", "H[q(θ)]", "log p(π)", "ELBO"]
        for axes, start in ((left, terms.expected_log_joint), (right, terms.reconstruction)):
            value = mean(start).item()
            for bar in axes.patches:
                assert value == pytest.approx(bar.get_x(), rel=1e-9)
                value += bar.get_width()
            assert value == pytest.approx(mean(terms.elbo).item())
            numbers = [float(text.get_text().replace("−", "-")) for text in axes.texts]
            assert numbers[0] + sum(numbers[1:-1]) == pytest.approx(numbers[-1], abs=0.5)
            assert numbers[-1] == pytest.approx(mean(terms.elbo).item(), abs=0.06)
            # Every number is inside.
            left_edge, right_edge = axes.get_window_extent().intervalx
            for text in axes.texts:
                assert left_edge <= text.get_window_extent().x0 <= text.get_window_extent().x1 <= right_edge

    def test_nothing_to_draw_is_named(self) -> None:
        for T, count in ((0, 3), (3, 0)):
            with pytest.raises(DataError, match=rf"\({T}, {count}\)"):
                plots.elbo_terms(terms_of(T, count))


class TestEntropyMaps:
    def test_maps_are_entropies_in_nats(self) -> None:
        posterior = inferred()
        posterior.gamma[1] = torch.nn.functional.one_hot(torch.arange(D) % K, K).mT
        figure = plots.entropy_maps(torch.rand(B, D, 1), posterior, (H, W, 1), images=[2, 1])
        expected = torch.distributions.Categorical(probs=posterior.gamma.mT).entropy()
        maps = figure.axes[4:6]
        for axes, image in zip(maps, (2, 1), strict=True):
            (drawn,) = axes.images
            np.testing.assert_allclose(drawn.get_array(), expected[image].view(H, W), atol=1e-6)
            assert drawn.get_clim() == (0, math.log(K))
            assert axes.get_xlabel() == f"Σ {expected[image].sum():.1f} nats"
        assert figure.axes[6].get_ylabel() == "entropy of γ\n[nats per pixel]"

    def test_image_and_segmentation_stand_above(self) -> None:
        x, posterior = torch.rand(B, D, 3), inferred(C=3)
        figure = plots.entropy_maps(x, posterior, (H, W, 3), images=[3])
        image, segmentation, _ = (axes.images[0].get_array() for axes in figure.axes[:3])
        np.testing.assert_allclose(image, x[3].view(H, W, 3), atol=1e-6)
        expected = plots.component_colours(K)[posterior.labels[3]].reshape(H, W, 3)
        np.testing.assert_allclose(segmentation, expected)
        assert [axes.get_ylabel() for axes in figure.axes[:3]] == ["input", "segmentation", "entropy"]

    def test_the_first_five_unless_told_and_two_dimensions(self) -> None:
        figure = plots.entropy_maps(torch.rand(B, H, W, 2), inferred(C=2), (H, W, 2))
        assert [axes.get_title() for axes in figure.axes[:B]] == [f"image {b}" for b in range(B)]
        assert figure.axes[0].get_ylabel() == "input\nchannel 0"

    def test_one_component_is_sure_everywhere(self) -> None:
        figure = plots.entropy_maps(torch.rand(B, D, 1), inferred(1), (H, W, 1), images=[0])
        assert not figure.axes[2].images[0].get_array().any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"image_shape": (H, W + 1, 1)}, "needs"),
            ({"x": torch.rand(B + 1, D, 1)}, r"x has shape \(5, 30, 1\)"),
            ({"posterior": inferred()._replace(gamma=torch.rand(B, K, D - 1))}, "its own posterior"),
            ({"images": [B]}, "images must be integers from 0 to 3"),
            ({"images": []}, "at least one"),
        ],
    )
    def test_bad_input_is_named(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(DataError, match=message):
            plots.entropy_maps(
                **{"x": torch.rand(B, D, 1), "posterior": inferred(), "image_shape": (H, W, 1), **change}  # type: ignore[arg-type]
            )


class TestTrace:
    def test_panels_hold_means_and_the_middle_half(self) -> None:
        found = course()
        figure = plots.trace(found)
        values = [found.elbo, found.confidence, found.components_used, found.change[1:], found.ami, found.ari]
        drawn = [axes.lines[0] for axes in figure.axes] + [figure.axes[-1].lines[1]]
        for curve, expected in zip(drawn, values, strict=True):
            assert expected is not None
            np.testing.assert_allclose(np.asarray(curve.get_ydata()), expected.nanmean(1), rtol=1e-6)
        np.testing.assert_array_equal(figure.axes[3].lines[0].get_xdata(), [2, 3, 4])
        box = np.asarray(figure.axes[1].collections[0].get_paths()[0].vertices)
        quartiles = found.confidence.quantile(torch.tensor([0.25, 0.75]).double(), dim=1)
        for t in range(4):
            np.testing.assert_allclose(np.unique(box[box[:, 0] == t + 1, 1]), quartiles[:, t])
        titles = ["plug-in log p(x, θ)\n[nats per image]", "confidence", "components used", "RMS change of θ"]
        assert [axes.get_ylabel() for axes in figure.axes] == [*titles, "AMI and ARI"]

    def test_without_groups_there_is_no_panel_for_them(self) -> None:
        assert len(plots.trace(course(groups=False)).axes) == 4

    def test_what_is_known_at_the_end_is_a_point_and_what_is_not_has_no_panel(self) -> None:
        model = CLASSICAL["diagonal"]()
        found = quietly(trace, ClassicalEM(model, iterations=9, tol=0.0), items("diagonal").float())
        elbo, confidence, used = plots.trace(found).axes
        assert len(elbo.lines[0].get_xdata()) == len(found.elbo)
        for axes in (confidence, used):
            np.testing.assert_array_equal(axes.lines[0].get_xdata(), [len(found.elbo)])
            assert axes.lines[0].get_marker() == "o"

    def test_a_single_iteration_and_image(self) -> None:
        model = factors()
        figure = plots.trace(trace(VAE(model), torch.randn(1, 1, 6)))
        assert [axes.lines[0].get_marker() for axes in figure.axes] == ["o"] * 3

    def test_falls_of_a_monotone_method_are_marked(self) -> None:
        strategy: Strategy = GradientEM(MODELS["tied Bernoulli"](), iterations=4)
        x = images(3)
        found = trace(strategy, x)
        assert plots.trace(found).axes[0].get_legend() is None
        decreased = found.decreased.clone()
        decreased[2, 1] = True
        elbo = found.elbo.clone()
        elbo[2:, 1] -= 50
        figure = plots.trace(Trace(**{**vars(found), "elbo": elbo, "decreased": decreased}))
        mark = figure.axes[0].lines[-1]
        np.testing.assert_array_equal(mark.get_xdata(), [3])
        np.testing.assert_allclose(np.asarray(mark.get_ydata()), elbo[2:3].mean(1))

    def test_an_image_without_a_score_is_left_out(self) -> None:
        model = MODELS["tied Bernoulli"]()
        groups = torch.randint(1, 3, (3, 12))
        groups[1] = 0
        found = trace(RNNEM(model, iterations=3), images(3), groups)
        assert found.ari is not None
        curve = plots.trace(found).axes[-1].lines[1]
        np.testing.assert_allclose(np.asarray(curve.get_ydata()), found.ari[:, [0, 2]].mean(1))

    def test_no_image_is_named(self) -> None:
        found = course(groups=False)
        empty = {name: value[:, :0] if isinstance(value, Tensor) else value for name, value in vars(found).items()}
        with pytest.raises(DataError, match=r"\(4, 0\)"):
            plots.trace(Trace(**empty))
