"""Running an experiment: the command line over its configuration, set-up, training, summary."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from safetensors import SafetensorError

from jaxrl_llm.algorithms.iteration import DeviceReward
from jaxrl_llm.algorithms.policy_gradient import PolicyGradient
from jaxrl_llm.algorithms.presets import PRESETS
from jaxrl_llm.algorithms.trust_region import TrustRegionConfig
from jaxrl_llm.config import Experiment, ModelSource, OfflineExperiment, RunConfig, flatten
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import RowSource, nearest_name, open_source
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import add_adapters
from jaxrl_llm.models.peft import load_adapters, load_lora_config, save_adapters
from jaxrl_llm.models.pretrained import load_config, load_generation_config, load_params, save_pretrained
from jaxrl_llm.models.score_pretrained import save_score_model
from jaxrl_llm.models.tokenizers import load_tokenizer, stop_token_ids
from jaxrl_llm.models.transformer import Params, Transformer
from jaxrl_llm.sharding import make_mesh, parameter_shardings
from jaxrl_llm.training.compilation import enable_persistent_cache
from jaxrl_llm.training.curves import plot_curves
from jaxrl_llm.training.damage import DamagedRunError
from jaxrl_llm.training.distributed import ClusterConfig, from_main_process, initialize, is_main_process
from jaxrl_llm.training.episodes import RewardError
from jaxrl_llm.training.formatting import duration
from jaxrl_llm.training.judging import Judge
from jaxrl_llm.training.metrics import METRICS_FILE, read_metrics
from jaxrl_llm.training.offline import OfflineTrainer
from jaxrl_llm.training.report import Report
from jaxrl_llm.training.resume import find_run
from jaxrl_llm.training.scoring import RewardSum
from jaxrl_llm.training.trainer import Trainer, TrainingResult

ConfigT = TypeVar("ConfigT", bound=Experiment)
RunConfigT = TypeVar("RunConfigT", bound=RunConfig)
Panels = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with all that belongs to it."""

    model: Any
    """A `Transformer`; where rows train one, a `ScoreModel`."""
    params: Params
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    generation_config: dict[str, Any] | None = None


def parse(config: ConfigT, args: list[str] | None = None, *, description: str = "") -> ConfigT:
    """`config` with the command line's changes: `--algorithm.surrogate.clip-high=0.28 --mesh.fsdp=-1`.

    `--preset=gspo` puts that published algorithm in place of `config.algorithm`, whose flags may change it further.
    An unknown flag or preset ends the program at once and names the nearest one.
    """
    args = sys.argv[1:] if args is None else list(args)
    with plain_errors():
        chosen, args = _preset(args)
    if chosen is not None:
        config = dataclasses.replace(config, algorithm=chosen)
    names = ", ".join(preset.__name__ for preset in PRESETS)
    description = f"{description}\n\n--preset=NAME begins with a published algorithm: {names}."
    return tyro.cli(type(config), args=args, default=config, description=description)


def _preset(args: list[str]) -> tuple[PolicyGradient | None, list[str]]:
    """The preset that the command line names, if any, and the other arguments."""
    rest, name, arguments = [], None, iter(args)
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if flag != "--preset":
            rest.append(argument)
        else:
            name = value if given else next(arguments, "")
    if name is None:
        return None, rest
    presets = {preset.__name__: preset for preset in PRESETS}
    wanted = name.replace("-", "_")
    if wanted not in presets:
        nearest = nearest_name(wanted, list(presets))
        raise ValueError(f"no preset is named {name!r}{nearest}; there are {', '.join(presets)}")
    return presets[wanted](), rest


