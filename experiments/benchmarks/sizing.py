"""Which plan fits which model on which slice: the tables of docs/sizing.md.

    pip install 'jaxrl-llm[train,tpu]'
    python experiments/benchmarks/sizing.py --folder sizing              # hours on two cores: it compiles for slices
    python experiments/benchmarks/sizing.py --folder sizing --sizes qwen3-0.6b --slices v5e:2x4

For each model and slice `jaxrl-llm plan --search=1` finds the fastest plan that fits. What was found is kept in the
folder and not searched again. Prints a table in Markdown of all that is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

WORK = {"prompts": 128, "samples": 8, "prompt-tokens": 1024, "completion-tokens": 2048}
"""Of a step, the same everywhere."""
SLICES = {
    "qwen3-0.6b": ("v5e:2x4", "v5p:2x2x1", "v6e:2x4"),
    "qwen3-4b": ("v5e:4x8", "v5p:2x2x2", "v6e:4x4"),
    "llama3.1-8b": ("v5e:8x8", "v5p:2x2x4", "v6e:4x8"),
    "gemma3-12b": ("v5e:8x8", "v5p:2x4x4", "v6e:4x8"),
    "qwen3-30b-a3b": ("v5e:16x16", "v5p:4x4x4", "v6e:8x8"),
    "qwen3-32b": ("v5e:16x16", "v5p:4x4x4", "v6e:8x8"),
}
"""Models, and a slice of each generation that is large enough."""
HEAD = ("model", "slice", "flags", "slots", "sampler: GiB, s", "update: GiB, s")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="where the plans that were found are kept")
    parser.add_argument("--sizes", nargs="+", default=list(SLICES), help="models, by --size of `jaxrl-llm plan`")
    parser.add_argument("--slices", nargs="+", help="slices, in place of those of each model")
    return parser.parse_args()


def find(size: str, slice_: str, file: Path) -> None:
    """Searches, and leaves what was found in the file."""
    work = [f"--{name}={value}" for name, value in WORK.items()]
    command = [sys.executable, "-m", "jaxrl_llm", "plan", f"--slice={slice_}", f"--size={size}", *work, "--search=1"]
    ended = subprocess.run([*command, f"--json={file}"], stdout=sys.stderr).returncode
    if ended not in (0, 1):  # 1: nothing fits
        raise SystemExit(f"{size} on {slice_}: {' '.join(command)} ended with status {ended}")


def row(size: str, slice_: str, programs: list[dict[str, Any]]) -> list[str]:
    """A line of the table."""
    if not programs:
        return [size, slice_, "nothing fits", "", "", ""]
    sampler = programs[0]
    told = [f"{one['needed'] / 2**30:.1f}, {max(one['seconds'].values()):.3g} {one['limit']}" for one in programs]
    return [size, slice_, f"`{sampler['flags']}`", str(sampler["slots"]), *told]


def main() -> None:
    """Searches what is missing, and prints the table."""
    given = options()
    given.folder.mkdir(parents=True, exist_ok=True)
    lines = [HEAD, ("---",) * len(HEAD)]
    for size in given.sizes:
        for slice_ in given.slices or SLICES[size]:
            file = given.folder / f"{size}-{slice_.replace(':', '-')}.json"
            if not file.exists():
                find(size, slice_, file)
            lines.append(tuple(row(size, slice_, json.loads(file.read_text())["programs"])))
    print(*(f"| {' | '.join(line)} |" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
