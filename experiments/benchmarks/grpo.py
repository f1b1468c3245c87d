"""How fast GRPO runs on this machine: sampling, update, whole iteration; alone or beside another framework.

    python experiments/benchmarks/grpo.py                                   # a random toy model
    python experiments/benchmarks/grpo.py --size smollm2 --work W3 --model.dtype bfloat16
    python experiments/benchmarks/grpo.py --model.path MODELS/smollm2-135m-instruct --json speed.jsonl
    python experiments/benchmarks/grpo.py --work W2 --shape.lengths lognormal --tokens-per-micro-batch 4096
    python experiments/benchmarks/grpo.py --work W1 --shape.completion-tokens 1024 --shape.lengths lognormal --slots 16
    python experiments/benchmarks/grpo.py --work W3 --cache-dtype int8      # and how far sampler and learner are apart
    python experiments/benchmarks/grpo.py --beside 'PEER --work {work}'     # ours and PEER in turns

Each work runs in a process of its own, so that start-up, memory and compilations are that work's alone. With
`--beside`, ours and the peer's command run in turns (A B A B …), each time in fresh processes, and every pair gives
a ratio: a machine's speed drifts, but neighbours in time see about the same. docs/benchmarks.md says what is
measured; trl_grpo.py is the peer that measures TRL.

Hardware: anything that JAX runs on. Time: half a minute for the toy, minutes for 135 M parameters on two CPU cores.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import statistics
import time
from typing import Any

from jaxrl_llm.collector import importing

with importing():  # as the command does
    import jax
    from device import computed_flops, device_peak_gib, matmul_peak, temporaries_gib
    from measure import (
        WORKS,
        Bystanders,
        Work,
        conventional_flops,
        peak_rss_gib,
        process_age,
        publish,
        run_and_read,
        summarise,
    )
    from works import Benchmark, Learner, prepare

    from jaxrl_llm import __version__
    from jaxrl_llm.cli import plain_errors
    from jaxrl_llm.launch.flags import read_flags
    from jaxrl_llm.models.transformer import Transformer
    from jaxrl_llm.sharding import make_mesh
    from jaxrl_llm.training.compilation import CompilationCounter, enable_persistent_cache

# ---- Measuring -----------------------------------------------------------------------------------


def measure(config: Benchmark, work: Work) -> dict[str, Any]:
    """Times one work in this process, and returns its record."""
    cache = enable_persistent_cache() if config.cache else jax.config.values["jax_compilation_cache_dir"]
    with CompilationCounter() as compilations:
        mesh = make_mesh(config.mesh)
        model, run, learner = prepare(config, work, mesh)
        ready = process_age()
        run(0)
        start_up, mark = process_age(), compilations.mark()
        bystanders, seconds, of_cpu, phases = Bystanders(), [], [], []
        for number in range(1, config.repeats + 1):
            began, own = time.perf_counter(), time.process_time()
            phases.append(run(number))
            seconds.append(time.perf_counter() - began)
            of_cpu.append(time.process_time() - own)
        again = compilations.since(mark)
    record = {
        "system": "jaxrl_llm",
        "version": __version__,
        "jax": jax.__version__,
        "devices": f"{mesh.size} × {jax.devices()[0].device_kind}",
        "work": work,
        "model": config.model.path or f"random {config.size}",
        "parameters": model.config.num_parameters,
        **{name: getattr(model.config, name) for name in ("dtype", "param_dtype", "remat")},
        "kl_coef": config.kl_coef,
        "cache_dtype": config.cache_dtype,
        "shape": dataclasses.asdict(config.shape),
        "seconds": summarise(seconds),
        "cpu_seconds": summarise(of_cpu),
        "logp_gap": _logp_gap(learner) if learner is not None and work == "W3" else None,
        "useful_tokens": None if learner is None else round(float(learner.metrics["perf/frac_tokens_useful"]), 4),
        "phases": {name: round(statistics.median(p[name] for p in phases), 5) for name in phases[0]},
        "other_cpu": bystanders.share(),
        "ready_s": round(ready, 2),
        "start_up_s": round(start_up, 2),
        "peak_rss_gib": peak_rss_gib(),
        "device_peak_gib": device_peak_gib(),
        "temporaries_gib": temporaries_gib(),
        "compilations": {
            "programs": sum(compilations.counts.values()) - sum(again.values()),
            "seconds": round(compilations.seconds, 2),
            "from_cache": sum(one.from_cache for one in compilations.records),
            "names": compilations.counts,
            "after_first": again,
        },
        "persistent_cache": bool(cache),
    }
    return record | _rates(config, work, model, record["seconds"]["median"], mesh)


def _logp_gap(learner: Learner) -> dict[str, float]:
    """How far the log-probs of what was sampled last are from those that the learner gives it, in nats."""
    return {name: float(learner.metrics[f"sampling/logp_gap_{name}"]) for name in ("mean", "max")}


def _rates(
    config: Benchmark, work: Work, model: Transformer, seconds: float, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Tokens and FLOPs per second, beside the machine's matrix products."""
    reference = config.kl_coef != 0
    flops = {
        "convention": conventional_flops(work, model.config.num_parameters, config.shape, reference=reference),
        "computed": computed_flops(work, model.config, config.shape, reference=reference),
    }
    gflops = {name: 1e-9 * count / seconds for name, count in flops.items()}
    peaks = {dtype: matmul_peak(mesh, dtype) for dtype in dict.fromkeys(("float32", model.config.dtype))}
    return {
        "tokens_per_second": round(config.shape.sampled_tokens / seconds, 1),
        "flops": flops,
        "gflops_per_second": {name: round(rate, 2) for name, rate in gflops.items()},
        "matmul_peak": peaks,
        "fraction_of_peak": {
            dtype: {name: round(rate / peak["gflops"], 4) for name, rate in gflops.items()}
            for dtype, peak in peaks.items()
        },
    }


