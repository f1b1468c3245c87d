"""The page for those who come from TRL: its flags are flags, and TRL's names are TRL's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from jaxrl_llm.launch import stages
from jaxrl_llm.launch.configure import configure
from jaxrl_llm.launch.on_policy import PRESETS_BY_NAME
from jaxrl_llm.launch.words import as_flag, read_words, take_flag, with_preset

PAGE = (Path(__file__).parents[2] / "docs" / "from_trl.md").read_text()
COMMANDS: dict[str, tuple[Any, Any]] = {
    "grpo": (stages.GRPO, PRESETS_BY_NAME),
    "dpo": (stages.DPO, stages.METHODS),
    "sft": (stages.SFT, {}),
    "kto": (stages.KTO, stages.UNPAIRED_METHODS),
    "reward-model": (stages.REWARD_MODEL, {}),
}
CONFIGS = {
    "grpo": ("GRPOConfig",),
    "dpo": ("DPOConfig",),
    "sft": ("SFTConfig",),
    "kto": ("KTOConfig",),
    "reward-model": ("RewardConfig",),
}


def rows() -> list[tuple[str, str, str]]:
    """The command, TRL's names and our flags of each line of the tables of settings."""
    found = []
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        title = re.match(r"`jaxrl-llm ([\w-]+)`|Of the `transformers` trainer", section)
        if title is None:
            continue
        for names, flags in re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE):
            found.append((title[1] or "grpo", names, " ".join(re.findall(r"`(.*?)`", flags))))
    return found


@pytest.mark.parametrize(("command", "names", "flags"), rows())
def test_each_flag_is_one(command: str, names: str, flags: str) -> None:
    config, presets = COMMANDS[command]
    preset, rest = take_flag(flags.split(), "--preset")
    if preset is not None:
        config = with_preset(config, preset, presets)
    configure(config, read_words(rest), spelled=as_flag)


def test_there_are_tables() -> None:
    assert len(rows()) > 40
    assert {command for command, _, _ in rows()} == set(COMMANDS)


@pytest.mark.slow
def test_the_names_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl")
    known: dict[str, set[str]] = {}
    for command, configs in CONFIGS.items():
        known[command] = {field.name for name in configs for field in dataclasses.fields(getattr(trl, name))}
    known["grpo"] |= {"peft_config"}  # an argument of the trainer
    for command, names, _ in rows():
        missing = {name for name in re.findall(r"`(\w+)`", names) if name not in known[command]}
        assert not missing, (command, missing)
