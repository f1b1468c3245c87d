"""What reward functions and judges may do and return, and how it is told what they may not."""

from __future__ import annotations

import asyncio
import functools
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.rewards import with_time_limit
from jaxrl_llm.training.episodes import async_calls
from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.episodes.judging import check_judge, compare
from jaxrl_llm.training.episodes.scoring import RewardScores, RewardSum
from jaxrl_llm.training.episodes.user_functions import RewardError, UserCodeError

COMPLETIONS = ["right", "b" * 200, "\ud800 broken"]
KEY = np.zeros(2, np.uint32)


def scored(*functions: Callable[..., Any], completions: Sequence[Any] = COMPLETIONS, **settings: Any) -> RewardScores:
    columns = {"answer": [["x"], ["y"], ["z"]], "level": [1, 2, 3]}
    return RewardSum(functions, **settings)(["p", "p", "q"], list(completions), [[1], [1, 2], [3]], columns)


def score(*functions: Callable[..., Any], **settings: Any) -> np.ndarray:
    return scored(*functions, **settings).total


def returning(values: Any) -> Callable[..., Any]:
    def fixed(completions: list[str], **columns: Any) -> Any:
        return values

    return fixed


class NoFloat:
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __float__(self) -> float:
        raise self.error("no")


class NoRepr(dict[str, Any]):
    def __repr__(self) -> str:
        raise RuntimeError("no")


# ---- What is returned ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        *({0: 1.0, 1: 1.0, 2: 1.0}, {1.0, 2.0, 3.0}, frozenset({1, 2, 3}), {1: 1, 2: 2, 3: 3}.keys(), "123", b"123"),
        *(1.0, np.float32(1), jnp.ones(()), iter([1, 2, 3]), NoRepr(a=1, b=2, c=3)),
    ],
)
def test_rewards_are_a_list(values: Any) -> None:
    with pytest.raises(ValueError, match=r"the reward function 'fixed' must return a list of 3 values, got "):
        score(returning(values))


@pytest.mark.parametrize(
    "value",
    [
        *(NoFloat(error) for error in (RuntimeError, KeyError, SystemExit)),
        *("1", b"1", 1j, np.complex64(1), [1.0], (1.0,), np.ones(1), jnp.ones((1, 1)), object(), np.inf),
    ],
)
def test_a_reward_is_a_number(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"'fixed' must return finite numbers or None, got .* for sample 1, completion"
    ):
        score(returning([0.0, value, 1.0]))


def test_numbers_of_every_kind_are_rewards() -> None:
    values = [True, Fraction(1, 2), jnp.float32(2)]
    for returned in (values, tuple(values), np.float64([1, 0.5, 2]), jnp.float32([1, 0.5, 2])):
        np.testing.assert_array_equal(score(returning(returned)), np.float32([1, 0.5, 2]))


def test_a_sum_that_is_not_finite_is_told() -> None:
    with pytest.raises(ValueError, match=r"rewards \{'fixed': .*\} of sample 0, .* add up beyond float32"):
        score(returning([3e38, 1, 1]), weights=[2.0])


# ---- What is done -------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["clear", "append", "reverse", "items", "keys"])
def test_a_function_has_lists_of_its_own(harm: str) -> None:
    def changes(prompts: list[Any], completions: list[Any], completion_ids: list[Any], answer: Any, level: Any) -> Any:
        count = len(completions)
        for values in (prompts, completions, completion_ids, answer, level):
            if harm in ("clear", "reverse"):
                getattr(values, harm)()
            elif harm == "append":
                values.append(None)
        if harm == "items":
            answer[0].append("more")
            completion_ids[0][0] = 9
            completions[0][0]["content"] = "9"
        if harm == "keys":
            completions[0][0].clear()
        return [0.0] * count

    def sees(prompts: Any, completions: Any, completion_ids: Any, answer: Any, level: Any) -> list[float]:
        seen.append((prompts, completions, completion_ids, answer, level))
        return [0.0] * 3

    seen: list[Any] = []
    completions = [[{"role": "assistant", "content": text}] for text in "abc"]
    score(changes, sees, completions=completions)
    untouched = [[{"role": "assistant", "content": text}] for text in "abc"]
    assert seen == [(["p", "p", "q"], untouched, [[1], [1, 2], [3]], [["x"], ["y"], ["z"]], [1, 2, 3])]
    assert completions == untouched


