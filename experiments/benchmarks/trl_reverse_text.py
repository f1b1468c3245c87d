"""GRPO of `reverse_text.py` in TRL: from the same fine-tuned model, on the same prompts, with the same settings.

    pip install 'jaxrl-llm[parity]'        # PyTorch and TRL, in an environment of their own
    python experiments/benchmarks/trl_reverse_text.py --run runs/RUN

RUN is the folder of a run of reverse_text.py, which may still be going on: from it are the settings, and the model in
RUN/sft/model. Metrics are written to RUN/trl/metrics.jsonl, and both curves drawn to RUN/beside.png (--draw: no more
than that). Each system samples by its own noise, so that the curves are alike and not equal.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from jaxrl_llm.algorithms.optimizer import Rates, make_schedule
from jaxrl_llm.algorithms.policy_gradient.objective import PolicyGradient
from jaxrl_llm.cli import parse
from jaxrl_llm.data.loader import PromptLoader
from jaxrl_llm.data.prompts import PromptDataset
from jaxrl_llm.training.run.curves import running_mean
from jaxrl_llm.training.run.metrics import METRICS_FILE, read_metrics

sys.path.insert(0, str(Path(__file__).parents[1]))
from reverse_text import CONFIG, SFT, ReverseText, lcs, load_texts

ADAM = ("b1", 0.9), ("b2", 0.999), ("eps", 1e-8)
"""Settings of the optimizer that are left at their common defaults."""


def read_config(run: Path) -> ReverseText:
    """The settings of a run.

    Raises:
        ValueError: TRL would compute something else by these.
    """
    config = parse(CONFIG, [f"--config={run / 'config.json'}"])
    other = [f"optimizer.{name}" for name, value in ADAM if getattr(config.optimizer, name) != value]
    other += [] if config.algorithm == PolicyGradient() else ["algorithm"]
    if other:
        raise ValueError(f"{', '.join(other)} differ from what is compared here: run reverse_text.py with its own")
    return config


def prompts_in_order(config: ReverseText, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of all steps, in the order in which the run takes them.

    Raises:
        ValueError: the two systems write a prompt in other tokens.
    """
    rows, training = load_texts(config)[0], config.training
    limit = config.data.max_prompt_length
    dataset = PromptDataset(rows, tokenizer, max_prompt_length=limit, prompt_format=config.data.format)
    loader, found = PromptLoader(dataset, batch_size=training.prompts_per_step, seed=config.seed), []
    for _ in range(training.steps):
        batch = next(loader)
        for prompt, ids, length, text in zip(
            batch.prompts, batch.tokens, batch.lengths, batch.columns["text"], strict=True
        ):
            written: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            if list(written["input_ids"]) != ids[:length].tolist():
                raise ValueError(f"{text!r} is not the same prompt in both systems")
            found.append({"prompt": prompt, "text": text})
    return found


def greedy_reward(config: ReverseText, model: Any, tokenizer: Any) -> float:
    """Mean reward of greedy answers to the held-out texts."""
    held_out = load_texts(config)[1]
    rows = [held_out[n] for n in range(min(len(held_out), config.evaluation.max_prompts or len(held_out)))]
    texts = [row["text"] for row in rows]
    chats: Any = [config.data.format.prompt(row) for row in rows]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=config.sampling.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(lcs([], answers, texts)) / len(texts)


class Recorder(transformers.TrainerCallback):
    """Writes what TRL logs, and how long each step took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def write(self, step: int, **metrics: float) -> None:
        """A line of metrics."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        print(f"step {step}", *(f"{name} {value:.4g}" for name, value in metrics.items()), sep=" | ", flush=True)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stops it."""
        self._seconds = time.perf_counter() - self._began

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any = None, **_: Any) -> None:
        """Writes a step, and nothing of the run's end."""
        if "reward" in logs:
            names = ("reward", "loss", "entropy", "grad_norm", "completions/mean_length")
            self.write(state.global_step, **{n: float(logs[n]) for n in names if n in logs}, seconds=self._seconds)


def train(config: ReverseText, folder: Path) -> None:
    """Trains in TRL as the run does."""
    warnings.simplefilter("ignore", FutureWarning)
    source = str(folder / SFT / "model") if config.sft.steps else str(config.model.path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, padding_side="left")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    training, optimizer = config.training, config.optimizer
    reward: Any = lcs
    recorder = Recorder(folder / "trl" / METRICS_FILE)
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        seed=config.seed,
        per_device_train_batch_size=training.prompts_per_step * training.samples_per_prompt,
        num_generations=training.samples_per_prompt,
        max_steps=training.steps,
        shuffle_dataset=False,
        max_completion_length=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        top_p=config.sampling.top_p,
        top_k=config.sampling.top_k or 0,
        loss_type="grpo",
        beta=0.0,
        learning_rate=optimizer.learning_rate,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=math.inf if optimizer.max_grad_norm is None else optimizer.max_grad_norm,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(prompts_in_order(config, tokenizer)),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    rates = Rates(make_schedule(dataclasses.replace(optimizer, learning_rate=1.0), training.steps))
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.create_optimizer(), lambda n: rates[n])
    trainer.remove_callback(transformers.PrinterCallback)
    recorder.write(0, **{"eval/reward": greedy_reward(config, model, tokenizer)})
    trainer.train()
    recorder.write(training.steps, **{"eval/reward": greedy_reward(config, trainer.model, tokenizer)})


def draw(folder: Path) -> Path:
    """Both curves of the reward on one picture: of each step, pale, and over the last five; held-out texts as dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, path, color in (("jaxrl_llm", folder, "#1f6feb"), ("TRL", folder / "trl", "#d1570c")):
        lines = read_metrics(path / METRICS_FILE)
        steps, rewards = zip(*((line["step"], line["reward"]) for line in lines if "reward" in line), strict=True)
        axes.plot(steps, rewards, color=color, alpha=0.25, linewidth=1)
        axes.plot(
            steps, running_mean(rewards, 5), color=color, linewidth=2.2, label=f"{name}: samples, mean of 5 steps"
        )
        held_out = [(line["step"], line["eval/reward"]) for line in lines if "eval/reward" in line]
        axes.plot(
            *zip(*held_out, strict=True), "o--", color=color, linewidth=1, label=f"{name}: held-out texts, greedy"
        )
    axes.set(xlabel="GRPO step", ylabel="longest common subsequence / longer text", ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "beside.png", dpi=150)
    return folder / "beside.png"


def main(args: list[str] | None = None) -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder of a run of reverse_text.py")
    parser.add_argument("--draw", action="store_true", help="draw what is there, and train nothing")
    given = parser.parse_args(args)
    if not given.draw:
        train(read_config(given.run), given.run)
    print(draw(given.run))


if __name__ == "__main__":
    main()
