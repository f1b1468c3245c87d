"""The whole of RLHF: what PPO gains on a reward model trained just before is right, not only well scored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.training.run.metrics import read_metrics

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "ppo_rlhf.py"
TARGET, HORIZON = 1.0, 50
"""The experiment's KL of a completion in nats, and the steps after which the coefficient has found its level."""


@pytest.mark.slow
@pytest.mark.whole_run
def test_ppo_raises_the_gold_reward_and_the_kl_stays_near_its_target(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, str(EXPERIMENT), f"--run-dir={tmp_path}", "--training.steps=200"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    steps = [line for line in lines if "reward" in line]
    gold = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    scores = [line["reward"] for line in steps]
    assert np.mean(scores[-10:]) > np.mean(scores[:10]) + 0.25  # the proxy
    assert gold[-1] > gold[0] + 0.1, gold  # what it stands for, on 500 sums: a standard error is 0.022
    kl = [line["objective/kl"] for line in steps][HORIZON:]
    assert 0.7 * TARGET < np.mean(kl) < 1.3 * TARGET, np.mean(kl)
