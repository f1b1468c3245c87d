"""Plans: what is told of compiled programs, on CPU devices and, where libtpu is, for TPUs that are not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.__main__ import EXAMPLES
from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient import presets
from jaxrl_llm.algorithms.policy_gradient.objective import Correction, PolicyGradient
from jaxrl_llm.algorithms.policy_gradient.shaped_estimators import GAEAdvantage
from jaxrl_llm.cli import parse
from jaxrl_llm.config import ModelSource
from jaxrl_llm.device_memory import bytes_per_device
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.launch.plan import command, options
from jaxrl_llm.launch.plan import search as search_module
from jaxrl_llm.launch.plan.command import run_plan
from jaxrl_llm.launch.plan.compiled import Report, compile_program
from jaxrl_llm.launch.plan.hlo import BETWEEN, Collective, collectives
from jaxrl_llm.launch.plan.operations import forward
from jaxrl_llm.launch.plan.programs import GIB, Program, build, model_of
from jaxrl_llm.launch.plan.run_flags import OF_RUN, SAME, experiment_of, run_flags
from jaxrl_llm.launch.plan.search import found_table, search
from jaxrl_llm.launch.plan.settings import Plan
from jaxrl_llm.launch.plan.sizes import SIZES
from jaxrl_llm.launch.plan.slices import CHIPS, Chip
from jaxrl_llm.launch.plan.telling import describe, record
from jaxrl_llm.launch.plan.work import Work, update_work
from jaxrl_llm.launch.stages import GRPO
from jaxrl_llm.models.config import ExpertsConfig, LayerKind, LoraConfig, Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.learner import CriticSource, make_learner

REPOSITORY = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPUs' compiler, is not installed (extra: tpu)"
)


@pytest.fixture
def model_path(tmp_path: Path) -> str:
    """A folder with a tiny model's config.json and nothing else."""
    golden = json.loads((REPOSITORY / "tests/models/golden/qwen2.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(golden["config"]))
    return str(tmp_path)


def small(model_path: str, **changes):
    sizes = {"prompts": 4, "samples": 4, "prompt_tokens": 8, "completion_tokens": 8}
    other = {"model": ModelSource(path=model_path), "update": UpdateConfig(micro_batches=2)}
    return Plan(**{**sizes, **other, **changes})


def arguments(model_path: str, *more: str) -> list[str]:
    sizes = {"prompts": 8, "samples": 4, "prompt-tokens": 16, "completion-tokens": 16, "update.micro-batches": 2}
    return ["--model.path", model_path, *(f"--{name}={size}" for name, size in sizes.items()), *more]


# ---- Collectives ---------------------------------------------------------------------------------

HLO = """\
HloModule jit_f, is_scheduled=true

%all-reduce-scatter.1 (input: f32[8,4]) -> f32[8,2] {
  %all-reduce.1 = f32[8,4]{1,0} all-reduce(%input), channel_id=4, to_apply=%add
  ROOT %slice = f32[8,2]{1,0} dynamic-slice(%all-reduce.1)
}

%step.1 (input: f32[3]) -> f32[6] {
  ROOT %gathered.1 = f32[6]{0} all-gather(%input), channel_id=1, chain_id="3", metadata={op_name="g"}
}

%step.2 (input: f32[3]) -> f32[6] {
  %gathered.2 = f32[6]{0:S(1)} all-gather(%input), channel_id=1, chain_id="3", metadata={op_name="g"}
  ROOT %gathered.3 = f32[6]{0:S(1)} all-gather(%input), channel_id=1, chain_id="4", metadata={op_name="g"}
}

%inner_body (p: (s32[])) -> (s32[]) {
  %permute = (bf16[3,4]{1,0}, bf16[3,4]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=3
}

%condition (p: (s32[])) -> pred[] {
  %all-reduce.2 = pred[] all-reduce(%p), channel_id=5
}

%body (p: (s32[])) -> (s32[]) {
  %while.1 = (s32[]) while(%p), condition=%nothing, body=%inner_body, metadata={op_name="x"}
  %fused = f32[8,2]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %fused.again = f32[8,2]{1,0} fusion(%fused), kind=kCustom, calls=%all-reduce-scatter.1
  %scattered.1 = f32[2]{0} reduce-scatter(%p), channel_id=1, metadata={op_name="f/shard_map/reduce_scatter"}
  %scattered.2 = f32[2]{0} reduce-scatter(%p), channel_id=1, metadata={op_name="f/shard_map/reduce_scatter"}
  %started = f32[6]{0} fusion(%p), kind=kCustom, calls=%step.1
  %done = f32[6]{0} fusion(%started), kind=kCustom, calls=%step.2
  %send.1 = (f32[8,2]{1,0:T(8,128)}, u32[], token[]) send(%fused), channel_id=7, handler="xla_megascale_runtime"
  %recv.1 = (f32[8,2]{1,0:T(8,128)}, u32[], token[]) recv(%p), channel_id=6, handler="xla_megascale_runtime"
}

%nothing (p: (s32[])) -> pred[] {
  %constant.6 = s32[]{:T(128)} constant(9)
  %turn = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%turn, %constant.6), direction=LT
}

ENTRY %main (p: s32[]) -> s32[] {
  %gathered = f32[16]{0:T(128)S(1)} all-gather(%p), channel_id=1, metadata={op_name="jit(i)/sampler/x"}
  %both = (f32[2]{0}, s8[5]{0}) all-reduce(%p, %p), channel_id=2, to_apply=%add
  %while.2 = (s32[]) while(%p), condition=%condition, body=%body, metadata={op_name="jit(i)/update/while"}
}
"""


def test_collectives_are_found_where_they_run():
    assert [tuple(one) for one in collectives(HLO)] == [
        ("all-gather", 64, "once", 1, 0, 1, "sampler"),
        ("all-reduce", 8 + 5, "once", 1, 0, 1, ""),
        ("all-reduce", 1, "loop 1", 1, 1, 1, "update"),
        ("collective-permute", 24, "loop 1 inner", 9, 1, 1, "update"),
        ("reduce-scatter", 128, "loop 1", 1, 1, 1, "update"),  # written down once for each fusion it is part of
        ("reduce-scatter", 8, "loop 1", 1, 1, 1, "update"),
        ("reduce-scatter", 8, "loop 1", 1, 1, 1, "update"),  # another one, on the same channel
        ("all-gather", 24, "loop 1", 1, 1, 1, "update"),  # in two steps
        ("all-gather", 24, "loop 1", 1, 1, 1, "update"),
        ("between slices", 64, "loop 1", 1, 1, 1, "update"),
    ]


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no HLO module"):
        collectives("")


def test_collectives_of_a_real_program(mesh: Mesh):
    """A gather before a loop, and a sum over devices each time around it."""
    split, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in ("fsdp", None))

    def program(weight: jax.Array, x: jax.Array) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            return jnp.tanh(x * jax.lax.with_sharding_constraint(x, split).sum())

        weight = jax.lax.with_sharding_constraint(weight, whole)
        return jax.lax.fori_loop(0, 5, step, x) + weight

    shapes = [jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding) for sharding in (split, whole)]
    text = jax.jit(program, out_shardings=whole).lower(*shapes).compile().as_text()
    found = {(one.kind, one.place, one.times, one.open_loops) for one in collectives(text)}
    assert ("all-gather", "once", 1, 0) in found
    assert ("all-reduce", "loop 1", 5, 0) in found


