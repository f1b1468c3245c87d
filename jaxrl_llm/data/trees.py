"""Trees: sequences that begin alike are laid out in rows of tokens, in which they share what they have in common.

A conversation that went on in several ways, answers to prompts with a common system prompt, an answer continued several
ways: loss and gradient are those of the separate sequences, and what they share is computed once.

>>> trees = pack_trees(sequences, trained, tokens=4096)
>>> state, metrics = step(state, Demonstrations(**trees.texts))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrl_llm.data.tree_rows import Laid, Ordered, fill, lay_out
from jaxrl_llm.models.rows import PackedLayout, TokenRows


@dataclasses.dataclass(frozen=True)
class PackedTrees:
    """n sequences in B rows of T tokens, and what each of them trains: P = B·N groups of G sequences.

    Row b holds groups b·N to (b + 1)·N − 1; of those that it has not, masks are empty.
    """

    layout: PackedLayout
    """Where the tokens lie: one that several sequences share, at one place of a row."""
    completion: np.ndarray
    """`[P, G, Tc]` int32: of each sequence the tokens from the first to the last that is trained, right-padded."""
    mask: np.ndarray
    """`[P, G, Tc]` bool: which of them are trained. One that several sequences train counts for each of them."""
    slots: np.ndarray
    """`[n]`: the place of each sequence in `[P·G]`; −1: its group trains nothing, and is left out."""
    spans: np.ndarray
    """`[n, 2]`: the first of its tokens, as they were given, that is in `completion`, and one past the last."""

    @property
    def texts(self) -> dict[str, Any]:
        """Fields of any record of rows (`Demonstrations`, `PreferenceBatch`, `LearnerBatch`); prompts are not read."""
        groups = len(self.mask)
        return {
            "prompt": np.zeros((groups, 1), np.int32),
            "prompt_lengths": np.ones(groups, np.int32),
            "completion": self.completion,
            "mask": self.mask,
            "layout": self.layout,
        }

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed, without padding; those that are repeated in several rows count in each."""
        return int(np.sum(~np.asarray(self.layout.rows.is_padding)))

    def of_sequences(self, values: Any) -> np.ndarray:
        """What is known of each sequence, `[n, *]` in the order in which they were given, as `[P, G, *]`; 0 elsewhere.

        Raises:
            ValueError: it is not one for each.
        """
        array = _narrow(values)
        self._check_number(len(array))
        placed = self.slots >= 0
        out = np.zeros((self.mask[..., 0].size, *array.shape[1:]), array.dtype)
        out[self.slots[placed]] = array[placed]
        return out.reshape(*self.mask.shape[:2], *array.shape[1:])

    def of_tokens(self, values: Sequence[Any]) -> np.ndarray:
        """What is known of each token of each sequence, n arrays as long as these, as `[P, G, Tc]`; 0 elsewhere.

        Raises:
            ValueError: it is not one array for each, or one is too short.
        """
        self._check_number(len(values))
        arrays = [_narrow(array) for array in values]
        for number, (array, stop) in enumerate(zip(arrays, self.spans[:, 1], strict=True)):
            if array.ndim != 1 or len(array) < stop:
                raise ValueError(
                    f"values of sequence {number} have shape {array.shape}, but {stop} of its tokens are read: pass "
                    "one for each of its tokens"
                )
        return _at_slots(arrays, self.slots, self.spans, self.mask.shape)

    def by_sequence(self, values: Any) -> np.ndarray:
        """The inverse of `of_sequences`: `[P, G, *]`, such as log-probs, as `[n, *]`; 0 of sequences left out."""
        array = np.asarray(values)
        found = array.reshape(-1, *array.shape[2:])[self.slots]
        found[self.slots < 0] = 0
        return found

    def _check_number(self, number: int) -> None:
        if number != len(self.slots):
            raise ValueError(f"{number} values for {len(self.slots)} sequences: pass one for each, in their order")


