import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxrl_llm.rewards import make_math_reward, math_pool, math_reward
from jaxrl_llm.rewards.math_pool import MathPool, Question

# Parses at once; comparing it with a number computes a power with more digits than there are atoms.
HANGING = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def reward():
    return make_math_reward(timeout_s=20.0)


def score(reward, completion, gold):
    return reward([""], [completion], answer=[gold])[0]


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("72", "The answer is 72."),
        ("72", r"$\frac{144}{2}$"),
        ("72", [{"role": "assistant", "content": r"\boxed{72}"}]),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        (r"\frac{1}{2}", "so it is 1/2"),
        (r"$\frac{1}{2}$", "0.5"),
        (r"We add and get \boxed{7}", r"\boxed{7}"),
        ("1,234", "1234"),
        (r"2\sqrt{3}", r"$\sqrt{12}$"),
        ("2^{10}", "1024"),
        ("x+1", "$1+x$"),
        ("(x+1)^2", r"\boxed{x^2+2x+1}"),
        ("1, 2", r"\boxed{2, 1}"),
        (r"\{1,2\}", r"\boxed{\{2,1\}}"),
        (r"\$18.90", r"\boxed{\$18.90}"),
        ("72 dollars", r"\boxed{72}"),
        ("A", r"\boxed{A}"),
        (72, "72"),
        (0.25, r"\boxed{\frac14}"),
    ],
)
def test_equivalent(reward, gold, completion):
    assert score(reward, completion, gold) == 1.0


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("72", ""),
        ("72", "no number"),
        ("72", r"\boxed{73}"),
        ("72", "72 at first, but then 73"),
        ("72", r"\boxed{70}, \boxed{71}, \boxed{72}"),
        ("72", r"\boxed{"),
        ("72", '\x00\ud800 \n {"gold": "1"} right'),
        ("2", r"\boxed{2^{10}}"),
        ("2^{10}", r"\boxed{2}"),
        ("x+1", r"\boxed{1}"),
        (r"\frac{1}{3}", r"\boxed{0.33}"),
        ("72", "(" * 20_000),
    ],
)
def test_not_equivalent(reward, gold, completion):
    assert score(reward, completion, gold) == 0.0


@pytest.mark.parametrize(
    "gold", [None, "", " ", r"\frac{", "$$", r"\boxed{}", r"\boxed{7", "so " * 100, "(((", r"5 \foo 7"]
)
def test_gold_that_cannot_be_read_is_none_and_named_before_training(reward, gold):
    assert score(reward, "72", gold) is None
    problem = reward.check_row(prompt="?", answer=gold)
    assert problem is not None and problem.startswith("'answer': ") and repr(gold)[:100] in problem


@pytest.mark.parametrize(
    "gold", [7, 0.5, "7", "A", "no solution", r"\sqrt{2}", r"so \boxed{\frac12}", "10:30", "hello there"]
)
def test_gold_that_can_be_read_is_no_problem(reward, gold):
    assert reward.check_row(prompt="?", answer=gold) is None


def test_hanging_answers_are_stopped_in_time_and_the_next_one_is_scored():
    reward = make_math_reward(timeout_s=0.5)
    score(reward, "1", "1")  # starts the process
    start = time.monotonic()
    completions = ["72", HANGING, "72", HANGING, r"\boxed{72}"]
    assert reward([""] * 5, completions, answer=["72"] * 5) == [1.0, 0.0, 1.0, 0.0, 1.0]
    elapsed = time.monotonic() - start
    # It did hang, asked once for both; beyond its limit there are two starts of a process.
    assert 0.5 <= elapsed < 20.0


