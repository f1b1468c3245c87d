"""Rewards for completions of a wanted length."""

from __future__ import annotations

import math
from typing import Literal, get_args

from jaxrl_llm.rewards.per_sample import RewardFunction, make_per_sample_reward

LengthUnit = Literal["characters", "words", "tokens"]


def make_length_reward(
    target: float,
    *,
    unit: LengthUnit,
    tolerance: float = 0.0,
    falloff: float | None = None,
    name: str = "length_reward",
) -> RewardFunction:
    """Returns the reward for a length n near the target, falling off linearly on both sides.

        r(n) = max(0, 1 − max(0, |n − target| − tolerance) / falloff)

    Args:
        target: The wanted length, in `unit`.
        unit: `characters` (Unicode code points), `words` (separated by white space) or `tokens` (from the
            column `completion_ids`, the sampled stop token included).
        tolerance: How far n may be from the target at full reward, in `unit`.
        falloff: Over what further distance the reward falls to 0, in `unit`; `target` unless given.
        name: The metric's name.

    Raises:
        ValueError: If the unit is unknown, or target, tolerance or falloff is out of range.
    """
    if unit not in get_args(LengthUnit):
        raise ValueError(f"{name}: unit must be one of {', '.join(get_args(LengthUnit))}, got {unit!r}")
    slope = target if falloff is None else falloff
    if not (0 < target < math.inf and 0 <= tolerance < math.inf and 0 < slope < math.inf):
        raise ValueError(
            f"{name}: target and falloff must be positive and tolerance not negative, "
            f"got target={target}, tolerance={tolerance}, falloff={slope}"
        )

    def reward(length: int) -> float:
        return max(0.0, 1.0 - max(0.0, abs(length - target) - tolerance) / slope)

    if unit == "tokens":
        return make_per_sample_reward(lambda text, ids: reward(len(ids)), name, ["completion_ids"])
    if unit == "words":
        return make_per_sample_reward(lambda text: reward(len(text.split())), name)
    return make_per_sample_reward(lambda text: reward(len(text)), name)
