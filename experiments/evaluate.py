"""Evaluates a checkpoint on a data set: greedy accuracy, mean@n, pass@k and rewards, with their standard errors.

    python experiments/evaluate.py --experiment=grpo_gsm8k --model.path=SmolLM2-135M-Instruct.gguf \\
        --data=gsm8k_test.jsonl --samples=8 --ks 1 8 --output=evaluations/smollm2

`--experiment` names a file of this folder, or the path of your own: of its `CONFIG` are the reward functions, how a row
becomes a prompt, and how completions are sampled (any flag changes it: --sampling.max-tokens=256 --sampling.stop Q:).
The model is a folder of Hugging Face's format (such as the `model/` that a run leaves), a GGUF file or a hub id.

What is printed are means over prompts with their standard errors: s/√P of the prompts' values, which of an accuracy is
the binomial one. `--output` gets a line of JSON for each completion, as they come, and the numbers. One program decodes
greedily, another draws samples, for any number of prompts; on a pod it is the same line on every host.
"""

from __future__ import annotations

from pathlib import Path

from jaxrl_llm.cli import run_evaluation

if __name__ == "__main__":
    run_evaluation(folder=Path(__file__).parent, description=__doc__ or "")
