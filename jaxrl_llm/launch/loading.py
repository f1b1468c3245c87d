"""What a run is made of: the checkpoint that its configuration names, and the data."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from jaxrl_llm.config import Experiment, ModelSource, OfflineExperiment, RunConfig
from jaxrl_llm.data.interfaces import RowSource
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.rows import RowDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.launch.loading_bar import LoadingBar
from jaxrl_llm.launch.run_checkpoints import base_of, checkpoint_params
from jaxrl_llm.models.checkpoints.peft import load_adapters, load_lora_config
from jaxrl_llm.models.checkpoints.pretrained import (
    load_config,
    load_generation_config,
    load_params,
    what_is_left_out,
)
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer, stop_token_ids
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.lora import add_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.rewards.by_name import find_reward
from jaxrl_llm.sampling.checks import check_cut
from jaxrl_llm.sampling.layout import sampling_mesh
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.scorable import check_scorable
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.run.memory import bytes_of, check_memory

DatasetT = TypeVar("DatasetT")

# ---- The model -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with all that belongs to it."""

    model: Any
    """A `Transformer`; where rows train one, a `ScoreModel`."""
    params: Params
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    generation_config: dict[str, Any] | None = None
    source: ModelSource | None = None
    """What it was loaded from, if nothing has changed it since."""


def mesh_of(policy: Policy) -> jax.sharding.Mesh:
    """The devices on which a policy lies.

    Raises:
        ValueError: it is none, but a path, say.
    """
    if not isinstance(policy, Policy):
        raise ValueError(f"a policy is what load(path) gives, not {type(policy).__name__}")
    sharding = jax.tree.leaves(policy.params)[0].sharding
    mesh = getattr(sharding, "mesh", None)
    return mesh if isinstance(mesh, jax.sharding.Mesh) else make_mesh()


def check_writes(policy: Policy) -> None:
    """Refuses a policy that writes no text.

    Raises:
        ValueError: its model has a head of scores.
    """
    if isinstance(policy, Policy) and isinstance(policy.model, ScoreModel):
        raise ValueError("this policy has a head of scores, and writes no text: give one that load(path) gave")


def load_tokenizer_of(source: ModelSource) -> Any:
    """The tokenizer of a checkpoint whose model is known: of another one transformers would warn before we say so.

    Raises:
        ValueError: as `load_policy`.
    """
    source = base_of(source)
    path = _path(source)
    load_config(path)
    return load_tokenizer(path, chat_template=source.chat_template, template_arguments=source.template_arguments)


def load_policy(
    config: RunConfig | ModelSource, mesh: jax.sharding.Mesh, tokenizer: Any = None, *, seed: int = 0
) -> Policy:
    """The checkpoint that a run, or a source alone, names, on the mesh, with its tokenizer (loaded unless given).

    It may be one of a run, `<run>/checkpoints/<step>`: of the run's settings and files is then what it does not hold.
    `seed` is that of new adapters, where a source alone is given.

    Raises:
        ValueError: none is named, or it cannot be used; says why.
    """
    source, seed = (config, seed) if isinstance(config, ModelSource) else (config.model, config.seed)
    path = _path(base_of(source))
    tokenizer = load_tokenizer_of(source) if tokenizer is None else tokenizer
    generation = load_generation_config(path)
    own = None
    if isinstance(config, Experiment):
        own = sampling_mesh(mesh, config.sampling.tensor)
        config.sampling.check_vocabulary(load_config(path).vocab_size)
    model, params = load_model(source, mesh, seed=seed, sampled_on=own)
    return Policy(model, params, tokenizer, stop_token_ids(tokenizer, generation), generation, source)


def load_model(
    source: ModelSource, mesh: jax.sharding.Mesh, *, seed: int = 0, sampled_on: jax.sharding.Mesh | None = None
) -> tuple[Transformer, Params]:
    """The checkpoint that `source` names, without its tokenizer; errors as in `load_policy`.

    With adapters where `source` asks for them: those of its folder, or new ones, drawn from `seed`. A model that cannot
    be cut for the sampler's mesh, `sampled_on`, is refused before it is read.
    """
    if (base := base_of(source)) is not source:
        model, params = load_model(base, mesh, seed=seed, sampled_on=sampled_on)
        return model, checkpoint_params(source, model, params)
    path = _path(source)
    config = source.applied_to(load_config(path))
    if source.adapters is not None:  # read before the base, which may take minutes
        theirs = load_lora_config(source.adapters, config)
        config = dataclasses.replace(config, lora=config.lora or theirs)
    if config.lora is not None and config.lora.rank > config.embed_dim:
        raise ValueError(
            f"model.lora.rank={config.lora.rank} is more than the rank of any matrix of this model: give at most "
            f"{config.embed_dim}, its width"
        )
    model = Transformer(config)
    needs = {"parameters": bytes_of(model.abstract_params())}
    check_memory(mesh, needs, "model.lora.rank, set model.param_dtype=bfloat16, or take a smaller model")
    shardings = model.shardings(mesh)
    if sampled_on is not None:
        check_cut(model, mesh, sampled_on)
    name = Path(path).name or path
    if (remark := what_is_left_out(path)) and jax.process_index() == 0:
        print(f"{name} is a {remark}", file=sys.stderr)
    with LoadingBar(name, bytes_of(model.floats.abstract_params()), enabled=jax.process_index() == 0) as bar:
        params = load_params(path, model, shardings, told=bar)
    if source.adapters is not None:
        return model, load_adapters(source.adapters, model, params, shardings)
    if config.lora is not None:
        params = add_adapters(params, model, jax.random.key(seed), shardings)
    return model, params