# ---- Programs ------------------------------------------------------------------------------------


def test_memory_is_that_of_the_arguments_on_one_device(model_path: str):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    plan = small(model_path, algorithm=PolicyGradient(kl_coef=0.1))
    programs = {program.name: program for program in build(plan, mesh)}
    update, sampler = programs["update"], programs["sampler"]
    report = compile_program(update, mesh)
    state, reference = update.arguments[0], update.arguments[3]

    assert report.arguments == pytest.approx(bytes_per_device(update.arguments), rel=0.02)
    # Donated: the new state takes no memory beside the old one.
    assert report.outputs < 0.1 * bytes_per_device(state)
    # While it samples, the moments and the reference are there, too.
    resident = bytes_per_device((state.opt_state, reference))
    assert compile_program(sampler, mesh).resident == resident
    parameters = bytes_per_device(state.params)
    assert resident == pytest.approx(3 * parameters, rel=0.02)
    assert report.collectives


def test_parts_of_ppo_are_those_of_real_arrays(model_path: str):
    """Policy, critic, reference and reward model on eight devices, as a trainer has them, and what stays beside each
    program."""
    mesh, algorithm = make_mesh(MeshConfig(fsdp=2, tensor=4)), presets.ppo()
    apart: Any = ("sampler", "reward", "update")
    plan = small(model_path, algorithm=algorithm, reward_model="policy", programs=apart)
    sampler, reward, update = build(plan, mesh)
    model, others = model_of(plan, mesh), {"optimizer": plan.optimizer, "trust_region": None}
    shape: Any = {"iterations": 2, "plan": plan.update, "sampling": SamplingConfig(max_tokens=8), **others}
    learner = make_learner(model, algorithm, critic=CriticSource(), **shape)
    placed: Any = jax.tree.map(lambda leaf: leaf.sharding, learner.abstract_state(mesh))
    start = jax.jit(learner.start, static_argnames="seed", out_shardings=placed)
    params = jax.device_put(model.init(jax.random.key(0)), model.shardings(mesh))
    state = start(params, None, seed=0)
    judge = ScoreModel(model)
    of_judge = jax.device_put(judge.from_trunk(params), judge.shardings(mesh))

    def held(tree: Any, dtype: Any = None) -> int:
        arrays = [leaf if dtype is None else leaf.astype(dtype) for leaf in jax.tree.leaves(tree)]
        return sum(part.data.nbytes for leaf in arrays for part in leaf.addressable_shards if part.device.id == 0)

    expected = {
        "parameters": held(state.params),
        "optimizer": held(state.replace(params=None, critic=None)),
        "critic": held(state.critic.params),
        "critic's optimizer": held(state.critic.opt_state),
        "reference": held(state.params, model.config.dtype),
        "reward model": held(of_judge, model.config.dtype),
    }
    for program in (sampler, reward, update):
        assert program.parts | expected == program.parts
    assert update.parts["gradients"] == expected["parameters"] + expected["critic"]
    of_optimizers = expected["critic"] + held((state.opt_state, state.critic.opt_state))
    beside_sampler = of_optimizers + expected["reference"] + expected["reward model"]
    assert bytes_per_device(sampler.resident) == beside_sampler
    rest = 4 * 4 * 8 * (4 + 4) + 4 * 4  # log-probs, and whether they have ended
    assert bytes_per_device(reward.resident) == held(state) + expected["reference"] + rest
    assert bytes_per_device(update.resident) == expected["reward model"]
    assert bytes_per_device(update.arguments[0]) == held(state)


def test_scores_of_a_reward_model_are_a_program(model_path: str):
    mesh = make_mesh(MeshConfig(fsdp=8))
    plan = small(model_path, reward_model="policy", programs=("reward",), samples=8)
    (program,) = build(plan, mesh)
    report = compile_program(program, mesh)
    assert report.arguments >= bytes_per_device(program.arguments[0])
    told = record(program, report, None)
    assert set(told["bytes"]) >= {"parameters", "optimizer", "reward model"}
    assert sum(told["bytes"].values()) == pytest.approx(told["needed"], rel=0.02)
    with pytest.raises(ValueError, match=r"reward_model='x' is none of policy, smollm2-135m, .* does not exist"):
        build(dataclasses.replace(plan, reward_model="x"), mesh)


