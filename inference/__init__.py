"""Inference: strategies on the spatial mixture, their parts, and training objectives."""

from pnem.inference import encoders
from pnem.inference.annealed_importance_sampling import annealed_importance_sampling
from pnem.inference.chains import Chains, MixingWarning
from pnem.inference.classical_em import ClassicalEM
from pnem.inference.convergence import ConvergenceWarning, Fit
from pnem.inference.estimates import Estimate
from pnem.inference.factor_analysis import FactorAnalysis
from pnem.inference.filtering import FilteringStrategy
from pnem.inference.gradient_em import GradientEM
from pnem.inference.iterative_vi import IterativeVI
from pnem.inference.m_steps import MStep, Parameters, register_m_step
from pnem.inference.marginal_likelihood import (
    evidence_lower_bound,
    exact_log_marginal,
    importance_weighted_bound,
    prior_monte_carlo,
)
from pnem.inference.match_moments import MatchMoments
from pnem.inference.n_em import NEM
from pnem.inference.noise import BitFlip, MaskedUniform, Noise
from pnem.inference.normal_moments import NormalMoments
from pnem.inference.normal_scale_mixtures import NormalScaleMixture
from pnem.inference.nuts import NUTS
from pnem.inference.objectives import ELBO, Losses, NEMLoss, Objective
from pnem.inference.online_em import OnlineEM
from pnem.inference.posterior import Posterior, State
from pnem.inference.pyro_guide import PyroGuide
from pnem.inference.r_nem import RNEM
from pnem.inference.rnn_em import RNNEM
from pnem.inference.semi_amortised import SemiAmortised
from pnem.inference.strategy import Strategy
from pnem.inference.vae import VAE
from pnem.inference.variational import Normals, NormalStrategy

__all__ = [
    "ELBO",
    "NEM",
    "NUTS",
    "RNEM",
    "RNNEM",
    "VAE",
    "BitFlip",
    "Chains",
    "ClassicalEM",
    "ConvergenceWarning",
    "Estimate",
    "FactorAnalysis",
    "FilteringStrategy",
    "Fit",
    "GradientEM",
    "IterativeVI",
    "Losses",
    "MStep",
    "MaskedUniform",
    "MatchMoments",
    "MixingWarning",
    "NEMLoss",
    "Noise",
    "NormalMoments",
    "NormalScaleMixture",
    "NormalStrategy",
    "Normals",
    "Objective",
    "OnlineEM",
    "Parameters",
    "Posterior",
    "PyroGuide",
    "SemiAmortised",
    "State",
    "Strategy",
    "annealed_importance_sampling",
    "encoders",
    "evidence_lower_bound",
    "exact_log_marginal",
    "importance_weighted_bound",
    "prior_monte_carlo",
    "register_m_step",
]
