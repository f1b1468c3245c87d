"""Evaluation without training: a policy's completions of a data set, scored by the reward functions of training."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm.checks import check_fields, count, finite
from jaxrl_llm.config import flatten
from jaxrl_llm.data.encoded_rows import Overlong
from jaxrl_llm.data.formats import PromptFormat
from jaxrl_llm.data.interfaces import RowSource
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.sources import open_source
from jaxrl_llm.launch.loading import Policy, check_writes, find_rewards, mesh_of
from jaxrl_llm.models.checkpoints.tokenizers import known_tokens
from jaxrl_llm.rewards import RewardFunction
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.training.episodes.estimates import Estimate, solved_within
from jaxrl_llm.training.episodes.evaluate import Decoded, EvaluationConfig, Evaluator, Scores
from jaxrl_llm.training.episodes.reading import completion_text
from jaxrl_llm.training.episodes.scorable import check_scorable
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.run.distributed import is_main_process

COMPLETIONS, METRICS = "completions.jsonl", "metrics.json"
"""Files of an evaluation's folder."""

_WIDTHS = 64
"""Prompts are padded to multiples of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured."""

    samples: int = 0
    """Samples n of each prompt; 0: it is decoded greedily only."""
    ks: tuple[int, ...] = ()
    """k of each pass@k, at most n; empty: 1 and n."""
    greedy: bool = True
    """Whether to decode greedily."""
    solved_by: str | None = None
    """Reward function whose value of at least `threshold` means that a prompt is solved; `None`: the first one."""
    threshold: float = 1.0
    """The value from which on a prompt is solved."""
    batch_size: int = 32
    """Prompts decoded at a time. Beside memory and time it changes the noise of samples."""
    seed: int = 0
    """Of that noise."""

    def __post_init__(self) -> None:
        """Rejects what cannot be measured."""
        check_fields(
            "evaluation",
            self,
            samples=count(self.samples, least=0),
            batch_size=count(self.batch_size),
            threshold=finite(self.threshold),
            seed=(0 <= self.seed < 2**32, f"be between 0 and {2**32 - 1}"),
        )
        if not (self.greedy or self.samples):
            raise ValueError("nothing would be decoded: give samples, or greedy")
        if not all(1 <= k <= self.samples for k in self.ks):
            raise ValueError(f"ks={self.ks} of pass@k must be from 1 to samples={self.samples}")

    def check(self, sampling: SamplingConfig) -> None:
        """Raises ValueError for samples that would all be equal."""
        if self.samples and sampling.greedy:
            raise ValueError(f"samples={self.samples} would all be equal: give sampling.temperature above 0")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, Estimate]
    """By name; see `evaluate`."""
    prompts: int
    """Prompts that were evaluated."""
    completions: int
    """Completions of them."""
    tokens: int
    """Tokens of these."""
    seconds: float
    """Compilation included."""

    def metrics_as_json(self) -> dict[str, dict[str, float | None]]:
        """Value, standard error and number of prompts of each, `None` for what is not known."""
        return {
            name: {"value": _number(value), "stderr": _number(stderr), "prompts": prompts}
            for name, (value, stderr, prompts) in self.metrics.items()
        }

    def table(self) -> str:
        """The metrics with their standard errors, a line each."""
        width = max(map(len, self.metrics))
        lines = [f"{'metric':{width}}  {'value':>9}  {'stderr':>8}  {'prompts':>7}"]
        for name, (value, stderr, prompts) in self.metrics.items():
            error = "" if math.isnan(stderr) else f"± {stderr:.4f}"
            lines.append(f"{name:{width}}  {value:9.4f}  {error:>8}  {prompts:7d}")
        return "\n".join(lines)


