import json
from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest

from jaxrl_llm.data.loader import PromptLoader, eval_batches
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("0123456789+=")


def arithmetic(size: int) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(size)]


def make_dataset(size: int = 10, **settings) -> PromptDataset:
    return PromptDataset(arithmetic(size), TOKENIZER, max_prompt_length=8, **settings)


def take(loader, count):
    return list(islice(loader, count))


def indices(batches):
    return [batch.indices.tolist() for batch in batches]


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.lengths, b.lengths)
        np.testing.assert_array_equal(a.indices, b.indices)
        assert (a.prompts, a.columns, a.epoch) == (b.prompts, b.columns, b.epoch)


def test_a_batch_holds_together():
    for batch in take(PromptLoader(make_dataset(), batch_size=4, seed=0), 5):
        assert batch.tokens.shape == (4, 8)
        assert batch.prompts == [f"{n}+{n}=" for n in batch.indices]
        assert batch.columns == {"answer": [str(2 * n) for n in batch.indices]}
        decoded = [TOKENIZER.decode(row[:length]) for row, length in zip(batch.tokens, batch.lengths, strict=True)]
        assert decoded == batch.prompts
        assert batch.valid.all()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10, 25])
def test_every_prompt_once_per_epoch_and_nothing_dropped(batch_size):
    loader = PromptLoader(make_dataset(), batch_size=batch_size, seed=1)
    served = np.concatenate(indices(take(loader, 40 // batch_size + 1)))
    epochs = [served[start : start + 10].tolist() for start in range(0, len(served) - 9, 10)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert all(epoch != following for epoch, following in pairwise(epochs))


def test_epoch_is_that_of_the_first_prompt():
    batches = take(PromptLoader(make_dataset(), batch_size=4, seed=0), 6)
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 2]


def test_order_depends_on_the_seed_alone():
    def order(seed):
        return indices(take(PromptLoader(make_dataset(), batch_size=4, seed=seed), 10))

    assert order(3) == order(3)
    # Also no seed is a neighbour's later epoch.
    flat = {seed: np.concatenate(order(seed)).reshape(-1, 10).tolist() for seed in (3, 4)}
    assert not any(epoch in flat[4] for epoch in flat[3])


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_resume_gives_the_identical_continuation(steps):
    loader = PromptLoader(make_dataset(), batch_size=4, seed=5)
    take(loader, steps)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 6)
    resumed = PromptLoader(make_dataset(), batch_size=4, seed=5)
    take(resumed, 2)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_equal(take(resumed, 6), expected)


def test_state_of_another_run_is_refused():
    state = PromptLoader(make_dataset(), batch_size=4, seed=5).get_state()

    def refused(*, dataset=None, batch_size=4, seed=5):
        with pytest.raises(ValueError, match="belongs to another order of prompts") as caught:
            PromptLoader(dataset or make_dataset(), batch_size=batch_size, seed=seed).set_state(state)
        return str(caught.value)

    assert "seed was 5 and is 6" in refused(seed=6)
    assert "batch_size was 4 and is 5" in refused(batch_size=5)
    message = refused(dataset=make_dataset(11))
    assert "rows was 10 and is 11" in message
    assert "seed was" not in message
    rows = arithmetic(10)
    rows[4]["answer"] = "wrong"
    assert "content was" in refused(dataset=PromptDataset(rows, TOKENIZER, max_prompt_length=8))


def test_dropped_prompts_are_never_served():
    rows = [*arithmetic(6), {"prompt": "123456+7=", "answer": "123463"}, *arithmetic(3)]
    dataset = PromptDataset(rows, TOKENIZER, max_prompt_length=8, overlong="drop")
    loader = PromptLoader(dataset, batch_size=3, seed=0)
    served = Counter(np.concatenate(indices(take(loader, 6))).tolist())
    assert served == {index: 2 for index in range(10) if index != 6}


def test_one_prompt_serves_any_batch():
    (batch,) = take(PromptLoader(make_dataset(1), batch_size=3, seed=0), 1)
    assert batch.prompts == ["0+0="] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"seed": 2**32}, "seed must be between 0 and"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptLoader(make_dataset(), **{"batch_size": 4, "seed": 0, **settings})


# --- evaluation ---


def test_evaluation_serves_each_prompt_once_in_order():
    batches = list(eval_batches(make_dataset(), batch_size=4))
    assert indices(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]
    assert [batch.valid.tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert all(batch.tokens.shape == (4, 8) for batch in batches)


def test_evaluation_in_batches_larger_than_the_data():
    (batch,) = eval_batches(make_dataset(2), batch_size=5)
    assert batch.indices.tolist() == [0, 1, 0, 1, 0]
    assert batch.valid.tolist() == [True, True, False, False, False]


def test_evaluation_checks_its_batch_size_at_once():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        eval_batches(make_dataset(), batch_size=0)
