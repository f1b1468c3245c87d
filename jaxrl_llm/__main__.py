"""The command `jaxrl-llm`, or `python -m jaxrl_llm`: a subcommand for each stage of post-training."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from jaxrl_llm import __version__
from jaxrl_llm.collector import importing
from jaxrl_llm.extras import MissingExtraError

COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "demo": "GRPO from nothing: a small model learns to add, in two minutes, without checkpoint or network.",
        "sft": "Supervised fine-tuning on prompts with completions, conversations or packed rows.",
        "reward-model": "A reward model from preferences, in the format of AutoModelForSequenceClassification.",
        "prm": "A process reward model from labelled steps, in the format of AutoModelForTokenClassification.",
        "dpo": "Preference optimisation on pairs: DPO, or another method by --preset=ipo, simpo, orpo, …",
        "kto": "Preference optimisation on single completions that are good or bad.",
        "grpo": "Reinforcement learning on rewards: GRPO, or another algorithm by --preset=rloo, dapo, gspo, …",
        "ppo": "The same with a critic.",
        "trpo": "The same with a trust region in place of an optimizer.",
        "distill": "Distillation on own samples: from teachers, or from itself when told more (--preset=sdft, sdpo).",
        "star": "A model that writes its own training data: rationales whose answers are right.",
        "generate": "Complete prompts with a checkpoint.",
        "evaluate": "Greedy accuracy, mean@n, pass@k and rewards of a checkpoint on a data set.",
        "export": "Write a checkpoint of a run, or a GGUF file, as a folder that transformers loads.",
        "plan": "Whether training fits a TPU slice, and what it takes there: compiled without the slice.",
        "report": "A page of a run, finished or not, or one that compares several: report RUN [RUN …].",
    }
)
"""What each subcommand does."""

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "demo": "jaxrl-llm demo --preset=gspo",
        "sft": "jaxrl-llm sft --model=Qwen/Qwen3-0.6B --data=conversations.jsonl --lora-rank=16",
        "reward-model": "jaxrl-llm reward-model --model=Qwen/Qwen3-0.6B --data=pairs.jsonl",
        "prm": "jaxrl-llm prm --model=Qwen/Qwen3-0.6B --data=steps.jsonl",
        "dpo": "jaxrl-llm dpo --model=Qwen/Qwen3-0.6B --data=pairs.jsonl --beta=0.1",
        "kto": "jaxrl-llm kto --model=Qwen/Qwen3-0.6B --data=judged.jsonl",
        "grpo": "jaxrl-llm grpo --model=Qwen/Qwen3-0.6B --data=prompts.jsonl --rewards math my_rewards.py:brief",
        "ppo": "jaxrl-llm ppo --model=Qwen/Qwen3-0.6B --data=prompts.jsonl --rewards math",
        "trpo": "jaxrl-llm trpo --model=Qwen/Qwen3-0.6B --data=prompts.jsonl --rewards math --trust-region.max-kl=0.01",
        "distill": "jaxrl-llm distill --model=Qwen/Qwen3-0.6B --teachers Qwen/Qwen3-4B --data=prompts.jsonl",
        "star": "jaxrl-llm star --model=Qwen/Qwen3-0.6B --data=gsm8k.jsonl --eval-data=test.jsonl --rewards gsm8k "
        "--hint='{question} (The answer is {answer}.)'",
        "generate": "jaxrl-llm generate --model=runs/RUN/model --prompts 'Name a color.' --temperature=0",
        "evaluate": "jaxrl-llm evaluate --model=runs/RUN/model --data=test.jsonl --rewards math --samples=8 --ks 1 8",
        "export": "jaxrl-llm export --model=runs/RUN/checkpoints/200 --output=my-model",
        "plan": "jaxrl-llm plan --slice=v5e:2x4 --size=qwen3-0.6b --mesh.fsdp=8 --prompts=64 --samples=8",
        "report": "jaxrl-llm report runs/grpo-20261130-101500 runs/grpo-20261130-114000 --output=comparison.html",
    }
)
"""A line of each."""


def overview() -> str:
    """What `jaxrl-llm --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: jaxrl-llm COMMAND [--SETTING=VALUE …]", ""]
    lines += [f"  {name:<{width}}{text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "COMMAND --help shows the settings that are set most, --help-all all of them."])


def main(args: Sequence[str] | None = None) -> None:
    """Runs the subcommand that a command line names.

    Args:
        args: the command line; `None`: the process's.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if args[0] == "--version":
        print(f"jaxrl-llm {__version__}")
        return
    name = args[0].replace("_", "-")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? There are" if near else "there are"
        what = "the command comes before its settings" if name.startswith("-") else f"there is no command {args[0]}"
        print(f"error: {what}; {hint} {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        with importing():
            from jaxrl_llm.launch.stages import RUN
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    sys.argv = [f"jaxrl-llm {name}", *args[1:]]  # a stage reads its own command line
    RUN[name](f"{COMMANDS[name]}\n\n    {EXAMPLES[name]}")


if __name__ == "__main__":
    main()
