"""Compiles the sampler and the update step for a TPU slice that is not there: does it compile, and does it fit?

    pip install -e '.[train,tpu]'
    python tpu_scripts/compile_for.py --slice v5e:2x4 --size qwen2.5-1.5b --mesh.fsdp 4 --mesh.tensor 2
    python tpu_scripts/compile_for.py --slice v6e:4x4 --model.path MODELS/some-model --update.micro-batches 4

libtpu holds the compiler of every TPU generation and needs no TPU for it (x86-64 Linux). Nothing is run and no weight
is read: of a model's folder, `config.json` is enough. The programs are those of the trainer, made of the same parts,
from abstract arguments with the trainer's shardings; the state is donated as there.

Hardware: any x86-64 Linux machine. Time: minutes; memory: a few GiB.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import math
import os
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from hlo import Collective, collectives
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.update import make_update_step
from jaxrl_llm.algorithms.state import abstract_train_state
from jaxrl_llm.cli import plain_errors
from jaxrl_llm.config import ModelSource
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.models.checkpoints.pretrained import load_config
from jaxrl_llm.models.config import LayerKind, ModelConfig, RopeConfig
from jaxrl_llm.models.lora import abstract_reference, has_adapters
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.engine import Sampler
from jaxrl_llm.sampling.logits import CacheDType, SamplingConfig, SlotAttention
from jaxrl_llm.sampling.traffic import spread, traffic
from jaxrl_llm.sharding import MeshConfig, make_mesh, replicated, sampling_mesh
from jaxrl_llm.types import Rollout

GIB = 2**30
HBM_GIB = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.7, "TPU v6 lite": 31.2, "TPU7x": 94.7}
"""What the compiler lets a program use, by `device_kind`: the chip's memory less what the system keeps (its
versions differ by 0.01)."""

Size = Literal["smollm2-135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b", "llama3.1-8b"]
_QWEN: Any = {
    "layer_kinds": (LayerKind(rope=RopeConfig(theta=1e6)),),
    "max_position_embeddings": 32_768,
    "attention_bias": True,
    "num_kv_heads": 2,
}
_QWEN3: Any = {"layer_kinds": _QWEN["layer_kinds"], "max_position_embeddings": 40_960, "qk_norm": True}
SIZES: dict[Size, ModelConfig] = {
    "smollm2-135m": ModelConfig(49_152, 576, 1536, 30, 9, 3, 64, max_position_embeddings=8192, tie_embeddings=True),
    "qwen2.5-0.5b": ModelConfig(151_936, 896, 4864, 24, 14, head_dim=64, tie_embeddings=True, **_QWEN),
    "qwen2.5-1.5b": ModelConfig(151_936, 1536, 8960, 28, 12, head_dim=128, tie_embeddings=True, **_QWEN),
    "qwen2.5-7b": ModelConfig(152_064, 3584, 18_944, 28, 28, head_dim=128, **(_QWEN | {"num_kv_heads": 4})),
    "qwen3-0.6b": ModelConfig(151_936, 1024, 3072, 28, 16, 8, 128, tie_embeddings=True, **_QWEN3),
    "llama3.1-8b": ModelConfig(128_256, 4096, 14_336, 32, 32, 8, 128, max_position_embeddings=131_072),
}
"""Shapes that need no `config.json`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to run where."""

    slice: str = "v5e:2x4"
    """Generation and chips of the slice: v4:2x2x1, v5e:2x4, v5p:2x2x2, v6e:4x4, tpu7x:2x2x1, …"""
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
    written: int | None = None
    """Tokens that these have on average when it is told what one more reads; `None`: half of the longest."""
    update: UpdateConfig = UpdateConfig(micro_batches=8)
    """Epochs, minibatches, micro-batches."""
    algorithm: PolicyGradient = PolicyGradient()
    """The objective; with a KL term the reference stays in memory, too."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    programs: tuple[Literal["sampler", "update"], ...] = ("sampler", "update")
    """Which programs to compile."""
    dump: Path | None = None
    """Folder for the compiled programs as text (HLO)."""


class Program(NamedTuple):
    """A program of the training loop, before it is compiled."""

    name: str
    function: Any
    """Jitted."""
    arguments: tuple[Any, ...]
    """Abstract, with shardings."""
    resident: Any
    """Arrays that stay in memory while it runs and are none of its arguments."""
    remark: str = ""
    """What else there is to say of it."""


# ---- The slice and the programs ------------------------------------------------------------------


