"""The package in five words: `load`, `train`, `generate`, `evaluate`, `save`. They raise, and read no command line.

from jaxrl_llm import generate, load, train

policy = load("SmolLM2-135M-Instruct.gguf")
result = train(policy, rows, rewards=[brief], steps=20, learning_rate=1e-5, num_generations=8)
print(result.metrics["reward"], generate(result.policy, ["Name a color."]))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxrl_llm.checks import check_idle, nearest_name
from jaxrl_llm.config import DistillationExperiment, Experiment, ModelSource, OfflineExperiment, RunConfig
from jaxrl_llm.launch import stages
from jaxrl_llm.launch.configure import configure
from jaxrl_llm.launch.evaluation import Evaluation, evaluate
from jaxrl_llm.launch.folder import prepare
from jaxrl_llm.launch.generation import Completion, generate
from jaxrl_llm.launch.loading import Policy, check_writes, find_rewards, load_policy, load_prompts, load_rows, mesh_of
from jaxrl_llm.launch.offline import make_offline_trainer
from jaxrl_llm.launch.on_policy import check_rewarded, make_trainer, presets_of
from jaxrl_llm.launch.settings import check_effects
from jaxrl_llm.launch.teachers import find_teachers
from jaxrl_llm.launch.words import Presets, with_preset
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.models.checkpoints.score_pretrained import save_score_model
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.run.metrics import METRICS_FILE, read_metrics
from jaxrl_llm.training.stage import TrainingResult

__all__ = ["Completion", "Evaluation", "Policy", "Trained", "evaluate", "generate", "load", "save", "train"]

Method = Literal["grpo", "ppo", "trpo", "distill", "sft", "dpo", "kto", "reward-model", "prm"]
"""What `train` does: stages of the command `jaxrl-llm`."""

_ON_POLICY: Mapping[str, Experiment] = {
    "grpo": stages.GRPO,
    "ppo": stages.PPO,
    "trpo": stages.TRPO,
    "distill": stages.DISTILL,
}
_OFFLINE: Mapping[str, tuple[OfflineExperiment, Presets, Callable[[Policy], Policy] | None]] = {
    "sft": (stages.SFT, {}, None),
    "dpo": (stages.DPO, stages.METHODS, None),
    "kto": (stages.KTO, stages.UNPAIRED_METHODS, None),
    "reward-model": (stages.REWARD_MODEL, {}, stages.with_reward_head),
    "prm": (stages.PRM, {}, stages.with_step_head),
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves."""

    policy: Policy
    """The trained model, for `generate`, `evaluate`, `save` or more training."""
    metrics: dict[str, np.ndarray]
    """By name an array `[lines]` float64, one entry a line of `metrics.jsonl` (a step, or an evaluation, whose names
    begin with eval/); NaN where a line has no such metric. `step` says which line is which."""
    folder: Path
    """Of the run: its settings, metrics and checkpoints."""
    stopped: str | None
    """Why it ended early, or `None`."""


@dataclasses.dataclass(frozen=True)
class _Loading:
    """The settings of `load`."""

    model: ModelSource = ModelSource()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def load(path: str | Path, **settings: Any) -> Policy:
    """Loads a checkpoint with its tokenizer, on all devices.

    Args:
        path: a folder of Hugging Face's format, a .gguf file, a hub id, or a checkpoint of a run.
        settings: of the model (`dtype="bfloat16"`, `lora_rank=16`, any other of `ModelSource`), `mesh={"fsdp": 4}`, and
            the `seed` of new adapters.

    Raises:
        ValueError: a setting that there is not, or a checkpoint that cannot be used; says why.
    """
    own = {field.name for field in dataclasses.fields(ModelSource)}
    named = {f"model.{name}" if name in own else name: value for name, value in settings.items()}
    config = configure(_Loading(), {"model.path": str(path)} | named)
    return load_policy(config.model, make_mesh(config.mesh), seed=config.seed)


def train(
    policy: Policy,
    rows: Any,
    *,
    rewards: Sequence[RewardFunction | str] | RewardFunction | str = (),
    method: Method = "grpo",
    preset: str | None = None,
    eval_rows: Any = None,
    **settings: Any,
) -> Trained:
    """Trains a policy on prompts with rewards, or on given rows.

    It is what the command `jaxrl-llm METHOD` does, with the same settings and defaults. `policy` stays as it is.

    Args:
        policy: as `load` gives it.
        rows: prompts or rows: a list of dicts, a data set of `datasets`, a data frame, or where they are (a file,
            hf:<name>, tfds:<name>, reasoning_gym:<task>).
        rewards: of methods that sample: functions `f(prompts, completions, **columns) -> list[float | None]`, or names.
        method: which stage.
        preset: a published algorithm or method of that stage.
        eval_rows: held-out ones; `eval_every` says when they are evaluated.
        settings: by short name (`learning_rate=1e-5`, `num_generations=8`, `teachers=["Qwen/Qwen3-4B"]`), by record
            (`optimizer={"b2": 0.95}`), or as a record itself (`algorithm=PolicyGradient(…)`).

    Raises:
        ValueError: names what does not fit together, before anything is compiled.
        RunError: the run cannot go on: it diverged, or a reward function failed.
    """
    if method not in get_args(Method):
        known = get_args(Method)
        raise ValueError(f"there is no method {method!r}{nearest_name(method, known)}; there are {', '.join(known)}")
    if method not in ("reward-model", "prm"):
        check_writes(policy)
    if method in _ON_POLICY:
        trainer, config = _on_policy(policy, rows, rewards, _ON_POLICY[method], preset, eval_rows, settings)
    else:
        if rewards:
            raise ValueError(f"method={method!r} trains on given rows, and reads no rewards: leave them out")
        trainer, config = _offline(policy, rows, method, preset, eval_rows, settings)
    result = trainer.run()
    return _trained(dataclasses.replace(policy, model=trainer.model), result, config)


