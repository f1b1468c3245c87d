"""The command that completes prompts with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.checks import check_fields, count, expand_home
from jaxrl_llm.config import ModelSource
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.generation import Completion, generate
from jaxrl_llm.launch.loading import SOURCES, load_policy, load_tokenizer_of
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.stop_texts import check_stop_texts
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import enable_persistent_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRun:
    """All settings of the command."""

    model: ModelSource = ModelSource()
    """The checkpoint."""
    prompts: tuple[str, ...] = ()
    """Texts to complete; what a user says, where the model has a chat template."""
    data: str | None = None
    """In place of prompts: file (.jsonl, .json, .csv, .parquet), hf:<name>, tfds:<name> or reasoning_gym:<task>."""
    max_prompts: int | None = None
    """Use the first rows of the data only."""
    format: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""
    chat: bool = True
    """Write prompts as conversations by the model's chat template, if it has one."""
    samples: int = 1
    """Completions of each prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    seed: int = 0
    """Of the noise."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    output: str | None = None
    """File that gets a line of JSON for each completion, with token ids and log-probs; `None`: texts are printed."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        check_fields("generate", self, samples=count(self.samples), max_prompts=count(self.max_prompts))


def run_generation(args: Sequence[str] | None = None, *, description: str = "") -> list[list[Completion]]:
    """Completes the prompts that a command line gives, and prints the texts or writes them to a file.

    Errors end the program with one line, before the model is loaded where that can be.

    Args:
        args: the command line; `None`: the process's.
        description: for `--help`.
    """
    config = read_flags(GenerationRun(), args, description)
    with plain_errors():
        return _run(config)


def _run(config: GenerationRun) -> list[list[Completion]]:
    output = None if config.output is None else Path(expand_home(config.output))
    if output is not None and output.exists():
        raise ValueError(f"output={output} is there already: choose another --output")
    if output is not None:  # what cannot be written is told before hours of sampling
        output.parent.mkdir(parents=True, exist_ok=True)
    if config.model.path is None:
        raise ValueError("no model given: pass --model=<folder, .gguf file or hub id>")
    if bool(config.prompts) == bool(config.data):
        raise ValueError(f"pass either --prompts 'a text' 'another', or --data={SOURCES}")
    model = dataclasses.replace(config.model, path=expand_home(config.model.path))
    enable_persistent_cache()
    mesh = make_mesh(config.mesh)
    sampling_mesh(mesh, config.sampling.tensor)
    tokenizer = load_tokenizer_of(model)
    check_stop_texts(config.sampling.stop, tokenizer)
    prompts = _prompts(config, tokenizer)
    policy = load_policy(model, mesh, tokenizer)
    found = generate(policy, prompts, sampling=config.sampling, samples=config.samples, seed=config.seed, mesh=mesh)
    if output is None:
        _print(prompts, found)
    else:
        lines = (
            json.dumps({"prompt": prompt} | dataclasses.asdict(completion), ensure_ascii=False)
            for prompt, group in zip(prompts, found, strict=True)
            for completion in group
        )
        output.write_text("".join(f"{line}\n" for line in lines))
        print(f"{output} has {sum(map(len, found))} completions")
    return found


def _prompts(config: GenerationRun, tokenizer: Any) -> list[Any]:
    """What is completed: texts, or conversations."""
    if config.data is not None:
        rows = open_source(config.data, max_rows=config.max_prompts)
        size = len(rows) if config.max_prompts is None else min(config.max_prompts, len(rows))
        return [config.format.prompt(rows[index]) for index in range(size)]
    if config.chat and tokenizer.chat_template:
        return [[{"role": "user", "content": text}] for text in config.prompts]
    return list(config.prompts)


def _print(prompts: Sequence[Any], found: Sequence[Sequence[Completion]]) -> None:
    """Prompts and completions as a reader expects them."""
    for prompt, group in zip(prompts, found, strict=True):
        shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        print(f"── {shown}")
        for completion in group:
            print(completion.text + ("" if completion.finished else " […]"))
            print()
