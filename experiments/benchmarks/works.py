"""What is timed: sampling, an update, an iteration, put together from the library's parts as the trainer does it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from make_model import SIZES, Size, word_tokenizer
from measure import WORKS, Shape, Work

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import abstract_train_state, make_train_state
from jaxrl_llm.cli import load_model
from jaxrl_llm.config import ModelSource
from jaxrl_llm.data.prompts import PromptBatch
from jaxrl_llm.models.checkpoints.tokenizers import load_tokenizer
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.models.unrolling import compiler_options
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import CacheDType, SamplingConfig
from jaxrl_llm.sharding import MeshConfig, replicated
from jaxrl_llm.training.ahead import Ahead
from jaxrl_llm.training.episodes.episodes import score_rollout
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.types import Rollout

COUNTED_TOKEN = 260
"""The reward is how often it occurs."""

Phases = dict[str, float]
"""Seconds of the parts of one repetition, where it has any."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is timed, on which model, how often."""

    model: ModelSource = ModelSource(remat="none")
    """The policy; without a path, a random one of `size`."""
    size: Size = "tiny"
    """Size of the random model: tiny (4 layers of width 128), smollm2 (SmolLM2-135M's), qwen3-0.6b."""
    work: tuple[Work, ...] = tuple(WORKS)
    """W1: sampling, W2: one GRPO update, W3: one iteration: sampling, a Python reward, update."""
    kl_coef: float = 0.0
    """Weight of the KL term; above 0 every update scores the batch under the reference, too."""
    shape: Shape = Shape()
    """Sizes of the batch."""
    micro_batches: int = 1
    """Pieces in which the gradient is accumulated, padding included: more of them need less memory."""
    tokens_per_micro_batch: int | None = None
    """Pack completions into rows of so many tokens, and compute no padding."""
    slots: int | None = None
    """Completions that are decoded at a time on a device; None: all."""
    cache_dtype: CacheDType | None = None
    """Type in which the sampler keeps keys and values; None: the model's."""
    room: int | None = None
    """Tokens of the longest completion that the sampler is compiled for, which none of these may reach (None:
    shape.completion_tokens)."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    repeats: int = 5
    """Repetitions that are timed, after the one that compiles."""
    cache: bool = False
    """Use the persistent compilation cache, as training does: the first run fills it, later ones start faster."""
    json: str | None = None
    """File that every record is appended to, one JSON object a line; -: print lines of RESULT and JSON."""
    beside: str | None = None
    """Shell command of a peer, run in turns with ours: {work} in it becomes W1, W2 or W3, and it must print a line
    RESULT {"seconds": {"median": …}}."""
    pairs: int = 3
    """Turns of each with `beside`."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant, and a peer that cannot know its work."""
        for field in ("repeats", "pairs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        longest = self.shape.completion_tokens
        if self.room is not None and self.room < longest:
            raise ValueError(f"room={self.room} must be at least shape.completion_tokens={longest}")
        if self.beside is not None and len(self.work) > 1 and "{work}" not in self.beside:
            raise ValueError(f"--beside {self.beside!r} must contain {{work}}, since {' '.join(self.work)} are run")


# ---- The policy and its programs -----------------------------------------------------------------


def load(config: Benchmark, mesh: jax.sharding.Mesh) -> tuple[Transformer, Params, Any]:
    """Model, parameters on the mesh, tokenizer."""
    source = config.model
    if source.path is not None:
        return *load_model(source, mesh), load_tokenizer(source.path)
    model = Transformer(source.applied_to(SIZES[config.size]))
    return model, random_params(model, mesh), word_tokenizer(model.config.vocab_size)


def random_params(model: Transformer, mesh: jax.sharding.Mesh) -> Params:
    """Parameters, on the mesh."""
    return jax.jit(model.init, out_shardings=model.shardings(mesh))(jax.random.key(0))


class Update(NamedTuple):
    """The update step before it is compiled."""

    program: Any
    """Jitted: (state, rollout, rewards, reference) → (state, metrics), the state donated."""
    state: Any
    """Abstract, with shardings."""
    begin: Callable[[Params], Any]
    """Parameters → a state, with copies of them."""


def make_update(config: Benchmark, mesh: jax.sharding.Mesh, model: Transformer) -> Update:
    """The update step as the trainer makes it."""
    plan = UpdateConfig(micro_batches=config.micro_batches, tokens_per_micro_batch=config.tokens_per_micro_batch)
    optimizer = make_optimizer(OptimizerConfig(), make_schedule(OptimizerConfig(), 1000))
    state = abstract_train_state(model, optimizer, mesh)
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_update_step(model, optimizer, PolicyGradient(kl_coef=config.kl_coef), plan)
    out, options = (placed, replicated(mesh)), compiler_options(model.config, mesh)
    program = jax.jit(step, donate_argnums=0, out_shardings=out, compiler_options=options)
    return Update(program, state, jax.jit(lambda p: make_train_state(p, optimizer, 0), out_shardings=placed))


class Learner:
    """The training state and the compiled update."""

    def __init__(self, config: Benchmark, mesh: jax.sharding.Mesh, model: Transformer, params: Params):
        self._program, _, begin = make_update(config, mesh, model)
        self._mesh, self._reference = mesh, params if config.kl_coef else None
        self.metrics: dict[str, jax.Array] = {}
        """Of the last update."""
        with jax.set_mesh(mesh):
            self.state = begin(params)

    def __call__(self, rollout: Rollout, rewards: jax.Array | np.ndarray) -> None:
        """Makes one update, to its end."""
        with jax.set_mesh(self._mesh):
            self.state, self.metrics = self._program(self.state, rollout, rewards, self._reference)
        jax.block_until_ready((self.state, self.metrics))

    def lower(self, rollout: Any, rewards: Any) -> jax.stages.Lowered:
        """An update's program for such a batch, before it is compiled."""
        return self._program.lower(self.state, rollout, rewards, self._reference)


def make_sampler(config: Benchmark, mesh: jax.sharding.Mesh, model: Transformer) -> Sampler:
    """Samples completions that nothing but their limits stops."""
    longest = config.room or config.shape.completion_tokens
    settings = SamplingConfig(max_tokens=longest, slots=config.slots, cache_dtype=config.cache_dtype)
    return Sampler(model, settings, group=config.shape.samples, stop_tokens=(), mesh=mesh)


def random_prompts(shape: Shape, vocabulary: int, seed: int) -> np.ndarray:
    """Ids `[P, Tp]`."""
    return np.random.default_rng(seed).integers(4, vocabulary, (shape.prompts, shape.prompt_tokens), np.int32)


# ---- The works -----------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """A work that is ready to be timed."""

    model: Transformer
    run: Callable[[int], Phases]
    """Does it once, given the repetition's number."""
    learner: Learner | None
    """What makes updates, where the work does."""


def prepare(config: Benchmark, work: Work, mesh: jax.sharding.Mesh) -> Prepared:
    """Loads the model and makes its programs."""
    model, params, tokenizer = load(config, mesh)
    if work == "W1":
        return Prepared(model, _sampling(config, mesh, model, params), None)
    learner = Learner(config, mesh, model, params)
    if work == "W2":
        return Prepared(model, _updating(config, mesh, model, learner), learner)
    return Prepared(model, _iterating(config, mesh, model, learner, tokenizer), learner)


def _sampling(
    config: Benchmark, mesh: jax.sharding.Mesh, model: Transformer, params: Params
) -> Callable[[int], Phases]:
    sampler, lengths = make_sampler(config, mesh, model), _lengths(config.shape)
    key, limits = jax.random.key_data(jax.random.key(0)), _limits(config)

    def work(number: int) -> Phases:
        prompt = random_prompts(config.shape, model.config.vocab_size, number)
        jax.block_until_ready(sampler(params, prompt, lengths, key, number, limits))
        return {}

    return work


def given_rollout(shape: Shape, vocabulary: int, mesh: jax.sharding.Mesh) -> tuple[Rollout, jax.Array]:
    """Random completions and rewards."""
    random = np.random.default_rng(0)
    size = (shape.prompts, shape.samples, shape.completion_tokens)
    arrays = {
        "prompt": random_prompts(shape, vocabulary, 0),
        "prompt_lengths": _lengths(shape),
        "completion": random.integers(4, vocabulary, size, np.int32),
        "completion_lengths": np.array(shape.completion_lengths, np.int32),
        "finished": np.zeros(size[:2], bool),
        "logprobs": np.zeros(size, np.float32),
        "sampler_logprobs": np.zeros(size, np.float32),
    }
    rewards = random.random(size[:2], np.float32)
    return jax.device_put((Rollout(**arrays), rewards), replicated(mesh))


def _updating(
    config: Benchmark, mesh: jax.sharding.Mesh, model: Transformer, learner: Learner
) -> Callable[[int], Phases]:
    rollout, rewards = given_rollout(config.shape, model.config.vocab_size, mesh)

    def work(number: int) -> Phases:
        learner(rollout, rewards)
        return {}

    return work


def _iterating(
    config: Benchmark, mesh: jax.sharding.Mesh, model: Transformer, learner: Learner, tokenizer: Any
) -> Callable[[int], Phases]:
    shape, vocabulary = config.shape, model.config.vocab_size
    sampler, rewards, limits = make_sampler(config, mesh, model), RewardSum((count_token,)), _limits(config)
    ahead = _compile_ahead(config, mesh, sampler, learner)

    def work(number: int) -> Phases:
        tokens = random_prompts(shape, vocabulary, number)
        batch = PromptBatch(
            tokens=tokens,
            lengths=_lengths(shape),
            prompts=[tokenizer.decode(row.tolist()) for row in tokens],
            openings=[""] * len(tokens),
            columns={},
            indices=np.arange(shape.prompts),
            valid=np.ones(shape.prompts, bool),
            epoch=0,
        )
        times = [time.perf_counter()]
        ahead.wait("sample")
        key = np.asarray(learner.state.key)
        rollout = sampler(learner.state.params, tokens, batch.lengths, key, number, limits)
        jax.block_until_ready(rollout)
        times.append(time.perf_counter())
        episodes = score_rollout(rollout, batch, rewards, tokenizer, stop_tokens=())
        times.append(time.perf_counter())
        ahead.wait("update")
        learner(rollout, episodes.rewards)
        times.append(time.perf_counter())
        return dict(zip(("sample", "reward", "update"), np.diff(times).tolist(), strict=True))

    return work


def _compile_ahead(config: Benchmark, mesh: jax.sharding.Mesh, sampler: Sampler, learner: Learner) -> Ahead:
    """Sampler and update, compiled beside each other as the trainer does it."""
    if _limits(config) is not None:
        return Ahead(mesh, {})
    shape = config.shape
    sampling = sampler.trace(learner.state.params, shape.prompts, shape.prompt_tokens, learner.state.key)
    whole = replicated(mesh)
    rollout = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), sampling.out_info)
    rewards = jax.ShapeDtypeStruct((shape.prompts, shape.samples), np.float32)
    return Ahead(mesh, {"sample": sampling.lower, "update": lambda: learner.lower(rollout, rewards)})


def _lengths(shape: Shape) -> np.ndarray:
    return np.full((shape.prompts,), shape.prompt_tokens, np.int32)


def _limits(config: Benchmark) -> np.ndarray | None:
    full = config.shape.lengths == "full" and config.room in (None, config.shape.completion_tokens)
    return None if full else np.array(config.shape.completion_lengths, np.int32)


def count_token(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]]) -> list[float]:
    """How often one token occurs."""
    return [float(ids.count(COUNTED_TOKEN)) for ids in completion_ids]