def test_a_reward_model_alone_makes_one_program(model_path: str):
    """The trainer's own, with all that stays in memory among its arguments; its phases are told apart."""
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    plan = small(model_path, prompts=2, update=UpdateConfig(), reward_model="policy", layers=1, completion_tokens=4)
    (iteration,) = build(plan, mesh)
    assert (iteration.name, iteration.resident) == ("iteration", ())
    assert [*iteration.phases] == ["sampler", "reward", "update"]
    chip = Chip(1.0, tflops=1.0, hbm_gbps=1.0, ici_gbps=1.0)
    report = compile_program(iteration, mesh)
    told = record(iteration, report, chip)
    assert sum(told["bytes"].values()) == pytest.approx(told["needed"], rel=0.02)
    assert set(told["bytes"]) >= {"parameters", "optimizer", "reward model", "activations and others"}
    phases = told["phases"]
    assert told["least_seconds"] == sum(max(one["seconds"].values()) for one in phases.values())
    assert all(sum(one["sent"].values()) for one in phases.values())
    assert "at least      reward: compute" in describe(iteration, report, chip)


@pytest.mark.slow
def test_phases_of_one_program_need_and_send_what_they_do_alone(model_path: str):
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    plan = small(model_path, algorithm=presets.ppo(), reward_model="policy")
    (iteration,), apart = build(plan, mesh), build(dataclasses.replace(plan, programs=("sampler", "update")), mesh)
    whole, *alone = (compile_program(one, mesh) for one in (iteration, *apart))
    assert whole.needed >= max(one.needed for one in alone)
    phases = whole.sent(iteration.phases)
    for program, report in zip(apart, alone, strict=True):
        sent = report.sent(program.phases)[program.name]
        assert sum(phases[program.name].values()) == pytest.approx(sum(sent.values()), rel=0.1)


@pytest.mark.parametrize(("programs", "why"), [((), "leaves nothing"), (("update", "reward"), "needs a reward_model")])
def test_a_plan_of_no_program_is_refused(programs: tuple[Any, ...], why: str):
    with pytest.raises(ValueError, match=rf"programs=\(.*\) {why}"):
        Plan(programs=programs)


def test_settings_of_a_critic_need_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        run_plan(["--slice=local", "--critic.shares-trunk"])
    assert "GroupAdvantage has no critic; --preset=ppo has one" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_plan(["--slice=local", "--programs"])
    assert "leaves nothing to compile" in capsys.readouterr().err


def test_what_a_token_reads_is_told_of_slots(model_path: str):
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    slots = {"slots": 2, "programs": ("sampler",), "completion_tokens": 40}
    (program,) = build(small(model_path, **slots, written=10), mesh)
    told = re.fullmatch(
        r"a token reads 0\.00 GiB .* 2 texts of 8 \+ 1 to (\d+) tokens, .* \(auto\), .*", program.remarks[-1]
    )
    assert told
    assert 10 < int(told[1]) <= 20
    (program,) = build(small(model_path, **slots, sampling_attention="xla"), mesh)
    assert "(auto)" not in program.remarks[-1]
    with pytest.raises(ValueError, match="written=21 must be from 1 to 20"):
        build(small(model_path, **slots, written=21), mesh)


def test_what_a_token_reads_of_rounded_weights():
    """All but embedding and head, which a token reads in bfloat16, in 1 + 2/32 bytes for 2."""
    plan = Plan(size="smollm2-135m", layers=1, programs=("sampler",), prompts=2, slots=2, completion_tokens=8)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    floats, integers = (
        build(dataclasses.replace(plan, sampling_weights_dtype=dtype), mesh)[0] for dtype in (None, "int8")
    )
    linear = 576 * (2 * 576 + 2 * 192 + 3 * 1536)
    assert floats.work.read - integers.work.read == floats.work.turns * linear * (2 - 1.0625)
    own = "the sampler's own weights"
    assert integers.parts[own] < floats.parts[own]


def test_the_example_of_the_command_has_flags_that_there_are():
    plan = read_flags(Plan(), shlex.split(EXAMPLES["plan"])[2:], "")
    assert (plan.slice, plan.mesh.fsdp) == ("v5e:2x4", 8)


def test_numbers_that_do_not_fit_the_mesh_are_refused(model_path: str):
    mesh = make_mesh(MeshConfig(), jax.devices()[:3])
    with pytest.raises(ValueError, match=r"mesh\.fsdp"):
        build(small(model_path), mesh)
    with pytest.raises(ValueError, match=r"update\.micro_batches=3 × 1 row shards"):
        build(small(model_path, update=UpdateConfig(micro_batches=3)), make_mesh(MeshConfig(), jax.devices()[:1]))
    with pytest.raises(ValueError, match=r"tokens_per_micro_batch=15 is less than .* raise it to 16 or more"):
        small(model_path, update=UpdateConfig(tokens_per_micro_batch=15), search=1)
    with pytest.raises(ValueError, match=r"search=-1 must be at least 0"):
        Plan(search=-1)


def test_what_is_sent_counts_loops_as_often_as_they_turn():
    """A token of 64 at a time in two loops that look for the end after each 8th, and prompts, read 3 times."""
    found = [
        Collective("all-gather", 1000, "once"),
        Collective("all-reduce", 10, "loop 1", 1, 1),  # at each look
        Collective("all-reduce", 1, "loop 1 inner", 8 * 2, 1),  # in two layers of each token
        Collective("all-reduce", 1, "loop 2 inner", 8 * 2, 1),
        Collective("all-to-all", 100, "loop 2 inner", 5, 2),  # within a loop over prompts
    ]
    report = Report(1.0, 0, 0, 0, 0, 0, found, "")
    work = Work(flops=0, again=0, read=0, turns=64, turn="token", stride=8, fills=3)
    assert report.sent({"sampler": work})["sampler"] == {
        "all-gather": 1000,
        "all-reduce": 10 * 4 + 2 * 64,
        "all-to-all": 1500,
    }
    pieces = Work(flops=0, again=0, read=0, turns=4, turn="piece")
    assert report.sent({"update": pieces})["update"]["all-reduce"] == 4 * (10 + 16 + 16)


