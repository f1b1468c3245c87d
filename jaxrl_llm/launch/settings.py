"""What no record of settings can see of itself, refused before anything is read: names, folders, flags in vain."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrl_llm.algorithms.optimizer import make_schedule
from jaxrl_llm.config import Experiment, ModelSource, OfflineExperiment, RunConfig, StarExperiment, flatten
from jaxrl_llm.models.config import ExpertsConfig, LayerKind, ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.checks import row_split
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sharding import make_mesh, row_shards
from jaxrl_llm.training.learner import check_group, make_learner
from jaxrl_llm.training.run.distributed import from_main_process
from jaxrl_llm.training.run.memory import ROWS, check_memory
from jaxrl_llm.training.run.metrics import METRICS_FILE
from jaxrl_llm.training.run.resume import CHECKPOINTS, SavedRun
from jaxrl_llm.training.star.trainer import ITERATIONS

CONFIG_FILE = "config.json"
"""The resolved configuration, in a run's folder."""

# ---- Flags in vain -------------------------------------------------------------------------------


def check_effects(before: Any, after: Any) -> None:
    """Refuses changes of settings that nothing reads, with the others as they are.

    Args:
        before: an experiment's own settings.
        after: the same with the changes of a command line.

    Raises:
        ValueError: names them, and what would give them an effect.
    """
    old, new = flatten(before), flatten(after)
    changed = [name for name in new if new[name] != old.get(name)]
    for names, way_out in _unread(after):
        if idle := [name for name in changed if name.startswith(names)]:
            given = ", ".join(f"{name}={new[name]!r}" for name in idle[:3])
            raise ValueError(f"{given} would have no effect: {way_out}, or leave it out")


