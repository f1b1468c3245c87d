"""What is to run where."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.checks import check_fields, count
from jaxrl_llm.config import ModelSource
from jaxrl_llm.launch.plan.sizes import Size
from jaxrl_llm.models.config import BaseDType
from jaxrl_llm.sampling.logits import CacheDType, SlotAttention
from jaxrl_llm.sharding import MeshConfig
from jaxrl_llm.training.learner import CriticSource

ProgramName = Literal["sampler", "reward", "update", "iteration"]
OWN = "policy"
"""What stands for the policy's own shape where another model is named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Settings of the command."""

    UNREAD: ClassVar[tuple[str, ...]] = ("optimizer.learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay")
    """Settings that change nothing of it, and are not on the page of the usual ones."""
    slice: str = "v5e:2x4"
    """Generation and chips of the slice: v4:2x2x1, v5e:2x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, …; 2xv5e:4x4: two of
    them; local: the devices of this machine."""
    size: Size = "qwen2.5-1.5b"
    """The model's shape, unless `model.path` names a checkpoint."""
    layers: int | None = None
    """L, another number of layers than the model has: what compiling costs should not depend on it."""
    model: ModelSource = ModelSource(dtype="bfloat16")
    """Checkpoint (its config.json alone is read) and types."""
    prompts: int = 64
    """P, prompts of a step."""
    samples: int = 8
    """G, completions of each prompt."""
    prompt_tokens: int = 512
    """Tp, tokens of the longest prompt."""
    completion_tokens: int = 1024
    """Tc, tokens of the longest completion."""
    slots: int | Literal["auto"] | None = "auto"
    """Completions that are decoded at a time on a device; `auto`: as many as fit, `None`: all."""
    sampling_tensor: int | None = None
    """Devices that share a copy of the weights while sampling; `None`: mesh.tensor."""
    sampling_attention: SlotAttention = "auto"
    """How completions in flight attend."""
    sampling_cache_dtype: CacheDType | None = None
    """Type in which keys and values are kept; `None`: the model's."""
    sampling_weights_dtype: BaseDType | None = None
    """Integers to which the layers' linear maps are rounded before sampling; `None`: they are the model's."""
    written: int | None = None
    """Tokens that these have on average when it is told what one more reads; `None`: half of the longest."""
    update: UpdateConfig = UpdateConfig(micro_batches=8)
    """Epochs, minibatches, micro-batches."""
    algorithm: PolicyGradient = PolicyGradient()
    """The objective; with a KL term the reference stays in memory, too; --preset=ppo has a critic."""
    critic: CriticSource = CriticSource()
    """The critic of an algorithm that is made of one (PPO): of the policy's shape, as a run makes it."""
    reward_model: str | None = None
    """A model whose scores of completions are the rewards: one of the sizes, a checkpoint (its config.json alone is
    read), or `policy`, for one of the policy's shape. It stays in memory in `model.dtype`, on the policy's mesh, and
    reads completions in the pieces in which the update does."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    programs: tuple[ProgramName, ...] | None = None
    """Which programs to compile; `None`: those that the run is: sampler and update, or with a reward model one
    `iteration` of sampler, reward and update. With functions of the host as further rewards it is these three."""
    search: int = 0
    """Find so many plans that fit, the fastest first: meshes, slots, tokens of a row (in place of micro-batches) and
    rematerialisation are tried. Axes of the mesh, sampling_tensor, update.tokens_per_micro_batch and model.remat are
    kept where they are set. Told with the flags of a run."""
    dump: str | None = None
    """Folder for the compiled programs as text (HLO)."""
    json: str | None = None
    """File for all of it as JSON."""
    picture: str | None = None
    """File for the memory of the programs as bars, .png or .svg."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant, rows without room for the longest text, and plans of nothing."""
        counts = {"prompts": 1, "samples": 1, "prompt_tokens": 1, "completion_tokens": 1, "search": 0}
        check_fields("plan", self, **{name: count(getattr(self, name), least=n) for name, n in counts.items()})
        self.update.check_width(self.prompt_tokens, self.completion_tokens)
        lacking = "" if self.made else "leaves nothing to compile"
        if self.reward_model is None and not {"reward", "iteration"}.isdisjoint(self.made):
            lacking = "needs a reward_model"
        if lacking:
            raise ValueError(
                f"programs={self.programs} {lacking}: name sampler or update, or leave it out for all that there are"
            )

    @property
    def made(self) -> tuple[ProgramName, ...]:
        """`programs`, or those that a trainer makes of such a run."""
        if self.programs is not None:
            return self.programs
        return ("sampler", "update") if self.reward_model is None else ("iteration",)

    @property
    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing as the others are, and what is missing."""
        missing = {}
        if not self.algorithm.needs_critic:
            missing["critic"] = f"{self.algorithm.reader} has no critic; --preset=ppo has one"
        if self.search:
            missing |= dict.fromkeys(
                ("programs", "dump"), "a search compiles all programs and writes none; leave out search"
            )
        return missing

    @property
    def group(self) -> int:
        """Completions of each prompt, the greedy one of an algorithm that needs it among them."""
        return self.samples + self.algorithm.needs_greedy

    @property
    def mean_written(self) -> int:
        """`written`, or what stands for it."""
        return self.completion_tokens // 2 if self.written is None else self.written