def fails(completions: list[str], **columns: Any) -> list[float]:
    rewards = []
    for completion in completions:  # from Python 3.12 on, a comprehension keeps its variable to itself
        rewards.append(1 / (len(completion) - 200))
    return rewards


def test_what_raises_is_told_with_its_sample_and_place() -> None:
    place = rf"\({__file__}:{fails.__code__.co_firstlineno + 3}\)"
    message = (
        f"^the reward function 'fails' raised ZeroDivisionError on 3 samples: .*, at sample 1, completion '{'b' * 80}'"
    )
    with pytest.raises(UserCodeError, match=f"{message} {place}$"):
        score(fails)


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("\udcff bytes\nof a path"), r"ValueError on 3 samples: \\udcff bytes of a path"),
        (Unreadable(), r"Unreadable on 3 samples: \(its text cannot be read\)"),
        (SystemExit(3), "SystemExit on 3 samples: 3"),
        (StopIteration(), "StopIteration on 3 samples, at"),
        (KeyError("long" * 1000), "KeyError on 3 samples: '(long){124}l"),
    ],
)
def test_an_error_of_any_text_is_one_line_that_can_be_printed(error: BaseException, text: str) -> None:
    def broken(completions: list[str], **columns: Any) -> list[float]:
        for _completion in reversed(completions):
            raise error
        return []

    with pytest.raises(UserCodeError, match=f"'broken' raised {text}") as caught:
        score(broken)
    message = str(caught.value)
    assert "\n" not in message and message.encode()
    assert r"at sample 2, completion '\ud800 broken'" in message


def test_what_cannot_be_called_as_a_reward_function_is_refused_at_once() -> None:
    async def later(completions: list[str]) -> list[float]:
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match="the reward function 'max' does not say what it takes"):
        RewardSum([max])
    with pytest.raises(ValueError, match=r"must return a list of 3 values, got <coroutine .*: it is async"):
        score(lambda_of(later))
    for given in (fails, {fails}, iter([fails])):
        with pytest.raises(ValueError, match=r"rewards are a tuple or list of functions, got .*: put it in one"):
            RewardSum(given)
    for timeout in (0, -1.0, np.nan):
        with pytest.raises(ValueError, match=r"timeout=.* must be None, or positive seconds"):
            RewardSum([fails], timeout=timeout)


def lambda_of(later: Callable[..., Any]) -> Callable[..., Any]:
    return lambda completions, **columns: later(completions)


def stuck(completions: list[str], **columns: Any) -> list[float]:
    for completion in completions:
        try:
            while completion.startswith("b"):
                time.sleep(0.01)
        except Exception:  # such a function catches everything that it should
            continue
    return [0.0] * len(completions)


def backtracks(completions: list[str], **columns: Any) -> list[float]:
    return [float(bool(re.match("(b|b?)*c", completion))) for completion in completions]


@pytest.mark.parametrize("function", [stuck, backtracks])
def test_a_call_that_takes_too_long_is_ended_and_told_with_its_sample(function: Callable[..., Any]) -> None:
    before = signal.getsignal(signal.SIGALRM)
    message = (
        rf"'{function.__name__}' took longer than 0.2 s on 3 samples, at sample 1, completion 'b{{80}}' \({__file__}:"
    )
    with pytest.raises(UserCodeError, match=message):
        score(function, timeout=0.2)
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    np.testing.assert_array_equal(score(returning([1, 2, 3]), timeout=5.0), [1, 2, 3])


def test_a_function_with_a_limit_of_its_own_is_left_out_after_it() -> None:
    slow, late = with_time_limit(stuck, 0.1), with_time_limit(naps(5.0), 0.1, otherwise=-1.0)
    scores = scored(slow, late, returning([1, 2, 3]), timeout=0.2)
    np.testing.assert_array_equal(scores.total, [0, 1, 2])
    assert np.isnan(scores.by_name["stuck"]).all()
    assert scores.metrics == {"rewards/stuck/timed_out": (1.0, 1), "rewards/naps/timed_out": (1.0, 1)}
    in_time = scored(with_time_limit(returning([1, 2, 3]), 5.0))
    assert in_time.metrics == {"rewards/fixed/timed_out": (0.0, 1)} and in_time.total.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"returned None for sample 0.*; stuck took too long, and with_time_limit\("):
        score(slow)
    for seconds, otherwise in ((0, None), (np.nan, 0.0), (1, np.inf)):
        with pytest.raises(ValueError, match=r"must be positive seconds|must be a finite reward, or None"):
            with_time_limit(stuck, seconds, otherwise=otherwise)


