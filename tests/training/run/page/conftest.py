from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.training.run.completions import CompletionsConfig, CompletionsWriter
from jaxrl_llm.training.run.metrics import MetricsWriter

MARKUP = "</script><img src=x onerror=document.title='hurt'> é \u2028 \ud800"


def completion(step: int, row: int, sample: int, *, kind: str = "train", text: str = MARKUP) -> dict[str, Any]:
    right = float((row + sample + step) % 3 == 0) if 0 < row < 9 else float(row >= 9)
    told: dict[str, Any] = {
        "kind": kind,
        "row": row,
        "sample": sample,
        "prompt": [{"role": "user", "content": f"what is {row}?"}],
        "completion": text,
        "reward": right,
        "rewards": {"right": right, "short": 0.5},
        "advantage": right - 0.5 if kind == "train" else None,
        "logprob": -1.5 if kind == "train" else None,
        "tokens": 3 + step % 5,
        "finished": sample != 1,
        "extra": {"read": "<b>"},
    }
    if sample == 0 and kind == "train":
        told |= {"token_ids": [1, 2], "token_texts": ["a", "\n"], "token_logprobs": [-1.0, None]}
        told |= {"token_old_logprobs": [-1.1, -0.4], "token_ref_logprobs": [-1.2, -0.3], "token_entropy": [0.5, 0.1]}
    return told


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a run of so many steps."""

    def make(
        steps: int, *, name: str = "run", form: str = "jsonl", first: int = 1, groups: int = 2, **settings
    ) -> Path:
        folder, resumed = tmp_path / name, first - 1 if first > 1 else None
        told = CompletionsConfig(format=form)
        with (
            MetricsWriter(folder, tensorboard=False, resume_step=resumed) as metrics,
            CompletionsWriter(folder, told, resume_step=resumed) as completions,
        ):
            for step in range(first, steps + 1):
                line = {"reward": math.sin(step), "loss": math.nan if step == 2 else 1 / step, "perf/x_seconds": 0.1}
                metrics.write(step, line | {"ratio/mean": 1.0})
                rows = [completion(step, (step + p) % 10, sample) for p in range(groups) for sample in range(3)]
                completions.write(step, lambda rows=rows: rows)
                if step % 10 == 0:
                    metrics.write(step, {"eval/accuracy": step / steps})
                    held_out = [completion(step, row, 0, kind="eval", text=f"{step}") for row in range(2)]
                    completions.write(step, lambda rows=held_out: rows)
        config = {"name": name, "training.steps": steps, "sampling.temperature": 1.0, "optimizer.b1": 0.9} | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make