def test_what_is_sent_of_minibatches_counts_their_part_of_the_pieces():
    """Two epochs of four minibatches of a batch of 8 pieces, and a pass over all of it before."""
    found = [
        Collective("all-gather", 1, "loop 1 inner", 3, 1),
        Collective("all-gather", 100, "loop 2 inner", 2 * 4 * 3, 1, outside=2 * 4),
    ]
    work = Work(flops=0, again=0, read=0, turns=2 * 8, turn="piece", epochs=2, minibatches=4)
    sent = Report(1.0, 0, 0, 0, 0, 0, found, "").sent({"update": work})
    assert sent["update"] == {"all-gather": 3 * 8 + 100 * 2 * 4 * 3 * 2}


@pytest.mark.parametrize(("limit", "word"), [(1.0, "DOES NOT FIT"), (2.0, "fits"), (None, "a device\n")])
def test_verdict_counts_what_stays_in_memory(limit: float | None, word: str):
    half = GIB // 2
    report = Report(1.0, half, 0, half, half, half, [Collective("all-gather", GIB, "loop 1", 2, 1)], "")
    work = Work(flops=2e12, again=1e12, read=5e9, turns=3, turn="piece")
    program = Program("update", None, (), (), {"parameters": half, "gradients": half // 2}, {"update": work})
    chip = None if limit is None else Chip(limit, tflops=1, hbm_gbps=10, ici_gbps=1)
    told = describe(program, report, chip)
    assert told.startswith("update: needs 1.50 GiB")
    assert word in told
    assert "parameters 0.50, gradients 0.25, batch 0.50, activations and others 0.25" in told
    assert "all-gather 6.00" in told  # twice in each of three pieces
    if chip is not None:
        assert record(program, report, chip)["seconds"] == {"compute": 3, "memory": 0.5, "network": 6 * GIB / 1e9}
        assert "network binds (3 pieces one after another)" in told


def test_the_network_between_slices_is_a_limit_of_its_own():
    found = [Collective("all-gather", 10**9, "once"), Collective(BETWEEN, 10**9, "loop 1", 2, 1)]
    program = Program("update", None, (), (), {}, {"": Work(flops=0, again=0, read=0, turns=3, turn="piece")})
    told = record(program, Report(1.0, 0, 0, 0, 0, 0, found, ""), CHIPS["TPU v5 lite"])
    assert told["sent"] == {"all-gather": 10**9, BETWEEN: 6 * 10**9}
    assert told["seconds"]["network"] == 1 / 200
    assert (told["seconds"]["network between slices"], told["limit"]) == (6 / 3.125, "network between slices")
    assert "network between slices" not in record(program, Report(1.0, 0, 0, 0, 0, 0, found[:1], ""), CHIPS["TPU v5"])


def products_of(function: Any, *arguments: Any) -> int:
    """Operations of the matrix products of a function, as it is traced."""

    def of(jaxpr: Any) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
            inner = sum(map(of, jax.extend.core.jaxprs_in_params(equation.params)))
            total += inner * equation.params.get("length", 1)
        return total

    return of(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_operations_are_those_of_the_traced_program(tiny_config):
    """Of a dense pass, in which each token is multiplied with all others: those behind it are taken off."""
    model, width, rows = Transformer(tiny_config(num_layers=3)), 24, 2
    params, tokens = model.abstract_params(), jnp.zeros((rows, width), jnp.int32)

    def logits(params: Params) -> jax.Array:
        return model.head_logits(params, model.causal(params, tokens).states)

    counted = forward(model.config, width, [[]] * rows, scored=rows * width)
    heads = model.config.num_heads * model.config.head_dim
    unseen = 4 * heads * 3 * rows * (width * width - width * (width + 1) // 2)
    assert products_of(logits, params) == counted.total + unseen


@pytest.mark.parametrize(
    ("algorithm", "critic", "passes"),
    [
        (PolicyGradient(), CriticSource(), 1 + 2 * 3),
        (presets.ppo(), CriticSource(), 3 + 2 * (3 + 3)),  # reference, old log-probs and values before both are trained
        (presets.ppo(), CriticSource(shares_trunk=True), 3 + 2 * 3),
    ],
    ids=["grpo", "ppo", "shared"],
)
def test_operations_of_all_of_an_update_are_those_of_the_traced_program(
    model_path: str, algorithm: PolicyGradient, critic: CriticSource, passes: int
):
    """Of two epochs of two minibatches, to the last one, but for pairs that a dense pass computes and none sees."""
    model = ModelSource(path=model_path, attention="dense", remat="none", scan_layers=True)
    epochs: Any = {"update": UpdateConfig(epochs=2, minibatches=2), "algorithm": algorithm, "critic": critic}
    plan = small(model_path, model=model, reward_model="policy", programs=("reward", "update"), **epochs)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    reward, update = build(plan, mesh)
    config, p, g, t, c = model_of(plan, mesh).config, *(plan.prompts, plan.samples), *(8, 8)
    unseen = t * t + g * c * (t + c) - t * (t + 1) // 2 - g * (c * t + c * (c + 1) // 2)
    unseen *= 4 * config.num_heads * config.head_dim * config.num_layers * p
    with jax.set_mesh(mesh):
        counted = {one.name: products_of(one.function.__wrapped__, *one.arguments) for one in (reward, update)}
    assert counted == {"reward": reward.work.flops + unseen, "update": update.work.flops + passes * unseen}


def test_frozen_weights_have_no_gradient_and_integers_are_read_as_such(tiny_config):
    """By hand, of two layers with embeddings of their own, 4 prompts × 4 completions in 2 pieces."""
    config = tiny_config(num_layers=2, embed_dim=64, mlp_dim=128, head_dim=16, num_heads=4, num_kv_heads=4)
    sizes = {"prompts": 4, "samples": 4, "prompt_tokens": 8, "completion_tokens": 8}
    plan, lora = Plan(**sizes, update=UpdateConfig(micro_batches=2)), LoraConfig(2)
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    configs = config, dataclasses.replace(config, lora=lora), dataclasses.replace(config, lora=lora, base_dtype="int4")
    plain, adapted, rounded = (update_work(c, mesh, plan, state=0) for c in configs)
    linear, once = 2 * (4 * 64 * 64 + 3 * 64 * 128), forward(config, 8, [[8] * 4] * 4, scored=128)
    assert plain.flops == 3 * once.total / 2
    assert adapted.flops == rounded.flops == (2 * (once.products + once.head) + 3 * once.attention) / 2
    assert (plain.read, adapted.read) == (2 * 3 * 4 * config.num_parameters, 2 * 2 * 4 * config.num_parameters)
    assert adapted.read - rounded.read == 2 * 2 * linear * (4 - 0.625)
    assert adapted.sent - rounded.sent == 2 * 2 * linear * (4 - 0.625) / 2

    experts = ExpertsConfig(count=4, per_token=2, width=32, shared=96)
    mixture = dataclasses.replace(config, lora=lora, layer_kinds=(LayerKind(experts=True),), experts=experts)
    adapted, rounded = (
        update_work(c, mesh, plan, state=0) for c in (mixture, dataclasses.replace(mixture, base_dtype="int4"))
    )
    linear = 2 * (4 * 64 * 64 + 3 * 64 * (4 * 32 + 96))  # routers are floats
    assert adapted.read - rounded.read == 2 * 2 * linear * (4 - 0.625)


def test_windows_bound_what_is_seen(tiny_config):
    whole, narrow = (
        forward(tiny_config(num_layers=1, sliding_windows=(window,)), 5, [[4, 0]], scored=0) for window in (None, 3)
    )
    pair = 4 * 8 * 4
    assert whole.attention == pair * sum(range(1, 10))
    assert narrow.attention == pair * (1 + 2 + 7 * 3)


def test_what_is_written_can_be_read_again(model_path: str, tmp_path: Path, capsys):
    files = {name: tmp_path / "of" / f"plan.{name}" for name in ("json", "png")}
    more = [
        "--slice=local",
        "--mesh.fsdp=8",
        "--programs",
        "update",
        f"--json={files['json']}",
        f"--picture={files['png']}",
    ]
    with pytest.raises(SystemExit, match="0"):
        run_plan(arguments(model_path, *more))
    assert "mesh fsdp 8" in capsys.readouterr().out
    told = json.loads(files["json"].read_text())
    (update,) = told["programs"]
    assert update["program"] == "update"
    assert sum(update["bytes"].values()) == pytest.approx(update["needed"], rel=0.05)
    assert files["png"].stat().st_size > 5000


def test_program_that_does_not_fit_is_no_crash(model_path: str, monkeypatch: pytest.MonkeyPatch, capsys):
    def refuse(program, mesh: Mesh):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 20G of 16G\nmore")

    monkeypatch.setattr(command, "compile_program", refuse)
    with pytest.raises(SystemExit, match="1"):
        run_plan(arguments(model_path, "--mesh.fsdp=8", "--slice=local"))
    assert capsys.readouterr().out.endswith("update: DOES NOT FIT\n  RESOURCE_EXHAUSTED: 20G of 16G\n")


def test_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        run_plan([])
    assert "jaxrl-llm[tpu]" in capsys.readouterr().err


# ---- TPUs ----------------------------------------------------------------------------------------


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as for a user."""
    command = [sys.executable, "-m", "jaxrl_llm", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_sizes_have_the_parameters_that_were_published():
    billions = {name: round(config.num_parameters / 1e9, 2) for name, config in SIZES.items()}
    published = {"qwen3-0.6b": 0.6, "qwen3-4b": 4.02, "qwen3-32b": 32.76, "qwen3-30b-a3b": 30.53}
    published |= {"llama3.1-8b": 8.03, "gemma3-12b": 11.77, "qwen2.5-7b": 7.62, "smollm2-135m": 0.13}
    assert billions | published == billions


# ---- Search --------------------------------------------------------------------------------------


def searched(model_path: str, chip: Chip, **changes):
    """The first plan that a search finds on eight devices, and the lines that it told."""
    told: list[str] = []
    plan = small(model_path, **{"mesh": MeshConfig(tensor=2, context=2), "sampling_tensor": 2} | changes)
    return next(search(plan, jax.devices(), chip, told.append)), told


def test_search_finds_the_fastest_plan_that_fits(model_path: str):
    slow_links = Chip(1.0, tflops=1e9, hbm_gbps=1e9, ici_gbps=1e-3)
    found, told = searched(model_path, slow_links)
    assert len(told) == 2  # what the bounds order first is compiled, and nothing else
    assert found.plan.mesh == MeshConfig(data=1, fsdp=2, tensor=2, context=2)
    assert [one["program"] for one in found.records] == ["sampler", "update"]
    assert all(one["fits"] and one["limit"] == "network" for one in found.records)
    # The fewer pieces the fewer times weights are sent, and what needs none of them again takes less with dots.
    assert (found.plan.model.remat, found.plan.update.tokens_per_micro_batch) == ("dots", 8 * 128)
    update = next(one for one in build(found.plan, found.mesh) if one.name == "update")
    record_ = found.records[1]
    assert sum(update.parts.values()) + update.work.kept <= record_["needed"]
    assert update.work.sent <= sum(record_["sent"].values())
    assert {"--mesh.fsdp=2", "--sampling.tensor=2", "--model.remat=dots"} < set(found.flags.split())
    assert "tensor 2" in found_table([found])


def fake_compiler(monkeypatch: pytest.MonkeyPatch, refused: Any) -> list[tuple[str, Any]]:
    """In place of the compiler one to which all fits but what `refused` says; what it was given, in order."""
    given: list[tuple[str, Any]] = []

    def compiled(option: Any, chip: Chip, tell: Any) -> tuple[dict[str, Any] | None, int | None]:
        (name,) = option.plan.made
        given.append((name, option.plan))
        if refused(name, option.plan):
            return None, round(chip.hbm_gib * GIB) + 1
        return {"program": name, "least_seconds": option.seconds(chip), "slots": 1}, None

    monkeypatch.setattr(search_module, "_compiled", compiled)
    return given


def test_search_goes_on_to_the_next_sampler(model_path: str, monkeypatch: pytest.MonkeyPatch):
    """The one that the bounds put first does not fit: its mesh has another, and the first is not compiled again."""
    best: list[int] = []

    def refused(name: str, plan: Plan) -> bool:
        best.extend([plan.sampling_tensor or 0] if name == "sampler" and not best else [])
        return name == "sampler" and [plan.sampling_tensor] == best

    given = fake_compiler(monkeypatch, refused)
    mesh = MeshConfig(fsdp=4, tensor=2)
    one_budget: Any = {"update": UpdateConfig(tokens_per_micro_batch=128)}
    plan = small(model_path, mesh=mesh, reward_model="policy", algorithm=presets.ppo(), **one_budget)
    found = list(search(plan, jax.devices(), Chip(1.0, 1e9, 1e9, 1e-3), lambda line: None, remats=("dots", "full")))
    assert {one.plan.model.remat for one in found} == {"dots", "full"}
    assert {dataclasses.astuple(one.plan.mesh) for one in found} == {(1, 4, 1, 2, 1)}  # as set
    assert all(one.plan.sampling_tensor not in best for one in found)
    for one in found:
        assert [told["program"] for told in one.records] == ["iteration"]
    assert len(found) == 2  # each update once
    assert [name for name, _ in given if name != "sampler"] == ["update", "reward", "iteration", "update", "iteration"]
    samplers = [(plan.sampling_tensor, plan.slots) for name, plan in given if name == "sampler"]
    assert len(samplers) == len(set(samplers)) > 1


def test_search_goes_on_with_fewer_slots(model_path: str, monkeypatch: pytest.MonkeyPatch):
    """Where the compiler needs more than was foretold of one, or of all together; slots that are set stay."""
    refused: set[Any] = {("sampler", "auto"), ("iteration", 14)}
    given = fake_compiler(monkeypatch, lambda name, plan: (name, plan.slots) in refused)
    only: Any = {"mesh": MeshConfig(fsdp=8), "sampling_tensor": 4, "prompts": 8}

    def first(**changes: Any) -> Any:
        plan = small(model_path, **only, **changes)
        return next(search(plan, jax.devices(), Chip(1.0, 1e9, 1e9, 1e9), print, remats=("full",)), None)

    found = first(reward_model="policy", update=UpdateConfig(tokens_per_micro_batch=128))
    assert found is not None
    assert [plan.slots for name, plan in given if name == "sampler"] == ["auto", 14, 12]  # of all 16 of a device
    assert "--sampling.slots=12" in found.flags.split()
    refused.add(("sampler", 16))
    given.clear()
    assert first(slots=16) is None


def test_search_leaves_out_what_needs_more_than_what_did_not_fit(model_path: str, monkeypatch: pytest.MonkeyPatch):
    given = fake_compiler(monkeypatch, lambda name, plan: name == "update" and plan.model.remat == "none")
    plan = small(model_path, mesh=MeshConfig(fsdp=8))
    found = next(search(plan, jax.devices(), Chip(1.0, 1e-9, 1e9, 1e9), lambda line: None, remats=("none", "full")))
    assert found.plan.model.remat == "full"
    tried = [(plan.model.remat, plan.update.tokens_per_micro_batch) for name, plan in given if name == "update"]
    assert tried == [("none", 256), ("full", 256)]  # rows of 128 would keep as much


def test_search_learns_nothing_of_experts_and_texts_that_are_cut_otherwise():
    """What two devices gather along an axis says nothing of those that have a whole layer's experts, or texts."""

    def option(mesh: MeshConfig, programs: tuple[Any, ...] = ("update",)) -> Any:
        work = SimpleNamespace(kept=10)
        return SimpleNamespace(plan=Plan(programs=programs), mesh=make_mesh(mesh), work=work, least=10)

    beyond = search_module._Beyond(100)
    beyond.learn(option(MeshConfig(expert=2, context=2, tensor=2)), 101)
    known = {(2, 2, 2): True, (2, 2, 1): True, (2, 4, 1): True, (4, 2, 1): False, (1, 2, 2): False, (2, 1, 2): False}
    for (expert, context, tensor), too_much in known.items():
        mesh = MeshConfig(expert=expert, context=context, tensor=tensor)
        assert beyond.too_much(option(mesh)) == too_much, mesh


def test_search_tries_to_deal_experts_out():
    dense, mixture = (Plan(size=size, mesh=MeshConfig(tensor=2)) for size in ("qwen3-0.6b", "qwen3-30b-a3b"))
    tried = [{one.expert for one in options._meshes(plan, 8)} for plan in (dense, mixture)]
    assert tried == [{1}, {1, 2, 4}]


def test_search_takes_no_mesh_but_one_of_the_devices():
    assert {one.data for one in options._meshes(Plan(mesh=MeshConfig(data=-1, fsdp=1)), 4)} == {1, 2, 4}
    for mesh, told in ((MeshConfig(tensor=3), "cannot be split by the fixed"), (MeshConfig(fsdp=3), "needs 3 devices")):
        with pytest.raises(ValueError, match=told):
            next(options._meshes(Plan(mesh=mesh), 8))


def test_search_keeps_what_the_command_line_sets(model_path: str):
    plan = Plan(model=ModelSource(dtype="bfloat16"))
    assert command._remats(plan, ["--search=1"]) == options.REMATS
    assert command._remats(plan, ["--search=1", "--model.remat=full"]) == ("full",)
    dots = Plan(model=ModelSource(dtype="bfloat16", remat="dots"))
    assert command._remats(dots, ["--search=1", "--model.remat", "dots"]) == ("dots",)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": ModelSource(path="m", dtype="bfloat16", remat="dots", base_dtype="int8", lora=LoraConfig(8, 16.0))},
        {"sampling_cache_dtype": "int8", "sampling_weights_dtype": "int4", "slots": 3, "sampling_attention": "xla"},
        {"algorithm": presets.ppo(), "critic": CriticSource(optimizer=OptimizerConfig(offload=True))},
        {"algorithm": presets.gspo(), "update": UpdateConfig(tokens_per_micro_batch=4096)},
        {"algorithm": PolicyGradient(advantage=GAEAdvantage(lam=0.9), correction=Correction(w_max=3.0))},
        {"optimizer": OptimizerConfig(offload=True, rounding="stochastic"), "mesh": MeshConfig(fsdp=2, tensor=4)},
    ],
)
def test_flags_that_are_told_are_those_of_the_run(changes: dict[str, Any]):
    """Read again, by the command itself, they are every setting that a run has of the plan."""
    plan = Plan(**changes)
    words = shlex.split(" ".join(run_flags(plan)))
    assert parse(GRPO, words) == experiment_of(plan)
    of_no_run = {"slice", "size", "layers", "reward_model", "written", "programs", "search", "dump", "json", "picture"}
    assert {field.name for field in dataclasses.fields(Plan)} == {*OF_RUN, *SAME} | of_no_run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dump=hlo"], "dump='hlo' would have no effect"),
        (["--programs", "sampler"], "would have no effect: a search compiles all"),
        (["--preset=ppo", "--reward-model=policies"], "reward_model='policies' is none of policy, "),
    ],
)
def test_search_refuses_what_it_cannot_do(flags: list[str], message: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(command, "CHIPS", {jax.devices()[0].device_kind: Chip(1.0, 1.0, 1.0, 1.0)})
    with pytest.raises(SystemExit):
        run_plan(["--slice=local", "--search=1", *flags])
    assert message in capsys.readouterr().err


def test_search_says_why_nothing_can_fit(model_path: str):
    with pytest.raises(ValueError, match="alone do not fit"):
        searched(model_path, Chip(1e-9, 1, 1, 1), slots=1)
    with pytest.raises(ValueError, match="--sampling-tensor=3 must be a multiple of the mesh's tensor=2"):
        searched(model_path, Chip(1.0, 1, 1, 1), sampling_tensor=3)
    with pytest.raises(ValueError, match="exceed the model's"):  # and not what some tensor axis cannot hold
        searched(model_path, Chip(1.0, 1, 1, 1), completion_tokens=100_000)
    with pytest.raises(SystemExit):
        run_plan(arguments(model_path, "--slice=local", "--search=1"))


@needs_libtpu
def test_both_programs_compile_for_a_slice(model_path: str, tmp_path: Path):
    split = ("--mesh.fsdp", "4", "--mesh.tensor", "2")
    told = run(*arguments(model_path, *split, "--dump", str(tmp_path / "hlo")))
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"v5e:2x4, 8 × TPU v5 lite; JAX {jax.__version__}, mesh fsdp 4 × tensor 2")
    assert told.stdout.count(" of 15.75: fits") == 2
    assert (tmp_path / "hlo/update.hlo.txt").read_text().startswith("HloModule jit_update_step")