def _path(source: ModelSource) -> str:
    if source.path is None or not source.path.strip():
        raise ValueError("no model given: pass --model.path=<folder, .gguf file or hub id>")
    return source.path


# ---- The data ------------------------------------------------------------------------------------


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
    data, rewards = config.data, reward_sum(config)
    _check_lengths(config.model, max_prompt_length=data.max_prompt_length)

    def read(rows: RowSource, limit: int | None) -> PromptDataset:
        prompts = PromptDataset(
            rows,
            tokenizer,
            max_prompt_length=data.max_prompt_length,
            prompt_format=data.format,
            overlong=data.overlong,
            max_rows=limit,
        )
        if rewards is not None:
            check_scorable(rewards, prompts)
        return prompts

    limits = data.max_train_prompts, config.evaluation.max_prompts
    return _load_both(config, read, limits, train_rows, eval_rows, "prompts")


def reward_sum(config: Experiment) -> RewardSum | None:
    """The reward functions of an experiment, if it has any.

    Raises:
        ValueError: one is named that there is not, or the weights do not fit.
        FileNotFoundError: the file of one is missing.
    """
    if not config.rewards:
        return None
    return RewardSum(find_rewards(config.rewards), config.reward_weights, timeout=config.reward_timeout)


def find_rewards(rewards: Sequence[RewardFunction | str] | RewardFunction | str) -> tuple[RewardFunction, ...]:
    """Reward functions, one or several, those found by their names that are given so."""
    if isinstance(rewards, str) or callable(rewards):
        rewards = (rewards,)
    if not isinstance(rewards, Sequence):
        raise ValueError(f"rewards are a function, the name of one, or a list of them, not {type(rewards).__name__}")
    return tuple(find_reward(reward) if isinstance(reward, str) else reward for reward in rewards)


def load_rows(
    config: OfflineExperiment,
    tokenizer: Any,
    *,
    train_rows: RowSource | None = None,
    eval_rows: RowSource | None = None,
) -> tuple[RowDataset, RowDataset | None]:
    """Rows to train on and held-out ones.

    Args:
        config: settings.
        tokenizer: of the model.
        train_rows: rows, in place of `config.data.train`.
        eval_rows: held-out rows, in place of `config.data.eval`.

    Raises:
        ValueError: none are given, or they cannot be used; says which and why.
        FileNotFoundError: a file is missing.
    """
    data = config.data
    lengths = {"max_prompt_length": data.max_prompt_length, "max_completion_length": data.max_completion_length}
    _check_lengths(config.model, **lengths)

    def read(rows: RowSource, limit: int | None) -> RowDataset:
        return data.format.dataset(rows, tokenizer, **lengths, overlong=data.overlong, max_rows=limit)

    limits = data.max_train_rows, config.evaluation.max_rows
    return _load_both(config, read, limits, train_rows, eval_rows, "rows")


def _check_lengths(source: ModelSource, **limits: int) -> None:
    """Refuses lengths beyond the model's: all is padded to them, whatever the data's own lengths are."""
    if source.path is None:  # a model that an experiment makes
        return
    config = source.applied_to(load_config(source.path))
    positions, way = config.longest_text, config.way_to_longer
    for name, limit in limits.items():
        if limit > positions:
            raise ValueError(f"data.{name}={limit} is more than the model's {positions} positions{way}; lower it")


def _load_both(
    config: Experiment | OfflineExperiment,
    read: Callable[[RowSource, int | None], DatasetT],
    limits: tuple[int | None, int | None],
    train_rows: RowSource | None,
    eval_rows: RowSource | None,
    what: str,
) -> tuple[DatasetT, DatasetT | None]:
    """Data to train on and held-out data, from the rows given or else from where the configuration says.

    Args:
        config: settings.
        read: makes a data set of rows, of the first so many of them.
        limits: how many are read to train on and to evaluate on.
        train_rows: in place of `config.data.train`.
        eval_rows: in place of `config.data.eval`.
        what: the rows' name in errors.
    """
    data, every = config.data, config.evaluation.every
    training = data.train if train_rows is None else train_rows
    held_out = data.eval if eval_rows is None else eval_rows
    if training is None:
        raise ValueError(f"no {what} given: pass --data.train={SOURCES}")
    if data.eval is not None and not every:
        raise ValueError(
            f"data.eval={data.eval} would never be used, since evaluation.every=0: "
            "pass --evaluation.every=<steps>, or --data.eval=None"
        )
    if held_out is None and every:
        raise ValueError(
            f"evaluation.every={every} needs held-out {what}: pass --data.eval={SOURCES}, or --evaluation.every=0"
        )

    def load(source: str | RowSource, name: str, limit: int | None) -> DatasetT:
        rows = open_source(source, max_rows=limit)
        try:
            return read(rows, limit)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    train = load(training, f"training {what}", limits[0])
    return train, None if held_out is None or not every else load(held_out, f"held-out {what}", limits[1])


SOURCES = "<file, hf:…, tfds:… or reasoning_gym:…>"
