"""How fast decoding reads what it must: the share of the device's bandwidth that a token of every slot reaches.

    python experiments/benchmarks/decode_bandwidth.py --size qwen3-0.6b --model.dtype bfloat16    # a GPU or TPU
    python experiments/benchmarks/decode_bandwidth.py --size qwen3-0.6b --model.dtype bfloat16 --attention xla

All slots decode completions of equal length, once of the first and once of the second number of `--written` tokens,
by the same compiled program: the difference is the time of the tokens between them. What they read is that of
`jaxrl_llm.sampling.traffic`: the weights, and whole pages of keys and values. What else a token takes (to draw it, to
write it down) counts as time and not as bytes. The device's bandwidth is that of a copy, bytes read and written.

Hardware: one GPU or TPU whose memory holds the slots (256 of qwen3-0.6b: 40 GiB; fewer `--slots` otherwise); a CPU for
the tiny model. Time: a minute or two.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device import copy_bandwidth, device_peak_gib
from make_model import SIZES, Size
from measure import Bystanders, publish, summarise
from works import random_params

from jaxrl_llm import __version__
from jaxrl_llm.cli import plain_errors
from jaxrl_llm.config import ModelSource
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.decode import row_keys
from jaxrl_llm.sampling.in_flight import sample_in_flight
from jaxrl_llm.sampling.layout import gather_for_sampling
from jaxrl_llm.sampling.logits import CacheDType, SamplingConfig, SlotAttention, uniforms
from jaxrl_llm.sampling.sampled import Wanted
from jaxrl_llm.sampling.traffic import traffic
from jaxrl_llm.sharding import make_mesh, on_cpu


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Which texts, of which model."""

    size: Size = "tiny"
    """The model: tiny (4 layers of width 128), smollm2 (SmolLM2-135M's shape) or qwen3-0.6b."""
    model: ModelSource = ModelSource()
    """Types."""
    slots: int = 256
    """S, completions that are decoded at a time."""
    samples: int = 8
    """G, of each prompt; they divide the slots."""
    prompt_tokens: int = 512
    """Tp."""
    written: tuple[int, int] = (128, 384)
    """Tokens of a completion between which decoding is timed."""
    attention: SlotAttention = "auto"
    """How slots attend."""
    cache_dtype: CacheDType | None = None
    """Type in which keys and values are kept; `None`: the model's."""
    copy_gib: float = 1.0
    """Of the array that is copied."""
    repeats: int = 3
    """Pairs that are timed, after a first one."""
    json: str | None = None
    """File that the record is appended to, one JSON object a line; -: print lines of RESULT and JSON."""

    def __post_init__(self) -> None:
        """Rejects a path, whose weights would not be read, and what no difference can be taken of."""
        if self.model.path is not None:
            raise ValueError(f"model.path={self.model.path}: speed does not depend on the weights; choose a --size")
        if min(self.slots, self.samples, self.prompt_tokens, self.repeats) < 1 or self.slots % self.samples:
            raise ValueError(
                f"slots={self.slots} must be a multiple of samples={self.samples}, and these, "
                f"prompt_tokens={self.prompt_tokens} and repeats={self.repeats} at least 1"
            )
        if not 0 < self.written[0] < self.written[1]:
            raise ValueError(f"written={self.written} must be two numbers of tokens, the larger one last")


def measure(config: Decoding) -> dict[str, Any]:
    """The record."""
    mesh = make_mesh(devices=jax.devices()[:1])
    model, longest = Transformer(config.model.applied_to(SIZES[config.size])), config.written[1]
    prompts, group = config.slots // config.samples, config.samples
    settings = SamplingConfig(max_tokens=longest, attention=config.attention, cache_dtype=config.cache_dtype)

    def decode(params: Params, limit: jax.Array) -> jax.Array:
        axes, dtype = model.logical_axes(), jnp.dtype(model.config.dtype)
        wanted = Wanted(
            prompt=jnp.zeros((prompts, config.prompt_tokens), jnp.int32),
            lengths=jnp.full(prompts, config.prompt_tokens),
            uniform=uniforms(row_keys(jax.random.key(0), jnp.arange(prompts), group), longest),
            greedy=None,
            limits=jnp.full((prompts, group), limit),
        )
        return sample_in_flight(
            model,
            gather_for_sampling(params, axes, dtype, mesh),
            wanted,
            slots=config.slots,
            in_loops=not on_cpu(),
            config=settings,
            stop_tokens=(),
        ).clock

    shape: dict[str, Any] = {"group": group, "prompt_width": config.prompt_tokens, "tokens": longest}
    shape["cache_dtype"] = config.cache_dtype
    reads = traffic(model, mesh, config.attention, np.full(config.slots, sum(config.written) // 2), **shape)
    with jax.set_mesh(mesh):
        program, params = jax.jit(decode), random_params(model, mesh)
        limits = [jnp.int32(limit) for limit in config.written]
        turns = [int(program(params, limit)) for limit in limits]
        bystanders, seconds = Bystanders(), []
        for _ in range(config.repeats):
            marks = [time.perf_counter()]
            for limit in limits:
                program(params, limit).block_until_ready()
                marks.append(time.perf_counter())
            seconds.append((marks[2] - 2 * marks[1] + marks[0]) / (turns[1] - turns[0]))
    other = bystanders.share()
    token, copied = summarise(seconds), copy_bandwidth(config.copy_gib)
    rate = 1e-9 * sum(reads) / token["median"]
    return {
        "version": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model": config.size,
        "dtype": model.config.dtype,
        "attention": config.attention,
        "cache_dtype": config.cache_dtype,
        **{name: getattr(config, name) for name in ("slots", "samples", "prompt_tokens", "written")},
        "seconds": token,
        "tokens_per_second": round(config.slots / token["median"], 1),
        "bytes": reads._asdict(),
        "gb_per_second": round(rate, 2),
        "copy_gb_per_second": copied,
        "fraction_of_copy": round(rate / copied, 4),
        "other_cpu": other,
        "device_peak_gib": device_peak_gib(),
    }


def describe(record: dict[str, Any]) -> str:
    """A record as a few lines."""
    seconds, read = record["seconds"], {name: size / 2**30 for name, size in record["bytes"].items()}
    first, last = record["written"]
    return (
        f"a token of {record['slots']} slots, at {record['prompt_tokens']} + {first} to {last} tokens, on one "
        f"{record['device']}: {1e3 * seconds['median']:.4g} ms (min {1e3 * seconds['min']:.4g}, max "
        f"{1e3 * seconds['max']:.4g}, n {seconds['n']}), {record['tokens_per_second']:,.0f} tokens per second\n"
        f"reads {read['weights']:.3f} GiB of weights and {read['pages']:.3f} of keys and values: "
        f"{record['gb_per_second']:,.1f} GB/s, {record['fraction_of_copy']:.1%} of the "
        f"{record['copy_gb_per_second']:,.0f} of a copy"
    )


def main(args: list[str] | None = None) -> None:
    """Measures."""
    with plain_errors():
        config = read_flags(Decoding(), args, __doc__ or "")
        record = measure(config)
    print(describe(record), flush=True)
    publish(record, config.json)


if __name__ == "__main__":
    main()
