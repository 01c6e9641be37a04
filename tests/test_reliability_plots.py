"""Figures of reliability: what is drawn is what was found."""

import math
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot

from pnem import plots
from pnem.diagnostics import Calibration, Reliability
from pnem.errors import DataError


def shares(axes, index):
    """The heights of the filled histogram with this number."""
    return axes.patches[2 * index].get_data().values


def test_k_hat_is_a_histogram_of_each_strategy():
    one = Reliability(k_hat=torch.tensor([0.11, 0.12, 0.69, 0.71], dtype=torch.float64))
    other = Reliability(k_hat=torch.tensor([-math.inf, -0.9, 2.5, math.inf, math.nan]))
    before = dict(matplotlib.rcParams)
    figure = plots.k_hat({"one": one, "other": other})
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == []
    (axes,) = figure.axes
    edges = axes.patches[0].get_data().edges
    expected = np.zeros(25)
    for low, share in ((0.1, 0.5), (0.6, 0.25), (0.7, 0.25)):
        expected[np.abs(edges[:-1] - low).argmin()] = share
    np.testing.assert_allclose(shares(axes, 0), expected)
    # All that is beyond is in the outermost bins.
    np.testing.assert_allclose(shares(axes, 1), [0.4, *[0] * 23, 0.6])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "one: 25% above 0.7",
        "other: 60% above 0.7",
    ]
    assert axes.lines[0].get_xdata() == [0.7, 0.7]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["≤−0.5", "0", "0.5", "1", "1.5", "≥2"]
    assert plots.k_hat(one).legends[0].get_texts()[0].get_text() == "25% above 0.7"


def test_nothing_to_draw_is_refused_with_the_reason():
    with pytest.raises(DataError, match="empty mapping"):
        plots.k_hat({})
    absent = Reliability(absent={"k_hat": "q(θ) is a Delta"})
    with pytest.raises(DataError, match=r"'rnn-em' has no k̂ to draw: q\(θ\) is a Delta"):
        plots.k_hat({"rnn-em": absent})


@pytest.mark.parametrize(
    ("simulations", "draws", "bins"), [(200, 99, 10), (1000, 99, 20), (400, 63, 16), (400, 60, 20), (30, 99, 2)]
)
def test_ranks_are_counted_in_equal_bins_where_that_can_be(simulations, draws, bins):
    ranks = torch.arange(simulations * 2).reshape(simulations, 2) % (draws + 1)
    figure = plots.calibration_ranks(Calibration(ranks, ("θ[0]", "log p(x | θ)"), draws))
    assert [axes.get_title().partition(",")[0] for axes in figure.axes] == ["θ[0]", "log p(x | θ)"]
    for q, axes in enumerate(figure.axes):
        band, filled, expected, _ = (patch.get_data() for patch in axes.patches)
        edges = filled.edges
        assert len(filled.values) == bins
        assert filled.values.sum() == simulations
        counted = [((ranks[:, q] >= low) & (ranks[:, q] < high)).sum() for low, high in pairwise(edges)]
        assert filled.values.tolist() == counted
        np.testing.assert_allclose(expected.values, simulations * np.diff(edges) / (draws + 1))
        assert (band.baseline <= expected.values).all()
        assert (expected.values <= band.values).all()


def test_the_band_holds_bars_of_uniform_ranks_with_the_probability_that_it_says():
    ranks = torch.randint(0, 100, (400, 12))
    figure = plots.calibration_ranks(Calibration(ranks, tuple(map(str, range(12))), 99))
    inside = []
    for axes in figure.axes:
        band, filled, *_ = (patch.get_data() for patch in axes.patches)
        inside.append((band.baseline <= filled.values) & (filled.values <= band.values))
    assert np.mean(inside) > 0.97


def test_of_many_test_quantities_those_of_lowest_p_value_are_drawn():
    ranks = torch.randint(0, 100, (200, 30))
    ranks[:, 17] = 3
    found = Calibration(ranks, tuple(f"θ[{m}]" for m in range(30)), 99)
    figure = plots.calibration_ranks(found)
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert len(titles) == 12
    assert "θ[17],  p < 1e-12" in titles
    names = [title.partition(",")[0] for title in titles]
    assert max(found.p_values[name] for name in names) <= sorted(found.p_values.values())[11]
    assert names == [name for name in found.names if name in names]
