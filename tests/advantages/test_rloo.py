import numpy as np
import pytest

from jaxrl_llm.advantages.rloo import rloo_advantages, rloo_token_advantages

VALID = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [0, 1, 0]], bool)


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def leave_one_out_loop(rewards, valid):
    out = np.zeros(rewards.shape)
    for p, i in zip(*np.nonzero(valid), strict=True):
        others = [rewards[p, j] for j in np.flatnonzero(valid[p]) if j != i]
        out[p, i] = rewards[p, i] - np.mean(others) if others else 0.0
    return out


def arrays_of(ragged):
    mask = ragged.mask & VALID[..., None]
    scores = np.where(VALID, ragged.scores, np.nan)
    return {"scores": scores, "old_logprobs": ragged.old, "ref_logprobs": ragged.ref, "mask": mask}


def test_golden_numbers(examples):
    """No KL: with the policy as its own reference."""
    mask = np.ones((2, 4, 3), bool)
    scores, logprobs = np.array([[1, 0, 0, 1], [1, 1, 1, 0]]), np.full((2, 4, 3), -0.5)
    A = rloo_advantages(scores, logprobs, logprobs, mask)
    close(A, examples["rloo.adv"])
    close(scores - A, examples["rloo.baseline"])
    close(rloo_token_advantages(scores, logprobs, logprobs, mask)[..., 1], examples["rloo.adv"])


@pytest.mark.parametrize("labelled", [False, True])
def test_equals_the_definition(ragged, labelled):
    arrays = arrays_of(ragged)
    labels = np.repeat([4, 2, 9, 0], 3).reshape(4, 3) if labelled else None
    options = {"kl_coef": 0.3, "sample_mask": VALID, "group_ids": labels}
    kl = np.where(arrays["mask"], ragged.old - ragged.ref, 0)
    clipped = np.clip(arrays["scores"], -0.4, 0.4)
    expected = leave_one_out_loop(np.nan_to_num(clipped - 0.3 * kl.sum(-1)), VALID)
    close(rloo_advantages(**arrays, **options, score_clip=0.4), expected)

    scores = np.clip(leave_one_out_loop(np.nan_to_num(arrays["scores"]), VALID), -0.5, 0.5)
    to_go = kl[..., ::-1].cumsum(-1)[..., ::-1]
    expected = np.where(arrays["mask"], scores[..., None] - 0.3 * to_go, 0)
    close(rloo_token_advantages(**arrays, **options, advantage_clip=0.5), expected)


def test_rewards_of_tokens(ragged):
    """They add up for the comparison; a token then has those from itself on."""
    arrays = arrays_of(ragged)
    earned = np.where(arrays["mask"], ragged.values, np.nan)
    kl = np.where(arrays["mask"], ragged.old - ragged.ref, 0)
    totals = np.nan_to_num(arrays["scores"]) + np.nansum(earned, -1)
    options = {"kl_coef": 0.3, "sample_mask": VALID, "token_rewards": earned}
    close(rloo_advantages(**arrays, **options), leave_one_out_loop(totals - 0.3 * kl.sum(-1), VALID))

    expected = np.zeros(kl.shape)
    for p, i, t in zip(*np.nonzero(arrays["mask"]), strict=True):
        others = [totals[p, j] for j in np.flatnonzero(VALID[p]) if j != i]
        if others:  # a sample alone is compared with itself
            to_go = np.nansum(earned[p, i, t:]) + arrays["scores"][p, i] - 0.3 * kl[p, i, t:].sum()
            expected[p, i, t] = to_go - np.mean(others)
        else:
            expected[p, i, t] = -np.nansum(earned[p, i, :t]) - 0.3 * kl[p, i, t:].sum()
    close(rloo_token_advantages(**arrays, **options), expected)


@pytest.mark.parametrize("estimate", [rloo_advantages, rloo_token_advantages])
def test_holds_of_every_estimator(ragged, check_estimator, estimate):
    arrays = arrays_of(ragged) | {"scores": ragged.scores, "sample_mask": VALID}
    check_estimator(lambda **kwargs: estimate(**kwargs, kl_coef=0.3), arrays, trained="scores")


def test_unscored_samples_do_not_matter(ragged):
    arrays = arrays_of(ragged)
    for estimate in (rloo_advantages, rloo_token_advantages):
        expected = estimate(**arrays, sample_mask=VALID)
        for value in (np.inf, 5.0):
            changed = np.where(VALID, arrays["scores"], value)
            np.testing.assert_array_equal(estimate(**{**arrays, "scores": changed}, sample_mask=VALID), expected)
        assert (np.asarray(expected)[~VALID] == 0).all()


def test_errors(ragged):
    arrays = arrays_of(ragged)
    with pytest.raises(ValueError, match=r"scores has shape \(4, 2\), but mask has shape \(4, 3, 6\): pass one a seq"):
        rloo_advantages(**{**arrays, "scores": np.zeros((4, 2))})
    with pytest.raises(ValueError, match=r"sample_mask has shape \(4, 2\), but the tokens have shape \(4, 3, 6\)"):
        rloo_token_advantages(**{**arrays, "scores": np.zeros((4, 2))})
    with pytest.raises(ValueError, match="mask must be bool"):
        rloo_token_advantages(**{**arrays, "mask": arrays["mask"] * 1.0})
