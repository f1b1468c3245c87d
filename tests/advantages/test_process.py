import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.process import (
    dense_step_rewards,
    find_step_ends,
    implicit_process_rewards,
    min_form_weights,
    process_advantages,
    step_of_token,
    steps_to_tokens,
)
from jaxrl_llm.masking import suffix_sum


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


@pytest.fixture
def data():
    """[P, G, K] = [3, 2, 4] steps in 7 tokens; one sample has none, one an unscored step; garbage at the padding."""
    counts = np.array([[3, 1], [0, 4], [2, 2]])
    step_mask = np.arange(4) < counts[..., None]
    step_mask[1, 1, 2] = False
    ends = np.array([[[1, 2, 5, 99], [6, 0, 0, 0]], [[0] * 4, [0, 1, 3, 4]], [[2, 3, -1, 7], [0, 6, 1, 1]]])
    rewards = np.where(step_mask, np.random.default_rng(0).uniform(size=ends.shape), np.nan)
    mask = np.arange(7) < np.array([[6, 7], [3, 5], [4, 7]])[..., None]
    return {"step_rewards": rewards, "step_ends": ends, "step_mask": step_mask, "mask": mask}


def process_loop(step_rewards, step_ends, step_mask, mask, ddof=1, eps=1e-4):
    out = np.zeros(mask.shape)
    for p in range(len(mask)):
        group = step_rewards[p][step_mask[p]]
        for i, t in zip(*np.nonzero(mask[p]), strict=True):
            for j in np.flatnonzero(step_mask[p, i]):
                if step_ends[p, i, j] >= t:
                    out[p, i, t] += (step_rewards[p, i, j] - group.mean()) / (group.std(ddof=ddof) + eps)
    return out


def test_process_supervision_golden_numbers(examples):
    step_rewards = np.array([[0.9, 0.2, np.nan], [0.5, 0.6, 0.1]])
    step_mask = ~np.isnan(step_rewards)
    ends, mask = np.array([[1, 3, 0], [0, 1, 2]]), np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    A = process_advantages(step_rewards, ends, step_mask, mask, eps=0, group_size=2)
    close(A[0], examples["grpo.ps_token_adv_0"])
    close(A[0, np.array([1, 3])], examples["grpo.ps_adv_0"])
    close(A[1, :3], examples["grpo.ps_adv_1"])
    # The standardized rewards themselves: what the sum falls by from step to step.
    close(A[0, np.array([1, 3])] - np.append(A[0, 3:], 0), examples["grpo.ps_norm_0"])
    close(A[1, :3] - np.append(A[1, 1:3], 0), examples["grpo.ps_norm_1"])


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("ddof", [0, 1])
def test_process_advantages_equal_the_definition(data, labelled, ddof):
    labels = np.array([[5, 5], [2, 2], [9, 9]]) if labelled else None
    close(process_advantages(**data, ddof=ddof, eps=0.01, group_ids=labels), process_loop(**data, ddof=ddof, eps=0.01))


def test_process_advantages_hold_of_every_estimator(data, check_estimator):
    check_estimator(process_advantages, data, mask="step_mask", trained="step_rewards")


def test_dense_rewards_golden_numbers(examples):
    scores, mask = np.array([[0.9, 0.2]]), np.ones((1, 2), bool)
    rewards = steps_to_tokens(scores, np.array([[1, 3]]), mask, 4)
    close(rewards, [[0, 0.9, 0, 0.2]])
    close(suffix_sum(rewards, np.ones((1, 4), bool))[0], examples["prm.dense_return"])
    close(min_form_weights(scores, mask)[0], examples["prm.minform_weights_T0p1"])


def test_steps_and_tokens(data):
    ends, step_mask = data["step_ends"], data["step_mask"]
    values, steps = np.zeros((3, 2, 7)), np.zeros((3, 2, 7), int)
    for p, i, t in np.ndindex(values.shape):
        held = [j for j in range(4) if step_mask[p, i, j]]
        values[p, i, t] = sum(data["step_rewards"][p, i, j] for j in held if ends[p, i, j] == t)
        steps[p, i, t] = sum(ends[p, i, j] < t for j in held)
    close(steps_to_tokens(data["step_rewards"], ends, step_mask, 7), values)
    np.testing.assert_array_equal(step_of_token(ends, step_mask, 7), steps)
    np.testing.assert_array_equal(jax.jit(step_of_token, static_argnums=2)(ends, step_mask, 7), steps)


