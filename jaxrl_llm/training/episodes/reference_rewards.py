"""Rewards of what the reference draws of each prompt, once, when it first comes: they are kept with the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from jaxrl_llm.training.run.distributed import is_main_process

REFERENCE_REWARDS_FILE = "reference_rewards.jsonl"
"""In the folder of the run: a line a prompt, so that a run that goes on finds the same values."""


class ReferenceRewards:
    """Rewards `[N]` of the reference's samples of each prompt, by its row in the data.

    Args:
        folder: of the run, where they are kept.
        resume: whether those that lie there are the run's own.
    """

    def __init__(self, folder: Path, *, resume: bool):
        self._file, self._rewards = folder / REFERENCE_REWARDS_FILE, dict[int, np.ndarray]()
        if resume and self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                kept = json.loads(line)
                self._rewards[kept["row"]] = np.asarray(kept["rewards"], np.float32)

    def lacks(self, rows: np.ndarray) -> bool:
        """Whether any of these prompts has none yet."""
        return any(row not in self._rewards for row in rows.tolist())

    def keep(self, rows: np.ndarray, rewards: np.ndarray) -> None:
        """Keeps rewards `[P, N]` of those prompts that have none yet."""
        new = {row: own for row, own in zip(rows.tolist(), rewards, strict=True) if row not in self._rewards}
        self._rewards |= new
        if is_main_process():
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"row": row, "rewards": own.tolist()}) + "\n" for row, own in new.items())

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Those of these prompts, `[P, N]`."""
        return np.stack([self._rewards[row] for row in rows.tolist()])
