"""What prompts got the last time, kept on the host."""

from __future__ import annotations

import numpy as np

from jaxrl_llm.training.episodes.history import CompletionHistory

TOKENS = np.arange(1, 25).reshape(2, 3, 4)
LENGTHS = np.array([[4, 1, 2], [3, 3, 0]])


def test_what_was_kept_last_comes_back() -> None:
    history = CompletionHistory(3, 4)
    history.keep(np.array([7, 5]), TOKENS, LENGTHS)
    history.keep(np.array([9, 7]), TOKENS + 50, LENGTHS)
    tokens, lengths = history.of(np.array([5, 8, 7]))
    assert lengths.tolist() == [[3, 3, 0], [0, 0, 0], [3, 3, 0]]
    assert tokens[0].tolist() == [[13, 14, 15, 0], [17, 18, 19, 0], [0, 0, 0, 0]]
    assert not tokens[1].any()
    assert tokens[2].tolist() == [[63, 64, 65, 0], [67, 68, 69, 0], [0, 0, 0, 0]]


def test_memory_is_bounded() -> None:
    """The prompts whose turn lies farthest back are forgotten, which a turn makes the nearest."""
    history = CompletionHistory(3, 4, most_tokens=20)
    history.keep(np.array([0, 1]), TOKENS, LENGTHS)  # 7 and 6 tokens
    history.keep(np.array([0]), TOKENS[:1], LENGTHS[:1])
    history.keep(np.array([2]), TOKENS[:1], LENGTHS[:1])  # 20 in all
    assert history.of(np.arange(4))[1].any(axis=1).tolist() == [True, True, True, False]
    history.keep(np.array([3]), TOKENS[:1], LENGTHS[:1])
    assert history.of(np.arange(4))[1].any(axis=1).tolist() == [False, False, True, True]
