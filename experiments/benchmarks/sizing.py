"""Which plan fits which model on which slice: the tables of docs/sizing.md.

    pip install 'jaxrl-llm[train,tpu]'
    python experiments/benchmarks/sizing.py --folder sizing    # hours on two cores: it compiles for slices
    python experiments/benchmarks/sizing.py --folder sizing --models qwen3-0.6b --slices v5e:2x4

Of most `jaxrl-llm plan --search=1` finds the fastest plan that fits the slice; of others the plan is given here. What
was found is kept in the folder and not sought again. Prints a table in Markdown of all that is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = ("--prompts=256", "--samples=8", "--prompt-tokens=1024", "--completion-tokens=4096")
"""Of a step, the same everywhere."""
SLICES = {
    "qwen3-0.6b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"),
    "qwen3-4b": ("v5e:4x8", "v5p:2x2x2", "v6e:4x4"),
    "llama3.1-8b": ("v5e:8x8", "v5e:16x16", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x8", "v6e:8x8"),
    "qwen3-32b": ("v5e:16x16", "v5p:4x4x4", "v6e:8x8"),
}
"""Slices of each generation on which a plan is sought, the first ones as small as goes."""
DENSE = ("--update.micro-batches=1", "--model.remat=full", "--mesh.tensor=4", "--sampling-tensor=8")
MIXTURE = ("--algorithm.routing=replayed", "--update.micro-batches=1", "--model.remat=full", "--mesh.tensor=8")
EXPERTS = (*MIXTURE[:-1], "--mesh.tensor=4", "--mesh.expert=4")
PPO = ("--preset=ppo", "--reward-model=policy", "--update.micro-batches=1", "--model.remat=full", "--mesh.tensor=8")
GIVEN = {
    ("gemma3-12b", "v5e:8x8"): (*DENSE, "--update.tokens-per-micro-batch=5120"),
    ("gemma3-12b", "v5p:2x4x4"): (*DENSE, "--update.tokens-per-micro-batch=5120"),
    ("gemma3-12b", "v6e:4x8"): (*DENSE, "--update.tokens-per-micro-batch=5120"),
    ("qwen3-30b-a3b", "v5e:16x16"): (*MIXTURE, "--update.tokens-per-micro-batch=10240", "--slots=40"),
    ("qwen3-30b-a3b", "v5p:4x4x4"): (*MIXTURE, "--update.tokens-per-micro-batch=20480"),
    ("qwen3-30b-a3b, expert 4", "v5p:4x4x4"): (*EXPERTS, "--update.tokens-per-micro-batch=20480"),
    ("qwen3-30b-a3b", "v6e:8x8"): (*MIXTURE, "--update.tokens-per-micro-batch=10240", "--slots=96"),
    ("llama3.1-8b, PPO", "v5e:16x16"): (*PPO, "--update.tokens-per-micro-batch=5120", "--mesh.context=2"),
    ("llama3.1-8b, PPO", "v5p:4x4x4"): (*PPO, "--update.tokens-per-micro-batch=5120"),
    ("llama3.1-8b, PPO", "v6e:8x8"): (*PPO, "--update.tokens-per-micro-batch=5120", "--slots=96"),
}
"""Plans that are not sought: the first that came to mind, a mixture with routing replay, and PPO with four models."""
ROWS: dict[tuple[str, str], tuple[str, ...]] = {
    (model, slice_): ("--search=1",) for model, slices in SLICES.items() for slice_ in slices
} | GIVEN
HEAD = ("model", "slice", "chips", "slots", "sampler: GiB, s", "reward: GiB, s", "update: GiB, s", "flags of the run")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, slices = ({key[number] for key in ROWS} for number in range(2))
    parser.add_argument("--folder", required=True, type=Path, help="where the plans that were found are kept")
    parser.add_argument("--models", nargs="+", choices=sorted(models), default=models, help="which of them")
    parser.add_argument("--slices", nargs="+", choices=sorted(slices), default=slices, help="which of them")
    return parser.parse_args()


def find(model: str, slice_: str, file: Path) -> None:
    """Compiles, and leaves what was found in the file."""
    asked = (f"--slice={slice_}", f"--size={model.split(',')[0]}", *BATCH, *ROWS[model, slice_], f"--json={file}")
    command = [sys.executable, "-m", "jaxrl_llm", "plan", *asked]
    ended = subprocess.run(command, stdout=sys.stderr).returncode
    if not file.exists():
        raise SystemExit(f"{model} on {slice_}: {' '.join(command)} ended with status {ended}")


def row(model: str, slice_: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    programs = found["programs"]
    if not programs or not all(one["fits"] for one in programs):
        return (model, slice_, *("",) * (len(HEAD) - 3), "does not fit")
    by_name = {one["program"]: one for one in programs}
    if (whole := by_name.get("iteration")) is not None:  # one program of three phases
        by_name = whole["phases"] | {"sampler": whole | whole["phases"]["sampler"]}

    def told(name: str) -> str:
        one = by_name.get(name)
        if one is None:
            return ""
        seconds = f"{max(one['seconds'].values()):.3g} {one['limit']}"
        return f"{one['needed'] / 2**30:.1f}, {seconds}" if "needed" in one else f"with it, {seconds}"

    sampler, chips = by_name["sampler"], found["plan"].split(", ")[1].split(" ")[0]
    cells = map(told, ("sampler", "reward", "update"))
    return model, slice_, chips, str(sampler["slots"]), *cells, f"`{sampler['flags']}`"


def main() -> None:
    """Compiles what is missing, and prints the table."""
    given = options()
    given.folder.mkdir(parents=True, exist_ok=True)
    lines: list[tuple[str, ...]] = [HEAD, ("---",) * len(HEAD)]
    for model, slice_ in ROWS:
        if model in given.models and slice_ in given.slices:
            file = given.folder / f"{model.replace(', ', '-')}-{slice_.replace(':', '-')}.json"
            if not file.exists():
                find(model, slice_, file)
            lines.append(row(model, slice_, json.loads(file.read_text())))
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