@pytest.mark.slow
@needs_libtpu
def test_between_two_slices_nothing_is_gathered(model_path: str, tmp_path: Path):
    """What crosses the network between slices is sent by MegaScale; all other collectives stay within a slice."""
    split = ("--slice", "2xv5e:2x2", "--mesh.data", "2", "--mesh.fsdp", "4", "--dump", str(tmp_path / "hlo"))
    told = run(*arguments(model_path, *split))
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith(f"2xv5e:2x2, 8 × TPU v5 lite; JAX {jax.__version__}, mesh data 2 × fsdp 4")
    update = (tmp_path / "hlo/update.hlo.txt").read_text()
    assert "megascale_target" in update
    assert set(re.findall(r"replica_groups=(\S+?\}\})", update)) == {"{{0,1,2,3}}"}
    assert "network between slices" in told.stdout


@needs_libtpu
def test_a_weight_is_gathered_and_not_multiplied_part_after_part():
    """Left to itself XLA makes loops of narrow products of it, slow to run and to compile."""
    line = """if True:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec
        from jaxrl_llm.launch.plan.slices import slice_devices
        from jaxrl_llm.models.blocks import _product
        from jaxrl_llm.sharding import MeshConfig, make_mesh
        mesh = make_mesh(MeshConfig(fsdp=8), slice_devices("v5e:2x4"))
        def of(shape, dtype, *axes):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        x, weight = of((8, 8704, 1536), "bfloat16", "fsdp"), of((8960, 1536), "float32", None, "fsdp")
        def value(weight, x):
            return jnp.sum(jnp.square(_product("bfloat16", "float32", ("mlp", "embed"), x, weight)), dtype="float32")
        with jax.set_mesh(mesh):
            gradient = jax.jit(jax.grad(value, argnums=(0, 1)), out_shardings=(weight.sharding, x.sharding))
            text = gradient.lower(weight, x).compile().as_text()
        print("windowed_dot_general" in text, "all-gather" in text, "reduce-scatter" in text)
    """
    command = [sys.executable, "-c", line]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.stdout.split() == ["False", "True", "True"], told.stdout + told.stderr