def evaluate(
    policy: Policy,
    rows: RowSource | PromptDataset,
    rewards: Sequence[RewardFunction | str] | RewardFunction | str | RewardSum,
    sampling: SamplingConfig | None = None,
    *,
    samples: int = 0,
    ks: Sequence[int] = (),
    greedy: bool = True,
    solved_by: str | None = None,
    threshold: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    prompt_format: PromptFormat | None = None,
    mesh: jax.sharding.Mesh | None = None,
    folder: str | Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Evaluation:
    """Completes every prompt of a data set, greedily and by sampling, and scores the completions.

    Prompts are decoded a batch at a time by the sampler of training, greedily in one compiled program and by sampling
    in another. A prompt is solved where the reward function `solved_by` gives at least `threshold`. Metrics are means
    over prompts with their standard errors (`Estimate`):

    - `greedy/accuracy`: prompts whose greedy completion solves them; `greedy/reward` and `greedy/rewards/<name>`: the
      weighted sum and each function; `greedy/finished`: completions that ended before `sampling.max_tokens`;
      `greedy/length`: their tokens.
    - `sampled/…`: the same over n samples of each prompt, of which `sampled/mean@n` is the share that solves it, and
      `sampled/pass@k` the chance that one of k does, 1 − C(n − c, k)/C(n, k) where c of n do (`solved_within`).

    Args:
        policy: the model with its tokenizer, as `load_policy` gives it.
        rows: rows with prompts, or these read already: then `prompt_format` has no effect.
        rewards: reward functions, as in training, or names of them.
        sampling: distribution, longest completion, stop texts, slots; `None`: the defaults of `SamplingConfig`.
        samples: n, of each prompt; 0: none.
        ks: k of each `pass@k`, at most n; empty: 1 and n.
        greedy: whether to decode greedily.
        solved_by: name of a reward function; `None`: the first one.
        threshold: its value from which on a prompt is solved.
        batch_size: prompts that are decoded at a time. Beside memory and time it changes the noise of samples.
        seed: of the noise.
        prompt_format: how a row becomes a prompt; `None`: from its column `prompt`.
        mesh: the devices to sample on; `None`: those on which the parameters lie.
        folder: where `completions.jsonl` is written as they come, and `metrics.json` at the end; `None`: nowhere.
        tell: given a line after each batch.

    Raises:
        ValueError: nothing is to be measured, or rows, rewards and settings do not fit together.
        RewardError: a reward function failed.
    """
    check_writes(policy)
    measures = Measures(
        samples=samples,
        ks=tuple(ks),
        greedy=greedy,
        solved_by=solved_by,
        threshold=threshold,
        batch_size=batch_size,
        seed=seed,
    )
    sampling, began, mesh = sampling or SamplingConfig(), time.perf_counter(), mesh or mesh_of(policy)
    total = rewards if isinstance(rewards, RewardSum) else RewardSum(find_rewards(rewards))
    measures.check(sampling)
    sampling.check_no_epochs("an evaluation")
    check_folder(folder)
    if not isinstance(rows, PromptDataset):
        positions = policy.model.config.longest_text
        rows = prompts_to_evaluate(rows, policy.tokenizer, total, sampling, positions, prompt_format=prompt_format)
    evaluator = Evaluator(
        policy.model.with_known_tokens(known_tokens(policy.tokenizer)),
        rows,
        policy.tokenizer,
        total,
        EvaluationConfig(every=1, samples=samples, solved_by=solved_by, batch_size=batch_size),
        sampling=sampling,
        stop_tokens=policy.stop_tokens,
        mesh=mesh,
        rows=batch_size,
        greedy=greedy,
    )
    key = np.asarray(jax.random.key_data(jax.random.key(seed)))
    parts: dict[str, list[Scores]] = {}
    with _appended(folder) as append:
        for batch in evaluator.batches(policy.params, key):
            for kind, decoded in zip(("greedy", "sampled"), batch, strict=True):
                if decoded is not None:
                    parts.setdefault(kind, []).append(decoded.scores)
                    append(_lines(kind, decoded, policy.tokenizer))
            if tell is not None:
                tell(_progress(parts, evaluator.solved_by, threshold, len(rows)))
    scores = {kind: Scores.joined(some) for kind, some in parts.items()}
    found = Evaluation(
        metrics=dict(
            metric for kind, some in scores.items() for metric in _metrics(kind, some, evaluator.solved_by, measures)
        ),
        prompts=len(rows),
        completions=sum(some.lengths.size for some in scores.values()),
        tokens=sum(int(some.lengths.sum()) for some in scores.values()),
        seconds=time.perf_counter() - began,
    )
    if folder is not None and is_main_process():
        settings = flatten(measures) | flatten(sampling, "sampling.") | {"solved_by": evaluator.solved_by}
        told = {"metrics": found.metrics_as_json(), "prompts": found.prompts, "dropped": rows.dropped}
        told |= {"completions": found.completions, "tokens": found.tokens, "seconds": found.seconds}
        (Path(folder) / METRICS).write_text(json.dumps(told | {"settings": settings}, indent=2) + "\n")
    return found


def prompts_to_evaluate(
    rows: Any,
    tokenizer: Any,
    rewards: RewardSum,
    sampling: SamplingConfig,
    positions: int,
    *,
    prompt_format: PromptFormat | None = None,
    overlong: Overlong = "raise",
    max_prompts: int | None = None,
) -> PromptDataset:
    """Prompts with what reward functions require, padded to little more than the longest.

    Args:
        rows: a source, or its name; see `open_source`.
        tokenizer: of the model.
        rewards: the reward functions.
        sampling: its longest completion has to fit behind a prompt.
        positions: of the model.
        prompt_format: how a row becomes a prompt; `None`: from its column `prompt`.
        overlong: what to do with prompts behind which no completion fits.
        max_prompts: use the first rows only.

    Raises:
        ValueError: there are none, one gives no prompt or cannot be scored, or a completion does not fit.
        FileNotFoundError: a file is missing.
    """
    limit = positions - sampling.max_tokens
    if limit < 1:
        raise ValueError(
            f"sampling.max_tokens={sampling.max_tokens} leaves no room in the model's {positions} positions"
        )
    prompts = PromptDataset(
        open_source(rows, max_rows=max_prompts),
        tokenizer,
        max_prompt_length=limit,
        prompt_format=prompt_format,
        overlong=overlong,
        max_rows=max_prompts,
    )
    prompts.max_prompt_length = min(-(-prompts.longest // _WIDTHS) * _WIDTHS, limit)
    check_scorable(rewards, prompts)
    return prompts


def check_folder(folder: str | Path | None) -> None:
    """Refuses a place that cannot be a folder, and to write over another evaluation; one that told nothing is none.

    Raises:
        ValueError: says which file is in the way.
    """
    if folder is None:
        return
    output = Path(folder)
    file = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ValueError(f"output={output} cannot be a folder: {file} is a file; choose another --output")
    for name in (COMPLETIONS, METRICS):
        if (output / name).exists() and (output / name).stat().st_size:
            raise ValueError(f"{output / name} is there already, of another evaluation: choose another --output")


@contextlib.contextmanager
def _appended(folder: str | Path | None) -> Iterator[Callable[[Iterable[str]], None]]:
    """What writes lines of completions, to nowhere in processes beside the first."""
    if folder is None or not is_main_process():
        yield lambda lines: None
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    with (Path(folder) / COMPLETIONS).open("w", encoding="utf-8") as file:
        yield lambda lines: file.writelines(f"{line}\n" for line in lines)


def _metrics(kind: str, scores: Scores, solved_by: str, measures: Measures) -> Iterator[tuple[str, Estimate]]:
    solved = scores.rewards[solved_by] >= measures.threshold  # not where the function does not apply
    if kind == "greedy":
        yield "greedy/accuracy", Estimate.of(solved)
    else:
        yield f"sampled/mean@{measures.samples}", Estimate.of(solved)
        for k in measures.ks or sorted({1, measures.samples}):
            yield f"sampled/pass@{k}", Estimate.of(solved_within(solved, k))
    for name, values in scores.rewards.items():
        yield f"{kind}/rewards/{name}" if name else f"{kind}/reward", Estimate.of(values)
    yield f"{kind}/finished", Estimate.of(scores.finished)
    yield f"{kind}/length", Estimate.of(scores.lengths)


def _progress(parts: dict[str, list[Scores]], solved_by: str, threshold: float, prompts: int) -> str:
    solved = {kind: Scores.joined(some).rewards[solved_by] >= threshold for kind, some in parts.items()}
    shares = ", ".join(f"{some.mean():.3f} ({kind})" for kind, some in solved.items())
    return f"{len(next(iter(solved.values())))} of {prompts} prompts: {solved_by} {shares}"


def _lines(kind: str, decoded: Decoded, tokenizer: Any) -> Iterator[str]:
    """A JSON object a completion."""
    episodes, scores = decoded.episodes, decoded.scores
    for number, (prompt, sample) in enumerate(np.ndindex(scores.lengths.shape)):
        text = completion_text(
            episodes.completion_ids[number],
            tokenizer,
            finished=episodes.finished[number],
            opening=episodes.openings[prompt],
        )
        rewards = {name: _number(float(values[prompt, sample])) for name, values in scores.rewards.items()}
        record = {
            "row": int(decoded.rows[prompt]),
            "kind": kind,
            "sample": sample,
            "prompt": episodes.prompts[prompt],
            "completion": text,
            "reward": rewards.pop(""),
            "rewards": rewards,
            "finished": bool(scores.finished[prompt, sample]),
            "tokens": int(scores.lengths[prompt, sample]),
            "columns": {name: values[prompt] for name, values in episodes.columns.items()},
            "extra": {name: values[number] for name, values in episodes.extra.items()},
        }
        yield json.dumps(record, ensure_ascii=False, default=str)


def _number(value: float) -> float | None:
    """As JSON has it, which has no NaN."""
    return None if math.isnan(value) else value
