"""Presets differ from each other as the papers do."""

from __future__ import annotations

import dataclasses

from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.presets import dapo, dr_grpo, grpo


def published(algorithm: PolicyGradient) -> dict[str, object]:
    fields = dataclasses.asdict(algorithm)
    scale = fields.pop("advantage")["scale"]
    clip = {name: fields["surrogate"][name] for name in ("clip_low", "clip_high")}
    return {"scale": scale, **clip, **{name: fields[name] for name in ("kl_coef", "aggregation", "mask_truncated")}}


def test_grpo():
    """2402.03300: group z-score, mean over outputs of token means, β = 0.04, k3; clip 0.2 as in PPO."""
    assert published(grpo()) == {
        "scale": "group",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.04,
        "aggregation": "seq-mean-token-mean",
        "mask_truncated": False,
    }
    assert grpo().kl_estimator == "k3"
    assert grpo().needs_reference


def test_dr_grpo():
    """2503.20783: neither the deviation nor the length divides, and there is no KL."""
    assert published(dr_grpo()) == {
        "scale": "none",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "kl_coef": 0.0,
        "aggregation": "seq-mean-token-sum-norm",
        "mask_truncated": False,
    }
    assert not dr_grpo().needs_reference


def test_dapo():
    """2503.14476: clip-higher 0.28, one mean over all tokens, truncated samples left out, no KL."""
    assert published(dapo()) == {
        "scale": "group",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "kl_coef": 0.0,
        "aggregation": "token-mean",
        "mask_truncated": True,
    }
