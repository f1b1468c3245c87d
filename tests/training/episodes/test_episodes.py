from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.prompts import PromptBatch, PromptDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.training.episodes.dynamic_sampling import GroupBuffer
from jaxrl_llm.training.episodes.episodes import Episodes, mean_of_known, score_rollout
from jaxrl_llm.training.episodes.judging import compare
from jaxrl_llm.training.episodes.reward_watch import RewardWatch
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.episodes.telling import TrainerState
from jaxrl_llm.training.episodes.user_functions import RewardError
from jaxrl_llm.types import Rollout

TOKENIZER = CharTokenizer("abc")
A, B, C, EOS, PAD = 2, 3, 4, 1, 0
STOPS = (EOS,)
# Two prompts, two completions each; what lies beyond a completion's length is not to be read.
COMPLETION = np.array([[[A, EOS, C, C], [B, B, B, B]], [[EOS, A, A, A], [A, B, EOS, PAD]]])
LENGTHS = np.array([[2, 4], [1, 3]])


def rollout() -> Rollout:
    zeros = jnp.zeros(COMPLETION.shape)
    return Rollout(
        prompt=jnp.zeros((2, 3), jnp.int32),
        prompt_lengths=jnp.ones(2, jnp.int32),
        completion=jnp.asarray(COMPLETION),
        completion_lengths=jnp.asarray(LENGTHS),
        finished=jnp.array([[True, False], [True, True]]),
        logprobs=zeros,
        sampler_logprobs=zeros,
    )


def batch(prompts: list[Any]) -> PromptBatch:
    return PromptBatch(
        tokens=np.zeros((2, 3), np.int32),
        lengths=np.ones(2, np.int32),
        prompts=prompts,
        openings=["", ""],
        columns={"answer": ["x", "y"], "level": [None, 3]},
        indices=np.arange(2),
        valid=np.ones(2, bool),
        epoch=0,
    )


def test_reward_functions_see_text_ids_and_columns_of_each_sample() -> None:
    seen: dict[str, Any] = {}

    def spy(**arguments: Any) -> list[float | None]:
        seen.update(arguments)
        return [1.0, None, 3.0, 5.0]

    def length(completions: list[str]) -> list[float]:
        return [float(len(text)) for text in completions]

    scored = score_rollout(
        rollout(), batch(["a", "b"]), RewardSum((spy, length), (1.0, 10.0)), TOKENIZER, stop_tokens=STOPS
    )
    assert {seen.pop(name) for name in ("trainer_state",)} == {TrainerState()}
    assert callable(seen.pop("log_metric")) and callable(seen.pop("log_extra"))
    assert seen == {
        "prompts": ["a", "a", "b", "b"],
        "completions": ["a", "bbbb", "", "ab"],  # without their ends
        "completion_ids": [[A, EOS], [B, B, B, B], [EOS], [A, B, EOS]],
        "answer": ["x", "x", "y", "y"],
        "level": [None, None, 3, 3],
    }
    np.testing.assert_array_equal(scored.rewards, np.float32([[11, 40], [3, 25]]))
    np.testing.assert_array_equal(scored.by_name["spy"], np.float32([[1, np.nan], [3, 5]]))
    assert scored.reward_metrics() == pytest.approx(
        {
            "rewards/spy/mean": 3.0,
            "rewards/spy/std": np.std([1, 3, 5]),
            "rewards/length/mean": 7 / 4,
            "rewards/length/std": np.std([1, 4, 0, 2]),
        }
    )


def test_a_stop_text_is_part_of_what_is_read() -> None:
    """Of a rollout in which `ac`, of the first prompt, and `bbbb` were stop texts, and the others ended by a token."""
    drawn = rollout().replace(completion=jnp.asarray(COMPLETION).at[0, 0, 1].set(C), finished=jnp.ones((2, 2), bool))
    seen: list[str] = []

    def spy(completions: list[str]) -> list[float]:
        seen.extend(completions)
        return [0.0] * 4

    scored = score_rollout(drawn, batch(["a", "b"]), RewardSum((spy,)), TOKENIZER, stop_tokens=STOPS)
    assert seen == ["ac", "bbbb", "", "ab"]
    assert scored.finished == [False, False, True, True]


def test_a_conversation_is_answered_by_a_message() -> None:
    prompts = [[{"role": "user", "content": "a"}], "b"]

    def spy(completions: list[Any]) -> list[float]:
        assert completions == [
            [{"role": "assistant", "content": "a"}],
            [{"role": "assistant", "content": "bbbb"}],
            "",
            "ab",
        ]
        return [0.0] * 4

    scored = score_rollout(rollout(), batch(prompts), RewardSum((spy,)), TOKENIZER, stop_tokens=STOPS)
    assert [sample.prompt for sample in scored.samples(TOKENIZER, 9)] == ["a", "b"]


