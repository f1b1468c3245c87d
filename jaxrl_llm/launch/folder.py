"""The start of a run: its process, its folder, and the settings that are written there."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import jax

from jaxrl_llm.checks import expand_home
from jaxrl_llm.config import RunConfig, flatten
from jaxrl_llm.launch.defaults import default_settings
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.settings import CONFIG_FILE, check_names, check_resumed, check_step, remarks_on_resuming
from jaxrl_llm.training.compilation import enable_persistent_cache
from jaxrl_llm.training.run.distributed import (
    ClusterConfig,
    from_main_process,
    how_to_resume,
    initialize,
    is_main_process,
)
from jaxrl_llm.training.run.resume import find_run
from jaxrl_llm.training.run.setup import RunSetup

RunConfigT = TypeVar("RunConfigT", bound=RunConfig)


def start(config: RunConfigT) -> RunConfigT:
    """As `prepare`; an error ends the program with one line."""
    with plain_errors():
        return prepare(config)


def prepare(config: RunConfigT) -> RunConfigT:
    """Prepares the process: distributed start where asked for, compilation cache, run folder.

    Returns:
        The configuration with `run_dir` filled in: the folder is there, and nothing has been written to it.

    Raises:
        ValueError: settings do not fit together, or there is nothing to go on with.
    """
    config = with_home(config)
    check_names(config)
    if config.resume and config.run_dir is None:
        raise ValueError("--resume needs --run-dir=<folder of the run>")
    if "://" in (config.run_dir or ""):
        raise ValueError(f"--run-dir={config.run_dir} is no folder: mount the bucket, and say where it lies then")
    if not 0 <= config.grace_period < math.inf:
        raise ValueError(f"--grace-period={config.grace_period} must be seconds, or 0: no phase is cut then")
    if config.distributed:
        cluster = config.cluster
        initialize(**vars(cluster))
    elif config.cluster != ClusterConfig():
        raise ValueError("--cluster.* says where other processes are: add --distributed, or leave it out")
    enable_persistent_cache()
    check_step(config)
    folder = Path(from_main_process(config.run_dir or _new_folder(config.name)))
    how_to_resume(f"--resume --run-dir={folder}")
    saved, remarks = find_run(folder, config.settings(), resume=config.resume), []
    if config.resume:
        remarks = check_resumed(folder, saved) + remarks_on_resuming(folder, config)
    config = dataclasses.replace(config, run_dir=str(folder))
    if is_main_process():
        _make_folder(folder)
        for remark in remarks:
            print(remark)
    return config


def with_home(config: RunConfigT) -> RunConfigT:
    """The configuration with `~` in its paths written out, as a shell does where it begins a word."""
    model = config.model
    model = dataclasses.replace(model, path=expand_home(model.path), adapters=expand_home(model.adapters))
    return dataclasses.replace(config, run_dir=expand_home(config.run_dir), model=model)


def _make_folder(folder: Path, *, exist_ok: bool = True) -> None:
    """Creates a run's folder, and those above it; what of them is still empty when the program ends goes again."""
    new = [each for each in (folder.absolute(), *folder.absolute().parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=exist_ok)
    if new:
        atexit.register(_remove_if_empty, new)


def _remove_if_empty(folders: Sequence[Path]) -> None:
    """Removes folders, of which each lies in the next one, up to the first that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _new_folder(name: str) -> str:
    """Creates `runs/<name>-<time>`, or one numbered after it: several runs may start in the same second."""
    if not is_main_process():
        return ""
    first = f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(first)
    for number in itertools.count(2):
        try:
            _make_folder(folder, exist_ok=False)
            break
        except FileExistsError:
            folder = Path(f"{first}-{number}")
    return str(folder)


def run_setup(config: RunConfig, mesh: jax.sharding.Mesh) -> RunSetup:
    """What the trainer of `config` is told of the run itself."""
    return RunSetup(
        folder=Path(config.run_dir or f"runs/{config.name}"),
        mesh=mesh,
        seed=config.seed,
        resume=config.resume,
        grace_period=config.grace_period,
        bare_reference=config.model.bare_reference,
        settings=config.settings(),
        defaults=default_settings(flatten(config)),
        title=config.name,
        wandb=config.wandb if config.wandb.project else None,
    )


def write_config(config: RunConfig, folder: Path) -> None:
    """Writes the resolved configuration to `config.json` in the run's folder."""
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(flatten(config), indent=2) + "\n")