def test_works_from_several_threads_at_once():
    reward = make_math_reward(timeout_s=0.5)
    results: dict[int, list[float | None]] = {}

    def run(index):
        completions = ["72", HANGING, str(index)]
        results[index] = list(reward([""] * 3, completions, answer=["72", "72", "2"]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: [1.0, 0.0, 0.0], 1: [1.0, 0.0, 0.0], 2: [1.0, 0.0, 1.0]}


def test_a_gold_answer_that_cannot_be_computed_with_is_none_and_named_before_training():
    reward = make_math_reward(timeout_s=0.5)
    assert score(reward, r"\boxed{4}", HANGING) is None
    assert "is no gold answer that can be read within the time limit" in reward.check_row(answer=HANGING)


def test_many_hanging_answers_are_bounded_together_and_cost_no_other_answer():
    reward = make_math_reward(timeout_s=1.0, batch_timeout_s=3.0)
    score(reward, r"\boxed{x}", "y+1")  # starts the process
    bombs = [rf"\boxed{{9^{{9^{{9^{{{index}}}}}}}}}" for index in range(10, 60)]
    start = time.monotonic()
    values = reward([], [*bombs, r"\boxed{1+x}"], answer=["x+1"] * 51)
    assert values == [0.0] * 50 + [1.0]
    assert time.monotonic() - start < 25.0  # one after the other: 50


def test_equal_answers_are_asked_about_once(monkeypatch):
    asked = []
    monkeypatch.setattr(math_pool._Worker, "ask", _recording(asked, math_pool._Worker.ask))
    reward = make_math_reward(timeout_s=20.0)
    assert reward([], [r"\boxed{1+x}"] * 5, answer=["x+1"] * 5) == [1.0] * 5
    assert len(asked) == 1


def _recording(asked, ask):
    def record(worker, question, timeout_s):
        asked.append(question)
        ask(worker, question, timeout_s)

    return record


def test_numbers_letters_and_words_start_no_process(monkeypatch):
    monkeypatch.setattr(math_pool, "_Worker", None)
    completions = [
        r"\boxed{1{,}000}",
        "The answer is B.",
        r"\boxed{\text{Yes}}",
        r"\boxed{x^2}",
        r"\boxed{5 apples or 6}",
    ]
    golds = ["1000", "B", "yes", "x^2", "5"]
    assert make_math_reward()([], completions, answer=golds) == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_a_dead_process_is_replaced(tmp_path, monkeypatch):
    # A stand-in for the worker's file, which is run in its place.
    worker = tmp_path / "math_worker.py"
    worker.write_text(
        "import json, sys, time\n"
        "print('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    if request['gold'] == 'hang': time.sleep(60)\n"
        "    print('gold', flush=True)\n"
        "    if request['text'] == 'crash': sys.exit(1)\n"
        "    print(request['text'], flush=True)\n"
    )
    monkeypatch.setattr(math_pool, "__file__", str(tmp_path / "math_pool.py"))
    pool = MathPool(timeout_s=0.5, batch_timeout_s=60.0)
    questions = [("1", "right"), ("hang", "right"), ("1", "crash"), ("1", "wrong"), ("2", "right")]
    verdicts = pool.ask([Question(*question) for question in questions])
    assert verdicts == ["right", "unread", "late", "wrong", "right"]


def test_an_interrupt_leaves_no_verdict_for_the_next_question(monkeypatch):
    pool = MathPool(timeout_s=20.0, batch_timeout_s=60.0)
    assert pool.ask([Question("1", "1")]) == ["right"]
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(MathPool, "_heard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pool.ask([Question("1", "1")])
    assert pool.ask([Question("1", "2")]) == ["wrong"]


def test_a_process_that_does_not_start_is_an_error(tmp_path, monkeypatch, capfd):
    (tmp_path / "math_worker.py").write_text("import no_such_package")
    monkeypatch.setattr(math_pool, "__file__", str(tmp_path / "math_pool.py"))
    with pytest.raises(RuntimeError, match=r"pip install 'jaxrl-llm\[rewards\]'"):
        score(make_math_reward(), r"\boxed{x}", "y+1")
    assert "no_such_package" in capfd.readouterr().err


def run_script(script):
    """Runs Python code; returns only when every process that holds its standard error has ended."""
    return subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=60)


def test_the_process_ends_with_the_interpreter_and_can_be_started_beside_jax():
    result = run_script(
        "import jax, os\n"
        "from jaxrl_llm.rewards.math_pool import MathPool, Question\n"
        "jax.devices()\n"
        "pool = MathPool(1000.0, 1000.0)\n"
        "print(pool.ask([Question('1', '1')]), os.getsid(pool._workers[1]._process.pid) != os.getsid(0))\n"
    )
    assert (result.stdout, result.stderr, result.returncode) == ("['right'] True\n", "", 0)


def test_a_hanging_process_ends_even_if_the_trainer_was_killed():
    start = time.monotonic()
    result = run_script(
        "import os, signal, threading, time\n"
        "from jaxrl_llm.rewards.math_pool import MathPool, Question\n"
        "pool = MathPool(1.0, 60.0)\n"
        "pool.ask([Question('1', '1')])\n"
        "threading.Thread(target=pool.ask, args=([Question('72', '9^{9^{9^{9}}}')],)).start()\n"
        "time.sleep(0.3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert result.returncode == -signal.SIGKILL
    # It had not ended with the trainer: it was at work until its alarm.
    assert 2.0 <= time.monotonic() - start < 30.0


def test_names_column_and_limit():
    assert math_reward.__name__ == "math_reward"
    reward = make_math_reward(answer_column="solution", name="equivalent")
    assert reward.__name__ == "equivalent"
    assert reward([""], ["1"], solution=["1"], answer=["2"]) == [1.0]
    with pytest.raises(ValueError, match="timeout_s must be positive and finite, got 0"):
        make_math_reward(timeout_s=0)
    with pytest.raises(ValueError, match="batch_timeout_s must be positive and finite, got inf"):
        make_math_reward(batch_timeout_s=float("inf"))
