"""The command that evaluates a checkpoint on a data set, by the reward functions of an experiment."""

from __future__ import annotations

import dataclasses
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxrl_llm.checks import check_fields, count, expand_home, nearest_name
from jaxrl_llm.config import Experiment, ModelSource
from jaxrl_llm.data.encoded_rows import Overlong
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.evaluation import (
    COMPLETIONS,
    METRICS,
    Evaluation,
    Measures,
    check_folder,
    evaluate,
    prompts_to_evaluate,
)
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.loading import find_rewards, load_policy, load_tokenizer_of
from jaxrl_llm.launch.run_checkpoints import base_of
from jaxrl_llm.launch.words import take_flag
from jaxrl_llm.models.checkpoints.pretrained import load_config
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sampling.stop_texts import check_stop_texts
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.compilation import enable_persistent_cache
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.run.distributed import ClusterConfig, initialize, is_main_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRun(Measures):
    """All settings of an evaluation."""

    rewards: tuple[RewardFunction | str, ...] = ()
    """Reward functions, or names of them: gsm8k, math, format, …, file.py:function or module:function."""
    reward_weights: tuple[float, ...] | None = None
    """Weight of each reward function; all 1 unless given."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward function may take before the evaluation ends with its name; `None`: any."""
    model: ModelSource = ModelSource()
    """The checkpoint."""
    data: str | None = None
    """File (.jsonl, .json, .csv, .parquet), hf:<name>, tfds:<name> or reasoning_gym:<task>."""
    max_prompts: int | None = None
    """Use the first prompts only."""
    overlong: Overlong = "raise"
    """What to do with prompts behind which the model has no room for a completion: stop at once, or drop them."""
    format: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled; the greedy ones have its lengths and stop texts."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    output: str | None = None
    """Folder of completions.jsonl and metrics.json; `None`: only the table is printed."""
    distributed: bool = False
    """Call jax.distributed.initialize first: on every host of a pod."""
    cluster: ClusterConfig = ClusterConfig()
    """With --distributed, where JAX does not detect the other processes."""

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        drawn = {f"sampling.{name}": "give --samples" for name in ("temperature", "top_k", "top_p", "min_p")}
        idle = {} if self.samples else drawn
        return idle if self.distributed else idle | {"cluster": "add --distributed"}

    @classmethod
    def of(cls, experiment: Experiment) -> EvaluationRun:
        """What an experiment says of its model, held-out prompts, rewards and sampling."""
        data, evaluation, sampling = experiment.data, experiment.evaluation, experiment.sampling
        if sampling.speculate == "history":  # of which an evaluation has none
            sampling = dataclasses.replace(sampling, speculate="prompt")
        return cls(
            rewards=experiment.rewards,
            reward_weights=experiment.reward_weights,
            reward_timeout=experiment.reward_timeout,
            solved_by=evaluation.solved_by,
            model=experiment.model,
            data=data.eval,
            overlong=data.overlong,
            format=data.format,
            sampling=sampling,
            mesh=experiment.mesh,
        )


def run_evaluation(
    args: Sequence[str] | None = None, *, folder: Path | None = None, description: str = ""
) -> Evaluation:
    """Evaluates what a command line names, and prints the table.

    `--experiment=NAME`, a file of `folder`, or the path of another one, says by its `CONFIG` how prompts are made, how
    completions are sampled and which functions score them; flags change it further. Errors end the program with one
    line, before the model is loaded where that can be.

    Args:
        args: the command line; `None`: the process's.
        folder: of experiments that are named without a path; `None`: the working directory.
        description: for `--help`.
    """
    with plain_errors():
        named, rest = take_flag(sys.argv[1:] if args is None else args, "--experiment")
        own = EvaluationRun() if named is None else EvaluationRun.of(_experiment(named, folder or Path()))
    config = read_flags(own, rest, description)
    with plain_errors():
        if not config.rewards:
            raise ValueError(
                "no reward function given: pass --rewards with names of some or file.py:function, or "
                "--experiment=<file>, whose rewards and prompts are taken"
            )
        return _run(config)


def _run(config: EvaluationRun) -> Evaluation:
    model = dataclasses.replace(config.model, path=expand_home(config.model.path))
    output = None if config.output is None else Path(expand_home(config.output))
    check_folder(output)
    config.check(config.sampling)
    config.sampling.check_no_epochs("an evaluation")
    check_fields("evaluation", config, max_prompts=count(config.max_prompts))
    rewards = RewardSum(find_rewards(config.rewards), config.reward_weights, timeout=config.reward_timeout)
    EvaluationConfig(solved_by=config.solved_by).solving_reward(rewards)
    if config.data is None:
        raise ValueError("no prompts given: pass --data=<file, hf:…, tfds:… or reasoning_gym:…>")
    if config.distributed:
        initialize(**vars(config.cluster))
    enable_persistent_cache()
    mesh = make_mesh(config.mesh)
    sampling_mesh(mesh, config.sampling.tensor)
    tokenizer = load_tokenizer_of(model)
    base = base_of(model)
    settings = base.applied_to(load_config(str(base.path)))
    prompts = prompts_to_evaluate(
        config.data,
        tokenizer,
        rewards,
        config.sampling,
        settings.longest_text,
        prompt_format=config.format,
        overlong=config.overlong,
        max_prompts=config.max_prompts,
    )
    check_stop_texts(config.sampling.stop, tokenizer)
    policy = load_policy(model, mesh, tokenizer)
    found = evaluate(
        policy,
        prompts,
        rewards,
        config.sampling,
        samples=config.samples,
        ks=config.ks,
        greedy=config.greedy,
        solved_by=config.solved_by,
        threshold=config.threshold,
        batch_size=config.batch_size,
        seed=config.seed,
        mesh=mesh,
        folder=output,
        tell=print if is_main_process() else None,
    )
    if is_main_process():
        print(found.table())
        if output is not None:
            print(f"{output / COMPLETIONS} has the completions, {output / METRICS} these numbers")
    return found


def _experiment(name: str, folder: Path) -> Experiment:
    """The `CONFIG` of an experiment's file."""
    path = Path(expand_home(name)) if name.endswith(".py") else folder / f"{name}.py"
    if not path.is_file():
        near = nearest_name(path.stem, [other.stem for other in folder.glob("*.py")])
        raise ValueError(f"--experiment={name}: there is no file {path}{near}")
    try:
        config = runpy.run_path(str(path)).get("CONFIG")
    except Exception as error:  # code of anyone, which may raise anything
        raise ValueError(f"--experiment={name}: {path} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(config, Experiment):
        raise ValueError(f"--experiment={name}: {path} has no CONFIG of an experiment on rewards of samples")
    return config
