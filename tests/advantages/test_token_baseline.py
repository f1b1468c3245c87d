import jax
import numpy as np
import pytest

from jaxrl_llm.advantages.token_baseline import optimal_token_baseline_advantages


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=atol)


def baseline_loop(rewards, logprobs, squares, mask, weights, zero_tail):
    out = np.zeros(mask.shape)
    for p in range(len(mask)):
        G, W = np.zeros(mask.shape[1:]), np.zeros(mask.shape[1:])
        for i, t in np.ndindex(mask.shape[1:]):
            G[i, t] = sum(rewards[p, i, k] for k in range(t, 6) if mask[p, i, k])
            W[i, t] = sum(
                weights[p, i, k] ** 2 * (1 - 2 * np.exp(logprobs[p, i, k]) + squares[p, i, k])
                for k in range(t + 1)
                if mask[p, i, k]
            )
        for i, t in zip(*np.nonzero(mask[p]), strict=True):
            alive = np.flatnonzero(mask[p, :, t])
            tail = zero_tail and len(alive) == 1
            b = 0 if tail or mask[p].any(-1).sum() == 1 else (W[alive, t] @ G[alive, t]) / W[alive, t].sum()
            out[p, i, t] = G[i, t] - b
    return out


def arrays_of(ragged):
    arrays = {"token_rewards": ragged.token_rewards, "old_logprobs": ragged.old}
    return arrays | {"sum_squared_probs": ragged.probs, "mask": ragged.mask}


@pytest.mark.parametrize("zero_tail", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_definition(ragged, zero_tail, labelled, weighted):
    arrays = arrays_of(ragged)
    weights = ragged.entropy if weighted else np.ones(ragged.mask.shape)
    expected = baseline_loop(*arrays.values(), weights, zero_tail)
    labels = np.repeat([3, 8, 1, 0], 3).reshape(4, 3) if labelled else None
    options = {"weights": weights if weighted else None, "zero_tail": zero_tail, "group_ids": labels}
    close(optimal_token_baseline_advantages(**arrays, **options), expected)


def test_a_single_row_keeps_its_returns(ragged):
    arrays = {name: x[:, :1] for name, x in arrays_of(ragged).items()}
    rewards = np.where(arrays["mask"], arrays["token_rewards"], 0)
    returns = np.where(arrays["mask"], rewards[..., ::-1].cumsum(-1)[..., ::-1], 0)
    for zero_tail in (False, True):
        close(optimal_token_baseline_advantages(**arrays, zero_tail=zero_tail), returns)


def test_holds_of_every_estimator(ragged, check_estimator):
    check_estimator(optimal_token_baseline_advantages, arrays_of(ragged), trained="token_rewards")


def test_weights_are_constants(ragged):
    arrays = {name: np.nan_to_num(x) for name, x in arrays_of(ragged).items()}

    def total(logprobs, squares):
        changed = {**arrays, "old_logprobs": logprobs, "sum_squared_probs": squares}
        return (optimal_token_baseline_advantages(**changed) ** 2).sum()

    for grad in jax.grad(total, argnums=(0, 1))(arrays["old_logprobs"], arrays["sum_squared_probs"]):
        assert (grad == 0).all()


def test_errors(ragged):
    arrays = arrays_of(ragged)
    with pytest.raises(ValueError, match=r"group_ids has shape \(4,\), but mask has shape \(4, 3, 6\)"):
        optimal_token_baseline_advantages(**arrays, group_ids=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"mask has shape \(6,\), which does not say which rows"):
        optimal_token_baseline_advantages(**{name: x[0, 0] for name, x in arrays.items()})
