"""Models: the spatial mixture, its likelihoods and its decoders."""

from pnem.models import decoders
from pnem.models.config import Configured
from pnem.models.likelihoods import Bernoulli, Likelihood, Normal
from pnem.models.mixture import SpatialMixture

__all__ = ["Bernoulli", "Configured", "Likelihood", "Normal", "SpatialMixture", "decoders"]
