"""Inference: strategies on the spatial mixture, their parts, and training objectives."""

from pnem.inference import encoders
from pnem.inference.classical_em import ClassicalEM, ConvergenceWarning
from pnem.inference.m_steps import MStep, Parameters, register_m_step
from pnem.inference.n_em import NEM
from pnem.inference.noise import BitFlip, MaskedUniform, Noise
from pnem.inference.objectives import ELBO, Losses, NEMLoss, Objective
from pnem.inference.posterior import Posterior, State
from pnem.inference.rnn_em import RNNEM
from pnem.inference.strategy import Strategy

__all__ = [
    "ELBO",
    "NEM",
    "RNNEM",
    "BitFlip",
    "ClassicalEM",
    "ConvergenceWarning",
    "Losses",
    "MStep",
    "MaskedUniform",
    "NEMLoss",
    "Noise",
    "Objective",
    "Parameters",
    "Posterior",
    "State",
    "Strategy",
    "encoders",
    "register_m_step",
]