@contextlib.contextmanager
def plain_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError, ImportError)) -> Iterator[None]:
    """Turns errors that are no bugs into one line on standard error and an exit status; a bug keeps its traceback.

    The status is 2 for what settings, data and damaged files cause, 1 for what the machine refuses (a full disk, a
    folder that may not be written), 130 for Ctrl-C.

    Args:
        kinds: which errors; by default those that settings, data and files cause.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt
    except kinds as error:
        print(f"error: {error}", file=sys.stderr)
        refused = isinstance(error, OSError | SafetensorError) and not isinstance(error, FileNotFoundError)
        raise SystemExit(1 if refused else 2) from error


def start(config: RunConfigT) -> RunConfigT:
    """Prepares the process: distributed start where asked for, compilation cache, run folder.

    Returns:
        The configuration with `run_dir` filled in: the folder is there, and nothing has been written to it.
    """
    with plain_errors():
        if config.resume and config.run_dir is None:
            raise ValueError("--resume needs --run-dir=<folder of the run>")
        if config.distributed:
            cluster = config.cluster
            initialize(cluster.coordinator_address, cluster.num_processes, cluster.process_id)
        elif config.cluster != ClusterConfig():
            raise ValueError("--cluster.* says where other processes are: add --distributed, or leave it out")
        enable_persistent_cache()
        folder = Path(from_main_process(config.run_dir or _new_folder(config.name)))
        find_run(folder, config.settings(), resume=config.resume)
        config = dataclasses.replace(config, run_dir=str(folder))
        if is_main_process():
            _make_folder(folder)
    return config


def _make_folder(folder: Path, *, exist_ok: bool = True) -> None:
    """Creates a run's folder; one that is still empty when the program ends goes again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=exist_ok)
    if is_new:
        atexit.register(_remove_if_empty, folder.absolute())


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _new_folder(name: str) -> str:
    """Creates `runs/<name>-<time>`, or one numbered after it: several runs may start in the same second."""
    if not is_main_process():
        return ""
    first = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(first)
    for number in itertools.count(2):
        try:
            _make_folder(folder, exist_ok=False)
            break
        except FileExistsError:
            folder = Path(f"{first}-{number}")
    return str(folder)


def load_policy(config: RunConfig, mesh: jax.sharding.Mesh, tokenizer: Any = None) -> Policy:
    """The checkpoint that `config.model` names, on the mesh, with its tokenizer (loaded, unless it is given).

    Raises:
        ValueError: none is named, or it cannot be used; says why.
    """
    path = _path(config.model)
    tokenizer = load_tokenizer(path) if tokenizer is None else tokenizer
    generation = load_generation_config(path)
    model, params = load_model(config.model, mesh, seed=config.seed)
    return Policy(model, params, tokenizer, stop_token_ids(tokenizer, generation), generation)


def load_model(source: ModelSource, mesh: jax.sharding.Mesh, *, seed: int = 0) -> tuple[Transformer, Params]:
    """The checkpoint that `source` names, without its tokenizer; errors as in `load_policy`.

    With adapters where `source` asks for them: those of its folder, or new ones, drawn from `seed`.
    """
    path = _path(source)
    config = source.applied_to(load_config(path))
    if source.adapters is not None:  # read before the base, which may take minutes
        theirs = load_lora_config(source.adapters, config)
        config = dataclasses.replace(config, lora=config.lora or theirs)
    model = Transformer(config)
    shardings = parameter_shardings(mesh, model.logical_axes(), model.abstract_params())
    params = load_params(path, model, shardings)
    if source.adapters is not None:
        return model, load_adapters(source.adapters, model, params, shardings)
    if config.lora is not None:
        params = add_adapters(params, model, jax.random.key(seed), shardings)
    return model, params


def _path(source: ModelSource) -> str:
    if source.path is None:
        raise ValueError("no model given: pass --model.path=<folder, .gguf file or hub id>")
    return source.path