@needs_libtpu
def test_integers_are_read_as_they_lie():
    """Of layers in a loop, none but the one that is read is turned or made floats."""
    line = """if True:
        import jax
        import jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec
        from jaxrl_llm.launch.plan.slices import slice_devices
        from jaxrl_llm.models.integers import Blocks, blocks_product
        from jaxrl_llm.sharding import MeshConfig, blocks_of, make_mesh
        mesh = make_mesh(MeshConfig(), slice_devices("v5e:1x1"))
        lies = NamedSharding(mesh, PartitionSpec())
        made = jax.eval_shape(lambda: Blocks.of(jnp.zeros((16, 14336, 4096)), "int4"))
        blocks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies), made)
        def layer(x, blocks):
            y = blocks_product("bfloat16", (blocks_of("embed"), "mlp"), x, blocks)
            return x + y[:, :4096], None
        def value(x, blocks):
            return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, blocks)[0], dtype="float32")
        x = jax.ShapeDtypeStruct((512, 4096), "bfloat16", sharding=lies)
        with jax.set_mesh(mesh):
            used = jax.jit(jax.grad(value)).lower(x, blocks).compile().memory_analysis().temp_size_in_bytes
        print(used / blocks.values.size)
    """
    told = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=120)
    assert float(told.stdout) < 0.5, told.stdout + told.stderr


