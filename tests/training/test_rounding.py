"""Runs with parameters in bfloat16: resumed exactly with what is kept beside them, or refused without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import chex
import jax
import pytest

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.algorithms.rounding import Rounding
from jaxrl_llm.algorithms.trust_region.step import TrustRegionConfig
from jaxrl_llm.cli import make_trainer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sharding import HOST, MeshConfig, make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.metrics import comparable_metrics
from jaxrl_llm.training.run.resume import CHECKPOINTS

ONE_DEVICE = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def make(tiny: ModuleType, tmp_path: Path):
    """Makes a trainer of parameters in bfloat16 at a rate that the nearest of them would not show."""

    def make(
        folder: str,
        steps: int,
        rounding: Rounding = "master",
        *,
        offload: bool = False,
        **changes: Any,
    ):
        optimizer = dataclasses.replace(tiny.CONFIG.optimizer, learning_rate=1e-6, rounding=rounding, offload=offload)
        training = dataclasses.replace(tiny.CONFIG.training, steps=steps, checkpoint_every=1)
        lean = {"algorithm": PolicyGradient(), "update": UpdateConfig(), "evaluation": EvaluationConfig()}
        config = dataclasses.replace(
            tiny.CONFIG, run_dir=str(tmp_path / folder), training=training, optimizer=optimizer, **lean | changes
        )
        policy = tiny.make_policy(ONE_DEVICE)
        model = Transformer(dataclasses.replace(policy.model.config, param_dtype="bfloat16"))
        params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), policy.params)
        policy = dataclasses.replace(policy, model=model, params=params)
        return make_trainer(config, policy, ONE_DEVICE, train_rows=tiny.TRAIN_ROWS, eval_rows=tiny.EVAL_ROWS)

    return make


@pytest.mark.parametrize(
    ("rounding", "offload"),
    [
        pytest.param("master", False, marks=pytest.mark.slow),
        pytest.param("stochastic", False, marks=pytest.mark.slow),
        ("master", True),
    ],
)
def test_a_run_in_bfloat16_resumes_exactly(rounding: Rounding, offload: bool, make) -> None:
    """Also with moments and the float32 copy in the host's memory, from where others may take them to the devices."""
    whole = make("whole", 3, rounding, offload=offload)
    whole.run()
    assert whole.compilations.counts["sample"] == whole.compilations.counts["update_step"] == 1
    make("cut", 1, rounding, offload=offload).run()
    resumed = make("cut", 3, rounding, offload=offload, resume=True)
    resumed.run()
    far = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(resumed.state.opt_state) if leaf.ndim}
    assert HOST in far if offload else HOST not in far
    chex.assert_trees_all_equal(whole.state, resumed.state)
    other = make("cut", 4, rounding, offload=not offload, resume=True)
    with Checkpointer(other.setup.folder / CHECKPOINTS, read_only=True) as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(other.abstract_state)[0], resumed.state)
    lines = [comparable_metrics(trainer.setup.folder / "metrics.jsonl")[-1] for trainer in (whole, resumed)]
    assert lines[0] == lines[1]


def test_a_checkpoint_without_the_copy_is_refused(make) -> None:
    """By the setting, and where settings are not compared by what is missing."""
    make("old", 1, "nearest").run()
    with pytest.raises(ValueError, match="rounding was 'nearest' and is 'master'"):
        make("old", 2, "master", resume=True)
    trainer = make("old", 2, "nearest", resume=True)
    trainer.abstract_state = make("other", 2).abstract_state
    with pytest.raises(ValueError, match=r"another model or optimizer:\n.*opt_state/master/embed/weight: not in the"):
        trainer.run()


def test_a_trust_region_has_no_moments_to_move(make) -> None:
    with pytest.raises(
        ValueError, match=r"optimizer\.offload=True would have no effect: a trust region has no moments"
    ):
        make("run", 1, offload=True, trust_region=TrustRegionConfig())


def test_a_trust_region_has_no_noise_in_its_parameters(make) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.rounding='stochastic' would move the policy from where"):
        make("run", 1, "stochastic", trust_region=TrustRegionConfig())