def slice_devices(name: str) -> list[Any]:
    """The devices of a TPU slice, to compile for; no TPU is looked for.

    Raises:
        ValueError: there is no such slice.
        ImportError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("libtpu is not installed, which compiles for TPUs: pip install 'jaxrl-llm[tpu]'")
    # The compiler only: no metadata server is asked, no chip is opened, and other processes may do the same.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # silences a warning; the slice's name decides
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    jax.config.update("jax_platforms", "cpu")
    # It could be written and not be read: a program cannot be loaded without its device.
    jax.config.update("jax_enable_compilation_cache", False)
    generation, _, chips = name.partition(":")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if generation == "v4" else {}
    if chips == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"slice={name!r} cannot be compiled for; name one such as v5e:2x4 ({error})") from error


def build(plan: Plan, mesh: Mesh) -> list[Program]:
    """The sampler and the update step as the trainer makes them, with abstract arguments.

    Raises:
        ValueError: the numbers do not fit the mesh or the model.
    """
    config = SIZES[plan.size] if plan.model.path is None else load_config(plan.model.path)
    if plan.layers is not None:
        config = dataclasses.replace(config, num_layers=plan.layers)
    model, whole = Transformer(plan.model.applied_to(config)), replicated(mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    optimizer = make_optimizer(plan.optimizer, make_schedule(plan.optimizer, 1000))
    state = abstract_train_state(
        model, optimizer, mesh, rounding=plan.optimizer.rounding, offload=plan.optimizer.offload
    )
    placed = jax.tree.map(lambda leaf: leaf.sharding, state)
    needed = plan.algorithm.needs_reference and not has_adapters(state.params)  # without them, the policy is the base
    reference = abstract_reference(state.params, model.config.dtype) if needed else None

    p, g, tc = plan.prompts, plan.samples, plan.completion_tokens
    prompt, lengths = array(p, plan.prompt_tokens), array(p)
    settings = SamplingConfig(
        max_tokens=tc,
        slots=plan.slots,
        tensor=plan.sampling_tensor,
        attention=plan.sampling_attention,
        cache_dtype=plan.sampling_cache_dtype,
    )
    limit = HBM_GIB.get(mesh.devices.flat[0].device_kind)
    sampler = Sampler(
        model,
        settings,
        group=g,
        stop_tokens=(0,),
        mesh=mesh,
        resident=bytes_per_device((state, reference)),
        memory=None if limit is None else limit * GIB,
    )
    sampler.check_length(plan.prompt_tokens)
    sample = jax.jit(sampler.sample, out_shardings=whole)
    rollout = Rollout(
        prompt=prompt,
        prompt_lengths=lengths,
        completion=array(p, g, tc),
        completion_lengths=array(p, g),
        finished=array(p, g, dtype=jnp.bool),
        logprobs=array(p, g, tc, dtype=jnp.float32),
        sampler_logprobs=array(p, g, tc, dtype=jnp.float32),
    )
    step = make_update_step(model, optimizer, plan.algorithm, plan.update)
    update = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole))
    arguments = state.params, prompt, lengths, state.key, array()
    remarks = []
    if "sampler" in plan.programs and plan.slots is not None:
        slots = sampler.slots(p, plan.prompt_tokens)
        chosen = sampler.how_slots_are_chosen(p, plan.prompt_tokens)
        remarks = [*filter(None, [chosen and " " + chosen]), what_a_token_reads(plan, model, mesh, slots)]
    programs = [
        Program("sampler", sample, arguments, (state.opt_state, reference), "\n".join(remarks)),
        Program("update", update, (state, rollout, array(p, g, dtype=jnp.float32), reference), ()),
    ]
    return [program for program in programs if program.name in plan.programs]


def what_a_token_reads(plan: Plan, model: Transformer, mesh: Mesh, slots: int) -> str:
    """A line on the weights, keys and values that a device reads for one more token of each slot.

    Raises:
        ValueError: `written` is no mean of such texts.
    """
    longest = plan.completion_tokens
    mean = longest // 2 if plan.written is None else plan.written
    if not 1 <= 2 * mean <= longest:
        raise ValueError(f"written={mean} must be from 1 to {longest // 2}: texts have up to twice as many tokens")
    written, ours = spread(slots, mean), sampling_mesh(mesh, plan.sampling_tensor)
    shape: dict[str, Any] = {"group": plan.samples, "prompt_width": plan.prompt_tokens, "tokens": longest}
    attentions = dict.fromkeys((plan.sampling_attention, *(("xla",) if plan.sampling_attention == "auto" else ())))
    shape["cache_dtype"] = plan.sampling_cache_dtype
    read = {attention: traffic(model, ours, attention, written, **shape) for attention in attentions}
    pages = ", ".join(f"{one.pages / GIB:.2f} ({attention})" for attention, one in read.items())
    weights = read[plan.sampling_attention].weights / GIB
    texts = f"{slots} texts of {plan.prompt_tokens} + 1 to {written.max()} tokens"
    return f"  a token reads {weights:.2f} GiB of weights and, of {texts}, {pages} of keys and values"


# ---- Compiling and telling -----------------------------------------------------------------------


class Report(NamedTuple):
    """What is known of a compiled program. Bytes are those of one device."""

    seconds: float
    """Processor time to trace, lower and compile."""
    arguments: int
    outputs: int
    """Those that overwrite donated arguments not counted."""
    temporaries: int
    """The block that the program sets aside for everything between, and its code."""
    peak: int
    """The most that is alive at one time; a block is never packed perfectly, so that `needed` is more."""
    resident: int
    """Arrays that stay in memory meanwhile."""
    flops: float
    """By XLA's count, in which the body of a loop runs once."""
    collectives: list[Collective]
    text: str
    """HLO."""
    host: int = 0
    """What the program has in the host's memory for one device, arguments and temporaries."""

    @property
    def needed(self) -> int:
        """Memory without which it cannot run."""
        return self.arguments + self.outputs + self.temporaries + self.resident