def _unread(config: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that nothing reads, by the beginnings of their names, and what would change that."""
    model = getattr(config, "model", None)
    if isinstance(model, ModelSource) and not model.lora.rank:
        unread = "model.lora.alpha", "model.lora.targets", "model.lora.use_rslora"
        with_adapters = "those of model.adapters have their own", "give --model.lora.rank"
        yield unread, with_adapters[model.adapters is None]
    if isinstance(config, RunConfig) and not config.wandb.project:
        yield tuple(f"wandb.{name}" for name in ("entity", "name", "group", "offline")), "give --wandb.project"
    if isinstance(config, StarExperiment):
        yield config.UNREAD, "what an iteration of STaR does is set by --star.*"
    elif isinstance(config, Experiment | OfflineExperiment):
        if not config.evaluation.every:
            yield tuple(f"evaluation.{name}" for name in _EVALUATION), "give --evaluation.every=<steps>"
        if not config.training.checkpoint_every:
            yield ("training.keep_checkpoints",), "give --training.checkpoint-every=<steps>"
    if isinstance(config, Experiment) and config.sampling.greedy:
        yield (
            ("sampling.top_k", "sampling.top_p", "sampling.min_p"),
            "at sampling.temperature=0 the likeliest token is taken; give --sampling.temperature above 0",
        )


_EVALUATION = ("max_prompts", "samples", "solved_by", "batch_size", "max_rows", "best_metric", "best_mode")


# ---- The run and its folder ----------------------------------------------------------------------


def check_names(config: RunConfig) -> None:
    """Refuses a name that is no name of a folder, and places that are named by nothing.

    Raises:
        ValueError: names the setting and its value.
    """
    name = config.name
    if not name or name in (".", "..") or any(sign in name for sign in "/\\\0"):
        raise ValueError(
            f"name={name!r} must be the name of a folder in runs/, without slashes; --run-dir puts a run elsewhere"
        )
    data: Any = getattr(config, "data", None)
    places = {"run_dir": config.run_dir, "model.path": config.model.path, "model.adapters": config.model.adapters}
    places |= {f"data.{kind}": getattr(data, kind, None) for kind in ("train", "eval")}
    for setting, place in places.items():
        if isinstance(place, str) and not place.strip():
            flag = setting.replace("_", "-")
            raise ValueError(f"{setting}={place!r} names nothing: give --{flag} a value, or leave it out")
    if config.run_dir is None:
        return
    folder = Path(config.run_dir)
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"run_dir={config.run_dir} cannot be a folder: {file} is a file; choose another --run-dir")


def check_resumed(folder: Path, saved: SavedRun | None) -> list[str]:
    """What to say of a folder from which a run is to go on.

    Args:
        folder: `--run-dir`.
        saved: the checkpoint that was found in it.

    Raises:
        ValueError: the folder holds no run; names one beside it that does and is spelt like it.
    """
    if saved is not None:
        return []
    holds_run, exists, beside = from_main_process(_look_at(folder))
    if holds_run:
        return [f"{folder} has no checkpoint yet: the run begins anew"]
    alike = difflib.get_close_matches(folder.absolute().name, beside, n=1, cutoff=0.5)
    hint = f"; did you mean --run-dir={folder.parent / alike[0]}?" if alike else ""
    what = "holds no run" if exists else "does not exist"
    raise ValueError(
        f"--resume finds nothing to go on with: {folder} {what}{hint or ';'} to start anew, leave --resume out"
    )


def _look_at(folder: Path) -> tuple[bool, bool, list[str]]:
    """Whether a folder holds a run, whether it exists, and the folders beside it that hold one."""
    beside = [path.name for path in folder.absolute().parent.glob("*/") if _holds_run(path)]
    return _holds_run(folder), folder.exists(), beside


def _holds_run(folder: Path) -> bool:
    """Whether a run of any kind, or several, began in a folder."""
    parts = CONFIG_FILE, METRICS_FILE, CHECKPOINTS, ITERATIONS
    of_several = (path for part in (CONFIG_FILE, METRICS_FILE) for path in folder.glob("*/" + part))
    return any((folder / part).exists() for part in parts) or any(of_several)


def remarks_on_resuming(folder: Path, config: RunConfig) -> list[str]:
    """What to say of settings that a run may change as it goes on, and that change its last bits.

    Args:
        folder: of the run.
        config: the settings with which it goes on.
    """
    path = folder / CONFIG_FILE
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):  # nothing depends on it but a remark
        return []
    now = flatten(config)
    return [
        f"{name} was {before[name]!r} and is {now[name]!r}: the same run but for the last bits of its numbers"
        for name in now
        if name.startswith(_LAST_BITS) and name in before and before[name] != now[name]
    ]


_LAST_BITS = (
    "mesh.",
    "update.micro_batches",
    "update.tokens_per_micro_batch",
    "update.reference",
    "model.attention",
    "model.remat",
    "model.scan_layers",
    "sampling.attention",
    "sampling.slots",
    "sampling.speculate",
    "sampling.speculative_tokens",
    "sampling.tensor",
    "optimizer.offload",
    "completions.",
)

# ---- Settings of a step --------------------------------------------------------------------------


def check_step(config: RunConfig) -> None:
    """Refuses what cannot be learned in this way, whatever the model and the data.

    A trainer finds the same, once it has a model, which may take minutes.

    Raises:
        ValueError: says what does not fit together.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed={config.seed} must be between 0 and {2**32 - 1}")
    mesh = make_mesh(config.mesh)
    shards = row_shards(mesh)
    of_sampler = sampling_mesh(mesh, config.sampling.tensor) if isinstance(config, Experiment) else mesh
    if isinstance(config, StarExperiment):
        config.update.group_split(config.star.rows_per_step, 1, shards)
        config.sampling.check_no_epochs("STaR")
    elif isinstance(config, Experiment):
        training, algorithm = config.training, config.algorithm
        prompts, group = training.prompts_per_step, training.samples_per_prompt
        tokens = 4 * prompts * (config.data.max_prompt_length + group * config.sampling.max_tokens)
        check_memory(mesh, {"a step's tokens": tokens}, ROWS)
        check_group(algorithm, group)
        config.update.check_width(config.data.max_prompt_length, config.sampling.max_tokens)
        config.update.group_split(prompts, group, shards, whole_groups=algorithm.needs_whole_groups)
        row_split(prompts, group + algorithm.needs_greedy, of_sampler, greedy=algorithm.needs_greedy)
        make_learner(
            Transformer(_ANY_MODEL),
            algorithm,
            iterations=training.steps,
            plan=config.update,
            optimizer=config.optimizer,
            sampling=config.sampling,
            critic=config.critic,
            trust_region=config.trust_region,
        )
    elif isinstance(config, OfflineExperiment):
        make_schedule(config.optimizer, config.training.steps)
        rows, data = config.training.rows_per_step, config.data
        needs = {"a step's tokens": 4 * rows * (data.max_prompt_length + data.max_completion_length)}
        settings = "training.rows_per_step, data.max_prompt_length or data.max_completion_length"
        check_memory(mesh, needs, settings)


# With all that a setting may speak of; whether the model has it is not known yet.
_ANY_MODEL = ModelConfig(
    *(8, 8, 8, 1, 1, 1, 8),
    tie_embeddings=True,
    layer_kinds=(LayerKind(experts=True),),
    experts=ExpertsConfig(count=1, per_token=1, width=8),
)
