"""Advantage estimators as pure functions of arrays: rewards in, advantages out."""

from jaxrl_llm.advantages.group import AdvantageBaseline, AdvantageScale, group_advantages, zero_std_groups

__all__ = ["AdvantageBaseline", "AdvantageScale", "group_advantages", "zero_std_groups"]