def load_prompts(
    config: Experiment,
    tokenizer: Any,
    *,
    train_rows: RowSource | None = None,
    eval_rows: RowSource | None = None,
) -> tuple[PromptDataset, PromptDataset | None]:
    """Prompts to train on and held-out ones, with all columns that the reward functions require.

    Args:
        config: settings.
        tokenizer: of the model.
        train_rows: prompts, in place of `config.data.train`.
        eval_rows: held-out prompts, in place of `config.data.eval`.

    Raises:
        ValueError: none are given, or they cannot be used; says which and why.
        FileNotFoundError: a file is missing.
    """
    rewards = _reward_sum(config)

    def load(source: str | RowSource, what: str, limit: int | None) -> PromptDataset:
        rows = open_source(source)
        try:
            prompts = PromptDataset(
                rows,
                tokenizer,
                max_prompt_length=config.data.max_prompt_length,
                prompt_format=config.data.format,
                overlong=config.data.overlong,
                max_rows=limit,
            )
            if rewards is not None:
                rewards.check_columns(prompts.column_names)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from error
        return prompts

    training = config.data.train if train_rows is None else train_rows
    if training is None:
        raise ValueError("no prompts given: pass --data.train=<file, hf:…, tfds:… or reasoning_gym:…>")
    if config.data.eval is not None and not config.evaluation.every:
        raise ValueError(
            f"data.eval={config.data.eval} would never be used, since evaluation.every=0: "
            "pass --evaluation.every=<steps>, or --data.eval=None"
        )
    train = load(training, "training prompts", config.data.max_train_prompts)
    evaluation = config.data.eval if eval_rows is None else eval_rows
    held_out = None if evaluation is None else load(evaluation, "held-out prompts", config.evaluation.max_prompts)
    if held_out is None and config.evaluation.every:
        raise ValueError(
            f"evaluation.every={config.evaluation.every} needs held-out prompts: "
            "pass --data.eval=<file, hf:…, tfds:… or reasoning_gym:…>, or --evaluation.every=0"
        )
    return train, held_out


def _reward_sum(config: Experiment) -> RewardSum | None:
    """The reward functions of an experiment, if it has any."""
    return RewardSum(config.rewards, config.reward_weights) if config.rewards else None


def make_trainer(
    config: Experiment,
    policy: Policy,
    mesh: jax.sharding.Mesh,
    *,
    train_rows: RowSource | None = None,
    eval_rows: RowSource | None = None,
    prompts: tuple[PromptDataset, PromptDataset | None] | None = None,
    device_rewards: Sequence[DeviceReward] = (),
    eval_rewards: RewardSum | None = None,
    judge: Judge | None = None,
    critic_params: Params | None = None,
    trust_region: TrustRegionConfig | None = None,
) -> Trainer:
    """The trainer that `config` describes; once all fits together, `config` is written to `run_dir/config.json`.

    Args:
        config: settings, started with `start`.
        policy: the model to train.
        mesh: the device mesh.
        train_rows: prompts, in place of `config.data.train`.
        eval_rows: held-out prompts, in place of `config.data.eval`.
        prompts: what `load_prompts` returned, if it was called before.
        device_rewards: as `Trainer`; with them, `config.rewards` may be empty.
        eval_rewards: as `Trainer`.
        judge: as `Trainer`.
        critic_params: as `Trainer`.
        trust_region: as `Trainer`.
    """
    train, held_out = prompts or load_prompts(config, policy.tokenizer, train_rows=train_rows, eval_rows=eval_rows)
    trainer = Trainer(
        model=policy.model,
        params=policy.params,
        tokenizer=policy.tokenizer,
        stop_tokens=policy.stop_tokens,
        dataset=train,
        eval_dataset=held_out,
        rewards=_reward_sum(config),
        device_rewards=device_rewards,
        eval_rewards=eval_rewards,
        judge=judge,
        critic_params=critic_params,
        trust_region=trust_region,
        algorithm=config.algorithm,
        critic=config.critic,
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
        wandb=config.wandb if config.wandb.project else None,
    )
    write_config(config, trainer.run_dir)
    return trainer


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes the resolved configuration to `config.json` in the run's folder."""
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(flatten(config), indent=2) + "\n")


PANELS: Panels = (
    ("reward", "eval/reward"),
    ("eval/accuracy",),
    ("entropy",),
    ("completions/mean_length",),
    ("grad_norm",),
)
"""What the picture of a run shows, where it was recorded."""