@needs_libtpu
def test_small_layers_are_a_loop_on_a_slice_and_none_on_a_cpu(model_path: str):
    line = """if True:
        import sys
        from jaxrl_llm.config import ModelSource
        from jaxrl_llm.launch.plan.programs import model_of
        from jaxrl_llm.launch.plan.settings import Plan
        from jaxrl_llm.launch.plan.slices import slice_devices
        from jaxrl_llm.sharding import MeshConfig, make_mesh
        plan = Plan(model=ModelSource(path=sys.argv[1]))
        for name in ("v5e:2x4", "local"):
            mesh = make_mesh(MeshConfig(), slice_devices(name)[:1])
            print(model_of(plan, mesh).config.scan_layers)
    """
    told = subprocess.run([sys.executable, "-c", line, model_path], capture_output=True, text=True, timeout=120)
    assert told.stdout.split() == ["True", "False"], told.stderr


@needs_libtpu
def test_slice_that_does_not_exist_is_refused():
    told = run("--slice", "v5e:3x3")
    assert told.returncode == 2
    assert told.stderr.splitlines()[-1].startswith("error: slice='v5e:3x3'")


@needs_libtpu
def test_memory_of_a_chip_is_what_the_compiler_says():
    """In a process of its own, too: what is set for the compiler is set for good."""
    line = """if True:
        import jax, re
        from jaxrl_llm.launch.plan.slices import CHIPS, slice_devices
        for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"):
            device = slice_devices(name)[0]
            sharding = jax.sharding.SingleDeviceSharding(device)
            huge = jax.ShapeDtypeStruct((2**19, 2**19), "float32", sharding=sharding)
            try:
                jax.jit(lambda x: x + 1).lower(huge).compile()
            except jax.errors.JaxRuntimeError as error:
                said = float(re.search(r"available HBM \\((.*?)G\\)", str(error))[1])
                assert 0 <= said - CHIPS[device.device_kind].hbm_gib < 0.1, error
                print(device.device_kind)
    """
    command = [sys.executable, "-c", line]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.stdout.splitlines() == ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"], told.stderr


