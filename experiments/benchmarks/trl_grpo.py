"""The same work in TRL, for `grpo.py --beside`: sampling, one GRPO update, or one iteration.

    pip install 'jaxrl-llm[parity]'        # PyTorch and TRL, in an environment of their own
    python experiments/benchmarks/trl_grpo.py --model MODELS/tiny-llama --work W3

W1 is `model.generate`, W2 and W3 are steps of `GRPOTrainer`; in W2 the completions are given (`rollout_func`), so that
what remains is the loss, its gradient, AdamW and, with a KL term, the reference. Timed from the beginning of a step
to its end, without the trainer's start-up and data loading. Prints one line, RESULT and the record as JSON.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
import time
import warnings
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from measure import (
    WORKS,
    Bystanders,
    Shape,
    Work,
    conventional_flops,
    peak_rss_gib,
    process_age,
    publish,
    summarise,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

COUNTED_TOKEN = 260
SHAPE = Shape()
ROWS = SHAPE.prompts * SHAPE.samples


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers checkpoint with a tokenizer")
    parser.add_argument("--work", choices=list(WORKS), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    parser.add_argument("--param-dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="above 0 the reference is scored, too")
    parser.add_argument("--remat", choices=("none", "full"), default="none", help="full: gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions that are timed, after a first one")
    parser.add_argument("--json", default="-", help="file to append the record to, in place of printing it")
    given = parser.parse_args()
    if given.param_dtype == "bfloat16" and given.dtype == "float32":
        parser.error("products of bfloat16 parameters are bfloat16: give --dtype bfloat16")
    return given


def exact_texts(tokenizer: Any, count: int) -> list[str]:
    """Texts of exactly `SHAPE.prompt_tokens` tokens, out of words that are one token wherever they stand."""
    draw, words = random.Random(0), []

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for token in draw.sample(range(len(tokenizer)), len(tokenizer)):
        if re.fullmatch(r" ?[a-z]+\d*", tokenizer.decode([token])):
            twice = encode(tokenizer.decode([token, token]))
            words += [token] if twice == [token, token] else []
        if len(words) == 256:
            break
    texts: list[str] = []
    for _ in range(100 * count):
        text = tokenizer.decode(draw.choices(words, k=SHAPE.prompt_tokens))
        if len(encode(text)) == SHAPE.prompt_tokens and len(texts) < count:
            texts.append(text)
    if len(texts) < count:
        raise ValueError(f"only {len(texts)} of {count} texts encode to {SHAPE.prompt_tokens} tokens again")
    return texts


def count_token(completion_ids: list[list[int]], **others: Any) -> list[float | None]:
    """How often one token occurs."""
    return [float(list(ids).count(COUNTED_TOKEN)) for ids in completion_ids]


class Times:
    """Seconds of each repetition; the first is start-up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start_up = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        if len(self.seconds) == 1:
            self.start_up, self.bystanders = process_age(), Bystanders()


def sample(given: argparse.Namespace, model: Any, tokenizer: Any) -> Times:
    """W1."""
    texts = [text for text in exact_texts(tokenizer, SHAPE.prompts) for _ in range(SHAPE.samples)]
    inputs = tokenizer(texts, add_special_tokens=False, return_tensors="pt").to(model.device)
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=mixed(given))
    times, new = Times(), SHAPE.completion_tokens
    with torch.no_grad(), autocast:
        for _ in range(given.repeats + 1):
            times.begin()
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=tokenizer.pad_token_id,
            ).cpu()
            times.end()
            if tokens.shape != (ROWS, SHAPE.prompt_tokens + new):
                raise ValueError(f"sampled {tuple(tokens.shape)} tokens, prompts included")
    return times


def mixed(given: argparse.Namespace) -> bool:
    """Whether products are bfloat16 and parameters float32: TRL's `bf16=True`."""
    return given.dtype == "bfloat16" and given.param_dtype == "float32"


def fixed_rollouts(tokenizer: Any, vocabulary: int) -> Any:
    """A `rollout_func` that gives every step the same completions at no cost."""
    numbers = random.Random(0)
    completions = [numbers.choices(range(4, vocabulary), k=SHAPE.completion_tokens) for _ in range(ROWS)]

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        encoded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        return {"prompt_ids": encoded, "completion_ids": completions, "logprobs": None}

    return rollout


def train(given: argparse.Namespace, model: Any, tokenizer: Any) -> Times:
    """W2 and W3."""
    times, steps = Times(), given.repeats + 1

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.end()

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=1,
        num_generations=SHAPE.samples,
        max_completion_length=SHAPE.completion_tokens,
        generation_kwargs={"min_new_tokens": SHAPE.completion_tokens},
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=given.kl_coef,
        loss_type="grpo",
        learning_rate=1e-6,
        max_steps=steps,
        bf16=mixed(given),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=given.remat == "full",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=count_token,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": exact_texts(tokenizer, SHAPE.prompts * steps)}),
        processing_class=tokenizer,
        callbacks=[Clock()],
        rollout_func=fixed_rollouts(tokenizer, model.config.vocab_size) if given.work == "W2" else None,
    )
    trainer.train()
    return times


def main() -> None:
    """Times one work and prints its record."""
    given = options()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func
    warnings.simplefilter("ignore", FutureWarning)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, given.param_dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    times = (sample if given.work == "W1" else train)(given, model, tokenizer)
    work: Work = given.work
    parameters = sum(p.numel() for p in model.parameters())
    seconds = summarise(times.seconds[1:])
    flops = conventional_flops(work, parameters, SHAPE, reference=given.kl_coef != 0)
    record = {
        "system": "trl",
        "version": trl.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "devices": str(model.device),
        "threads": torch.get_num_threads(),
        "work": work,
        "model": given.model,
        "parameters": parameters,
        **{name: getattr(given, name) for name in ("dtype", "param_dtype", "remat", "kl_coef")},
        "seconds": seconds,
        "other_cpu": times.bystanders.share(),
        "start_up_s": round(times.start_up, 2),
        "peak_rss_gib": peak_rss_gib(),
        "tokens_per_second": round(SHAPE.sampled_tokens / seconds["median"], 1),
        "flops": {"convention": flops},
        "gflops_per_second": {"convention": round(1e-9 * flops / seconds["median"], 2)},
    }
    publish(record, given.json)


if __name__ == "__main__":
    main()
