"""The worked example of CONTRIBUTING.md is an algorithm that trains, and its path through a step is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import make_train_state
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.types import Rollout

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def test_one_step_file_by_file_leads_through_files_that_are_there() -> None:
    section = TEXT.partition("## One GRPO step, file by file")[2].partition("\n## ")[0]
    path = re.findall(r"^\| `([\w/.]+)` \| `(\w+)` \|", section, re.MULTILINE)
    assert len(path) == section.count("\n| `") > 10
    assert path[0] == ("launch/demo.py", "run_demo") and path[-1][0].startswith("losses/")
    for file, name in path:
        body = ast.parse((ROOT / "jaxrl_llm" / file).read_text()).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{file} has no {name}"


def test_the_rooms_are_named_in_the_order_of_their_layers() -> None:
    (order,) = re.findall(r"^(`checks`.*?`api`)$", TEXT, re.MULTILINE | re.DOTALL)
    rooms = {path.stem for path in (ROOT / "jaxrl_llm").iterdir() if path.suffix in ("", ".py") and path.name[0] != "_"}
    assert set(re.findall(r"`(\w+)`", order)) == rooms


def test_the_worked_example_makes_an_update(tiny_config, lively_params) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    algorithm = names["median_grpo"]()
    assert isinstance(algorithm, PolicyGradient)

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 3, 4)).astype(np.int32)
    logprobs = -rng.random(tokens.shape).astype(np.float32)
    rollout = Rollout(
        prompt=tokens[:, 0],
        prompt_lengths=np.full(2, 4, np.int32),
        completion=tokens,
        completion_lengths=np.full((2, 3), 4, np.int32),
        finished=np.ones((2, 3), bool),
        logprobs=logprobs,
        sampler_logprobs=logprobs,
    )
    model, optimizer = Transformer(tiny_config()), optax.sgd(1.0)
    state = make_train_state(lively_params(model), optimizer, 0)
    step = jax.jit(make_update_step(model, optimizer, algorithm))
    _, moved = step(state, rollout, np.array([[0, 1, 5], [2, 2, 0]], np.float32))
    assert float(moved["grad_norm"]) > 0
    _, still = step(state, rollout, np.ones((2, 3), np.float32))
    assert float(still["grad_norm"]) == 0
