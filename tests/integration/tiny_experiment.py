"""A run small enough for tests: sums, a character tokenizer, a random model.

Also a script: `--signal=SIGKILL --signal-at=update:3` sends itself a signal in that phase of step 3 (others are
`sample`, `reward` and `evaluate`), and `--signal-at=checkpoint:4` while the checkpoint of step 4 is being written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms.batching import UpdateConfig
from jaxrl_llm.algorithms.optimizer import OptimizerConfig
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.cli import Policy, finish, make_trainer, parse, plain_errors, start, train
from jaxrl_llm.config import DataConfig, Experiment
from jaxrl_llm.data.tokenizers import CharTokenizer
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.models.config import ExpertsConfig, LayerKind, ModelConfig
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.sampling.logits import SamplingConfig
from jaxrl_llm.sharding import make_mesh
from jaxrl_llm.training.episodes.evaluate import EvaluationConfig
from jaxrl_llm.training.on_policy import Trainer, TrainingConfig

TOKENIZER = CharTokenizer("0123456789+-*=")


def shared_characters(prompts: list[Any], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """A point for each character that is a digit, another if it occurs in the answer; per character."""
    points = [[c.isdigit() + (c in right) for c in text] for text, right in zip(completions, answer, strict=True)]
    return [sum(of_text) / (len(of_text) + 1) for of_text in points]


@dataclasses.dataclass(frozen=True)
class TinyExperiment(Experiment):
    signal: str | None = None
    """Name of a signal to send to this very process."""
    signal_at: str = "update:1"
    """Phase and step."""

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().settings().items() if not name.startswith("signal")}


# Everything that a resumed run could lose: a reference, an order of minibatches, a schedule, epochs of the data.
CONFIG = TinyExperiment(
    name="tiny",
    rewards=(shared_characters,),
    algorithm=PolicyGradient(kl_coef=0.05),
    data=DataConfig(max_prompt_length=6),
    sampling=SamplingConfig(max_tokens=5),
    training=TrainingConfig(
        steps=4, prompts_per_step=4, samples_per_prompt=4, checkpoint_every=2, keep_checkpoints=1, samples_every=0
    ),
    update=UpdateConfig(minibatches=2),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
    evaluation=EvaluationConfig(every=2, samples=2),
)
SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "embed_dim": 16,
    "mlp_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "remat": "none",
}
MIXTURE: dict[str, Any] = {
    "experts": ExpertsConfig(count=4, per_token=2, width=24),
    "layer_kinds": (LayerKind(experts=True),),
    "qk_norm": True,
}
"""Beside `SIZES`: a small Qwen3-MoE."""
TRAIN_ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(10)]
EVAL_ROWS = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in range(5)]


def make_policy(mesh: jax.sharding.Mesh) -> Policy:
    model = Transformer(ModelConfig(**SIZES))
    shardings = model.shardings(mesh)
    params = jax.jit(model.init, out_shardings=shardings)(jax.random.key(0))
    return Policy(model, params, TOKENIZER, (TOKENIZER.eos_token_id,))


def make(config: TinyExperiment, mesh: jax.sharding.Mesh) -> tuple[Policy, Trainer]:
    policy = make_policy(mesh)
    return policy, make_trainer(config, policy, mesh, train_rows=TRAIN_ROWS, eval_rows=EVAL_ROWS)


def save_checkpoint(folder: Path) -> Path:
    """A checkpoint of a random model with a chat template, which reads and writes printable ASCII."""
    tokenizer = CharTokenizer("".join(map(chr, range(32, 127))) + "\n")
    model = Transformer(ModelConfig(**SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": 512}))
    save_pretrained(folder, model, model.init(jax.random.key(0)), tokenizer=tokenizer)
    settings = folder / "tokenizer_config.json"
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    return folder


STUCK = {
    "stuck": [signal.SIGTERM],
    "aborted": [signal.SIGINT, signal.SIGINT],
    "both": [signal.SIGTERM, signal.SIGINT],
}


def send_signal(trainer: Trainer, name: str, place: str) -> None:
    """Arranges for the signal to be sent at the place, or for those of `STUCK`, to slow phases, in one without end."""
    phase, step = place.split(":")
    stuck = name in STUCK

    def send() -> None:
        if not stuck:
            os.kill(os.getpid(), getattr(signal, name))
            return
        for place, number in enumerate(STUCK[name], start=1):
            threading.Timer(0.5 * place, os.kill, (os.getpid(), number)).start()
        endless = jax.jit(lambda x: jax.lax.while_loop(lambda x: x < 2, jnp.sin, x))
        jax.block_until_ready(endless(jnp.float32(0.5)))

    if phase != "checkpoint":

        def sending(enter: Any, at: int) -> Any:
            @contextlib.contextmanager
            def entered(name: str) -> Iterator[None]:
                with enter(name):
                    time.sleep(0.3 * stuck)
                    if (name, at) == (phase, int(step)):
                        send()
                    yield

            return entered

        iterate, evaluate = trainer.iterate, trainer.evaluate
        trainer.iterate = lambda number, enter: iterate(number, sending(enter, number))
        trainer.evaluate = lambda enter: evaluate(sending(enter, int(trainer.state.step)))
    else:  # arrays are written, and the first folder of the unfinished checkpoint gets its final name
        # Such a hook stays for as long as the process: of this run alone, it does nothing to tests after this one.
        unfinished = os.path.join(trainer.setup.folder, "checkpoints", f"{step}.")
        sys.addaudithook(lambda event, args: send() if event == "os.rename" and unfinished in str(args[0]) else None)


def digest(tree: Any) -> str:
    """A hash of every bit of every array, as far as this process holds it."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        whole = getattr(leaf, "is_fully_addressable", True)
        for part in [leaf] if whole else [shard.data for shard in leaf.addressable_shards]:
            total.update(np.asarray(part).tobytes())
    return total.hexdigest()


def main(args: list[str] | None = None) -> None:
    config = start(parse(CONFIG, args))
    with plain_errors():
        mesh = make_mesh(config.mesh)
        policy, trainer = make(config, mesh)
    if config.signal:
        send_signal(trainer, config.signal, config.signal_at)
    result = train(trainer)
    print("digest", digest(trainer.state))
    finish(config, policy, result, seconds=1.0)


if __name__ == "__main__":
    main()
