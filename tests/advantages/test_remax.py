import numpy as np
import pytest

from jaxrl_llm.advantages.remax import remax_advantages, remax_code_returns
from jaxrl_llm.masking import masked_sum


def close(value, expected, atol=1e-6):
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=atol)


def rows(ragged):
    arrays = {"mask": ragged.mask, "old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    arrays = {name: x.reshape(12, 6) for name, x in arrays.items()}
    return arrays | {"scores": ragged.scores.ravel(), "greedy_scores": ragged.greedy.ravel()}


def test_golden_numbers(examples, tok):
    greedy = np.array([0.4, -0.1])
    A = remax_advantages(tok.scores, greedy, tok.mask)
    close(A, np.where(tok.mask, np.array(examples["remax.adv"])[:, None], 0))
    close(masked_sum(-np.nan_to_num(tok.logprobs) * A, tok.mask, -1).mean(), examples["remax.loss"])
    out = remax_code_returns(tok.scores, greedy, tok.old, tok.ref, tok.mask)
    close(out, examples["remax.code_returns_beta0p05_g0p99"])


def test_equals_the_definition(ragged):
    logprobs = {"old_logprobs": ragged.old, "ref_logprobs": ragged.ref}
    greedy = ragged.greedy[:, :1]  # one for each prompt
    expected, code = np.zeros(ragged.mask.shape), np.zeros(ragged.mask.shape)
    for p, g in np.ndindex(ragged.scores.shape):
        tokens = np.flatnonzero(ragged.mask[p, g])
        difference = ragged.scores[p, g] - greedy[p, 0]
        for i, t in enumerate(tokens):
            kl = ragged.old[p, g] - ragged.ref[p, g]
            expected[p, g, t] = difference - 0.2 * kl[tokens[i:]].sum()
            code[p, g, t] = -0.2 * kl[t] + 0.9 ** (len(tokens) - i) * np.clip(difference, -0.5, 0.5)
    close(remax_advantages(ragged.scores, greedy, ragged.mask, **logprobs, kl_coef=0.2), expected)
    options = {"kl_coef": 0.2, "gamma": 0.9, "score_clip": 0.5}
    close(remax_code_returns(ragged.scores, greedy, *logprobs.values(), ragged.mask, **options), code)
    unclipped = remax_code_returns(ragged.scores, greedy, *logprobs.values(), ragged.mask, score_clip=None)
    wide = remax_code_returns(ragged.scores, greedy, *logprobs.values(), ragged.mask, score_clip=100)
    close(unclipped, wide)


def test_rewards_of_tokens_are_those_to_come(ragged):
    earned = np.where(ragged.mask, ragged.values, np.nan)
    to_go = np.nancumsum(earned[..., ::-1], -1)[..., ::-1]
    greedy = ragged.greedy[:, :1]
    expected = np.where(ragged.mask, to_go - greedy[..., None], 0)
    close(remax_advantages(0 * ragged.scores, greedy, ragged.mask, token_rewards=earned), expected)


@pytest.mark.parametrize("estimate", [remax_advantages, remax_code_returns])
def test_holds_of_every_estimator(ragged, check_estimator, estimate):
    check_estimator(lambda **kwargs: estimate(**kwargs, kl_coef=0.2), rows(ragged), trained="scores", packs=True)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (1, 4, 3)])
def test_errors(ragged, shape):
    with pytest.raises(ValueError, match=r"greedy_scores has shape .*, but scores has shape \(4, 3\): pass that shape"):
        remax_advantages(ragged.scores, np.zeros(shape), ragged.mask)


def test_packed_rows_need_one_score_for_each_sequence(tok):
    with pytest.raises(ValueError, match=r"scores has shape \(2,\), .* with segment_ids"):
        remax_code_returns(tok.scores, tok.scores, tok.old, tok.ref, tok.mask, segment_ids=np.zeros((2, 4), int))