@pytest.mark.parametrize("conversational", [False, True])
def test_a_thought_that_the_prompt_opens_is_read_with_the_completion(conversational: bool) -> None:
    """Of a text and of a template's prompt; reward functions and judges read the same."""
    tokenizer, rows = tagged(), [{"prompt": "<user>4"}, {"prompt": "<user>5<think>\n"}]
    if conversational:
        rows = [{"prompt": [{"role": "user", "content": row["prompt"].removesuffix("<think>\n")}]} for row in rows]
    served = PromptDataset(rows, tokenizer, max_prompt_length=19).batch([0, 1])
    first = "<think>\n" if conversational else ""
    assert served.openings == [first, "<think>\n"]
    seen: list[Any] = []

    def spy(completions: list[Any]) -> list[float]:
        seen.extend(completions)
        return [0.0] * 4

    def judge(*, first: list[Any], **_: Any) -> list[bool]:
        seen.extend(first)
        return [True] * len(first)

    ids = [tokenizer.encode(text) for text in ("4</think>5<end>", "<answer>4</answer><end>", "</think><pad>4", "<end>")]
    lengths = np.array([len(row) for row in ids]).reshape(2, 2)
    tokens = np.array([row + [0] * (9 - len(row)) for row in ids]).reshape(2, 2, 9)
    drawn = rollout().replace(
        completion=tokens, completion_lengths=lengths, finished=np.array([[True, True], [False, True]])
    )
    scored = score_rollout(drawn, served, RewardSum((spy,)), tokenizer, stop_tokens=tokenizer.encode("<end>"))
    texts = [first + "4</think>5", first + "<answer>4</answer>", "<think>\n</think>4", "<think>\n"]
    expected = [[{"role": "assistant", "content": text}] for text in texts] if conversational else texts
    assert seen == expected
    compare(judge, Episodes.joined([scored.groups([0]), scored.groups([1])]), tokenizer, KEY, 0)
    assert seen[4:8] == expected
    compare(judge, scored.first(1), tokenizer, KEY, 0)
    assert seen[12:14] == expected[::2]


KEY = np.zeros(2, np.uint32)


