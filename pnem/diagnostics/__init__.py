"""Is inference any good, what is it losing, and would another strategy be better? All in nats."""

from pnem.diagnostics.arviz_adapter import to_arviz
from pnem.diagnostics.calibration import Calibration, calibration
from pnem.diagnostics.collapse import CollapseWarning, collapse
from pnem.diagnostics.comparison import compare
from pnem.diagnostics.comparison_result import Comparison
from pnem.diagnostics.diagnosis import diagnose
from pnem.diagnostics.diagnosis_result import Diagnosis
from pnem.diagnostics.findings import Finding
from pnem.diagnostics.gap_result import InferenceGap
from pnem.diagnostics.gaps import inference_gap
from pnem.diagnostics.gradients import gradient_signal_to_noise
from pnem.diagnostics.psis import psis_k_hat
from pnem.diagnostics.reliability import Reliability, reliability
from pnem.diagnostics.restarts import RestartSpread, restart_spread
from pnem.diagnostics.terms import Terms, elbo_terms, terms_at
from pnem.diagnostics.tracing import Trace, trace

__all__ = [
    "Calibration",
    "CollapseWarning",
    "Comparison",
    "Diagnosis",
    "Finding",
    "InferenceGap",
    "Reliability",
    "RestartSpread",
    "Terms",
    "Trace",
    "calibration",
    "collapse",
    "compare",
    "diagnose",
    "elbo_terms",
    "gradient_signal_to_noise",
    "inference_gap",
    "psis_k_hat",
    "reliability",
    "restart_spread",
    "terms_at",
    "to_arviz",
    "trace",
]
