"""Figures of fits: what was inferred, iteration by iteration, and how training went.

Every function returns a `matplotlib.figure.Figure` that pyplot knows nothing of: as the last expression of a notebook
cell it is shown once, ``figure.savefig(path)`` writes it, and nothing is left to close. Matplotlib's settings are
those of `STYLE` while a figure is made, and afterwards what they were.
"""

from pnem.plots.animation import Animation, animation
from pnem.plots.comparison import comparison
from pnem.plots.curves import bound, elbo_by_iteration, training_curves
from pnem.plots.elbo import elbo_terms
from pnem.plots.entropy import entropy_maps
from pnem.plots.gaps import inference_gap
from pnem.plots.images import overview
from pnem.plots.mixtures import mixture_1d, mixture_2d
from pnem.plots.over_time import curves_by_horizon, curves_by_objects, curves_by_step
from pnem.plots.palette import component_colours
from pnem.plots.reliability import calibration_ranks, k_hat
from pnem.plots.sequences import sequence_frames
from pnem.plots.style import STYLE
from pnem.plots.traces import trace

__all__ = [
    "STYLE",
    "Animation",
    "animation",
    "bound",
    "calibration_ranks",
    "comparison",
    "component_colours",
    "curves_by_horizon",
    "curves_by_objects",
    "curves_by_step",
    "elbo_by_iteration",
    "elbo_terms",
    "entropy_maps",
    "inference_gap",
    "k_hat",
    "mixture_1d",
    "mixture_2d",
    "overview",
    "sequence_frames",
    "trace",
    "training_curves",
]
