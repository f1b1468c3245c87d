"""An update of one long row of tokens: its memory, its seconds, and the share of the machine's matrix products.

    python experiments/benchmarks/long_row.py --size smollm2 --tokens 4096 8192 16384 --repeats 0    # memory alone
    python experiments/benchmarks/long_row.py --size qwen3-0.6b --model.dtype bfloat16 --tokens 16384 65536    # a GPU

A prompt and the completions that share it fill a row of exactly so many tokens, which is one micro-batch. Memory is
that of the compiled program, on one device: parameters and moments (arguments), and all that is between (temporaries).
FLOPs are those of `device.computed_flops`: causal attention counted, what remat computes again not. With `--repeats 0`
nothing is run, and nothing of the model's size is allocated.

Hardware: one device of any kind; for qwen3-0.6b a GPU. Time: a few seconds for each length where nothing is run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
from device import computed_flops, device_peak_gib, matmul_peak
from make_model import SIZES, Size
from measure import Bystanders, Shape, publish, summarise
from works import Benchmark, given_rollout, make_update, random_params

from jaxrl_llm import __version__
from jaxrl_llm.cli import plain_errors
from jaxrl_llm.config import ModelSource
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class LongRow:
    """Which rows, of which model."""

    size: Size = "tiny"
    """The model: tiny (4 layers of width 128), smollm2 (SmolLM2-135M's shape) or qwen3-0.6b."""
    model: ModelSource = ModelSource(remat="attention")
    """Types, remat and the implementation of attention."""
    tokens: tuple[int, ...] = (1024, 2048, 4096)
    """T, lengths of the row, each measured by itself."""
    prompt_tokens: int = 256
    """Tp, of which the prompt's."""
    samples: int = 4
    """G, completions, equally long; of one, each token sees all before it."""
    repeats: int = 3
    """Updates that are timed, after a first one; 0: none is made."""
    json: str | None = None
    """File that every record is appended to, one JSON object a line; -: print lines of RESULT and JSON."""

    def __post_init__(self) -> None:
        """Rejects a path, whose weights would not be read, and rows that cannot be filled."""
        if self.model.path is not None:
            raise ValueError(f"model.path={self.model.path}: speed does not depend on the weights; choose a --size")
        if min(self.prompt_tokens, self.samples) < 1 or self.repeats < 0:
            raise ValueError(
                f"prompt_tokens={self.prompt_tokens} and samples={self.samples} must be at least 1, and "
                f"repeats={self.repeats} not negative"
            )
        for tokens in self.tokens:
            rest = tokens - self.prompt_tokens
            if rest < self.samples or rest % self.samples:
                raise ValueError(
                    f"tokens={tokens} less prompt_tokens={self.prompt_tokens} cannot be dealt to samples={self.samples}"
                    " of equal length: change one of them"
                )

    def update_of(self, tokens: int) -> Benchmark:
        """The update of a row."""
        completion = (tokens - self.prompt_tokens) // self.samples
        shape = Shape(1, self.prompt_tokens, self.samples, completion)
        return Benchmark(self.model, self.size, ("W2",), shape=shape, tokens_per_micro_batch=tokens)


def measure(config: LongRow, tokens: int) -> dict[str, Any]:
    """The record of one length."""
    work, mesh = config.update_of(tokens), make_mesh(devices=jax.devices()[:1])
    model = Transformer(config.model.applied_to(SIZES[config.size]))
    update, given = make_update(work, mesh, model), given_rollout(work.shape, model.config.vocab_size, mesh)
    began = time.process_time()
    with jax.set_mesh(mesh):
        compiled = update.program.lower(update.state, *given, None).compile()
    spent, memory = time.process_time() - began, compiled.memory_analysis()
    record = {
        "version": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "model": config.size,
        **{name: getattr(model.config, name) for name in ("dtype", "param_dtype", "remat", "attention")},
        "tokens": tokens,
        "shape": dataclasses.asdict(work.shape),
        "compile_cpu_s": round(spent, 2),
        "gib": {
            "arguments": round(memory.argument_size_in_bytes / 2**30, 3),
            "temporaries": round(memory.temp_size_in_bytes / 2**30, 3),
        },
    }
    if not config.repeats:
        return record
    with jax.set_mesh(mesh):
        state = update.begin(random_params(model, mesh))
        state, metrics = jax.block_until_ready(compiled(state, *given, None))
        if not math.isfinite(metrics["loss"]) or metrics["perf/frac_tokens_useful"] != 1:
            raise ValueError(f"not the update that was meant: {metrics}")
        bystanders, seconds = Bystanders(), []
        for _ in range(config.repeats):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, *given, None))
            seconds.append(time.perf_counter() - began)
    other = bystanders.share()
    flops, peak = computed_flops("W2", model.config, work.shape, reference=False), matmul_peak(mesh, model.config.dtype)
    rate = 1e-9 * flops / summarise(seconds)["median"]
    return record | {
        "seconds": summarise(seconds),
        "other_cpu": other,
        "tokens_per_second": round(tokens / summarise(seconds)["median"], 1),
        "gflops_per_second": round(rate, 1),
        "matmul_peak": peak,
        "fraction_of_peak": round(rate / peak["gflops"], 4),
        "device_peak_gib": device_peak_gib(),
    }


def describe(record: dict[str, Any]) -> str:
    """A record as a line or two."""
    gib = record["gib"]
    told = (
        f"{record['tokens']:>7} tokens: {gib['arguments']:.2f} GiB of arguments, {gib['temporaries']:.2f} of "
        f"temporaries; compiled in {record['compile_cpu_s']:.0f} s of CPU"
    )
    if "seconds" not in record:
        return told
    seconds, peak = record["seconds"], record["matmul_peak"]
    told += (
        f"\n        {seconds['median']:.4g} s (min {seconds['min']:.4g}, max {seconds['max']:.4g}, n {seconds['n']}), "
        f"{record['tokens_per_second']:,.0f} tokens per second\n        {record['gflops_per_second']:,.0f} GFLOP/s, "
        f"{record['fraction_of_peak']:.1%} of the {peak['gflops']:,.0f} of a {peak['size']}³ matrix product"
    )
    if record["device_peak_gib"] is not None:
        told += f"; at most {record['device_peak_gib']:.2f} GiB on the device so far"
    return told


def main(args: list[str] | None = None) -> None:
    """Measures each length."""
    with plain_errors():
        config = read_flags(LongRow(), args, __doc__ or "")
        model = config.model
        print(
            f"one update of {config.size}, {model.dtype}, remat {model.remat}, attention {model.attention}, on one "
            f"{jax.devices()[0].device_kind}"
        )
        for tokens in sorted(config.tokens):
            record = measure(config, tokens)
            print(describe(record), flush=True)
            publish(record, config.json)


if __name__ == "__main__":
    main()
