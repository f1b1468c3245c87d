"""What update steps are given is checked by shape and type, when they are traced."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.iteration import DeviceReward, make_device_scores, make_iteration
from jaxrl_llm.algorithms.offline import make_offline_evaluation, make_offline_step
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.preference.objective import PreferenceBatch, PreferenceObjective
from jaxrl_llm.algorithms.preference.online import make_online_preference_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.algorithms.supervised import Demonstrations, SupervisedObjective
from jaxrl_llm.algorithms.trust_region.step import make_trust_region_step
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.types import Rollout

SGD = optax.sgd(0.1)
REWARDS = np.zeros((4, 4), np.float32)


@pytest.mark.parametrize(
    "make_step",
    [
        lambda model: make_update_step(model, SGD, presets.dapo()),
        lambda model: make_trust_region_step(model, presets.dapo()),
        lambda model: make_online_preference_step(model, SGD, presets.online_dpo()),
    ],
    ids=["policy gradient", "trust region", "pairs"],
)
@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("finished", lambda x: x.astype(np.float32)),
        ("finished", lambda x: x[:, :1]),
        ("completion_lengths", lambda x: x[0]),
        ("sampler_logprobs", lambda x: x[..., :-1]),
        ("logprobs", lambda x: x.astype(np.int32)),
        ("prompt_lengths", lambda x: x[:, None]),
        ("completion", lambda x: x[0]),
    ],
)
def test_a_rollout_whose_arrays_do_not_fit_raises(make_step, field, change, tiny_config, make_rollout):
    model, rollout = Transformer(tiny_config()), make_rollout()
    params = model.abstract_params()
    state = jax.eval_shape(lambda p: make_train_state(p, SGD, 0), params)
    broken: Rollout = rollout.replace(**{field: change(getattr(rollout, field))})
    with pytest.raises(AssertionError, match=r"\[Chex\] Assertion"):
        jax.eval_shape(make_step(model), state, broken, REWARDS, params)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("mask", lambda x: x.astype(np.float32)),
        ("mask", lambda x: x[..., :-1]),
        ("completion", lambda x: x[:, 0]),
        ("prompt_lengths", lambda x: x[:-1]),
    ],
)
def test_rows_whose_arrays_do_not_fit_raise(field, change, tiny_config, make_rollout):
    model, rollout = Transformer(tiny_config()), make_rollout()
    rows = Demonstrations(rollout.prompt, rollout.prompt_lengths, rollout.completion, np.asarray(rollout.mask))
    broken: Any = rows._replace(**{field: change(getattr(rows, field))})
    params = model.abstract_params()
    state = jax.eval_shape(lambda p: make_train_state(p, SGD, 0), params)
    objective = SupervisedObjective()
    for function, of in (
        (make_offline_step(model, SGD, objective), state),
        (make_offline_evaluation(model, objective), params),
    ):
        with pytest.raises(AssertionError, match=r"\[Chex\] Assertion"):
            jax.eval_shape(function, of, broken)


@pytest.mark.parametrize("change", [lambda x: x[:, :1], lambda x: x[..., :1], lambda x: x.astype(np.int32)])
def test_log_probs_of_a_reference_that_do_not_fit_raise(change, tiny_config, make_rollout):
    """They would be spread over what they are not of."""
    model, rollout = Transformer(tiny_config()), make_rollout(group=2)
    mask, ahead = np.asarray(rollout.mask), change(rollout.logprobs)
    rows = PreferenceBatch(rollout.prompt, rollout.prompt_lengths, rollout.completion, mask, ref_logprobs=ahead)
    state = jax.eval_shape(lambda p: make_train_state(p, SGD, 0), model.abstract_params())
    with pytest.raises(AssertionError, match=r"\[Chex\] Assertion"):
        jax.eval_shape(make_offline_step(model, SGD, PreferenceObjective()), state, rows)


LENGTH = DeviceReward("length", lambda params, rollout: rollout.completion_lengths.astype(np.float32))


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [
        (np.zeros(4, np.int32), np.ones(4, np.int32)),
        (np.zeros((4, 5), np.int32), np.ones((4, 1), np.int32)),
        (np.zeros((4, 5), np.float32), np.ones(4, np.int32)),
    ],
)
def test_prompts_that_do_not_fit_raise_before_any_is_sampled(prompt, lengths):
    def never(*args: Any) -> Any:
        pytest.fail(f"was called with {args}")

    sampler: Any = SimpleNamespace(sample=never)
    with pytest.raises(AssertionError, match=r"\[Chex\] Assertion"):
        make_iteration(sampler, [LENGTH], never)(SimpleNamespace(params=(), key=(), step=0), prompt, lengths, [()])


def test_a_rollout_that_does_not_fit_is_not_scored(make_rollout):
    rollout = make_rollout()
    broken = rollout.replace(finished=rollout.finished[:, :1])
    with pytest.raises(AssertionError, match=r"\[Chex\] Assertion"):
        make_device_scores([LENGTH])([()], broken)
