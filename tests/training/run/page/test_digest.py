"""What a page is made of: the same whether a folder is read as it grows or at once, and bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxrl_llm.training.run.damaged_files import DamagedRunError
from jaxrl_llm.training.run.page.curves import POINTS, Curve, Curves
from jaxrl_llm.training.run.page.digest import Digest
from jaxrl_llm.training.run.page.document import page
from jaxrl_llm.training.run.page.samples import KeptSteps
from jaxrl_llm.training.run.page.tallies import BUCKETS, TIMES, Lengths

MakeRun = Callable[..., Path]


def test_a_long_curve_is_means_and_bounds_of_equal_parts() -> None:
    values = np.random.default_rng(0).normal(size=3001)
    curves = Curves()
    for step, value in enumerate(values):
        curves.add({"step": step, "x": value})
    curves.add({"step": 3001, "x": float("inf")})
    told = curves.data()
    curve, steps = told["curves"]["x"], told["axes"][told["curves"]["x"]["axis"]]
    width = steps[1] - steps[0]
    assert POINTS / 2 <= len(steps) <= POINTS + 1 and steps == list(range(0, 3001, width))
    parts = [values[step : step + width] for step in steps]
    for name, of in (("mean", np.mean), ("least", np.min), ("greatest", np.max)):
        np.testing.assert_allclose(curve[name], [of(part) for part in parts], rtol=1e-4, atol=1e-6)
    assert curve["first"] == pytest.approx(values[0], rel=1e-4)
    assert (curve["last"], curve["not_finite"], curves.last_step) == (None, 1, 3001)


def test_curves_of_the_same_steps_share_them() -> None:
    curves = Curves()
    for step in (1, 2):
        curves.add({"step": step, "a": 1.0, "b": step})
    curves.add({"step": 2, "eval/a": 0.5})
    told = curves.data()
    assert told["axes"] == [[1, 2], [2]]
    assert told["curves"]["b"] == {"axis": 0, "mean": [1.0, 2.0], "first": 1.0, "last": 2.0, "not_finite": 0}
    assert Curve().last[0] == 0


def test_kept_steps_are_the_first_the_last_and_some_at_equal_distances_between() -> None:
    kept = KeptSteps(limit=5)
    for step in range(3, 103):
        for _ in range(2):
            kept.add({"step": step})
    steps = [rows[0]["step"] for rows in kept.steps]
    assert steps == [3, 35, 67, 99, 102] and all(len(rows) == 2 for rows in kept.steps)


def test_lengths_keep_their_counts_as_their_parts_double() -> None:
    lengths, rng = Lengths(), np.random.default_rng(0)
    for step in range(1000):
        lengths.add({"step": step, "tokens": int(rng.integers(500)), "finished": bool(step % 4)})
    told = lengths.data()
    assert told is not None and (told["time"], told["width"]) == (32, 16)
    assert sum(count for *_, count in told["counts"]) == 1000
    assert sum(count for *_, ended, count in told["counts"] if not ended) == 250
    of_part = [sum(count for time, _, _, count in told["counts"] if time == part) for part in range(32)]
    assert of_part == [32] * 31 + [8]  # 1000 steps in parts of 32
    assert max(row[0] for row in told["counts"]) < TIMES and max(row[1] for row in told["counts"]) < BUCKETS


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_run_read_as_it_grows_is_the_run_read_at_once(make_run: MakeRun, form: str) -> None:
    folder = make_run(7, form=form)
    growing = Digest(folder)
    growing.update()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rew')  # which waits until it is whole
    growing.update()
    assert growing.curves.last_step == 7
    make_run(30, form=form, first=8)
    growing.update()
    growing.settings["training.steps"] = 30
    whole = Digest(folder)
    whole.update()
    assert growing.data() == whole.data()
    told = whole.data()
    assert told["step"] == told["steps"] == 30 and told["curves"]["loss"]["not_finite"] == 1
    assert [step["step"] for step in told["samples"]][:2] == [1, 3] and told["samples"][-1]["step"] == 30
    assert [len(group["samples"]) for group in told["samples"][0]["groups"]] == [3, 3]
    assert [[answer["step"] for answer in one["answers"]] for one in told["held_out"]] == [[10, 20, 30]] * 2
    assert sum(count for *_, count in told["lengths"]["counts"]) == 180
    prompts = told["prompts"]
    assert prompts["by"] == "right" and (prompts["never"], prompts["sometimes"], prompts["always"]) == (1, 8, 1)
    assert [tally["row"] for some in prompts["lists"] for tally in some] == [0, 9]


def test_a_damaged_line_is_named(make_run: MakeRun) -> None:
    folder = make_run(2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(DamagedRunError, match="line 3: expected a JSON object"):
        Digest(folder).update()


def test_a_page_is_bounded_whatever_the_run(make_run: MakeRun) -> None:
    folder = make_run(60)
    row = json.loads((folder / "completions.jsonl").read_bytes().split(b"\n")[0])
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "values")
    row |= {f"token_{name}": [-0.123456] * 700 for name in names} | {"token_texts": ["word "] * 700}
    row |= {"completion": "word " * 700, "tokens": 700}
    places = [(step, prompt, sample) for step in range(90) for prompt in range(2) for sample in range(4)]
    lines = (json.dumps(row | {"step": step, "row": prompt, "sample": sample}) for step, prompt, sample in places)
    (folder / "completions.jsonl").write_text("".join(f"{line}\n" for line in lines))
    digest = Digest(folder)
    digest.update()
    train = digest.data()["samples"]
    assert len(train) <= 21 and all(len(group["samples"]) == 4 for step in train for group in step["groups"])
    assert len(page([digest.data()])) < 21 * 4 * 40_000 < (folder / "completions.jsonl").stat().st_size / 8
