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
import tempfile
import warnings
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from measure import WORKS, Work, publish
from peer import COUNTED_TOKEN, ROWS, SHAPE, Times, exact_texts, record
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer


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


def count_token(completion_ids: list[list[int]], **others: Any) -> list[float | None]:
    """How often one token occurs."""
    return [float(list(ids).count(COUNTED_TOKEN)) for ids in completion_ids]


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
    about = record(
        times,
        work,
        parameters=parameters,
        reference=given.kl_coef != 0,
        system="trl",
        version=trl.__version__,
        torch=torch.__version__,
        transformers=transformers.__version__,
        devices=str(model.device),
        threads=torch.get_num_threads(),
        **{name: getattr(given, name) for name in ("model", "dtype", "param_dtype", "remat", "kl_coef")},
    )
    publish(about, given.json)


if __name__ == "__main__":
    main()