_SUMMED_UP = (
    "eval/accuracy",
    "eval/reward",
    "eval/completion_length",
    "eval/loss",
    "eval/margin",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
)
"""What the summary compares with the beginning, where it was recorded."""


def train(trainer: Trainer | OfflineTrainer) -> TrainingResult:
    """Trains; a reward function that fails ends the program with one line, after the steps before are saved.

    So does a file of the run that goes on, if it cannot be read any more.
    """
    with plain_errors((RewardError, DamagedRunError, ImportError, OSError)):
        return trainer.run()


@plain_errors((OSError, SafetensorError))  # the second is what a full disk is to safetensors
def finish(
    config: Experiment | OfflineExperiment,
    policy: Policy,
    result: TrainingResult,
    *,
    seconds: float,
    next_steps: tuple[str, ...] = (),
    panels: Panels = PANELS,
) -> None:
    """Exports the trained model, draws the curves, and says what came out and where it is.

    Adapters are merged into the model, and exported by themselves, too. A critic's head on the policy's trunk stays in
    the checkpoints: it is no part of the policy.

    Args:
        config: settings.
        policy: the model, without parameters.
        result: what training left.
        seconds: how long it all took.
        next_steps: what to try next, one line each.
        panels: what the picture shows, where it was recorded.
    """
    folder = Path(config.run_dir or "")
    scores = isinstance(policy.model, ScoreModel)
    params = {name: result.params[name] for name in policy.model.abstract_params()}
    if scores:
        save_score_model(folder / "model", policy.model, params, tokenizer=policy.tokenizer, overwrite=True)
    else:
        save_pretrained(
            folder / "model",
            policy.model,
            params,
            tokenizer=policy.tokenizer,
            generation_config=policy.generation_config,
            overwrite=True,
        )
    adapted, adapters = policy.model.config.lora is not None and not scores, folder / "adapters"
    if adapted:
        save_adapters(adapters, policy.model, params, base_name=config.model.path, overwrite=True)
    if not is_main_process():
        return
    rows = [("steps", f"{result.step}" + (f" of {config.training.steps} ({result.stopped})" if result.stopped else ""))]
    for name in _SUMMED_UP:
        if name in result.last_evaluation:
            rows.append((name, f"{result.first_evaluation[name]:.3f} → {result.last_evaluation[name]:.3f}"))
    rows.append(("time", f"{duration(seconds)}, compilation included"))
    recorded = {name for line in read_metrics(folder / METRICS_FILE) for name in line}
    shown = [kept for panel in panels if (kept := [name for name in panel if name in recorded])]
    if shown:
        plot_curves(folder / METRICS_FILE, folder / "curves.png", shown, title=config.name)
        rows.append(("curves", str(folder / "curves.png")))
    rows += [("metrics", str(folder / METRICS_FILE)), ("model", f"{folder / 'model'} (transformers loads it)")]
    rows += [("adapters", f"{adapters} (PEFT loads it)")] if adapted else []
    Report(result.step).summary(config.name, rows, next_steps=next_steps)


def run(config: Experiment, args: list[str] | None = None, *, description: str = "") -> TrainingResult:
    """Runs an experiment on a checkpoint: what the last line of an experiment file calls.

    Errors in the settings, the data, the checkpoint or a reward function end the program with one line that says
    what is wrong.
    """
    config = start(parse(config, args, description=description))
    began = time.perf_counter()
    with plain_errors():
        mesh = make_mesh(config.mesh)
        load_config(_path(config.model))  # before transformers warns of a model that is not implemented
        tokenizer = load_tokenizer(_path(config.model))
        prompts = load_prompts(config, tokenizer)  # before the model, which may take minutes
        policy = load_policy(config, mesh, tokenizer)
        trainer = make_trainer(config, policy, mesh, prompts=prompts)
    policy = dataclasses.replace(policy, params=None)  # the trainer has its own copy
    result = train(trainer)
    finish(config, policy, result, seconds=time.perf_counter() - began)
    return result
