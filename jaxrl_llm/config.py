"""The configuration of an experiment as one frozen record, which is also its command line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, Literal

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.interfaces import Algorithm
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.supervised import SupervisedObjective
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig
from jaxrl_llm.data.demonstrations import DemonstrationFormat
from jaxrl_llm.data.encoded_rows import Overlong
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.rows import RowFormat
from jaxrl_llm.models.config import AttentionKernel, BaseDType, DType, LoraConfig, ModelConfig, Remat
from jaxrl_llm.models.unrolling import are_looped
from jaxrl_llm.rewards import RewardFunction, reward_name
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.learner import CriticSource
from jaxrl_llm.training.offline import OfflineEvaluationConfig, OfflineTrainingConfig, OfflineUpdateConfig
from jaxrl_llm.training.on_policy import TrainingConfig
from jaxrl_llm.training.run.completions import CompletionsConfig
from jaxrl_llm.training.run.distributed import ClusterConfig
from jaxrl_llm.training.run.metrics import WandbConfig
from jaxrl_llm.training.star.trainer import StarConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Which checkpoint to train, and in which types."""

    path: str | None = None
    """Folder with config.json and safetensors, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or a checkpoint of a
    run, <run>/checkpoints/<step>."""
    dtype: DType = "float32"
    """Type of activations and matrix products; bfloat16 on TPU and GPU."""
    param_dtype: DType = "float32"
    """Type in which parameters are stored. In bfloat16, `optimizer.rounding` says how small updates add up: by default
    in a float32 copy beside the moments, so that training needs more memory than with parameters in float32, and
    less is moved between devices and from memory."""
    base_dtype: BaseDType | None = None
    """Keep the weights that adapters are trained beside as integers, with a scale for each 32: int8 (1.06 bytes a
    weight) or int4 (0.63). Needs model.lora.rank or model.adapters; embedding, head and norms keep param_dtype."""
    gradient_sums: DType = "float32"
    """Type in which devices sum the gradients of the layers' weights. bfloat16 moves half as much, and costs 0.4 % of
    a gradient on 8 devices, 1.6 to 1.9 % on 256."""
    remat: Remat = "full"
    """What the backward pass computes again: none (the fastest) nothing, full everything from the layers' inputs.
    Between them, attention keeps the outputs of attention, for long texts, and dots those of linear maps. offload is
    full with the layers' inputs in the host's memory."""
    scan_layers: bool | Literal["auto"] = "auto"
    """Compile the layers as one loop, and not one by one; auto: all but those of small models on CPUs, which are then
    faster, and compile faster, too."""
    attention: AttentionKernel = "auto"
    """How attention is computed in training: dense is fastest on short texts, blockwise and splash (TPU) need memory in
    proportion to tokens; auto chooses by platform and length."""
    batch_invariant: bool = False
    """Compute each token by itself, in sampler and learner alike, so that both give it the same log-prob, to the last
    bit, in whatever batch (docs/on_policy.md). Slower; without adapters, on meshes of data and fsdp."""
    long_rope: bool = False
    """Of models with longrope (Phi-3.5, Phi-4-mini): turn all texts by the factors of long ones, so that they may be
    longer than the context before its extension. Without it, texts are that long at most, and turned as these are."""
    lora: LoraConfig = LoraConfig(rank=0)
    """Train low-rank adapters beside the weights, in place of these: --model.lora.rank=16."""
    adapters: str | None = None
    """Folder of adapters in PEFT's format to begin with; rank, alpha and targets are then theirs."""

    bare_reference: bool = False
    """Where a run begins with adapters, the reference of its loss is the base without them, and not the model that the
    run begins with."""
    chat_template: str | None = None
    """File or text of a chat template (Jinja), in place of the tokenizer's."""
    template_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the chat template is given beside the conversation: --model.template-arguments='{"enable_thinking": false}'.
    They are written into the template of the exported model, as its defaults."""

    def __post_init__(self) -> None:
        """Rejects weights that could not be trained."""
        if self.base_dtype is not None and not self.lora.rank and self.adapters is None:
            raise ValueError(
                f"model.base_dtype={self.base_dtype}: weights kept as integers are not trained, adapters beside them "
                "are: pass --model.lora.rank=16, or leave it out"
            )

    def applied_to(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a checkpoint, computed as these settings say."""
        return dataclasses.replace(
            config.with_long_rope() if self.long_rope else config,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            base_dtype=self.base_dtype,
            gradient_sums=self.gradient_sums,
            remat=self.remat,
            scan_layers=are_looped(config) if self.scan_layers == "auto" else self.scan_layers,
            attention=self.attention,
            batch_invariant=self.batch_invariant,
            lora=self.lora if self.lora.rank else None,
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Prompts to train and to evaluate on."""

    train: str | None = None
    """File (.jsonl, .json, .csv, .parquet), hf:<name>, tfds:<name> or reasoning_gym:<task>."""
    eval: str | None = None
    """The same for held-out prompts; `evaluation.every` says when they are evaluated."""
    max_prompt_length: int = 256
    """Tp: tokens of the longest prompt, special tokens included."""
    overlong: Overlong = "raise"
    """What to do with longer prompts: stop at once, or drop and count them."""
    max_train_prompts: int | None = None
    """Use the first prompts only."""
    format: PromptFormat = PromptFormat()
    """How a row becomes a prompt."""


@dataclasses.dataclass(frozen=True)
class OfflineDataConfig:
    """Rows to train and to evaluate on."""

    train: str | None = None
    """File (.jsonl, .json, .csv, .parquet), hf:<name>, tfds:<name> or reasoning_gym:<task>."""
    eval: str | None = None
    """The same for held-out rows; `evaluation.every` says when they are evaluated."""
    max_prompt_length: int = 256
    """Tp: tokens of the longest prompt, special tokens included."""
    max_completion_length: int = 256
    """Tc: tokens of the longest completion, its end included."""
    overlong: Overlong = "raise"
    """What to do with longer ones: stop at once, or drop the row and count it."""
    max_train_rows: int | None = None
    """Use the first rows only."""
    format: RowFormat = DemonstrationFormat()
    """How a row of the data becomes one of the objective."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What runs of every kind have."""

    name: str
    """Name of the run, and of its folder."""
    model: ModelSource = ModelSource()
    """The model."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW and its schedule."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    wandb: WandbConfig = WandbConfig(project="")
    """Also log to Weights & Biases, if a project is named."""
    seed: int = 0
    """Of parameters, samples and orders."""
    run_dir: str | None = None
    """Folder of metrics, checkpoints and the resolved configuration; by default runs/<name>-<time>."""
    resume: bool = False
    """Go on from the latest checkpoint in run_dir, which must hold a run."""
    grace_period: float = 30.0
    """Seconds that SIGTERM leaves before the process is killed. A phase that does not end in a third of them is cut,
    and the last whole step saved: where phases take so long, the host's memory holds a copy of each step's state.
    0: no phase is cut."""
    distributed: bool = False
    """Call jax.distributed.initialize first: on every host of a pod."""
    cluster: ClusterConfig = ClusterConfig()
    """With --distributed, where JAX does not detect the other processes."""

    def settings(self) -> dict[str, Any]:
        """What a resumed run must share, flat and JSON-able.

        Left out is what changes no result, but only memory, speed or what is observed; where the data lie and the
        class of their format, since their content is compared; and, with a constant learning rate, the number of
        steps, so that a run can be extended.
        """
        free = _FREE if self.optimizer.schedule != "constant" else (*_FREE, "training.steps")
        return {
            name: value
            for name, value in flatten(self).items()
            if name not in free and not name.startswith(tuple(f"{record}." for record in free))
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(RunConfig):
    """All settings of a run that learns from its own samples."""

    rewards: tuple[RewardFunction | str, ...] = ()
    """Reward functions, f(prompts, completions, **columns) -> list[float | None], also `async def`, or names of them:
    gsm8k, math, format, …, file.py:function or module:function."""
    reward_weights: tuple[float, ...] | None = None
    """Weight of each reward function; all 1 unless given."""
    reward_timeout: float | None = None
    """Seconds that one call of a reward function or judge may take before the run ends with its name; `None`: any.
    A function that `jaxrl_llm.rewards.with_time_limit` made has its own, after which the run goes on."""
    algorithm: Algorithm = PolicyGradient()
    """The objective."""
    critic: CriticSource = CriticSource()
    """The value function of an algorithm that is made of one (PPO)."""
    data: DataConfig = DataConfig()
    """Prompts."""
    trust_region: TrustRegionConfig | None = None
    """TRPO's step in place of the optimizer's: --trust-region.max-kl=0.01."""
    sampling: SamplingConfig = SamplingConfig()
    """How completions are sampled."""
    training: TrainingConfig = TrainingConfig()
    """Length of the run and size of a step."""
    update: UpdateConfig = UpdateConfig()
    """Epochs, minibatches, micro-batches."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """When and how to evaluate."""
    completions: CompletionsConfig = CompletionsConfig()
    """Which completions the run leaves in its folder, beside their rewards and advantages."""

    def settings(self) -> dict[str, Any]:
        """As those of any run; reward functions by their own names, wherever their file lies by now."""
        settings = super().settings()
        return settings | {"rewards": [name.rpartition(":")[2] for name in settings["rewards"]]}

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        idle = {}
        if self.trust_region is not None:
            idle["optimizer"] = "a trust region takes the optimizer's place; see trust_region"
        if not self.algorithm.needs_critic:
            return idle | {"critic": f"{self.algorithm.reader} has no critic; --preset=ppo has one"}
        if self.critic.shares_trunk:
            return idle
        own = "a critic of its own has its own optimizer; set critic.optimizer.learning_rate"
        return idle | {"algorithm.value.coef": own}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StarExperiment(Experiment):
    """All settings of a run of a model that writes its own training data."""

    UNREAD: ClassVar[tuple[str, ...]] = (
        "training.",
        "algorithm.",
        "critic.",
        "update.epochs",
        "update.minibatches",
        "completions.",
    )
    """Beginnings of the settings that it has and does not read."""
    star: StarConfig = StarConfig()
    """The iterations."""
    hint: str | None = None
    """What the prompt is where the answer is given, for star.rationalize: a format string over the data's columns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationExperiment(Experiment):
    """All settings of a run that learns from teachers, or from itself told more, on its own samples."""

    algorithm: Algorithm = Distillation()
    """Divergence from the teachers."""
    teachers: tuple[str, ...] = ()
    """Models with the policy's tokenizer: folders, .gguf files or hub ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineExperiment(RunConfig):
    """All settings of a run on given rows: supervised fine-tuning, reward models, preferences."""

    objective: Any = SupervisedObjective()
    """What is trained: an `Objective`."""
    data: OfflineDataConfig = OfflineDataConfig()
    """Rows."""
    training: OfflineTrainingConfig = OfflineTrainingConfig()
    """Length of the run and size of a step."""
    update: OfflineUpdateConfig = OfflineUpdateConfig()
    """Micro-batches, and where a reference is computed."""
    evaluation: OfflineEvaluationConfig = OfflineEvaluationConfig()
    """When and how to evaluate."""


_FREE = (
    "name",
    "run_dir",
    "resume",
    "grace_period",
    "distributed",
    "cluster",
    "reward_timeout",
    "wandb",
    "mesh",
    "evaluation",
    "completions",
    "data.train",
    "data.eval",
    "data.format.part",
    "data.format.pairs.part",
    "model.remat",
    "optimizer.offload",
    "critic.optimizer.offload",
    "model.scan_layers",
    "sampling.attention",
    "sampling.slots",
    "sampling.speculate",
    "sampling.speculative_tokens",
    "sampling.tensor",
    "update.micro_batches",
    "update.tokens_per_micro_batch",
    "model.attention",
    "update.reference",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.samples_every",
    "training.max_skipped_steps",
)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A nested record as one level of JSON-able values under dotted names; functions by their names.

    A part that could be another (a record with a base class) stands there with the name of its class as well;
    `jaxrl_llm.launch.configure` reads it back.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        is_part = prefix and type(value).__bases__ != (object,)
        value = ({"part": type(value).__name__} if is_part else {}) | fields
    if isinstance(value, dict):
        flat: dict[str, Any] = {}
        for name, inner in value.items():
            flat |= flatten(inner, f"{prefix}{name}.")
        return flat
    if isinstance(value, tuple | list):
        value = [_as_item(item) for item in value]
    return {prefix[:-1]: json.loads(json.dumps(value, default=str))}


def _as_item(item: Any) -> Any:
    """One of several values of a setting."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {"part": type(item).__name__} | flatten(item)
    return reward_name(item) if callable(item) else item
