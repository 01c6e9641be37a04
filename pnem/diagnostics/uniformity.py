"""Whether ranks are uniform: a test that looks at the whole of their empirical distribution at once."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["uniformity_p_values"]


def uniformity_p_values(ranks: NDArray[np.int64], draws: int) -> NDArray[np.float64]:
    r"""The p-value of uniform ranks for each of Q columns, by their empirical distribution function.

    At every rank r < L the number of N ranks that are at most r is Binomial(N, (r + 1) / (L + 1)) if they are uniform.
    The statistic is the smallest of the two-sided p-values of these L numbers (Säilynoja, Bürkner & Vehtari 2022,
    "Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample
    comparison"). Its own distribution is exact, by a recursion over ranks: uniform counts are independent Poisson
    counts given their sum. The p-value is at most conservative by that the statistic is discrete.

    Args:
        ranks: (N, Q), whole numbers from 0 to L.
        draws: L.

    Returns:
        (Q,). Rounding hides what is below about 1e-13, which comes out as 0.

    >>> spread = np.arange(200) % 100
    >>> uniformity_p_values(np.stack([spread, spread // 2], 1), 99).round(3).tolist()
    [1.0, 0.0]
    """
    from scipy.stats import binom, poisson

    N, (L, every) = len(ranks), (draws, np.arange(len(ranks) + 1))
    share = np.arange(1, L + 1)[:, None] / (L + 1)
    # Two-sided, of every number (N + 1) at every rank (L).
    p_values = 2 * np.minimum(binom.cdf(every, N, share), binom.sf(every - 1, N, share))
    counts = (ranks[..., None] <= np.arange(L)).sum(0)
    statistic = p_values[np.arange(L), counts].min(-1, keepdims=True)
    # At ranks that mirror one another p-values are equal but for rounding.
    beyond = statistic * (1 + 1e-9)
    step = poisson.pmf(every - every[:, None], N / (L + 1))
    within = np.zeros((ranks.shape[1], N + 1))
    within[:, 0] = 1
    for p_value in p_values:
        within = (within @ step) * (p_value > beyond)
    stays = (within @ step)[:, -1] / poisson.pmf(N, N)
    return np.maximum(1 - stays, 0.0)