UNSTOPPABLE = """
import hashlib
from jaxrl_llm.training.episodes import time_limits
from jaxrl_llm.training.episodes.scoring import RewardScores, RewardSum
time_limits.GRACE = 0.2

def hashes(completions):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

RewardSum([hashes], timeout=0.1)(["p"], ["c"], [[1]], {})
"""


def test_what_no_signal_reaches_ends_the_process_with_one_line() -> None:
    ended = subprocess.run([sys.executable, "-c", UNSTOPPABLE], capture_output=True, text=True, timeout=60)
    error = "the reward function 'hashes' on 1 samples took longer than 0.1 s, and did not end when interrupted"
    assert (ended.returncode, ended.stderr) == (1, f"error: {error}\n")


# ---- Functions that are async -------------------------------------------------------------------------


def naps(seconds: float, name: str = "naps") -> Callable[..., Any]:
    async def nap(completions: list[str], log_metric: Any, **columns: Any) -> list[float]:
        await asyncio.sleep(seconds)
        log_metric("awake", 1.0)
        return [float(len(completion)) for completion in completions]

    nap.__name__ = name
    return nap


def test_async_functions_wait_together_and_while_others_run() -> None:
    class Object:
        async def __call__(self, completions: list[str]) -> list[float]:
            await asyncio.sleep(0.2)
            loops.append(asyncio.get_running_loop())
            return [1.0] * len(completions)

    def busy(completions: list[str]) -> list[float]:
        time.sleep(0.2)
        return [0.0] * len(completions)

    loops: list[Any] = []
    rewards = RewardSum([naps(0.2), Object(), functools.partial(naps(0.2, "other"), level=1), busy])
    for _ in range(2):
        began = time.perf_counter()
        found = rewards(["p", "p", "q"], COMPLETIONS, [[1], [1, 2], [3]], {"answer": "xyz"})
        assert time.perf_counter() - began < 0.5
    assert list(found.by_name) == ["naps", "Object", "other", "busy"]
    np.testing.assert_array_equal(found.by_name["naps"], [len(text) for text in COMPLETIONS])
    assert found.metrics == {"awake": (2.0, 2)}
    assert loops[0] is loops[1]  # what a session of HTTP needs


def test_async_functions_are_scored_where_a_loop_runs_already() -> None:
    async def in_a_notebook() -> np.ndarray:
        return score(naps(0.0))

    np.testing.assert_array_equal(asyncio.run(in_a_notebook()), [5, 200, 8])


def test_what_an_async_function_raises_is_told_with_its_sample_and_place() -> None:
    async def gives_up(completions: list[str], **columns: Any) -> list[float]:
        for completion in completions:
            await asyncio.sleep(0)
            if completion.startswith("b"):
                raise error
        return []

    async def too_few(completions: list[str]) -> list[float]:
        return [1.0]

    async def blocks(completions: list[str]) -> None:
        time.sleep(0.5)

    for error in (TimeoutError("of the service"), SystemExit(3), ConnectionError("503")):
        message = (
            rf"'gives_up' raised {type(error).__name__} on 3 samples: {error}, at sample 1, .* \({__file__}:\d+\)$"
        )
        with pytest.raises(UserCodeError, match=message):
            score(naps(9.0), gives_up, timeout=5.0)
    with pytest.raises(ValueError, match="'too_few' must return 3 values, one a sample, got 1"):
        score(too_few)
    with pytest.raises(UserCodeError, match=rf"'naps' took longer than 0.1 s on 3 samples \({__file__}:\d+\)$"):
        score(naps(9.0), timeout=0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_calls, "GRACE", 0.1)
        with pytest.raises(UserCodeError, match=r"'blocks' took longer than 0.1 s on 3 samples and awaits nothing"):
            score(with_time_limit(blocks, 0.1, otherwise=0.0), naps(0.0))


