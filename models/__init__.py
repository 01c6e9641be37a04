"""Models: the spatial mixture, its likelihoods and its decoders."""

from pnem.models import decoders
from pnem.models.config import Configured
from pnem.models.counts import Binomial, Categorical, Poisson
from pnem.models.likelihoods import Bernoulli, ExponentialFamily, Likelihood, Normal
from pnem.models.mixture import SpatialMixture
from pnem.models.multivariate_normal import MultivariateNormal
from pnem.models.normal_inverse_wishart import NormalInverseWishart
from pnem.models.priors import DiagonalNormal, LatentPrior, MixtureOfNormals, Prior
from pnem.models.student_t import StudentT

__all__ = [
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Configured",
    "DiagonalNormal",
    "ExponentialFamily",
    "LatentPrior",
    "Likelihood",
    "MixtureOfNormals",
    "MultivariateNormal",
    "Normal",
    "NormalInverseWishart",
    "Poisson",
    "Prior",
    "SpatialMixture",
    "StudentT",
    "decoders",
]
