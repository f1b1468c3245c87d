"""Running an experiment: the command line over its configuration, set-up, training, summary."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro

from jaxrl_llm.config import Experiment, flatten
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import RowSource, open_source
from jaxrl_llm.models.pretrained import from_pretrained, load_generation_config, save_pretrained
from jaxrl_llm.models.tokenizers import load_tokenizer, stop_token_ids
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.sharding import make_mesh, parameter_shardings
from jaxrl_llm.training.compilation import enable_persistent_cache
from jaxrl_llm.training.curves import plot_curves
from jaxrl_llm.training.distributed import from_main_process, initialize, is_main_process
from jaxrl_llm.training.metrics import METRICS_FILE, read_metrics
from jaxrl_llm.training.report import Report
from jaxrl_llm.training.scoring import RewardSum
from jaxrl_llm.training.trainer import Trainer, TrainingResult

ConfigT = TypeVar("ConfigT")


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with all that belongs to it."""

    model: Transformer
    params: Params
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    generation_config: dict[str, Any] | None = None


def parse(config: ConfigT, args: list[str] | None = None, *, description: str = "") -> ConfigT:
    """`config` with the command line's changes: `--algorithm.clip-high=0.28 --mesh.fsdp=-1`.

    An unknown flag ends the program at once and names the nearest one.
    """
    return tyro.cli(type(config), args=args, default=config, description=description)


def start(config: Experiment) -> Experiment:
    """Prepares the process: distributed start where asked for, compilation cache, run folder.

    Returns:
        The configuration with `run_dir` filled in; written to `run_dir/config.json`.
    """
    if config.distributed:
        initialize()
    enable_persistent_cache()
    run_dir = config.run_dir or f"runs/{config.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = dataclasses.replace(config, run_dir=from_main_process(run_dir))
    if is_main_process():
        folder = Path(config.run_dir or run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")
    return config


def load_policy(config: Experiment, mesh: jax.sharding.Mesh) -> Policy:
    """The checkpoint that `config.model` names, on the mesh, with its tokenizer.

    Raises:
        ValueError: none is named, or it cannot be used; says why.
    """
    source = config.model
    if source.path is None:
        raise ValueError("no model given: pass --model.path=<folder, .gguf file or hub id>")
    tokenizer = load_tokenizer(source.path)
    generation = load_generation_config(source.path)
    model, params = from_pretrained(
        source.path,
        shardings=lambda t: parameter_shardings(mesh, t.logical_axes(), t.abstract_params()),
        dtype=source.dtype,
        param_dtype=source.param_dtype,
        remat=source.remat,
    )
    return Policy(model, params, tokenizer, stop_token_ids(tokenizer, generation), generation)


def make_trainer(
    config: Experiment,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    *,
    train_rows: RowSource | None = None,
    eval_rows: RowSource | None = None,
) -> Trainer:
    """The trainer that `config` describes.

    Args:
        config: settings, started with `start`.
        policy: the model to train.
        mesh: the device mesh.
        train_rows: prompts, in place of `config.data.train`.
        eval_rows: held-out prompts, in place of `config.data.eval`.
    """
    if train_rows is None:
        if config.data.train is None:
            raise ValueError("no prompts given: pass --data.train=<file, hf:…, tfds:… or reasoning_gym:…>")
        train_rows = open_source(config.data.train)
    if eval_rows is None and config.data.eval is not None:
        eval_rows = open_source(config.data.eval)

    def prompts(rows: RowSource, limit: int | None) -> PromptDataset:
        return PromptDataset(
            rows,
            policy.tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            prompt_format=config.data.format,
            overlong=config.data.overlong,
            max_rows=limit,
        )

    return Trainer(
        model=policy.model,
        params=policy.params,
        tokenizer=policy.tokenizer,
        stop_tokens=policy.stop_tokens,
        dataset=prompts(train_rows, config.data.max_train_prompts),
        eval_dataset=None if eval_rows is None else prompts(eval_rows, config.evaluation.max_prompts),
        rewards=RewardSum(config.rewards, config.reward_weights),
        algorithm=config.algorithm,
        run_dir=config.run_dir or f"runs/{config.name}",
        mesh=mesh,
        training=config.training,
        update=config.update,
        optimizer=config.optimizer,
        sampling=config.sampling,
        evaluation=config.evaluation,
        seed=config.seed,
        resume=config.resume,
        description=config.settings(),
        title=config.name,
        wandb=config.wandb,
    )


def finish(
    config: Experiment, policy: Policy, result: TrainingResult, *, seconds: float, next_steps: tuple[str, ...] = ()
) -> None:
    """Exports the trained model, draws the curves, and says what came out and where it is."""
    folder = Path(config.run_dir or "")
    save_pretrained(
        folder / "model",
        policy.model,
        result.params,
        tokenizer=policy.tokenizer,
        generation_config=policy.generation_config,
        overwrite=True,
    )
    if not is_main_process():
        return
    rows = [("steps", f"{result.step}" + (f" (stopped: {result.stopped})" if result.stopped else ""))]
    for name in ("eval/accuracy", "eval/reward", "eval/completion_length"):
        if name in result.last_evaluation:
            before, after = result.first_evaluation[name], result.last_evaluation[name]
            rows.append((name, f"{before:.3f} → {after:.3f}"))
    rows.append(("time", f"{seconds:.0f} s, compilation included"))
    recorded = {name for line in read_metrics(folder / METRICS_FILE) for name in line}
    panels = [("reward", "eval/reward"), "eval/accuracy", "entropy", ("completions/mean_length",), "grad_norm"]
    shown = [kept for panel in panels if (kept := [n for n in _names(panel) if n in recorded])]
    if shown:
        plot_curves(folder / METRICS_FILE, folder / "curves.png", shown, title=config.name)
        rows.append(("curves", str(folder / "curves.png")))
    rows += [("metrics", str(folder / METRICS_FILE)), ("model", f"{folder / 'model'} (transformers loads it)")]
    Report(result.step).summary(config.name, rows, next_steps=next_steps)


def _names(panel: str | tuple[str, ...]) -> tuple[str, ...]:
    return (panel,) if isinstance(panel, str) else panel


def run(config: Experiment, args: list[str] | None = None, *, description: str = "") -> TrainingResult:
    """Runs an experiment on a checkpoint: what the last line of an experiment file calls.

    Errors in the settings, the data or the checkpoint end the program with one line that says what is wrong.
    """
    config = start(parse(config, args, description=description))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy = load_policy(config, mesh)
        trainer = make_trainer(config, policy, mesh)
    policy = dataclasses.replace(policy, params=None)  # the trainer has its own copy
    result = trainer.run()
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result


@contextlib.contextmanager
def plain_errors() -> Any:
    """Turns errors of the user's input into one line on standard error and exit status 2."""
    try:
        yield
    except (ValueError, FileNotFoundError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
