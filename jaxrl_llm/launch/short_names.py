"""Short names of the settings that everybody sets, and where what other frameworks call otherwise is to be found."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

SHORT: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "model_path": ("model.path",),
        "train_data": ("data.train",),
        "eval_data": ("data.eval",),
        "dtype": ("model.dtype",),
        "lora_rank": ("model.lora.rank",),
        "lora_alpha": ("model.lora.alpha",),
        "learning_rate": ("optimizer.learning_rate",),
        "warmup_steps": ("optimizer.warmup_steps",),
        "weight_decay": ("optimizer.weight_decay",),
        "max_grad_norm": ("optimizer.max_grad_norm",),
        "steps": ("training.steps",),
        "prompts_per_step": ("training.prompts_per_step",),
        "rows_per_step": ("training.rows_per_step",),
        "num_generations": ("training.samples_per_prompt", "samples"),
        "max_prompt_length": ("data.max_prompt_length",),
        "max_completion_length": ("data.max_completion_length", "sampling.max_tokens"),
        "temperature": ("sampling.temperature",),
        "beta": ("objective.pair_loss.beta", "objective.beta", "algorithm.beta", "algorithm.kl_coef"),
        "epsilon": ("algorithm.surrogate.clip_low+algorithm.surrogate.clip_high",),
        "epsilon_high": ("algorithm.surrogate.clip_high",),
        "num_iterations": ("update.epochs",),
        "eval_every": ("evaluation.every",),
        "save_every": ("training.checkpoint_every",),
    }
)
"""For each short name the settings that it may mean: the first that an experiment has; + joins two that it sets."""

SYNONYMS: Mapping[str, str] = MappingProxyType(
    {
        "model": "model_path",
        "model_name_or_path": "model_path",
        "data": "train_data",
        "dataset": "train_data",
        "dataset_name": "train_data",
        "reward_funcs": "rewards",
        "model_name": "model_path",
        "group_size": "num_generations",
        "num_return_sequences": "num_generations",
        "lora_r": "lora_rank",
        "max_steps": "steps",
        "max_new_tokens": "max_completion_length",
        "max_tokens": "max_completion_length",
        "lr": "learning_rate",
        "eval_steps": "eval_every",
        "save_steps": "save_every",
        "output_dir": "run_dir",
        "run_name": "name",
        "kl_coef": "beta",
        "torch_dtype": "dtype",
    }
)
"""Names that other frameworks have for the same."""

_ROWS = (
    "a step has --training.prompts-per-step × --training.samples-per-prompt rows (--training.rows-per-step), on all "
    "devices together; --update.micro-batches cuts it"
)

FOREIGN: Mapping[str, str] = MappingProxyType(
    {
        "per_device_train_batch_size": _ROWS,
        "batch_size": _ROWS,
        "train_batch_size": _ROWS,
        "micro_batch_size": _ROWS,
        "mini_batch_size": "--update.minibatches is the number of updates that a batch is cut into",
        "gradient_accumulation_steps": "--update.micro-batches cuts a step, and changes no result",
        "generation_batch_size": "a step samples --training.prompts-per-step × --training.samples-per-prompt",
        "steps_per_generation": "--update.minibatches × --update.epochs is the number of updates of a batch",
        "num_train_epochs": "--training.steps is the length of a run, in batches",
        "epochs": "--training.steps is the length of a run, in batches",
        "num_epochs": "--training.steps is the length of a run, in batches",
        "warmup_ratio": "--optimizer.warmup-steps counts steps",
        "system_prompt": "prompts may be lists of messages, the first of them the system's",
        "lr_scheduler_type": "--optimizer.schedule is constant, linear or cosine",
        "adam_beta1": "--optimizer.b1 is the decay of the first moment",
        "adam_beta2": "--optimizer.b2 is the decay of the second moment",
        "bf16": "--model.dtype=bfloat16 computes in bfloat16",
        "fp16": "--model.dtype is float32 or bfloat16",
        "gradient_checkpointing": "--model.remat says what the backward pass computes again",
        "report_to": "metrics go to TensorBoard and metrics.jsonl; --wandb.project adds W&B",
        "use_vllm": "the sampler is part of the program, and there is no engine beside it",
        "vllm_mode": "the sampler is part of the program, and there is no engine beside it",
        "loss_type": "--preset names the method; --algorithm.aggregation, of samples, how losses are summed",
        "scale_rewards": "--algorithm.advantage.scale says by what advantages are divided",
        "use_peft": "--model.lora.rank=16 trains adapters",
        "deepspeed": "--mesh.fsdp=-1 shards parameters, gradients and optimizer over all devices",
        "fsdp": "--mesh.fsdp=-1 shards parameters, gradients and optimizer over all devices",
        "logging_steps": "every step is logged",
        "resume_from_checkpoint": "--resume=<folder of the run> goes on with it",
        "log_completions": "--training.samples-every says how often completions are printed",
        "num_processes": "--cluster.num-processes, with --distributed",
    }
)
"""What other frameworks have and this one does otherwise."""


def setting_paths(config: Any, prefix: str = "") -> Iterator[str]:
    """The dotted paths of all settings of a record."""
    for field in dataclasses.fields(config):
        path, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from setting_paths(value, path + ".")
        else:
            yield path


def paths_of(config: Any, name: str) -> tuple[str, ...]:
    """The settings of `config` that a short name means.

    Args:
        config: a record of settings.
        name: with underscores, without dots; `config`'s own settings go before short names.

    Returns:
        One path, or two that get the same value; none where it is no short name, or means nothing here.
    """
    known = set(setting_paths(config))
    if name in known:
        return ()
    name = SYNONYMS.get(name, name)
    if name in known:
        return (name,)
    for joined in SHORT.get(name, ()):
        paths = tuple(joined.split("+"))
        if known.issuperset(paths):
            return paths
    return ()


def _concerns(text: str, config: Any) -> bool:
    """Whether a record has any of the settings that a text names, if it names some."""
    named = [flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+\.[a-z0-9.-]*[a-z0-9])", text)]
    return not named or not set(setting_paths(config)).isdisjoint(named)


def hint(config: Any, name: str, spelled: Callable[[str], str] = str) -> str | None:
    """Where a setting that there is not may be found: what of `config` is nearest, wherever in its path the slip is.

    Args:
        config: a record of settings.
        name: as it was given, with underscores, with or without dots.
        spelled: writes a setting's name as who gave it would.
    """
    last = name.rpartition(".")[2]
    if last in FOREIGN and _concerns(FOREIGN[last], config):
        return FOREIGN[last]
    if means := paths_of(config, last):
        return f"did you mean {spelled(means[0])}?"
    if last == name and name in {*SHORT, *SYNONYMS, *SYNONYMS.values()}:
        return "other commands have it, and it would have no effect here: leave it out"
    short = [short for short in (*SHORT, *SYNONYMS) if paths_of(config, short)]
    known = [*setting_paths(config), *short]
    folder = name.partition(".")[0] + "."
    known = [path for path in known if path.startswith(folder)] or known
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if not near:
        by_last: dict[str, str] = {}
        for path in sorted(known, key=lambda path: -path.count(".")):  # of several alike, the outermost
            by_last[path.rpartition(".")[2]] = path
        near = [by_last[found] for found in difflib.get_close_matches(last, by_last, n=1)]
    if near:
        return f"did you mean {spelled(near[0])}?"
    return f"--help-all lists those of {folder[:-1]}" if known[0].startswith(folder) else None
