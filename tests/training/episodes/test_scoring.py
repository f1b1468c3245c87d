import functools
import math

import numpy as np
import pytest

from jaxrl_llm.rewards import gsm8k_reward, make_length_reward, with_time_limit
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.episodes.telling import TrainerState
from jaxrl_llm.training.episodes.user_functions import UserCodeError

SAMPLES = {
    "prompts": ["p", "p", "q"],
    "completions": ["a", "bb", "ccc"],
    "completion_ids": [[1], [1, 2], [1, 2, 3]],
}


def characters(prompts, completions, **columns):
    return [len(completion) for completion in completions]


def tokens(completion_ids, **columns):
    return [len(ids) for ids in completion_ids]


def only_q(prompts, completions, level=0, **columns):
    return [10.0 if prompt == "q" else None for prompt in prompts]


def score(*functions, weights=None, columns=None, **samples):
    return RewardSum(functions, weights)(**{**SAMPLES, **samples}, columns=columns or {})


def returning(values):
    def fixed(prompts, completions, **columns):
        return values

    return fixed


def test_weighted_sum_by_hand():
    scores = score(characters, only_q, tokens, weights=[2.0, 0.5, -1.0])
    assert scores.total.dtype == np.float32
    np.testing.assert_array_equal(scores.total, [2 - 1, 4 - 2, 6 + 5 - 3])
    assert list(scores.by_name) == ["characters", "only_q", "tokens"]
    assert all(values.dtype == np.float32 for values in scores.by_name.values())
    np.testing.assert_array_equal(scores.by_name["only_q"], [np.nan, np.nan, 10])
    np.testing.assert_array_equal(scores.by_name["tokens"], [1, 2, 3])


def test_weights_are_one_unless_given_and_zero_only_logs():
    np.testing.assert_array_equal(score(characters, tokens).total, [2, 4, 6])
    scores = score(characters, only_q, weights=(1, 0))
    np.testing.assert_array_equal(scores.total, [1, 2, 3])
    assert scores.by_name["only_q"][2] == 10


def test_functions_get_their_arguments_by_name():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * 3

    def without_columns(completions, answer, weight=1.0):
        return [float(completion == gold) * weight for completion, gold in zip(completions, answer, strict=True)]

    scores = score(everything, without_columns, columns={"answer": ["a", "b", "ccc"], "source": [1, 2, 3]})
    told = {seen.pop(name) for name in ("log_metric", "log_extra")}
    assert len(told) == 2 and seen.pop("trainer_state").global_step == 0
    assert seen == {**SAMPLES, "answer": ["a", "b", "ccc"], "source": [1, 2, 3]}
    np.testing.assert_array_equal(scores.by_name["without_columns"], [1, 0, 1])


def test_numbers_of_all_kinds():
    values = [True, np.float16(0.5), np.asarray(3)]
    np.testing.assert_array_equal(score(returning(values)).total, [1, 0.5, 3])
    np.testing.assert_array_equal(score(returning(np.arange(3.0))).total, [0, 1, 2])
    np.testing.assert_array_equal(score(returning((-1, 0, 1))).total, [-1, 0, 1])


def test_package_rewards_and_conversational_completions():
    completions = [[{"role": "assistant", "content": text}] for text in ("#### 5", "#### 6", "none")]
    scores = score(
        gsm8k_reward,
        make_length_reward(2, unit="tokens"),
        completions=completions,
        columns={"answer": ["#### 5", "#### 5", "no number"]},
    )
    np.testing.assert_array_equal(scores.by_name["gsm8k_reward"], [1, 0, np.nan])
    np.testing.assert_array_equal(scores.total, [1.5, 1, 0.5])


def test_a_function_that_raises_is_named_and_is_the_cause():
    def broken(prompts, completions, **columns):
        raise KeyError("lost")

    with pytest.raises(RuntimeError, match=r"'broken' raised KeyError on 3 samples: 'lost'") as info:
        score(characters, broken)
    assert isinstance(info.value.__cause__, KeyError)