@pytest.mark.slow
@needs_libtpu
def test_bytes_of_the_sampler_are_foretold_within_a_twentieth_where_memory_is_short():
    """With room to spare the compiler packs its block loosely; here it is given what fills a chip."""
    line = """if True:
        import jax
        from jaxrl_llm.device_memory import bytes_per_device
        from jaxrl_llm.launch.plan.programs import build
        from jaxrl_llm.launch.plan.settings import Plan
        from jaxrl_llm.launch.plan.slices import slice_devices
        from jaxrl_llm.sampling.footprint import Footprint
        from jaxrl_llm.sharding import MeshConfig, make_mesh, replicated
        needs, told = Footprint.needs, []
        Footprint.needs = lambda self, slots: told.append(needs(self, slots)) or told[-1]
        plan = Plan(size="llama3.1-8b", layers=2, prompts=32, programs=("sampler",), mesh=MeshConfig(tensor=4))
        mesh = make_mesh(plan.mesh, slice_devices("v5e:2x2"))
        (program,) = build(plan, mesh)
        parameters, *others = told[-1].values()
        free = 15.7 * 2**30 - 1.05 * sum(others) - bytes_per_device(program.arguments)
        beside = jax.ShapeDtypeStruct((int(free) // 2**20, 2**20), "int8", sharding=replicated(mesh))
        filled = jax.jit(lambda _, *given: program.function(*given), keep_unused=True)
        with jax.set_mesh(mesh):
            memory = filled.lower(beside, *program.arguments).compile().memory_analysis()
        print(sum(others) / (memory.temp_size_in_bytes + memory.output_size_in_bytes))
    """
    told = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=300)
    assert float(told.stdout) == pytest.approx(1, abs=0.05), told.stderr
