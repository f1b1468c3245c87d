"""Records of algorithms refuse values that cannot be right: NaN, infinities, and what is out of range."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.entropy_estimators import GTPOAdvantage
from jaxrl_llm.algorithms.policy_gradient.estimators import HADWAdvantage
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, OverlongPenalty, PolicyGradient, ValueObjective
from jaxrl_llm.algorithms.policy_gradient.sequence_surrogates import VESPO, GeometricMeanClipped, SequenceClipped
from jaxrl_llm.algorithms.policy_gradient.shaped_estimators import GAEAdvantage, ReinforcePlusPlusAdvantage
from jaxrl_llm.algorithms.policy_gradient.surrogates import CISPO, DPPO, Clipped, CovarianceClipped
from jaxrl_llm.algorithms.preference.objective import PreferenceObjective
from jaxrl_llm.algorithms.preference.pair_losses import DPO, EXO, ORPO, Mixture, SimPO
from jaxrl_llm.algorithms.preference.presets import PAIRED, UNPAIRED
from jaxrl_llm.algorithms.preference.unpaired import BCOObjective, KTOObjective
from jaxrl_llm.algorithms.score_models.process_reward import ProcessRewardObjective
from jaxrl_llm.algorithms.score_models.reward_model import RewardModelObjective
from jaxrl_llm.algorithms.score_models.search import BeamSearchConfig
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig

WHOLE = (
    *(preset() for preset in (*presets.PRESETS, *PAIRED.values(), *UNPAIRED.values())),
    presets.dppo(0.1, 0.1),
    PolicyGradient(overlong=OverlongPenalty(cache=2), correction=Correction()),
    RewardModelObjective(),
    ProcessRewardObjective(),
    SupervisedObjective(),
    TrustRegionConfig(),
    BeamSearchConfig(),
)


def records_in(value: Any) -> Iterator[Any]:
    """A record and those in it."""
    if isinstance(value, tuple):
        for item in value:
            yield from records_in(item)
    elif dataclasses.is_dataclass(value):
        yield value
        yield from records_in(tuple(getattr(value, field.name) for field in dataclasses.fields(value)))


RECORDS = {type(record): record for record in records_in(WHOLE)}


def settings() -> Iterator[tuple[type, str, Any]]:
    """The settings of all records, with their types; of optional ones the type that is no `None`."""
    for record in RECORDS:
        hints = typing.get_type_hints(record)
        for field in dataclasses.fields(record):
            hint = hints[field.name]
            yield record, field.name, typing.get_args(hint)[0] if type(hint) is types.UnionType else hint


NUMBERS = [(record, name) for record, name, hint in settings() if hint in (float, tuple[float, ...])]
CHOICES = [(record, name) for record, name, hint in settings() if typing.get_origin(hint) is Literal]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("record", "name"), NUMBERS)
def test_numbers_are_finite(record: type, name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{wrong}"):
        dataclasses.replace(RECORDS[record], **{name: (wrong, wrong) if name == "weights" else wrong})


@pytest.mark.parametrize(("record", "name"), CHOICES)
def test_choices_are_among_those_there_are(record: type, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}='no such choice' must be"):
        dataclasses.replace(RECORDS[record], **{name: "no such choice"})


@pytest.mark.parametrize(
    ("record", "settings", "message"),
    [
        (Clipped, {"clip_low": 2.0}, r"algorithm\.surrogate\.clip_low=2\.0 must be None, or .* below 1"),
        (Clipped, {"clip_low": 1.0}, "clip_low=1.0 must"),
        (SequenceClipped, {"clip_low": 1.5}, "clip_low=1.5 must"),
        (CovarianceClipped, {"clip_low": 1.1}, "clip_low=1.1 must be None, or a distance from 1 between 0 and 1"),
        (GeometricMeanClipped, {"clip_low": -0.4}, "clip_low=-0.4 must be None, or not negative"),
        (CISPO, {"w_max": -1.0}, "w_max=-1.0 must be larger than w_min"),
        (DPPO, {"delta_low": -0.1, "delta_high": 0.1}, "delta_low=-0.1 must not be negative"),
        (VESPO, {"k_pos": -1.0}, "k_pos=-1.0 must not be negative"),
        (PolicyGradient, {"entropy_coef": -0.1}, r"algorithm\.entropy_coef=-0\.1 must not be negative"),
        (ValueObjective, {"coef": -0.5}, r"algorithm\.value\.coef=-0\.5 must not be negative"),
        (Correction, {"w_max": 0.0}, "w_max=0.0 must be None, or positive"),
        (Correction, {"w_min": 2.0, "w_max": 0.5}, "w_min=2.0 must be below w_max=0.5"),
        (OverlongPenalty, {"cache": 0}, "cache=0 must be at least 1"),
        (ReinforcePlusPlusAdvantage, {"gamma": 1.5}, "gamma=1.5 must be between 0 and 1"),
        (GAEAdvantage, {"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 must be None, or not negative"),
        (HADWAdvantage, {"min_rate": 1.5}, "min_rate=1.5 must be between 0 and 1"),
        (GTPOAdvantage, {"success_reward": math.nan}, "success_reward=nan must be finite"),
        (DPO, {"beta": 0.0}, r"objective\.pair_loss\.beta=0\.0 must be positive"),
        (EXO, {"label_smoothing": 0.0}, "label_smoothing=0.0 must be positive"),
        (EXO, {"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below 0.5"),
        (SimPO, {"gamma": -0.5}, "gamma=-0.5 must not be negative"),
        (ORPO, {"odds_coef": -0.1}, "odds_coef=-0.1 must not be negative"),
        (Mixture, {"weights": (0.0, 0.0)}, r"weights=\(0.0, 0.0\) must be finite and not negative, and not all 0"),
        (PreferenceObjective, {"nll_coef": -1.0}, r"objective\.nll_coef=-1\.0 must not be negative"),
        (PreferenceObjective, {"ld_alpha": 1.5}, r"objective\.ld_alpha=1\.5 must be between 0 and 1"),
        (KTOObjective, {"lambda_u": -1.0}, r"objective\.lambda_u=-1\.0 must not be negative"),
        (BCOObjective, {"beta": -0.1}, r"objective\.beta=-0\.1 must be positive"),
        (RewardModelObjective, {"center_coef": -0.1}, r"objective\.center_coef=-0\.1 must not be negative"),
    ],
)
def test_values_out_of_range(record: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**settings)


def test_a_wide_range_of_the_logarithm_is_no_mistake() -> None:
    assert GeometricMeanClipped(clip_low=1.5).bounds == {"clip_low": 1.5, "clip_high": 0.4}
    assert CovarianceClipped(clip_low=1.0).clip_low == 1
