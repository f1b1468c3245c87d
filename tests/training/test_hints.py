"""What a policy is told as its own teacher, and runs in which it is: one program a phase, the same when they go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import numpy as np
import pytest

from jaxrl_llm.algorithms.distillation.objective import Distillation
from jaxrl_llm.algorithms.distillation.presets import sdft, sdpo
from jaxrl_llm.algorithms.distillation.self_teacher import SelfTeacher
from jaxrl_llm.cli import make_trainer
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.config import LoraConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.episodes.episodes import Episodes
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.episodes.hints import Hints, check_texts, hinted_prompt
from jaxrl_llm.training.on_policy import Trainer
from jaxrl_llm.training.run.metrics import comparable_metrics

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])
TELLING = SelfTeacher(
    hints=("{answer}*", "{solution}=", "-{feedback}="), template="{hints}{prompt}", max_prompt_length=11
)


def test_a_prompt_with_what_can_be_told() -> None:
    assert hinted_prompt(TELLING, "1+1=", {"solution": "2", "answer": None, "feedback": ""}) == "2=1+1="
    assert hinted_prompt(TELLING, "{x}", {"answer": 7, "feedback": "{y}"}) == "7*-{y}={x}"
    assert hinted_prompt(TELLING, "1+1=", {"prompt": "0"}) is None
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    assert hinted_prompt(sdft().itself, messages, {"demonstration": "2"}) == [
        messages[0],
        {
            "role": "user",
            "content": "1+1\n\nThis is an example of a good answer:\n\n2\n\nNow give an answer of your own.",
        },
    ]


def test_each_sample_is_told_its_own() -> None:
    """The first that another one solved, and what was said of itself; without either nothing."""
    tokenizer = CharTokenizer("0123456789+-*=")
    end = tokenizer.eos_token_id
    episodes = Episodes(
        rewards=np.float32([[0, 1, 2], [1, 0, 0], [0, 0, 0]]),
        by_name={},
        prompts=["1+1=", "2+2=", "3+3="],
        completion_ids=[[*tokenizer.encode(text), end] for text in "123456789"],
        columns={"answer": [None, None, "12345678"]},
        finished=[True] * 9,
        openings=[""] * 3,
        extra={"feedback": [None, "8", None, None, None, None, None, None, None]},
    )
    hinted = Hints(TELLING, tokenizer)(episodes)
    read = [
        [tokenizer.decode(row[:length].tolist()) for row, length in zip(*of_prompt, strict=True)]
        for of_prompt in zip(hinted.tokens, hinted.lengths, strict=True)
    ]
    assert read[0] == ["2=1+1=", "3=-8=1+1=", "2=1+1="]
    assert read[1] == ["", "4=2+2=", "4=2+2="]
    assert read[2] == ["", "", ""]
    assert hinted.too_long.tolist() == [[False] * 3, [False] * 3, [True] * 3]


@pytest.fixture
def make(tiny: ModuleType, tmp_path: Path):
    """A trainer on sums; a reward function says what was wrong."""

    def judged(completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("feedback", ["0" if text[:1] == "1" else None for text in completions])
        return [float(bool(text) and text[0].isdigit()) for text in completions]

    def make(folder: str = "run", *, steps: int = 3, mesh: Any = ONE_DEVICE, **changes: Any) -> Trainer:
        itself = SelfTeacher(hints=("{solution}=", "-{feedback}="), template="{hints}{prompt}", max_prompt_length=11)
        given = {"algorithm": dataclasses.replace(sdpo(), itself=itself), "rewards": (judged,)}
        config = dataclasses.replace(
            tiny.CONFIG, run_dir=str(tmp_path / folder), evaluation=EvaluationConfig(), **(given | changes)
        )
        training = dataclasses.replace(config.training, steps=steps, checkpoint_every=2)
        policy, config = tiny.make_policy(mesh), dataclasses.replace(config, training=training)
        return make_trainer(config, policy, mesh, train_rows=tiny.TRAIN_ROWS)

    return make


@pytest.mark.slow
def test_a_run_goes_on_with_the_average(make) -> None:
    whole = make("whole")
    whole.run()
    counts = {name: count for name, count in whole.compilations.counts.items() if name != "_checksums"}
    assert counts == {"sample": 1, "update_step": 1}
    make("cut", steps=2).run()
    resumed = make("cut", resume=True)
    resumed.run()
    chex.assert_trees_all_equal(
        (whole.state.params, whole.state.average), (resumed.state.params, resumed.state.average)
    )
    gaps = jax.tree.map(lambda one, other: float(abs(one - other).max()), whole.state.params, whole.state.average)
    assert max(jax.tree.leaves(gaps)) > 1e-3
    line = comparable_metrics(whole.setup.folder / "metrics.jsonl")[-1]
    assert 0 < line["distillation/frac_taught"] <= 1
    assert {"reward", "rewards/judged/mean", "distillation/itself", "entropy"} <= line.keys()


def test_without_rewards_it_learns_from_the_data(make) -> None:
    shown = SelfTeacher(policy="start", hints=("{answer}=",), template="{hints}{prompt}", max_prompt_length=11)
    trainer = make(algorithm=Distillation(itself=shown), rewards=(), steps=1)
    trainer.run()
    line = comparable_metrics(trainer.setup.folder / "metrics.jsonl")[-1]
    assert line["distillation/frac_taught"] == 1
    assert not any("reward" in name for name in line)


@pytest.mark.slow
def test_eight_devices_learn_what_one_does(make) -> None:
    one, eight = make("one", steps=2), make("eight", steps=2, mesh=make_mesh(MeshConfig(data=2, fsdp=4)))
    for trainer in (one, eight):
        trainer.run()
    for tree in ("params", "average"):
        chex.assert_trees_all_close(
            *(jax.tree.map(np.asarray, getattr(trainer.state, tree)) for trainer in (one, eight)), rtol=1e-3, atol=1e-4
        )


def test_of_adapters_the_average_is_theirs(tiny_config) -> None:
    import optax

    from jaxrl_llm.algorithms.state import abstract_train_state

    model = Transformer(tiny_config(lora=LoraConfig(rank=2)))
    state = abstract_train_state(model, optax.sgd(1.0), ONE_DEVICE, algorithm=sdft())
    names = {path[-1].key for path, _ in jax.tree.leaves_with_path(state.average)}
    assert names == {"lora_a", "lora_b"}


def test_what_cannot_be_told_is_refused_before_anything_is_sampled(make) -> None:
    def itself(**changes: Any) -> dict[str, Any]:
        told = SelfTeacher(
            **{"hints": ("{answer}=",), "template": "{hints}{prompt}", "max_prompt_length": 11} | changes
        )
        return {"algorithm": Distillation(itself=told)}

    with pytest.raises(ValueError, match=r"itself.hints: \{anwser\} is no column of the data; did you mean 'answer'\?"):
        make(**itself(hints=("{anwser}",)))
    with pytest.raises(ValueError, match=r"hints show a \{solution\}, .* there is no reward: pass --rewards"):
        make(rewards=(), **itself(hints=("{solution}",)))
    with pytest.raises(ValueError, match=r"\{feedback\} is no column of the data \(no reward function says any\)"):
        make(rewards=(), **itself(hints=("{feedback}",)))
    with pytest.raises(ValueError, match=r"row 0: the prompt with .* has 6 tokens, more than .*max_prompt_length=5"):
        make(**itself(max_prompt_length=5))
    with pytest.raises(ValueError, match=r"itself.max_prompt_length=12 and sampling.max_tokens=5 are more than .* 16"):
        make(**itself(max_prompt_length=12))
    with pytest.raises(ValueError, match=r"itself.template='\{prompt\}' must hold \{prompt\} and \{hints\} once each"):
        check_texts(SelfTeacher(template="{prompt}"), rewarded=True)
