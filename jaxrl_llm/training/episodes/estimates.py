"""Estimates from evaluated prompts, with their standard errors over prompts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean over prompts."""

    value: float
    """NaN where no prompt counts."""
    stderr: float
    """s / √P with the sample standard deviation s of the P prompts' values (P − 1 in its denominator); of a share that
    is the binomial √(p (1 − p) / (P − 1)). NaN for fewer than two prompts."""
    prompts: int
    """P, those that count."""

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """The mean of values `[prompts]` or, over samples first, `[prompts, samples]`; NaN does not count."""
        values = values.astype(np.float64).reshape(len(values), -1)
        known = ~np.isnan(values)
        some = known.any(axis=1)
        means = np.where(known, values, 0.0)[some].sum(axis=1) / known[some].sum(axis=1)
        count = len(means)
        spread = float(np.std(means, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
        return cls(float(np.mean(means)) if count else math.nan, spread, count)


def solved_within(solved: np.ndarray, k: int) -> np.ndarray:
    """The chance that one of k samples of a prompt is right, `[prompts]`: 1 − C(n − c, k)/C(n, k).

    The unbiased estimator of Chen et al. 2021 (2107.03374).

    Args:
        solved: bool `[prompts, n]`, of which c of a prompt are true.
        k: 1 to n.
    """
    n = solved.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of each prompt, there are {n}")
    return np.array([1 - math.comb(n - int(c), k) / math.comb(n, k) for c in solved.sum(axis=1)])
