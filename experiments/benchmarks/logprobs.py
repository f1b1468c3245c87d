"""Token log-probs from hidden states, chunked and plain: memory of the compiled programs, seconds, difference.

    python experiments/benchmarks/logprobs.py                               # 2048 tokens, vocabulary 32 000
    python experiments/benchmarks/logprobs.py --tokens 8192 --dtype bfloat16
    python experiments/benchmarks/logprobs.py --timed none                  # memory alone: nothing is allocated

What is compiled and timed is the value and the gradient, in states and head, of the sum of the log-probs, with the mean
entropy beside it. The plain pass makes all logits at once (`scores_from_logits`), the chunked one is `token_scores`.
Memory is that of the compiled program: arguments, results (the gradients of states and head) and temporaries, beside
what it cannot do without: states, head, gradient of the head, and one chunk of logits. Both are timed in turns, plain,
chunked, plain, chunked, …, and each pair gives a ratio.

Hardware: anything that JAX runs on. Time: a minute on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from measure import Bystanders, publish, summarise

from jaxrl_llm import __version__
from jaxrl_llm.cli import plain_errors
from jaxrl_llm.launch.flags import read_flags
from jaxrl_llm.logprobs import CHUNK_LOGITS, MIN_CHUNK, TokenScores, scores_from_logits, token_scores
from jaxrl_llm.models.config import DType

Scorer = Callable[[jax.Array, jax.Array, jax.Array], TokenScores]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Sizes of what is measured, and how often."""

    tokens: int = 2048
    """B·T, tokens whose log-probs are timed."""
    vocabulary: int = 32_000
    """V of what is timed."""
    width: int = 1024
    """D, of what is timed and of the memory."""
    memory_tokens: int = 8192
    """B·T of the programs whose memory is read off; they are not run."""
    memory_vocabulary: int = 151_936
    """V of these programs."""
    dtype: DType = "float32"
    """Type of states and head."""
    timed: Literal["both", "none"] = "both"
    """Whether anything is run and timed."""
    repeats: int = 5
    """Pairs that are timed, after one that compiles."""
    json: str | None = None
    """File that the record is appended to, one JSON object a line; -: print a line of RESULT and JSON."""

    def __post_init__(self) -> None:
        """Rejects counts that cannot be meant."""
        for field in ("tokens", "vocabulary", "width", "memory_tokens", "memory_vocabulary", "repeats"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")


def plain_scores(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> TokenScores:
    """Scores from logits of all tokens over the whole vocabulary."""
    logits = jnp.einsum("td,vd->tv", hidden, head, preferred_element_type=jnp.float32)
    return scores_from_logits(logits, tokens)


SCORERS: dict[str, Scorer] = {"plain": plain_scores, "chunked": token_scores}


def value_and_gradient(scorer: Scorer) -> Any:
    """Compiles to `(states, head, tokens) -> ((Σ log-probs, mean entropy), gradients of states and head)`."""

    def loss(hidden: jax.Array, head: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = scorer(hidden, head, tokens)
        return jnp.sum(scores.logprobs), jnp.mean(scores.entropy)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


# ---- Memory --------------------------------------------------------------------------------------


def memory(config: Benchmark) -> dict[str, Any]:
    """MiB of the compiled programs, and of what they cannot do without."""
    tokens, vocabulary, width = config.memory_tokens, config.memory_vocabulary, config.width
    states, head = ((size, width) for size in (tokens, vocabulary))
    inputs = [jax.ShapeDtypeStruct(*given) for given in ((states, config.dtype), (head, config.dtype))]
    ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    needed = {}
    for name, scorer in SCORERS.items():
        analysis = value_and_gradient(scorer).lower(*inputs, ids).compile().memory_analysis()
        needed[name] = _with_sum(
            {
                "arguments": analysis.argument_size_in_bytes,
                "results": analysis.output_size_in_bytes,
                "temporaries": analysis.temp_size_in_bytes,
            }
        )
    item, entries = jnp.dtype(config.dtype).itemsize, max(MIN_CHUNK, CHUNK_LOGITS // tokens)
    floor = _with_sum(
        {
            "states": item * tokens * width,
            "head": item * vocabulary * width,
            "gradient of the head": item * vocabulary * width,
            "one chunk": 4 * tokens * min(entries, vocabulary),
        }
    )
    return {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "width": width,
        "mib": {name: _in_mib(parts) for name, parts in needed.items()},
        "floor_mib": _in_mib(floor),
        "chunked_of_floor": round(needed["chunked"]["all"] / floor["all"], 3),
    }


def _with_sum(parts: dict[str, int]) -> dict[str, int]:
    return parts | {"all": sum(parts.values())}


def _in_mib(parts: dict[str, int]) -> dict[str, float]:
    return {name: round(size / 2**20, 1) for name, size in parts.items()}


# ---- Time ----------------------------------------------------------------------------------------


def timing(config: Benchmark) -> dict[str, Any]:
    """Seconds of both on random arrays, in turns, and the largest differences of what they return."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(config.tokens, config.width)), config.dtype)
    head = jnp.asarray(rng.normal(size=(config.vocabulary, config.width)) / config.width**0.5, config.dtype)
    tokens = jnp.asarray(rng.integers(0, config.vocabulary, config.tokens))
    programs = {name: value_and_gradient(scorer) for name, scorer in SCORERS.items()}
    results = [jax.block_until_ready(program(hidden, head, tokens)) for program in programs.values()]
    bystanders = Bystanders()
    clocks = {"seconds": time.perf_counter, "processor_seconds": time.process_time}
    spent: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in clocks} for name in programs}
    for _ in range(config.repeats):
        for name, program in programs.items():
            began = {clock: read() for clock, read in clocks.items()}
            jax.block_until_ready(program(hidden, head, tokens))
            for clock, read in clocks.items():
                spent[name][clock].append(read() - began[clock])
    names = ("logprobs", "entropy", "gradient of states", "gradient of head")
    return {
        "tokens": config.tokens,
        "vocabulary": config.vocabulary,
        "width": config.width,
        **{name: {clock: summarise(values) for clock, values in lists.items()} for name, lists in spent.items()},
        "chunked_of_plain": {
            clock: summarise(
                [ours / theirs for ours, theirs in zip(spent["chunked"][clock], spent["plain"][clock], strict=True)]
            )
            for clock in clocks
        },
        "differences": dict(zip(names, _differences(*results), strict=True)),
        "other_cpu": bystanders.share(),
    }


def _differences(expected: Any, ours: Any) -> list[float]:
    """Largest differences, relative to the largest element."""
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True)
    arrays = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    return [float(f"{np.abs(a - b).max() / np.abs(a).max():.2g}") for a, b in arrays]


# ---- For people ----------------------------------------------------------------------------------


def measure(config: Benchmark) -> dict[str, Any]:
    """The record of everything."""
    device = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    record: dict[str, Any] = {"version": __version__, "jax": jax.__version__, "device": device, "dtype": config.dtype}
    record["memory"] = memory(config)
    if config.timed == "both":
        record["time"] = timing(config)
    return record


def describe(record: dict[str, Any]) -> str:
    """A record as a few lines."""
    found = record["memory"]
    lines = [
        f"{record['device']}, {record['dtype']}, JAX {record['jax']}",
        _sizes(found),
        *(f"  {name:<10}{_listed(parts)}" for name, parts in found["mib"].items()),
        f"  {'floor':<10}{_listed(found['floor_mib'])}",
        f"  chunked / floor: {found['chunked_of_floor']}",
    ]
    if timed := record.get("time"):
        lines.append(_sizes(timed))
        for name in SCORERS:
            wall, processor = (timed[name][clock] for clock in ("seconds", "processor_seconds"))
            lines.append(
                f"  {name:<10}{wall['median']:.4g} s (min {wall['min']:.4g}, n {wall['n']}), "
                f"{processor['median']:.4g} s of processors"
            )
        wall, processor = (timed["chunked_of_plain"][clock]["median"] for clock in ("seconds", "processor_seconds"))
        lines.append(f"  chunked / plain: {wall:.3f}, {processor:.3f} of processors")
        lines.append("  differences: " + ", ".join(f"{name} {size:g}" for name, size in timed["differences"].items()))
        if timed["other_cpu"] is not None:
            lines.append(f"  other processes had {timed['other_cpu']:.0%} of the CPU time")
    return "\n".join(lines)


def _sizes(record: dict[str, Any]) -> str:
    return f"{record['tokens']} tokens, vocabulary {record['vocabulary']}, width {record['width']}"


def _listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{part} {size:,.0f}" for part, size in parts.items()) + " MiB"


def main(args: list[str] | None = None) -> None:
    """Runs the benchmark."""
    with plain_errors():
        config = read_flags(Benchmark(), args, __doc__ or "")
        record = measure(config)
        print(describe(record))
        publish(record, config.json)


if __name__ == "__main__":
    main()