def _on_policy(
    policy: Policy,
    rows: Any,
    rewards: Any,
    config: Experiment,
    preset: str | None,
    eval_rows: Any,
    settings: Mapping[str, Any],
) -> tuple[Any, Experiment]:
    config = dataclasses.replace(config, rewards=find_rewards(rewards))
    if not config.rewards and not isinstance(config, DistillationExperiment):
        raise ValueError("no reward function given: pass rewards=[a function, or the name of one]")
    config = _settled(config, policy, preset, presets_of(config), settings)
    check_rewarded(config)
    prompts = load_prompts(config, policy.tokenizer, train_rows=rows, eval_rows=eval_rows)
    mesh, sources = mesh_of(policy), find_teachers(config, policy.tokenizer)
    teachers = [source.load(mesh) for source in sources]
    return make_trainer(config, policy, mesh, prompts=prompts, teachers=teachers), config


def _offline(
    policy: Policy, rows: Any, method: str, preset: str | None, eval_rows: Any, settings: Mapping[str, Any]
) -> tuple[Any, OfflineExperiment]:
    config, presets, prepare_policy = _OFFLINE[method]
    config = _settled(config, policy, preset, presets, settings)
    read = load_rows(config, policy.tokenizer, train_rows=rows, eval_rows=eval_rows)
    if prepare_policy is not None and not isinstance(policy.model, ScoreModel):
        policy = prepare_policy(policy)
    return make_offline_trainer(config, policy, mesh_of(policy), rows=read), config


def _settled(config: Any, policy: Policy, preset: str | None, presets: Presets, settings: Mapping[str, Any]) -> Any:
    """`config` with a preset and other settings, its folder made; model and mesh are the policy's."""
    mesh = _sizes(mesh_of(policy), config.mesh)
    own = dataclasses.replace(config, model=policy.source or config.model, mesh=mesh)
    begun = own if preset is None else with_preset(own, preset, presets)
    changed = configure(begun, settings)
    if changed.model != own.model or changed.mesh != own.mesh:
        raise ValueError("settings of the model and the mesh belong to load(): a policy has them already")
    if changed.data.train is not None or changed.data.eval is not None:
        raise ValueError("rows and eval_rows are what is read: leave data out, or give its path as rows")
    check_effects(own, changed)
    check_idle(changed, begun)
    return prepare(changed)


def _sizes(mesh: jax.sharding.Mesh, other: MeshConfig) -> MeshConfig:
    """The settings of a mesh over all devices; of one that is not, `other`."""
    names = {field.name for field in dataclasses.fields(MeshConfig)}
    return MeshConfig(**mesh.shape) if mesh.size == jax.device_count() and names == set(mesh.shape) else other


def _trained(policy: Policy, result: TrainingResult, config: RunConfig) -> Trained:
    params = {name: result.params[name] for name in policy.model.abstract_params()}
    folder = Path(config.run_dir or "")
    return Trained(dataclasses.replace(policy, params=params, source=None), read_arrays(folder), folder, result.stopped)


def read_arrays(run: str | Path) -> dict[str, np.ndarray]:
    """The metrics of a run as arrays, as `Trained.metrics` has them.

    Args:
        run: its folder.
    """
    lines = read_metrics(Path(run) / METRICS_FILE)
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: np.array([line.get(name, np.nan) for line in lines], np.float64) for name in names}


def save(policy: Policy, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes a policy as a folder that `transformers` loads; adapters are merged into it.

    Args:
        policy: a model with a head of tokens or of scores.
        folder: where to.
        overwrite: replace a model that is there.

    Raises:
        ValueError: there is something, and it is not to be replaced.
    """
    if isinstance(policy.model, ScoreModel):
        return save_score_model(folder, policy.model, policy.params, tokenizer=policy.tokenizer, overwrite=overwrite)
    return save_pretrained(
        folder,
        policy.model,
        policy.params,
        tokenizer=policy.tokenizer,
        generation_config=policy.generation_config,
        overwrite=overwrite,
    )