def test_an_interrupt_is_not_caught():
    def interrupted(prompts, completions, **columns):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_wrong_number_of_values():
    with pytest.raises(ValueError, match=r"'fixed' must return 3 values, one a sample, got 2"):
        score(returning([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"'fixed' must return a list of 3 values, got None"):
        score(returning(None))
    with pytest.raises(ValueError, match=r"'fixed' must return a list of 3 values, got 0\.5"):
        score(returning(0.5))


@pytest.mark.parametrize("value", ["1.0", math.nan, math.inf, -math.inf, 1e39, 10**400, [1.0], {}, 1j, np.nan])
def test_a_value_that_is_no_finite_number(value):
    completions = ["a", "é" * 200, "c"]
    with pytest.raises(ValueError, match=rf"'fixed' .* for sample 1, completion '{'é' * 80}'$"):
        score(returning([0.0, value, 1.0]), completions=completions)


def test_no_function_applies():
    with pytest.raises(ValueError, match=r"\(only_q\) returned None for sample 0, completion 'a' \(2 of 3"):
        score(only_q)
    scores = RewardSum((only_q,))(**SAMPLES, columns={}, may_lack=True)
    np.testing.assert_array_equal(scores.total, [np.nan, np.nan, 10])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="3 completions, but 'answer' has 2 values"):
        score(characters, columns={"answer": ["x", "y"]})
    with pytest.raises(ValueError, match="3 completions, but 'prompts' has 1 values"):
        score(characters, prompts=["p"])


def test_missing_column_is_found_before_anything_runs():
    def solved(prompts, completions, solution, *, level, hint=None, **columns):
        raise AssertionError("must not run")

    reward_sum = RewardSum([characters, solved])
    reward_sum.check_columns(["solution", "level"])
    with pytest.raises(ValueError) as info:
        reward_sum.check_columns(["level", "answer"])
    assert str(info.value) == (
        "the reward function 'solved' requires the column(s) ['solution'], which the data set lacks; "
        "its columns are ['answer', 'level']"
    )
    with pytest.raises(ValueError, match=r"which the data set lacks; did you mean 'Solutions'\?; its columns are"):
        reward_sum.check_columns(["level", "Solutions"])
    with pytest.raises(ValueError, match=r"'solved' requires the column\(s\) \['solution', 'level'\]"):
        reward_sum(**SAMPLES, columns={})
    with pytest.raises(ValueError, match=r"'gsm8k_reward' requires the column\(s\) \['answer'\]"):
        RewardSum([gsm8k_reward]).check_columns([])
    RewardSum([make_length_reward(3, unit="tokens")]).check_columns([])


def test_columns_named_as_arguments_raise():
    with pytest.raises(ValueError, match=r"\['completions'\] bear the name"):
        RewardSum([characters]).check_columns(["answer", "completions"])


def test_what_is_no_sum_of_reward_functions():
    with pytest.raises(ValueError, match="no reward function"):
        RewardSum([])
    with pytest.raises(ValueError, match=r"several reward functions are named \['characters'\]"):
        RewardSum([characters, tokens, characters])
    with pytest.raises(ValueError, match="a reward function must be a function, got 'characters'"):
        RewardSum(["characters"])  # type: ignore[list-item]
    for weights in ([1.0], [1.0, math.nan], [1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="one finite number a function"):
            RewardSum([characters, tokens], weights)


def test_names():
    class Scorer:
        def __call__(self, completions):
            return [1.0] * len(completions)

    functions = [characters, gsm8k_reward, functools.partial(only_q, level=1), with_time_limit(tokens, 9.0), Scorer()]
    names = ("characters", "gsm8k_reward", "only_q", "tokens", "Scorer")
    assert RewardSum(functions).names == tuple(score(*functions, columns={"answer": ["1"] * 3}).by_name) == names


# ---- What functions are told, and tell ----------------------------------------------------------------


def test_functions_are_told_of_the_run_where_they_name_it_or_take_all():
    seen = []

    def named(completions, trainer_state, log_extra=None):
        seen.append((trainer_state, callable(log_extra)))
        return [0.0] * 3

    def all_of_it(completions, **kwargs):
        seen.append((kwargs["trainer_state"], callable(kwargs.get("log_extra")), callable(kwargs.get("log_metric"))))
        return [0.0] * 3

    def neither(completions, answer):
        return [0.0] * 3

    state = TrainerState(global_step=3, max_steps=10, epoch=0.5)
    score(named, all_of_it, neither, columns={"answer": [1, 2, 3]}, trainer_state=state)
    assert seen == [(state, True), (state, True, True)]
    with pytest.raises(AttributeError, match="trainer_state has no 'log_history' here; it has global_step, max_steps"):
        _ = state.log_history


def test_functions_tell_metrics_and_columns():
    def tells(completions, log_metric, log_extra, **kwargs):
        log_metric("share", 0.25)
        log_metric("share", np.float32(0.75))
        log_extra("read", np.array([1, 2, 3]))
        log_extra("twice", ["old"] * 3)
        return [0.0] * 3

    def also(completions, log_metric, log_extra):
        log_metric("share", True)
        log_extra("twice", [{"a": np.float64(1.5)}, None, object])
        return [0.0] * 3

    scores = score(tells, also)
    assert scores.metrics == {"share": (2.0, 3)}
    assert scores.extra == {"read": [1, 2, 3], "twice": [{"a": 1.5}, None, str(object)]}


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("log_extra", ("read", [1, 2]), r"needs a list of 3 values, one a sample, got 2"),
        ("log_extra", ("read", "abc"), r"needs a list of 3 values, got 'abc'"),
        ("log_extra", (None, [1, 2, 3]), r"log_extra\(None, …\): a column's name is text"),
        ("log_metric", ("share", "high"), r"log_metric\('share', 'high'\): a metric is a number"),
        ("log_metric", ("share", [1, 2]), r"a metric is a number"),
        ("log_metric", ("", 1), r"a metric's name is text"),
    ],
)
def test_what_cannot_be_told_names_the_function(name, given, message):
    def tells(completions, **kwargs):
        kwargs[name](*given)
        return [0.0] * 3

    with pytest.raises(UserCodeError, match=rf"'tells' raised ValueError on 3 samples: .*{message}"):
        score(tells)


def test_environments_are_refused_where_they_are_required():
    def played(completions, environments):
        return [0.0] * 3

    def perhaps(completions, environments=None, **kwargs):
        return [float(environments is None)] * 3

    with pytest.raises(
        ValueError, match="the reward function 'played' requires 'environments', of which there are none"
    ):
        RewardSum([played]).check_columns([])
    np.testing.assert_array_equal(score(perhaps).total, [1, 1, 1])
