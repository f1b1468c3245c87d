import pytest

from jaxrl_llm.rewards import make_length_reward


def scores(reward, completions, **columns):
    return reward(prompts=[""] * len(completions), completions=completions, **columns)


def test_characters():
    reward = make_length_reward(4, unit="characters")
    # Code points: each of the four letters below takes several bytes.
    assert scores(reward, ["", "ab", "abcd", "語語語語", "abcdef", "a" * 8, "a" * 100]) == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    )


def test_words_with_tolerance_and_falloff():
    reward = make_length_reward(5, unit="words", tolerance=1, falloff=2)
    lengths = [0, 2, 3, 4, 5, 6, 7, 8, 20]
    expected = [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert scores(reward, [" \n word" * length for length in lengths]) == pytest.approx(expected)


def test_tokens_are_counted_in_completion_ids():
    reward = make_length_reward(2, unit="tokens", name="tokens")
    assert reward.__name__ == "tokens"
    ids = [[5, 6], [5], [], [0, 0, 0]]
    assert scores(reward, ["a long text"] * 4, completion_ids=ids) == pytest.approx([1.0, 0.5, 0.0, 0.5])
    with pytest.raises(TypeError, match="completion_ids"):
        scores(reward, ["text"])


def test_conversational_completion():
    reward = make_length_reward(2, unit="words")
    assert scores(reward, [[{"role": "assistant", "content": "two words"}]]) == [1.0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": 0},
        {"target": -3},
        {"target": float("inf")},
        {"target": 3, "tolerance": -1},
        {"target": 3, "falloff": 0},
        {"target": float("nan")},
    ],
)
def test_numbers_out_of_range_raise(arguments):
    with pytest.raises(ValueError, match="must be positive"):
        make_length_reward(**arguments, unit="words")


def test_unknown_unit_raises():
    with pytest.raises(ValueError, match="characters, words, tokens, got 'bytes'"):
        make_length_reward(3, unit="bytes")  # type: ignore[arg-type]
