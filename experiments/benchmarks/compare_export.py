"""Does PyTorch write what jaxrl_llm writes? Greedy text of a model that was trained here, from both.

    pip install torch && python experiments/benchmarks/compare_export.py --run runs/RUN

Prompts are the first held-out ones of the run, in its format. For each, the sampler's greedy completion (all prompts at
once, right-padded) is compared with that of `generate` in PyTorch's transformers (one at a time), token by token.
Prints where they part and by how much the two tokens' logits differ there (a tie within rounding is no mistake), and
ends with status 1 if any do.

Hardware: a CPU. Time: a minute for 135 M parameters and 16 prompts.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxrl_llm.cli import load_model, plain_errors
from jaxrl_llm.config import ModelSource
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.prompts import PromptBatch, PromptDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.models.checkpoints.pretrained import load_generation_config
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer, stop_token_ids
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared."""

    run: str | None = None
    """Folder of a run, with config.json and model/."""
    prompts: int = 16
    """How many held-out prompts."""
    max_tokens: int | None = None
    """Longest completion; that of the run when not given."""

    @property
    def folder(self) -> Path:
        """That of the run."""
        if self.run is None:
            raise ValueError("no run given: pass --run=<folder of a run>")
        return Path(self.run)

    @property
    def model(self) -> str:
        """Folder that transformers loads."""
        return str(self.folder / "model")


def ours(config: Comparison) -> tuple[PromptBatch, list[list[int]], Any, tuple[int, ...], int]:
    """The prompts, our completions, the tokenizer, the tokens that end a completion, its longest length."""
    settings = json.loads((config.folder / "config.json").read_text())
    if settings["data.eval"] is None:
        raise ValueError(f"{config.run} was run without held-out prompts (data.eval)")
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params = load_model(ModelSource(path=config.model), mesh)
    tokenizer = load_tokenizer(config.model)
    stop_tokens = stop_token_ids(tokenizer, load_generation_config(config.model))
    fields = [field.name for field in dataclasses.fields(PromptFormat)]
    prompts = PromptDataset(
        open_source(settings["data.eval"]),
        tokenizer,
        max_prompt_length=settings["data.max_prompt_length"],
        prompt_format=PromptFormat(**{name: settings[f"data.format.{name}"] for name in fields}),
        overlong=settings["data.overlong"],
        max_rows=config.prompts,
    )
    batch = prompts.batch(range(len(prompts)))
    greedy = SamplingConfig(max_tokens=config.max_tokens or settings["sampling.max_tokens"], temperature=0.0)
    sampler = Sampler(model, greedy, group=1, stop_tokens=stop_tokens, mesh=mesh)
    rollout = sampler(params, batch.tokens, batch.lengths, np.zeros(2, np.uint32), 0)
    rows = zip(np.asarray(rollout.completion[:, 0]), np.asarray(rollout.completion_lengths[:, 0]), strict=True)
    return batch, [row[:length].tolist() for row, length in rows], tokenizer, stop_tokens, greedy.max_tokens


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
        config = read_flags(Comparison(), args, __doc__ or "")
        batch, completions, tokenizer, stop_tokens, max_tokens = ours(config)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    equal = 0
    for number, (row, length, completion) in enumerate(zip(batch.tokens, batch.lengths, completions, strict=True)):
        prompt = row[:length].tolist()
        expected = theirs(model, prompt, max_tokens, stop_tokens)
        if completion == expected:
            equal += 1
        else:
            print(f"prompt {number}: {parting(model, prompt, completion, expected)}")
            print(f"  ours:    {tokenizer.decode(completion)!r}\n  PyTorch: {tokenizer.decode(expected)!r}")
    tokens = sum(map(len, completions))
    print(f"{equal} of {len(completions)} greedy completions ({tokens} tokens) are the same in jaxrl_llm and PyTorch")
    return 0 if equal == len(completions) else 1


if __name__ == "__main__":
    sys.exit(main())
