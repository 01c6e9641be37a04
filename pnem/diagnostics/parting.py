"""Whether the loss went on falling while the grouping got worse."""

import numpy as np
import pandas as pd

from pnem.diagnostics.findings import Finding
from pnem.inference import Strategy

__all__ = ["parting"]

# Epochs whose median is taken: one epoch that is out of line moves it little.
WINDOW = 3
# By which the ARI must have fallen: ten times the standard error that a few thousand images have.
MARGIN = 0.05
# And how many standard deviations of its changes from epoch to epoch: what the best of some tens of windows exceeds
# the last by when nothing but noise is there stays below.
DEVIATIONS = 4.0


def parting(history: pd.DataFrame, strategy: Strategy) -> list[Finding]:
    """A finding where the validation loss fell while the validation ARI fell.

    Medians of three epochs are compared: the best of the ARI with the last, which must be lower by 0.05 and by four
    standard deviations of its noise; and the loss of the same epochs, which must be lower at the end as well. It takes
    six epochs at least.

    Args:
        history: one row for each epoch, with ``epoch``, ``valid_loss`` and ``valid_ari``.
        strategy: what was trained, for what to try.
    """
    known = history.dropna(subset=["valid_loss", "valid_ari"])
    if len(known) < 2 * WINDOW:
        return []
    ari, loss = (known[name].rolling(WINDOW).median().to_numpy()[WINDOW - 1 :] for name in ("valid_ari", "valid_loss"))
    # Of the windows that share no epoch with the last.
    best = int(ari[:-WINDOW].argmax())
    drop = ari[best] - ari[-1]
    changes = np.diff(known["valid_ari"])
    # The median absolute deviation of a normal is 0.6745 σ, and a difference has twice the variance.
    noise = np.median(np.abs(changes - np.median(changes))) / (0.6745 * np.sqrt(2))
    if not (drop > max(MARGIN, DEVIATIONS * noise) and loss[-1] < loss[best]):
        return []
    first, last = (int(known["epoch"].iloc[i]) for i in (best, best + WINDOW - 1))
    seen = (
        f"from epochs {first} to {last} to the last three, the validation ARI fell from {ari[best]:.2f} to "
        f"{ari[-1]:.2f} while the validation loss fell from {loss[best]:.1f} to {loss[-1]:.1f} nats per image"
    )
    return [Finding("loss and grouping part ways", seen, float(drop), _advice(strategy, last))]


def _advice(strategy: Strategy, epochs: int) -> str:
    model = strategy.model
    if not model.owned:
        return (
            "nothing in this model makes components divide an image: declare ownership with "
            "SpatialMixture(..., pixel_prior=...)"
        )
    ideas = [f"fewer than {model.latent_features} latent_features"]
    if not model.has_proper_prior:
        ideas.append('a proper prior, SpatialMixture(..., prior="standard_normal"), with IterativeVI')
    if model.mixing_kind == "learned":
        ideas.append('mixing="uniform"')
    if strategy.noise is None:
        ideas.append("input noise")
    return f"limit what one component can draw: {', '.join(ideas)}; meanwhile train for epochs={epochs}"
