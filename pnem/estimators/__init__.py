"""scikit-learn estimators, fitted by classical EM.

They keep scikit-learn's conventions and its names for what they share with its own estimators: they can be cloned and
pickled, and used in a ``Pipeline`` or a ``GridSearchCV``.

>>> import numpy as np
>>> from pnem.estimators import MixtureModel
>>> counts = np.random.default_rng(0).poisson([[1.0], [20.0]], size=(2, 100)).reshape(-1, 1)
>>> mixture = MixtureModel(2, likelihood="poisson", random_state=0).fit(counts)
>>> bool(mixture.converged_)
True
"""

from pnem.estimators.factor_analysis import FactorAnalysis
from pnem.estimators.mixture_model import MixtureModel

__all__ = ["FactorAnalysis", "MixtureModel"]
