"""The worked example of docs/trees.md trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import optax

from jaxrl_llm.models.transformer import Transformer

TEXT = (Path(__file__).parents[2] / "docs" / "trees.md").read_text()


def test_the_worked_example_trains(tiny_config, lively_params):
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block.replace("4096", "64"), "trees.md", "exec"), names)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 64, (2, 5)).tolist()
    conversations = [prompt + rng.integers(1, 64, rng.integers(1, 6)).tolist() for prompt in prompts for _ in range(3)]
    spoken = [[number >= 5 for number in range(len(tokens))] for tokens in conversations]
    rewards = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    model = Transformer(tiny_config(num_layers=1))
    params = lively_params(model)
    state, metrics = names["train_on_conversations"](model, params, optax.sgd(1e-5), conversations, spoken, rewards)
    assert int(state.step) == 2
    assert float(metrics["grad_norm"]) > 0 and float(metrics["frac_steps_skipped"]) == 0
    assert float(metrics["ratio/max"]) != 1  # the second step is measured against the first