def measure_afresh(config: Benchmark, work: Work) -> dict[str, Any]:
    """`measure` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, config, work).result()


# ---- For people ----------------------------------------------------------------------------------


def describe(record: dict[str, Any]) -> str:
    """A record as a table of a few lines."""
    seconds, compiled = record["seconds"], record["compilations"]
    rates = record["gflops_per_second"]
    parts = ", ".join(f"{name} {spent:.4g}" for name, spent in record["phases"].items())
    rows = {
        "seconds": f"{_spread(seconds)}{f' ({parts})' if parts else ''}",
        "CPU seconds": _spread(record["cpu_seconds"]),
        "tokens": f"{record['tokens_per_second']:,.0f} completion tokens per second",
        "GFLOP/s": f"{rates['convention']:,.1f} by convention, {rates['computed']:,.1f} computed",
    }
    for dtype, fractions in record["fraction_of_peak"].items():
        peak = record["matmul_peak"][dtype]
        rows[f"of {dtype}"] = (
            f"{fractions['convention']:.1%} by convention, {fractions['computed']:.1%} computed, of the "
            f"{peak['gflops']:,.0f} GFLOP/s of a {peak['size']}³ matrix product"
        )
    if record["useful_tokens"] is not None:
        rows["useful"] = f"{record['useful_tokens']:.1%} of the tokens that are computed"
    if (gap := record["logp_gap"]) is not None:
        rows["log-probs"] = f"sampler and learner {gap['mean']:.2g} nats apart, {gap['max']:.2g} at most"
    device = record["device_peak_gib"]
    programs = ", ".join(f"{name} {size:.3g}" for name, size in record["temporaries_gib"].items())
    rows["memory"] = f"{record['peak_rss_gib']:.2f} GiB at most" + (f", {device:.2f} on the device" if device else "")
    rows["temporaries"] = f"GiB: {programs or 'under 0.001 in each program'}"
    rows["start-up"] = f"{record['start_up_s']:.1f} s to the end of the first run, {record['ready_s']:.1f} without it"
    rows["compilations"] = (
        f"{compiled['programs']} in {compiled['seconds']:.1f} s, {compiled['from_cache']} of them from the cache; "
        f"after the first run {compiled['after_first'] or 'none'}"
    )
    if record["other_cpu"] is not None:
        rows["disturbance"] = f"other processes had {record['other_cpu']:.0%} of the CPU time"
    title = (
        f"{record['work']}: {WORKS[record['work']]}; {record['model']}, {record['parameters'] / 1e6:.1f} M parameters, "
        f"{record['dtype']}, {record['devices']}"
    )
    return "\n".join([title, *(f"  {name:<14}{text}" for name, text in rows.items())])


def _spread(seconds: dict[str, float]) -> str:
    return f"{seconds['median']:.4g} (min {seconds['min']:.4g}, max {seconds['max']:.4g}, n {seconds['n']})"


def main(args: list[str] | None = None) -> None:
    """Runs the benchmark."""
    with plain_errors():
        config = read_flags(Benchmark(), args, __doc__ or "")
        for work in config.work:
            if config.beside is None:
                record = measure_afresh(config, work)
                print(describe(record))
                publish(record, config.json)
            else:
                publish(compare(config, work, config.beside), config.json)


def compare(config: Benchmark, work: Work, peer: str) -> dict[str, Any]:
    """Runs ours and the peer in turns, and returns the record of their ratios, peer's seconds / ours."""
    command, ratios, starts, name = peer.replace("{work}", work), [], [], "peer"
    for pair in range(1, config.pairs + 1):
        ours = measure_afresh(config, work)
        if pair == 1:
            print(describe(ours))
        publish(ours, config.json)
        theirs = run_and_read(command)
        publish(theirs, config.json)
        name = theirs.get("system", name)
        ratios.append(theirs["seconds"]["median"] / ours["seconds"]["median"])
        starts += [theirs["start_up_s"] / ours["start_up_s"]] if "start_up_s" in theirs else []
        print(f"pair {pair} of {config.pairs}: ours {_spread(ours['seconds'])}, {name} {_spread(theirs['seconds'])}")
        print(f"  {name} / ours: {ratios[-1]:.2f}" + (f", start-up {starts[-1]:.2f}" if starts else ""), flush=True)
    record = {
        "comparison": f"{name} / jaxrl_llm",
        "work": work,
        "ratio": summarise(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "start_up_ratios": [round(ratio, 3) for ratio in starts],
        "peer": command,
    }
    print(f"{work}: {name} takes {_spread(record['ratio'])} times as long as jaxrl_llm")
    return record


if __name__ == "__main__":
    main()
