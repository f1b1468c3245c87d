import inspect
import re

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from jaxrl_llm.data import reasoning
from jaxrl_llm.data.reasoning import make_reasoning_gym_reward, reasoning_gym_rows
from jaxrl_llm.data.sources import open_source


def score(reward, rows, completions):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return reward(prompts=columns["question"], completions=completions, **columns)


def test_rows_are_the_packages_own():
    rows = reasoning_gym_rows("chain_sum", size=4, seed=3, config={"min_terms": 2, "max_terms": 2})
    task = reasoning_gym.create_dataset("chain_sum", size=4, seed=3, min_terms=2, max_terms=2)
    assert rows == [task[index] for index in range(4)]
    assert set(rows[0]) == {"question", "answer", "metadata"}
    assert open_source("reasoning_gym:chain_sum,size=4,seed=3,min_terms=2,max_terms=2") == rows
    assert open_source("reasoning_gym:chain_sum,size=4") == reasoning_gym_rows("chain_sum", size=4, seed=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reasoning_gym:chain_sums,size=4", r"no task 'chain_sums'; did you mean 'chain_sum'\?"),
        ("reasoning_gym:chain_sum,size=4,min_term=2", "no option 'min_term'; did you mean 'min_terms'"),
        ("reasoning_gym:chain_sum", "needs size="),
        ("reasoning_gym:chain_sum,size=many", "needs size="),
        ("reasoning_gym:chain_sum,size=4,min_terms=9,max_terms=2", "chain_sum refuses .*max_terms"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec)


def test_reward_is_the_tasks_own_score():
    rows = reasoning_gym_rows("chain_sum", size=3, seed=0)
    reward = make_reasoning_gym_reward("chain_sum")
    right, wrong, partly = rows[0]["answer"], "x", f"It is {rows[2]['answer']}."
    share = len(rows[2]["answer"]) / len(partly)
    assert score(reward, rows, [f" {right}\n", wrong, partly]) == [1.0, 0.0, pytest.approx(share)]
    messages = [[{"role": "assistant", "content": row["answer"]}] for row in rows]
    assert score(reward, rows, messages) == [1.0] * 3
    assert reward.__name__ == "reasoning_gym"


def test_reward_of_a_tagged_answer():
    rows = reasoning_gym_rows("chain_sum", size=3, seed=0)
    reward = make_reasoning_gym_reward("chain_sum", answer_tag="answer")
    first, second, third = (row["answer"] for row in rows)
    completions = [f"<answer>1</answer> no, <answer>\n{first} </answer>", second, f"<answer>{third}"]
    assert score(reward, rows, completions) == [1.0, 0.0, 0.0]


def test_what_the_scorer_cannot_parse_scores_zero():
    rows = reasoning_gym_rows("prime_factorization", size=2, seed=0)
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym.create_dataset("prime_factorization").score_answer("hello", rows[0])
    assert score(make_reasoning_gym_reward("prime_factorization"), rows, ["hello", rows[1]["answer"]]) == [
        0.0,
        1.0,
    ]


def test_countdown_accepts_arithmetic_only(tmp_path):
    rows = reasoning_gym_rows("countdown", size=1, seed=0) * 4
    mark = tmp_path / "executed"
    attack = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    scores = score(make_reasoning_gym_reward("countdown"), rows, [rows[0]["answer"], attack, "9**9**9**9", "9* *9"])
    assert scores == [1.0, 0.0, 0.0, 0.0]
    assert not mark.exists()


@pytest.mark.parametrize("name", sorted(reasoning._EVALUATES_ANSWER))
def test_scorers_that_execute_the_answer_are_refused(name):
    with pytest.raises(ValueError, match="evaluates the answer as Python code"):
        make_reasoning_gym_reward(name)


def test_no_other_scorer_executes_text():
    # A task that is new or has changed must be looked at before its scorer meets a model's text.
    looked_at = {
        "bitwise_arithmetic",  # evaluates its own problem
        "codeio",  # runs its own code to make rows
        "gsm_symbolic",  # evaluates its own fractions
        "number_sorting",  # evaluates its own answer
        "basic_arithmetic",  # evaluates its own expression
        "propositional_logic",  # a parser of its own that happens to be called parse_expr
    }
    executes = re.compile(r"\b(eval|exec|parse_expr|sympify)\(")
    found = {
        name
        for name, (task, _) in DATASETS.items()
        if executes.search(inspect.getsource(inspect.getmodule(task)))  # type: ignore[arg-type]
    }
    assert found - looked_at == (reasoning._EVALUATES_ANSWER | reasoning._EVALUATES_ARITHMETIC) - {"composite"}
