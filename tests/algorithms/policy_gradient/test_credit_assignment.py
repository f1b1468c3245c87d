"""What credit assignment reads of a critic, and what may make several optimizer steps of a batch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.credit_assignment import CreditAssignment
from jaxrl_llm.algorithms.policy_gradient.critic import Critic
from jaxrl_llm.algorithms.policy_gradient.objective import OverlongPenalty
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.scorer import Scorer
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer

BOOTSTRAPPED = dataclasses.replace(
    presets.ppo(),
    advantage=dataclasses.replace(presets.ppo().advantage, kl_coef=0.0, bootstrap_truncated=True, whiten=False),
)


def test_what_was_cut_goes_on_with_the_value_of_its_last_token(tiny_config, lively_params, make_rollout):
    """Without rewards, with γ = λ = 1, a return is that value where a completion was cut, and 0 where it ended."""
    algorithm = dataclasses.replace(BOOTSTRAPPED, advantage=dataclasses.replace(BOOTSTRAPPED.advantage, lam=1.0))
    model, rollout = Transformer(tiny_config()), make_rollout()
    score_model = ScoreModel(model, lm_head=True)
    critic, params = Critic(score_model), score_model.from_trunk(lively_params(model), jax.random.key(1))
    assign = CreditAssignment(algorithm, Scorer(model), UpdateConfig(micro_batches=2), keeps_old=False, critic=critic)
    state = make_train_state(params, optax.identity(), 0)
    credited = jax.jit(lambda *given: assign(*given, None).batch)(state, rollout, np.zeros((4, 4), np.float32))
    last = jax.jit(score_model.scores)(params, rollout, rollout.mask)
    expected = np.where(rollout.finished, 0.0, last)[..., None] * np.asarray(rollout.mask)
    assert 2 <= (~rollout.finished).sum() <= 14
    np.testing.assert_allclose(credited.returns, expected, atol=1e-5)


@pytest.mark.parametrize("preset", [presets.reinforce, presets.remax, presets.rloo, presets.gpg, presets.opo])
@pytest.mark.parametrize("plan", [{"epochs": 2}, {"minibatches": 2}], ids=lambda plan: next(iter(plan)))
def test_what_has_no_ratio_makes_one_optimizer_step_of_a_batch(preset, plan, tiny_config):
    """From the second one on it would learn from samples of another policy."""
    model, sgd = Transformer(tiny_config()), optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"LogProb would learn from samples of another policy.*update\.epochs=1"):
        make_update_step(model, sgd, preset(), UpdateConfig(**plan))
    make_update_step(model, sgd, preset(), UpdateConfig(micro_batches=2))
    make_update_step(
        model, sgd, dataclasses.replace(preset(), surrogate=presets.cispo().surrogate), UpdateConfig(**plan)
    )


def test_a_penalty_for_length_is_taken_off_the_greedy_baseline_too(tiny_config, lively_params, make_rollout):
    """Where all completions are as long and as good, none has an advantage; by token, but for what it has already."""
    model, rollout = Transformer(tiny_config()), make_rollout()
    lengths = np.full((4, 4), 6, np.int32)
    lengths[1, -1] = 3  # of this prompt the greedy one is short, and not punished
    rollout = rollout.replace(completion_lengths=lengths)
    algorithm = dataclasses.replace(presets.remax(), overlong=OverlongPenalty(cache=2, scale=0.5))
    assign = CreditAssignment(algorithm, Scorer(model), UpdateConfig(), keeps_old=False)
    state = make_train_state(lively_params(model), optax.identity(), 0)
    for rewards in (np.ones((4, 4), np.float32), np.ones((4, 4, 6), np.float32) / lengths[..., None]):
        credited = assign(state, rollout, rewards, None)
        expected = np.zeros((4, 3, 6))
        expected[1] = -0.5
        if rewards.ndim == 3:
            expected -= np.arange(6) / 6
        np.testing.assert_allclose(credited.batch.advantages, expected, atol=1e-6)
        assert float(credited.metrics["reward"].value()) == pytest.approx(1)
        assert float(credited.metrics["num_tokens"].value()) == lengths.sum() + rollout.prompt_lengths.sum()
        assert float(credited.metrics["completions/mean_length"].value()) == 6
