"""Sequences that begin alike, laid out in rows of tokens: against a loop over sequences, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data.trees import PackedTrees, pack_trees

Sequences = tuple[list[list[int]], list[list[bool]]]


def random_sequences(seed: int, number: int = 14, longest: int = 12) -> Sequences:
    """Few ids, so that many begin alike, some are equal, and some begin others; some tokens, or none, are trained."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, 3, rng.integers(1, longest + 1)).tolist() for _ in range(number)]
    sequences[5], sequences[6] = sequences[3] + [1], sequences[3][:-1] or [2]
    sequences[7] = list(sequences[2])
    trained = [[False, *(rng.random(len(s) - 1) < rng.choice([0, 0.4, 0.8])).tolist()] for s in sequences]
    return sequences, trained


def path(trees: PackedTrees, row: int, place: int) -> list[int]:
    """The places from a root to a token of a row, by way of the parents."""
    places, parent = [int(place)], np.asarray(trees.layout.parent)[row]
    while parent[places[-1]] != places[-1]:
        places.append(int(parent[places[-1]]))
    return places[::-1]


def assert_laid_out(trees: PackedTrees, sequences: list[list[int]], trained: list[list[bool]], group: int = 1) -> None:
    rows, place = trees.layout.rows, np.asarray(trees.layout.place)
    length = rows.tokens.shape[1]
    groups, _, width = trees.mask.shape
    per_row = groups // len(rows.tokens)
    assert place.shape == (len(rows.tokens), per_row, group, width)
    flat, mask, completion = (x.reshape(-1, width) for x in (place, trees.mask, trees.completion))
    prefixes: dict[int, dict[tuple[int, ...], int]] = {row: {} for row in range(len(rows.tokens))}
    for number, (sequence, marks) in enumerate(zip(sequences, trained, strict=True)):
        slot = trees.slots[number]
        of_group = trained[number // group * group : (number // group + 1) * group]
        assert (slot >= 0) == any(map(any, of_group))
        if not any(marks):
            assert slot < 0 or not mask[slot].any()
            continue
        row = slot // group // per_row
        first, last = marks.index(True), len(marks) - 1 - marks[::-1].index(True)
        where = path(trees, row, flat[slot, last - first])
        assert np.asarray(rows.tokens)[row, where].tolist() == sequence[: last + 1]
        assert np.asarray(rows.depth)[row, where].tolist() == list(range(last + 1))
        assert flat[slot, : last - first + 1].tolist() == where[first:]
        assert (flat[slot, last - first + 1 :] == -1).all()
        assert completion[slot, : last - first + 1].tolist() == sequence[first : last + 1]
        assert mask[slot].tolist() == marks[first : last + 1] + [False] * (width - (last - first + 1))
        for depth, at in enumerate(where):
            assert prefixes[row].setdefault(tuple(sequence[: depth + 1]), at) == at  # at one place in a row
    assert mask.sum() == sum(map(sum, trained))
    for row, known in prefixes.items():
        assert (~np.asarray(rows.is_padding)[row]).sum() == len(known) <= length  # each once, and nothing else
        key, query = np.arange(length), np.arange(length)[:, None]
        seen = (key <= query) & (query < np.asarray(rows.end)[row])
        for place in range(length):
            assert np.flatnonzero(seen[place]).tolist() == path(trees, row, place)
    assert trees.num_tokens == sum(map(len, prefixes.values()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("tokens", "group"), [(13, 1), (20, 1), (200, 1), (26, 2), (91, 7)])
def test_rows_are_those_of_a_loop(seed, tokens, group):
    sequences, trained = random_sequences(seed)
    trees = pack_trees(sequences, trained, tokens=tokens, group=group)
    assert_laid_out(trees, sequences, trained, group)
    again = pack_trees(sequences, trained, tokens=tokens, group=group)
    np.testing.assert_array_equal(trees.layout.place, again.layout.place)


@pytest.mark.parametrize("seed", range(3))
def test_parents_are_their_whole_sequences(seed):
    """What a sequence goes on from is context: neither trained nor there twice."""
    own, trained = random_sequences(seed)
    rng = np.random.default_rng(seed)
    parents = [-1, *(int(rng.integers(-1, number)) for number in range(1, len(own)))]
    whole: list[list[int]] = []
    for tokens, parent in zip(own, parents, strict=True):
        whole.append((whole[parent] if parent >= 0 else []) + tokens)
    marks = [[False] * (len(w) - len(t)) + t for w, t in zip(whole, trained, strict=True)]
    trees = pack_trees(own, trained, parents=parents, tokens=64)
    assert_laid_out(trees, whole, marks)
    values = [10.0 * number + np.arange(len(tokens)) for number, tokens in enumerate(own)]
    expected = [v[t] for v, t in zip(values, trained, strict=True)]
    np.testing.assert_array_equal(
        np.sort(trees.of_tokens(values)[trees.mask]), np.sort(np.concatenate(expected).astype(np.float32))
    )


def test_values_go_where_their_sequences_are():
    sequences, trained = random_sequences(1)
    trees = pack_trees(sequences, trained, tokens=20)
    rewards = np.arange(14) + 0.5
    placed = trees.of_sequences(rewards)
    assert placed.shape == trees.mask.shape[:2] and placed.dtype == np.float32
    np.testing.assert_array_equal(trees.by_sequence(placed), np.where([any(marks) for marks in trained], rewards, 0))
    np.testing.assert_array_equal(trees.of_tokens(sequences)[trees.mask], trees.completion[trees.mask])
    assert trees.of_tokens(sequences).dtype.kind == "i"
    with pytest.raises(ValueError, match="13 values for 14 sequences"):
        trees.of_sequences(rewards[:-1])
    with pytest.raises(ValueError, match="13 values for 14 sequences"):
        trees.of_tokens(sequences[:-1])
    number = int(np.argmax(trees.spans[:, 1]))
    short = [tokens[:1] if i == number else tokens for i, tokens in enumerate(sequences)]
    with pytest.raises(ValueError, match=rf"sequence {number} have shape \(1,\), but {trees.spans[number, 1]} of its"):
        trees.of_tokens(short)


@pytest.mark.parametrize(
    ("sequences", "distinct"),
    [
        ([[1, 2, 3], [1, 2, 3]], 3),  # identical
        ([[1, 2], [1, 2, 3, 4]], 4),  # one begins the other
        ([[1, 2], [3, 2]], 4),  # nothing in common
        ([[5, 6]], 2),
    ],
)
def test_small_trees(sequences, distinct):
    trained = [[False] + [True] * (len(s) - 1) for s in sequences]
    trees = pack_trees(sequences, trained, tokens=8)
    assert_laid_out(trees, sequences, trained)
    assert trees.num_tokens == distinct


def test_what_nobody_trains_is_left_out():
    """Also a token by itself, and what follows the last trained one."""
    trees = pack_trees([[5], [1, 2, 3, 4]], [[False], [False, True, False, False]], tokens=8)
    assert trees.slots.tolist() == [-1, 0] and trees.num_tokens == 2 and trees.mask.sum() == 1
    alone = pack_trees([[5]], [[False]], tokens=4)
    assert alone.num_tokens == 0 and not alone.mask.any()


def test_sizes_that_are_given_are_those_of_all_batches():
    shapes = set()
    for seed in range(4):
        trees = pack_trees(*random_sequences(seed), tokens=24, rows=8, groups_per_row=5, width=12)
        assert_laid_out(trees, *random_sequences(seed))
        shapes.add((trees.layout.rows.tokens.shape, trees.layout.place.shape, trees.mask.shape))
    assert shapes == {((8, 24), (8, 5, 1, 12), (40, 1, 12))}


def test_a_common_beginning_is_in_each_row_that_needs_it():
    sequences = [[7] * 10 + [number] * 3 for number in range(1, 7)]
    trained = [[False] * 10 + [True] * 3] * 6
    trees = pack_trees(sequences, trained, tokens=16)
    assert_laid_out(trees, sequences, trained)
    assert trees.layout.rows.tokens.shape == (3, 16) and trees.num_tokens == 3 * 16


PAIR = ([[1, 2], [3, 4]], [[False, True]] * 2)
LONG = ([[1, 2, 3, 4, 5]], [[False, True, True, True, True]])


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (([], []), {}, "there are no sequences"),
        (([[1, 2], []], [[False, True], []]), {}, "sequence 1 has no tokens"),
        (([[1, 2]], [[False, True], [True]]), {}, "2 masks for 1 sequences"),
        (([[1, 2]], [[False]]), {}, r"trained\[0\] is bool of shape \(1,\), but sequence 0 has 2 tokens"),
        (([[1, 2]], [[0, 1]]), {}, r"trained\[0\] is int64"),
        (([[1.0, 2.0]], [[False, True]]), {}, "sequence 0 is no list of token ids"),
        (([[1, -2]], [[False, True]]), {}, "sequence 0 is no list of token ids"),
        (([[[1, 2]]], [[[False, True]]]), {}, "sequence 0 is no list of token ids"),
        (([[1, 2]], [[True, True]]), {}, "sequence 0 trains its first token, which nothing predicts"),
        (LONG, {"tokens": 4}, "sequence 0 has 5 tokens up to the last trained one, more than a row of tokens=4"),
        (LONG, {"width": 3}, "has 4 tokens from its first trained one to its last, more than width=3"),
        (([[1, 2], [3, 4], [5, 6]], [[False, True]] * 3), {"tokens": 2, "rows": 2}, "fill 3 rows .* more than rows=2"),
        (PAIR, {"group": 2, "tokens": 3}, "sequences 0 to 1 are a group of 4 tokens"),
        (([[1, 2]] * 3, [[False, True]] * 3), {"group": 2}, "3 sequences cannot be cut into groups of group=2"),
        (PAIR, {"parents": [1, -1]}, "sequence 0 goes on from sequence 1, which does not"),
        (PAIR, {"parents": [-1, 1]}, "sequence 1 goes on from sequence 1, which does not"),
        (PAIR, {"parents": [-1]}, "1 parents for 2 sequences"),
    ],
)
def test_what_does_not_fit_raises(given: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        pack_trees(*given, **{"tokens": 16, **options})