def test_a_time_limit_that_cannot_be_kept_is_refused() -> None:
    def in_thread() -> None:
        with pytest.raises(ValueError, match="cannot be stopped after 1 s outside the main thread"):
            score(returning([1, 2, 3]), timeout=1.0)
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert done == [True]


# ---- Judges -------------------------------------------------------------------------------------------


def judged(judge: Any, **settings: Any) -> dict[str, np.ndarray]:
    rewards = np.zeros((1, 3), np.float32)
    ids = [[2], [3, 3], [4, 4, 4]]
    episodes = Episodes(rewards, {}, ["p"], ids, {"answer": [["x"]]}, [False] * 3, [""])
    return compare(judge, episodes, CharTokenizer("abc"), KEY, 1, **settings)


def verdicts_of(make: Callable[[list[str]], Any]) -> Callable[..., Any]:
    def judge(*, prompts: Any, first: Any, second: Any, columns: Any) -> Any:
        return make(first)

    return judge


@pytest.mark.parametrize("value", [None, "true", "", float("nan"), 0.7, 1.0, 2, 1, 0, [True], np.array([True]), -1])
def test_a_verdict_is_true_or_false(value: Any) -> None:
    with pytest.raises(RewardError, match=r"the judge 'judge' must return True .* or False, got .* for pair 1, comp"):
        judged(verdicts_of(lambda first: [True, value, False]))


@pytest.mark.parametrize("values", [None, True, {0: True}, {True, False, 2}, "yes", [True], np.True_, [True] * 4])
def test_verdicts_are_a_list_of_one_a_pair(values: Any) -> None:
    with pytest.raises(RewardError, match=r"the judge 'judge' must return (a list of )?3 values, .*got "):
        judged(verdicts_of(lambda first: values))


def test_verdicts_of_every_kind() -> None:
    expected = [[True, False, True]]
    for values in (expected[0], np.array(expected[0]), jnp.array(expected[0]), [np.True_, False, jnp.array(True)]):
        np.testing.assert_array_equal(judged(verdicts_of(lambda first, v=values: v))["preferred"], expected)


def test_a_judge_that_raises_or_hangs_is_named_with_its_pair_and_place() -> None:
    def judge(*, prompts: Any, first: Any, second: Any, columns: Any) -> list[bool]:
        for text in first:
            if text == "bb":
                raise ConnectionError("judge API: 503")
        return []

    def slow(*, prompts: Any, first: Any, second: Any, columns: Any) -> list[bool]:
        time.sleep(60)
        return []

    message = (
        rf"the judge 'judge' raised ConnectionError on 3 pairs: judge API: 503, at pair 1, completion 'bb' \({__file__}"
    )
    with pytest.raises(RewardError, match=message):
        judged(judge)
    with pytest.raises(RewardError, match=r"the judge 'slow' took longer than 0.1 s on 3 pairs \("):
        judged(slow, timeout=0.1)


def test_a_judge_has_lists_of_its_own() -> None:
    def judge(*, prompts: Any, first: Any, second: Any, columns: Any) -> list[bool]:
        asked.append((list(prompts), list(first), columns["answer"][0].copy()))
        prompts.clear(), first.clear(), second.clear()
        columns["answer"][0].append("more")
        return [False] * 3

    asked: list[Any] = []
    judged(judge)
    assert [(prompts, answer) for prompts, _, answer in asked] == [(["p"] * 3, ["x"])] * 2


def test_what_is_no_judge_is_refused_at_once() -> None:
    async def later(*, prompts: Any, first: Any, second: Any, columns: Any) -> list[bool]:
        return []

    def fewer(prompts: Any, first: Any, second: Any) -> list[bool]:
        return []

    def more(prompts: Any, first: Any, second: Any, columns: Any, model: Any) -> list[bool]:
        return []

    for judge, message in (
        ("gpt", "a judge must be a function, got 'gpt'"),
        (later, "the judge 'later' is async"),
        (fewer, "the judge 'fewer' must take prompts=, first=, second= and columns=: got an unexpected .* 'columns'"),
        (more, "the judge 'more' must take .*: missing a required argument: 'model'"),
    ):
        with pytest.raises(ValueError, match=message):
            check_judge(judge)
    check_judge(verdicts_of(lambda first: []))
    check_judge(lambda **given: [])
