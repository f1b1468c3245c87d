"""Ids behind the tokenizer's end are never sampled, and sampler and learner agree on what that leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxrl_llm.algorithms.policy_gradient.presets import grpo
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.checkpoints.tokenizers import known_tokens
from jaxrl_llm.models.config import ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import MeshConfig, make_mesh
from jaxrl_llm.training.episodes.scoring import RewardSum
from jaxrl_llm.training.on_policy import Trainer, TrainingConfig
from jaxrl_llm.training.run.setup import RunSetup

TOKENIZER = CharTokenizer("0123456789+=")
MODEL = Transformer(ModelConfig(len(TOKENIZER) + 50, 16, 32, 1, 2, 2, 8, remat="none"))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 40}, {"temperature": 2.0, "top_p": 0.99}])
def test_no_sample_holds_an_id_that_the_tokenizer_has_not(tmp_path: Path, sampling: dict[str, Any]) -> None:
    seen: list[int] = []

    def spy(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(token for ids in completion_ids for token in ids)
        return [float(n % 2) for n in range(len(completion_ids))]

    rows = [{"prompt": f"{n}+1="} for n in range(4)]
    trainer = Trainer(
        model=MODEL,
        params=jax.jit(MODEL.init)(jax.random.key(0)),
        tokenizer=TOKENIZER,
        stop_tokens=(1,),
        dataset=PromptDataset(rows, TOKENIZER, max_prompt_length=4),
        rewards=RewardSum((spy,)),
        algorithm=grpo(),
        setup=RunSetup(tmp_path, make_mesh(MeshConfig(data=1), devices=jax.devices()[:1])),
        training=TrainingConfig(steps=1, prompts_per_step=4, samples_per_prompt=8, checkpoint_every=0),
        sampling=SamplingConfig(max_tokens=8, **sampling),
    )
    trainer.run()
    assert len(seen) > 64 and max(seen) < len(TOKENIZER) == known_tokens(TOKENIZER)
    metrics = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    if not trainer.sampler.config.truncates:
        assert metrics["sampling/logp_gap_max"] < 1e-4


def test_a_model_whose_ids_are_all_known_is_itself() -> None:
    assert MODEL.with_known_tokens(MODEL.config.vocab_size) is MODEL
    assert MODEL.with_known_tokens(14).config.known_tokens == 14
