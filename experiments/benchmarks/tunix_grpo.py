"""The same work in Tunix, for `grpo.py --beside`: sampling, or one iteration of GRPO.

    pip install google-tunix==0.1.7        # in an environment of its own
    python experiments/benchmarks/tunix_grpo.py --model MODELS/tiny-llama --work W1

W1 is Tunix's own sampler (`tunix.generate.sampler`) as its rollouts call it, with a cache of exactly the tokens that
there are; W3 is a step of `GRPOLearner`, from one batch's being asked for to the next one's. All on one device.
Tunix puts a beginning-of-text token before every prompt, so the texts are one token shorter. float32. Prints one line,
RESULT and the record as JSON.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax import nnx
from measure import publish
from peer import COUNTED_TOKEN, ROWS, SHAPE, Times, exact_texts, record
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3 import model as llama
from tunix.models.llama3 import params as llama_params
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

NEVER = 10**9


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Llama checkpoint with a tokenizer")
    parser.add_argument("--work", choices=("W1", "W3"), required=True)
    parser.add_argument("--repeats", type=int, default=5, help="repetitions that are timed, after a first one")
    parser.add_argument("--json", default="-", help="file to append the record to, in place of printing it")
    return parser.parse_args()


def load(folder: str, mesh: jax.sharding.Mesh) -> tuple[Any, llama.ModelConfig]:
    """The model, and its sizes."""
    sizes = json.loads(Path(folder, "config.json").read_text())
    config = llama.ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        rope_theta=int((sizes.get("rope_parameters") or sizes)["rope_theta"]),
        norm_eps=sizes["rms_norm_eps"],
        weight_tying=sizes["tie_word_embeddings"],
        remat_config=llama.RematConfig.NONE,
    )
    return llama_params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.float32), config


def sample(given: argparse.Namespace, model: Any, config: llama.ModelConfig, tokenizer: Any) -> Times:
    """W1."""
    prompt, new = SHAPE.prompt_tokens, SHAPE.completion_tokens
    cache = CacheConfig(prompt + new, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler, times = Sampler(model, tokenizer, cache), Times()
    texts = [text for text in exact_texts(tokenizer, SHAPE.prompts, tokens=prompt - 1) for _ in range(SHAPE.samples)]
    for n in range(given.repeats + 1):
        times.begin()
        found = sampler(
            texts,
            max_generation_steps=new,
            max_prompt_length=prompt,
            temperature=1.0,
            top_p=1.0,
            seed=n,
            eos_tokens=[-1],  # nothing stops them
        )
        lengths = {len(tokens) for tokens in found.tokens}
        times.end()
        if len(found.tokens) != ROWS or lengths != {new}:
            raise ValueError(f"{len(found.tokens)} completions of {lengths} tokens")
    return times


def train(given: argparse.Namespace, model: Any, mesh: jax.sharding.Mesh, tokenizer: Any) -> Times:
    """W3."""
    times, steps = Times(), given.repeats + 1
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=SHAPE.completion_tokens,
        max_prompt_length=SHAPE.prompt_tokens,
        kv_cache_size=SHAPE.prompt_tokens + SHAPE.completion_tokens,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[-1],
    )
    training = rl_cluster.RLTrainingConfig(
        eval_every_n_steps=NEVER,
        max_steps=steps,
        actor_optimizer=optax.adamw(1e-6),
        mini_batch_size=SHAPE.prompts,
        train_micro_batch_size=SHAPE.prompts,
    )
    roles = (rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT)
    cluster = rl_cluster.RLCluster(
        actor=model,
        reference=None,
        tokenizer=tokenizer,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh), training_config=training, rollout_config=rollout
        ),
    )
    counted = tokenizer.decode([COUNTED_TOKEN])

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(text.count(counted)) for text in completions]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        """One batch a step; that the next is asked for ends a step."""
        texts = exact_texts(tokenizer, SHAPE.prompts * steps, tokens=SHAPE.prompt_tokens - 1)
        for first in range(0, len(texts), SHAPE.prompts):
            if first:
                finish()
            times.begin()
            yield {"prompts": np.array(texts[first : first + SHAPE.prompts])}

    def finish() -> None:
        jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
        times.end()

    config = grpo_learner.GRPOConfig(num_generations=SHAPE.samples, num_iterations=1, beta=0.0, epsilon=0.2)
    learner = grpo_learner.GRPOLearner(rl_cluster=cluster, reward_fns=reward, algo_config=config)
    with mesh:
        learner.train(batches())
    finish()
    return times


def main() -> None:
    """Times one work and prints its record."""
    given = options()
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    model, config = load(given.model, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    times = sample(given, model, config, tokenizer) if given.work == "W1" else train(given, model, mesh, tokenizer)
    about = record(
        times,
        given.work,
        parameters=parameters,
        system="tunix",
        version=version("google-tunix"),
        jax=jax.__version__,
        devices=str(jax.devices()),
        model=given.model,
        dtype="float32",
    )
    publish(about, given.json)


if __name__ == "__main__":
    main()
