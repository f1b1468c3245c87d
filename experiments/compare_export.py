"""Does PyTorch write what jaxrl_llm writes? Greedy text of a model that was trained here, from both.

    pip install torch && python experiments/compare_export.py --model runs/RUN/model --data gsm8k_test.jsonl

Prompts are those of `grpo_gsm8k.py`. For each, the sampler's greedy completion (all prompts at once, right-padded) is
compared with that of `generate` in PyTorch's transformers (one at a time), token by token. Prints where they part and
by how much the two tokens' logits differ there (a tie within rounding is no mistake), and ends with status 1 if any do.

Hardware: a CPU. Time: a minute for 135 M parameters and 16 problems.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
import numpy as np
import torch
import transformers
import tyro
from grpo_gsm8k import CONFIG

from jaxrl_llm.cli import load_policy, plain_errors
from jaxrl_llm.config import ModelSource
from jaxrl_llm.data.prompts import PromptBatch, PromptDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared."""

    model: str
    """Folder that transformers loads."""
    data: str
    """Problems, with the column question."""
    problems: int = 16
    """How many of them."""
    max_tokens: int = 96
    """Longest completion."""


def ours(config: Comparison) -> tuple[PromptBatch, list[list[int]], Any, tuple[int, ...]]:
    """The prompts, our completions, the tokenizer and the tokens that end a completion."""
    mesh = make_mesh(devices=jax.devices()[:1])
    source = ModelSource(path=config.model)
    policy = load_policy(dataclasses.replace(CONFIG, model=source), mesh)
    prompts = PromptDataset(
        open_source(config.data),
        policy.tokenizer,
        max_prompt_length=CONFIG.data.max_prompt_length,
        prompt_format=CONFIG.data.format,
        max_rows=config.problems,
    )
    batch = prompts.batch(range(len(prompts)))
    greedy = SamplingConfig(max_tokens=config.max_tokens, temperature=0.0)
    sampler = Sampler(policy.model, greedy, group=1, stop_tokens=policy.stop_tokens, mesh=mesh)
    rollout = sampler(policy.params, batch.tokens, batch.lengths, np.zeros(2, np.uint32), 0)
    rows = zip(np.asarray(rollout.completion[:, 0]), np.asarray(rollout.completion_lengths[:, 0]), strict=True)
    return batch, [row[:length].tolist() for row, length in rows], policy.tokenizer, policy.stop_tokens


def theirs(model: Any, prompt: list[int], max_tokens: int, stop_tokens: tuple[int, ...]) -> list[int]:
    """PyTorch's completion."""
    ids = torch.tensor([prompt])
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(stop_tokens),
        pad_token_id=stop_tokens[0],
    )
    return written[0, len(prompt) :].tolist()


def parting(model: Any, prompt: list[int], one: list[int], other: list[int]) -> str:
    """Where two completions part, and how near their tokens are to each other there."""
    place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return f"one ends after {min(len(one), len(other))} tokens"
    with torch.no_grad():
        logits = model(torch.tensor([prompt + other[:place]])).logits[0, -1]
    return f"token {place}: logits differ by {float(logits[other[place]] - logits[one[place]]):.1e} in PyTorch"


def main(args: list[str] | None = None) -> int:
    """Compares; the exit status."""
    with plain_errors():
        config = tyro.cli(Comparison, args=args, description=__doc__)
        batch, completions, tokenizer, stop_tokens = ours(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    equal = 0
    for number, (row, length, completion) in enumerate(zip(batch.tokens, batch.lengths, completions, strict=True)):
        prompt = row[:length].tolist()
        expected = theirs(model, prompt, config.max_tokens, stop_tokens)
        if completion == expected:
            equal += 1
        else:
            print(f"problem {number}: {parting(model, prompt, completion, expected)}")
            print(f"  ours:    {tokenizer.decode(completion)!r}\n  PyTorch: {tokenizer.decode(expected)!r}")
    tokens = sum(map(len, completions))
    print(f"{equal} of {len(completions)} greedy completions ({tokens} tokens) are the same in jaxrl_llm and PyTorch")
    return 0 if equal == len(completions) else 1


if __name__ == "__main__":
    sys.exit(main())