@pytest.mark.parametrize("max_steps", [1, 2, 5, 9])
def test_find_step_ends(max_steps):
    is_end = np.array([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], bool)
    ends, mask = find_step_ends(is_end, max_steps=max_steps)
    assert ends.shape == mask.shape == (4, max_steps)
    for row in range(4):
        marked = np.flatnonzero(is_end[row])[:max_steps]
        np.testing.assert_array_equal(ends[row, : len(marked)], marked)
        np.testing.assert_array_equal(mask[row], np.arange(max_steps) < len(marked))
    if max_steps == 5:
        close(steps_to_tokens(np.ones((4, 5)), ends, mask, 5), is_end)


def dense_loop(scores, mask, kind, temperature):
    out = np.zeros(scores.shape)
    for row in np.ndindex(scores.shape[:-1]):
        held = np.flatnonzero(mask[row])
        p = scores[row][held]
        weights = np.exp(-p / temperature)
        out[row][held] = {
            "identity": lambda p=p: p,
            "centered": lambda p=p: p - 0.5,
            "logit": lambda p=p: np.log(p / (1 - p)),
            "progress": lambda p=p: np.diff(p, prepend=0),
            "min_form": lambda p=p, weights=weights: p * weights / weights.sum(),
        }[kind]()
    return out


@pytest.mark.parametrize("kind", ["identity", "centered", "logit", "progress", "min_form"])
def test_dense_step_rewards(data, check_estimator, kind):
    arrays = {"step_scores": data["step_rewards"], "step_mask": data["step_mask"]}
    out = dense_step_rewards(**arrays, kind=kind, temperature=0.3)
    close(out, dense_loop(*arrays.values(), kind, 0.3), atol=1e-5)
    check_estimator(
        lambda **kwargs: dense_step_rewards(**kwargs, kind=kind), arrays, mask="step_mask", trained="step_scores"
    )


def test_certain_steps_have_finite_logits():
    mask = np.ones(3, bool)
    rewards = dense_step_rewards(np.array([0.0, 1.0, 0.5]), mask, kind="logit")
    close(rewards, [np.log(1e-6), -np.log(1e-6), 0], atol=0.05)
    grad = jax.grad(lambda x: dense_step_rewards(x, mask, kind="logit").sum())(jnp.array([0.0, 1.0, 0.5]))
    assert np.isfinite(grad).all()


def test_min_form_puts_the_credit_on_the_worst_step():
    weights = min_form_weights(np.array([0.9, 0.1, 0.8]), np.ones(3, bool), temperature=0.01)
    close(weights, [0, 1, 0])


def test_implicit_process_rewards(ragged, check_estimator):
    arrays = {"logprobs": ragged.old, "ref_logprobs": ragged.ref, "mask": ragged.mask}
    close(implicit_process_rewards(**arrays, beta=0.2), np.where(ragged.mask, 0.2 * (ragged.old - ragged.ref), 0))
    check_estimator(implicit_process_rewards, arrays, trained="logprobs")


def test_errors(data):
    with pytest.raises(ValueError, match="unknown kind 'prob': choose one of identity, centered"):
        dense_step_rewards(data["step_rewards"], data["step_mask"], kind="prob")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"step_ends has shape \(4,\), but mask has shape \(3, 2, 4\)"):
        process_advantages(**{**data, "step_ends": np.zeros(4, int)})
    with pytest.raises(ValueError, match=r"step_mask has shape \(3, 2, 4\), but mask has shape \(2, 7\)"):
        process_advantages(**{**data, "mask": data["mask"][0]})
    with pytest.raises(ValueError, match=r"group_ids has shape \(3,\), but step_rewards has shape \(3, 2, 4\)"):
        process_advantages(**data, group_ids=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"step_rewards has shape \(4,\), which does not say which rows"):
        process_advantages(**{name: x[0, 0] for name, x in data.items()})
    with pytest.raises(ValueError, match="temperature is 0: it must be positive"):
        min_form_weights(data["step_rewards"], data["step_mask"], temperature=0)
