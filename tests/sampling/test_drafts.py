"""Proposals beside a loop over places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.sampling.drafts import propose

COUNT = 4


def followed(source: list[int], newest: list[int], candidates: range, near: int) -> tuple[int, list[int]]:
    """How many tokens match at the best place, and what follows it, again and again."""
    best, found = (-1, 0), None
    for place in candidates:
        most = min(3, place + 1, len(newest))
        same = [source[place - back] == newest[-1 - back] for back in range(most)]
        matched = [*same, False].index(False)
        if found is None or (matched, -abs(place - near)) > best:
            best, found = (matched, -abs(place - near)), place
    if found is None:
        return -1, []
    return best[0], (source[found + 1 :] * COUNT)[:COUNT]


def agreed(following: list[list[int]]) -> list[int]:
    """The one that most of them go on like, for the longest; of equals the first."""

    def votes(one: list[int]) -> int:
        return sum((np.cumprod(np.array(one) == np.array(other))).sum() for other in following)

    return max(following, key=votes)


@pytest.mark.parametrize("voters", [1, 3])
def test_what_followed_the_same_tokens_is_proposed(voters):
    """Of two tokens, so that many places match, in texts of all lengths, with histories, empty ones and none."""
    rng = np.random.default_rng(0)
    rows, width, longest = 200, 6, 10
    prompts, drawn = rng.integers(1, width + 1, rows), rng.integers(0, longest, rows)
    ends = rng.integers(0, longest + 1, (rows, voters)) * (rng.random((rows, voters)) < 0.8)
    text, history = rng.integers(0, 2, (rows, width + longest)), rng.integers(0, 2, (rows, voters, longest))
    given = (jnp.asarray(text), jnp.asarray(prompts + drawn), jnp.asarray(history), jnp.asarray(ends))
    ours = np.asarray(jax.jit(propose, static_argnums=5)(*given, jnp.asarray(prompts), COUNT))
    alone = np.asarray(propose(*given[:2], None, None, jnp.asarray(prompts), COUNT))
    places = {"text": 0, "history": 0}
    for row in range(rows):
        begin, length = prompts[row], prompts[row] + drawn[row]
        known = text[row, :length].tolist()
        matched, own = followed(known, known, range(length - 1), length)
        if own:
            assert alone[row].tolist() == own
        found = []
        for voter in range(voters):
            source = known[:begin] + history[row, voter, : ends[row, voter]].tolist()
            found.append(followed(source, known, range(begin - 1, len(source) - 1), length - 1))
        again = max(score for score, _ in found)
        is_own = again < 0 or matched > max(again, 1)
        expected = own if is_own else agreed([following for score, following in found if score == again])
        if expected:
            assert ours[row].tolist() == expected
        places["text" if is_own else "history"] += 1
    assert min(places.values()) > 20


def test_a_history_is_followed_over_a_token_that_differs():
    """And found again where two were left out."""
    text = jnp.array([[50, 51, 1, 2, 9, 0, 0, 0, 0, 0], [50, 51, 1, 2, 5, 6, 0, 0, 0, 0]])
    history = jnp.array([[[1, 2, 3, 4, 5, 6, 7, 8]]] * 2)
    ours = propose(text, jnp.array([5, 6]), history, jnp.full((2, 1), 8), jnp.full(2, 2), 2)
    np.testing.assert_array_equal(ours, [[4, 5], [7, 8]])