def compile_program(program: Program, mesh: Mesh) -> Report:
    """Compiles.

    Raises:
        jax.errors.JaxRuntimeError: the compiler refuses; RESOURCE_EXHAUSTED if the memory does not suffice.
    """
    began = time.process_time()
    with jax.set_mesh(mesh):
        compiled = program.function.lower(*program.arguments).compile()
    seconds, memory, text = time.process_time() - began, compiled.memory_analysis(), compiled.as_text()
    return Report(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        resident=bytes_per_device(program.resident),
        flops=compiled.cost_analysis().get("flops", math.nan),
        collectives=collectives(text),
        text=text,
        host=memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    )


def describe(name: str, report: Report, limit: float | None) -> str:
    """A report as a few lines; `limit` is a device's memory in GiB, if it is known."""

    def gib(size: int) -> str:
        return f"{size / GIB:.2f}"

    verdict = f"needs {gib(report.needed)} GiB a device"
    if limit is not None:
        verdict += f" of {limit}: " + ("fits" if report.needed <= limit * GIB else "DOES NOT FIT")
    parts = f"arguments {gib(report.arguments)}, outputs {gib(report.outputs)}, temporaries {gib(report.temporaries)}"
    if report.resident:
        parts += f", beside it the rest of the state {gib(report.resident)}"
    if report.host:
        parts += f"; in the host's memory {gib(report.host)}"
    rows = [
        f"{name}: {verdict}",
        f"  compiled in {report.seconds:.0f} s of CPU",
        f"  GiB           {parts}; peak of the live {gib(report.peak)}",
        f"  FLOPs         {report.flops:.3g} a device, loop bodies counted once",
    ]
    places: dict[str, list[Collective]] = collections.defaultdict(list)
    for collective in report.collectives:
        places[collective.place].append(collective)
    for place, found in places.items():
        kinds = collections.Counter(one.kind for one in found)
        sizes = {kind: sum(one.bytes for one in found if one.kind == kind) for kind in kinds}
        told = ", ".join(f"{count} {kind} ({sizes[kind] / 2**20:,.1f} MiB)" for kind, count in kinds.items())
        rows.append(f"  {place:<13} {told}")
    return "\n".join(rows if places else [*rows, "  no collectives"])


def main(args: list[str] | None = None) -> None:
    """Compiles and reports; exit status 1 if a program does not fit."""
    with plain_errors():
        plan = read_flags(Plan(), args, __doc__ or "")
        mesh = make_mesh(plan.mesh, slice_devices(plan.slice))
        programs = build(plan, mesh)
    kind = mesh.devices.flat[0].device_kind
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    print(f"{plan.slice}, {mesh.size} × {kind}, mesh {axes or 'of one'}; JAX {jax.__version__}")
    fits = True
    for program in programs:
        limit = HBM_GIB.get(kind)
        try:
            report = compile_program(program, mesh)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            fits = False
            print(f"{program.name}: DOES NOT FIT\n  {str(error).splitlines()[0]}", flush=True)
            continue
        fits &= limit is None or report.needed <= limit * GIB
        print(describe(program.name, report, limit), *filter(None, [program.remark]), sep="\n", flush=True)
        if plan.dump is not None:
            plan.dump.mkdir(parents=True, exist_ok=True)
            (plan.dump / f"{program.name}.hlo.txt").write_text(report.text)
    raise SystemExit(0 if fits else 1)


if __name__ == "__main__":
    main()
