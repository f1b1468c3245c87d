"""Stop texts: the token that completes one ends the completion, by whatever tokens it was written."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.stop_texts import StopTexts
from jaxrl_llm.training.episodes.reading import completion_text
from tests.data.small_tokenizers import KINDS, small_tokenizer


def first_complete(texts: StopTexts, ids: list[int]) -> int | None:
    """The number of tokens after which the automaton says that a stop text is complete."""
    state = 0
    for count, token in enumerate(ids, start=1):
        state = texts.following[state, texts.kinds[token]]
        if texts.complete(state):
            return count
    return None


def first_containing(stop: list[str], ids: list[int], tokenizer: Any) -> int | None:
    """The same by reading: the shortest beginning of the tokens whose text has a stop text in it."""
    for count in range(1, len(ids) + 1):
        text = completion_text(ids[:count], tokenizer, finished=False)
        if any(one in text for one in stop):
            return count
    return None


def test_the_first_complete_of_any_texts():
    """Of all short texts, and such stop texts as begin, end and lie in one another."""
    tokenizer = CharTokenizer("ab")
    texts = ["".join(signs) for length in (1, 2, 3) for signs in itertools.product("ab", repeat=length)]
    rng, found = np.random.default_rng(0), set()
    for _ in range(40):
        stop = list(rng.choice([*texts, "aabab", "babba", "bbab"], rng.integers(1, 4), replace=False))
        ours = StopTexts.of(stop, tokenizer, len(tokenizer) + 2)
        for ids in rng.integers(0, 4, (20, 9)).tolist():  # beginning, end and padding between characters
            expected = first_containing(stop, ids, tokenizer)
            assert first_complete(ours, ids) == expected, (stop, ids)
            found.add(expected)
    assert found == {None, *range(1, 10)}


STOPS = (["is"], [" is", "yes.\n"], ["Paris .", "\n\n"], ["<|end|>"], ["é!", "漢"], [" "], ["\n\nno", "is no"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_several_characters_and_parts_of_one(kind):
    """As the text of the tokens, decoded anew after each, says."""
    tokenizer, rng = small_tokenizer(kind), np.random.default_rng(1)
    signs = [tokenizer.encode(text, add_special_tokens=False) for text in ("é!", "漢", "é", "Paris", " is no", "\n\n")]
    vocabulary = tokenizer.get_vocab()
    # Several bytes beside each other, of which not all are of characters, are decoded to no character at all.
    single = [number for token, number in vocabulary.items() if kind == "bytes" or not token.startswith("<0x")]
    found = []
    for stop in STOPS:
        ours = StopTexts.of(stop, tokenizer, len(vocabulary) + 3)
        for _ in range(60):
            parts = [signs[rng.integers(len(signs))] if rng.random() < 0.3 else [rng.choice(single)] for _ in range(8)]
            ids = [int(token) for part in parts for token in part]
            expected = first_containing(stop, ids, tokenizer)
            assert first_complete(ours, ids) == expected, (stop, tokenizer.decode(ids))
            found.append(expected)
    assert {None, 1, 2, 3, 4} <= set(found)


def test_a_table_of_a_large_vocabulary_is_small_and_soon_made():
    """150 000 tokens of up to seven letters."""
    letters = "abcdefghijklmnopqrstuvwxyz </>\n"

    class Words:
        bos_token_id = eos_token_id = pad_token_id = None

        def __init__(self) -> None:
            lengths = np.random.default_rng(0).integers(1, 8, 150_000)
            drawn = np.random.default_rng(1).choice(list(letters), lengths.sum())
            self.words = ["".join(word) for word in np.split(drawn, np.cumsum(lengths)[:-1])]

        def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
            return "".join(map(self.words.__getitem__, ids))

        def token_bytes(self) -> list[bytes]:
            return [word.encode() for word in self.words]

    words, seconds = Words(), time.process_time()
    texts = StopTexts.of(["</the answer is now>"], words, 152_000)
    assert time.process_time() - seconds < 5
    assert texts.kinds.nbytes + texts.following.nbytes < 400_000


@pytest.mark.parametrize(("slots", "speculate"), [(None, "off"), (4, "off"), (4, "history")])
def test_completions_end_with_a_stop_text(slots, speculate, tiny_config, lively_params, one_device, prompts, key):
    """In both loops: the tokens, log-probs and all are those of completions that go on, up to that one.

    Also in the midst of what was proposed, which is how they go on.
    """
    tokenizer = CharTokenizer("".join(map(chr, range(97, 97 + 62))))
    model = Transformer(tiny_config())
    params = lively_params(model)

    def rollout(stop: tuple[str, ...]) -> Any:
        config = SamplingConfig(max_tokens=40, stop=stop, slots=slots, speculate=speculate)
        given = {"group": 3, "stop_tokens": (1, 5), "mesh": one_device, "tokenizer": tokenizer}
        return Sampler(model, config, **given)(params, *prompts, key, 0, None, history)

    history = None
    whole = rollout(())
    if speculate == "history":
        history = np.asarray(whole.completion), np.asarray(whole.completion_lengths)
    lengths = np.asarray(whole.completion_lengths)
    text = tokenizer.decode(np.asarray(whole.completion)[np.unravel_index(lengths.argmax(), lengths.shape)].tolist())
    stop = [text[4:6], text[1], text[9]]
    ours = rollout(tuple(stop))
    ended = 0
    for place in np.ndindex(lengths.shape):
        ids = np.asarray(whole.completion)[place][: lengths[place]].tolist()
        count = first_containing(stop, ids, tokenizer)
        ended += count is not None
        length = lengths[place] if count is None else count
        assert ours.completion_lengths[place] == length
        assert ours.finished[place] == (whole.finished[place] or count is not None)
        assert ours.completion[place][:length].tolist() == ids[:length]
        np.testing.assert_allclose(ours.logprobs[place][:length], whole.logprobs[place][:length], atol=1e-5)
    assert 3 < ended < lengths.size


def test_what_cannot_be_looked_for_raises(tiny_config, one_device):
    model, tokenizer = Transformer(tiny_config()), CharTokenizer("ab")
    given = {"group": 1, "stop_tokens": (), "mesh": one_device}
    with pytest.raises(ValueError, match=r"sampling.stop=\('a',\) .* pass the tokenizer"):
        Sampler(model, SamplingConfig(stop=("a",)), **given)
    for stop in ("a\ufffd", "\ud83d"):
        with pytest.raises(ValueError, match="holds what stands for no character"):
            Sampler(model, SamplingConfig(stop=(stop,)), tokenizer=tokenizer, **given)
    with pytest.raises(ValueError, match=r"the tokens of a object stand for is not known: give it a method"):
        Sampler(model, SamplingConfig(stop=("a",)), tokenizer=object(), **given)
    for stop in (("a", ""), "a", ["a"]):
        with pytest.raises(ValueError, match=r"sampling.stop=.* is out of range"):
            SamplingConfig(stop=stop)  # pyright: ignore[reportArgumentType]