def pack_trees(
    sequences: Sequence[Any],
    trained: Sequence[Any],
    *,
    tokens: int,
    parents: Sequence[int] | None = None,
    group: int = 1,
    rows: int | None = None,
    groups_per_row: int | None = None,
    width: int | None = None,
) -> PackedTrees:
    """Lays sequences out in rows of tokens, in each of which a common beginning is there once.

    What sequences have in common is found token by token. A sequence lies in one row; where those that begin alike do
    not fit into one, the beginning is repeated in the next. What follows a sequence's last trained token is left out.

    Args:
        sequences: n lists of token ids.
        trained: n lists of bool, as long: the tokens that are trained; not the first one, which nothing predicts.
        tokens: T, the length of a row.
        parents: for each sequence the number of an earlier one that it goes on from, or −1. Then its tokens are those
            after that one's, which it reads and does not train. `None`: all are whole.
        group: G; so many sequences one after another are compared with each other (a preference pair), and lie in one
            row.
        rows: B. `None`, as for the two that follow: as many as these sequences take, so that others may take another
            compilation. On a mesh it must be a multiple of the row shards (data × fsdp).
        groups_per_row: N, the most groups in a row.
        width: Tc, the most tokens from the first trained one of a sequence to the last.

    Returns:
        NumPy arrays; the same sequences give the same rows.

    Raises:
        ValueError: a sequence is empty, is longer than a row, or has no mask that fits; a parent comes later; there is
            no room in the sizes that were given.
    """
    whole, masks = _read(sequences, trained)
    starts = np.zeros(len(whole), np.int64)
    if parents is not None:
        whole, masks, starts = _after_parents(whole, masks, parents)
    spans = np.array([_span(mask) for mask in masks])
    ordered = Ordered.of([one[:stop] for one, stop in zip(whole, spans[:, 1], strict=True)])
    filled = fill(ordered, _groups(ordered, spans, group, tokens), tokens, groups_per_row)
    count = _room("rows", rows, len(filled), f"these sequences fill {len(filled)} rows of {tokens} tokens")
    widest = max(int(stop - first) for first, stop in spans)
    width = _room("width", width, widest, f"a sequence has {widest} tokens from its first trained one to its last")
    groups_per_row = groups_per_row or max((len(row.groups) for row in filled), default=1)

    slots = np.full(len(whole), -1, np.int64)
    places = [np.zeros(0, np.int32)] * len(whole)
    laid = [Laid.padding(tokens) for _ in range(count)]
    for b, row in enumerate(filled):
        laid[b], of_row = lay_out(ordered, row, tokens)
        for index, number in enumerate(row.groups):
            for g, sequence in enumerate(range(number * group, (number + 1) * group)):
                slots[sequence] = (b * groups_per_row + index) * group + g
                places[sequence] = of_row[ordered.order[sequence]]
    shape = (count * groups_per_row, group, width)
    arrays: Any = Laid(*(np.stack(parts) for parts in zip(*laid, strict=True)))
    place: Any = _at_slots(places, slots, spans, shape, fill=-1).reshape(count, groups_per_row, group, width)
    return PackedTrees(
        layout=PackedLayout(TokenRows(arrays.tokens, arrays.depth, arrays.end), arrays.parent, place, source=None),
        completion=_at_slots(whole, slots, spans, shape),
        mask=_at_slots(masks, slots, spans, shape),
        slots=slots,
        spans=np.maximum(spans - starts[:, None], 0),
    )


def _at_slots(
    arrays: Sequence[np.ndarray], slots: np.ndarray, spans: np.ndarray, shape: tuple[int, ...], fill: int = 0
) -> np.ndarray:
    """Of an array for each sequence what is in its span, at its slot of `[P·G, Tc]`; as `[P, G, Tc]`."""
    out = np.full((shape[0] * shape[1], shape[2]), fill, np.result_type(*arrays))
    for number in np.flatnonzero(slots >= 0).tolist():
        first, stop = spans[number]
        out[slots[number], : stop - first] = arrays[number][first:stop]
    return out.reshape(shape)