def tagged() -> Any:
    """A transformers tokenizer whose tags are special tokens, as those of many reasoning models are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tags = ["<pad>", "<eos>", "<end>", "<user>", "<think>", "</think>", "<answer>", "</answer>"]
    backend = Tokenizer(models.WordLevel({text: n for n, text in enumerate([*tags, *"45\n"])}, unk_token="4"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": tags[2:]})
    tokenizer.chat_template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<think>{{ '\n' }}"
    return tokenizer


def test_samples_are_the_best_and_the_worst_and_no_more_is_decoded() -> None:
    decoded = []

    class Counting(CharTokenizer):
        def decode(self, ids: Any, *, skip_special_tokens: bool = False) -> str:
            decoded.append(ids)
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    ids = [[A], [B], [C], [A, EOS], [B, EOS], [C, EOS]]
    rewards = np.float32([[0, 2, 1], [5, 4, 6]])
    episodes = Episodes(rewards, {"r": rewards}, ["first", "second"], ids)
    shown = episodes.samples(Counting("abc"), 3)
    assert [(sample.prompt, sample.completion, sample.reward) for sample in shown] == [
        ("first", "b", 2.0),
        ("first", "a", 0.0),
        ("second", "c<eos>", 6.0),
    ]
    assert len(decoded) == 3
    unknown = dataclasses.replace(episodes, rewards=np.float32([[0, np.nan, 1], [np.nan] * 3]))
    shown = unknown.samples(Counting("abc"), 3)
    assert [(sample.completion, sample.reward) for sample in shown[:2]] == [("c", 1.0), ("a", 0.0)]
    assert np.isnan(shown[2].reward)
    both = unknown.plus(np.ones((2, 3), np.float32), {"more": rewards})
    np.testing.assert_array_equal(both.rewards, [[1, 1, 2], [1, 1, 1]])


def test_groups_differ_in_rewards_that_are_known() -> None:
    unknown = np.nan
    rewards = np.float32([[1, unknown, 1], [unknown, unknown, 0], [0, unknown, 1]])
    rollout: Any = np.arange(3)
    filled = GroupBuffer(1)
    assert filled.add(
        rollout, Episodes(rewards, {}, ["a", "b", "c"], [[A]] * 9, finished=[True] * 9, openings=[""] * 3)
    )
    assert filled.kept_share == pytest.approx(1 / 3)
    assert filled.take()[0].tolist() == [2]


def test_what_functions_tell_goes_with_the_samples() -> None:
    def tells(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("share", 0.5)
        log_extra("text", completions)
        return [0.0] * 4

    def told(*functions: Any) -> Episodes:
        return score_rollout(rollout(), batch(["a", "b"]), RewardSum(functions), TOKENIZER, stop_tokens=STOPS)

    def silent(completions: list[str]) -> list[float]:
        return [0.0] * 4

    scores = told(tells)
    assert scores.reward_metrics()["share"] == 0.5 and scores.extra == {"text": ["a", "bbbb", "", "ab"]}
    joined = Episodes.joined([scores, dataclasses.replace(told(silent), by_name=scores.by_name)])
    assert joined.extra == {"text": ["a", "bbbb", "", "ab", *[None] * 4]} and joined.told == {"share": (0.5, 1)}
    assert joined.groups([3, 1]).extra == {"text": [None, None, "", "ab"]}
    assert joined.first(1).extra == {"text": ["a", "", None, None]}


@pytest.mark.parametrize("in_groups", [True, False])
def test_a_reward_that_teaches_nothing_is_told_once(in_groups: bool) -> None:
    def said(watch: RewardWatch, **by_name: Any) -> list[str]:
        rewards = {name: np.float32(values) for name, values in by_name.items()}
        return watch.remarks(Episodes(np.zeros((2, 2), np.float32), rewards, ["a", "b"], [[A]] * 4))

    watch = RewardWatch({"fixed": 1.0, "groups": 1.0, "varies": 1.0, "logged": 0.0}, in_groups=in_groups)
    none, some = [[np.nan, np.nan], [np.nan, np.nan]], [[1, 2], [3, 4]]
    same, groups = [[7, 7], [np.nan, 7]], [[1, 1], [2, 2]]
    told = [said(watch, fixed=same, groups=groups, varies=some, logged=same) for _ in range(12)]
    assert [len(lines) for lines in told] == [0] * 4 + [1 + in_groups] + [0] * 7
    assert "'fixed' has given " in told[4][0] and "the same reward (7): what is learned is" in told[4][0]
    assert not in_groups or "'groups' has given all 2 samples of each prompt the same reward: what" in told[4][1]
    again = RewardWatch({"f": 1.0}, in_groups=in_groups)
    changing = [said(again, f=none if n == 0 else some if n == 3 else same) for n in range(9)]
    assert ["returned None for all 4 samples" in lines[0] for lines in changing if lines] == [True, False]
    assert changing[8] and not any(changing[1:8])


def test_means_where_nothing_is_known() -> None:
    assert np.isnan(mean_of_known(np.float32([np.nan])))
    assert mean_of_known(np.float32([np.nan, 2, 4])) == 3


def fails_here(completions: list[str]) -> list[float]:
    return [1 / len(text) for text in completions]


def fails_in_a_library(completions: list[str]) -> list[float]:
    return [json.loads("{") for _ in completions]


def too_few(completions: list[str]) -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            fails_here,
            rf"'fails_here' raised ZeroDivisionError .* \({__file__}:{fails_here.__code__.co_firstlineno + 1}\)$",
        ),
        (
            fails_in_a_library,
            rf"raised JSONDecodeError .* \({__file__}:{fails_in_a_library.__code__.co_firstlineno + 1}\)$",
        ),
        (too_few, "'too_few' must return 4 values, one a sample, got 1$"),
    ],
)
def test_a_failing_function_is_named_with_its_line(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_rollout(rollout(), batch(["a", "b"]), RewardSum((function,)), TOKENIZER, stop_tokens=STOPS)


def test_an_error_of_our_own_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="token id 3 is outside the vocabulary of 3"):
        score_rollout(rollout(), batch(["a", "b"]), RewardSum((too_few,)), CharTokenizer("a"), stop_tokens=STOPS)


def test_the_tiny_data_set_reaches_the_functions(tiny: Any) -> None:
    dataset = PromptDataset(tiny.TRAIN_ROWS, tiny.TOKENIZER, max_prompt_length=6)
    served = dataset.batch([3, 7])
    scored = score_rollout(rollout(), served, RewardSum((tiny.shared_characters,)), tiny.TOKENIZER, stop_tokens=STOPS)
    assert scored.prompts == ["3+3=", "7+7="]
    assert scored.rewards.shape == (2, 2)