# ---- What is given -------------------------------------------------------------------------------


def _read(sequences: Sequence[Any], trained: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids and masks as arrays."""
    if not len(sequences):
        raise ValueError("there are no sequences: pass one at least")
    if len(trained) != len(sequences):
        raise ValueError(f"{len(trained)} masks for {len(sequences)} sequences: pass one for each")
    tokens, masks = [], []
    for number, (ids, mask) in enumerate(zip(sequences, trained, strict=True)):
        ids, mask = np.asarray(ids), np.asarray(mask)
        if ids.size == 0:
            raise ValueError(f"sequence {number} has no tokens: leave it out")
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
            raise ValueError(f"sequence {number} is no list of token ids, integers from 0 on: {ids!r:.80}")
        if mask.shape != ids.shape or mask.dtype != bool:
            raise ValueError(
                f"trained[{number}] is {mask.dtype} of shape {mask.shape}, but sequence {number} has {len(ids)} "
                "tokens: pass True or False for each of them"
            )
        tokens.append(ids.astype(np.int32))
        masks.append(mask)
    return tokens, masks


def _after_parents(
    tokens: list[np.ndarray], masks: list[np.ndarray], parents: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Whole sequences, their masks, and how long the context is that each goes on from."""
    if len(parents) != len(tokens):
        raise ValueError(f"{len(parents)} parents for {len(tokens)} sequences: pass one for each, -1 for none")
    whole, starts = [], np.zeros(len(tokens), np.int64)
    for number, parent in enumerate(parents):
        if not -1 <= parent < number:
            raise ValueError(
                f"sequence {number} goes on from sequence {parent}, which does not come before it: put parents first, "
                "and -1 where there is none"
            )
        before = whole[parent] if parent >= 0 else np.zeros(0, np.int32)
        whole.append(np.concatenate([before, tokens[number]]))
        starts[number] = len(before)
    contexts = [np.zeros(start, bool) for start in starts]
    return whole, [np.concatenate(pair) for pair in zip(contexts, masks, strict=True)], starts


def _span(mask: np.ndarray) -> tuple[int, int]:
    """The first trained token and one past the last; 0, 0 where there is none."""
    at = np.flatnonzero(mask)
    return (int(at[0]), int(at[-1]) + 1) if at.size else (0, 0)


def _groups(ordered: Ordered, spans: np.ndarray, group: int, tokens: int) -> dict[int, list[int]]:
    """Of each group that trains something the numbers of its sequences in their order."""
    if group < 1 or len(spans) % group:
        raise ValueError(f"{len(spans)} sequences cannot be cut into groups of group={group}")
    for number, (first, stop) in enumerate(spans):
        if stop > 0 and first == 0:
            raise ValueError(
                f"sequence {number} trains its first token, which nothing predicts: begin with one that is not trained"
            )
        if stop > tokens:
            raise ValueError(
                f"sequence {number} has {stop} tokens up to the last trained one, more than a row of tokens={tokens}: "
                "raise it, or shorten the sequence"
            )
    groups = {}
    for number, of_group in enumerate(ordered.order.reshape(-1, group).tolist()):
        if (needed := ordered.joined([], of_group)[0]) > tokens:
            raise ValueError(
                f"sequences {number * group} to {(number + 1) * group - 1} are a group of {needed} tokens, more than a "
                f"row of tokens={tokens}: raise it, or shorten them"
            )
        if needed:
            groups[number] = of_group
    return groups


def _room(name: str, given: int | None, needed: int, what: str) -> int:
    """The size that was given, or what is needed."""
    if given is not None and given < needed:
        raise ValueError(f"{what}, more than {name}={given}: raise it, or pass fewer or shorter sequences")
    return max(needed, 1) if given is None else given


def _narrow(values: Any) -> np.ndarray:
    """An array; floats as float32."""
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array
