"""A run's checkpoint as a model: its parameters, and the run's own settings, which say of what model they are."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax

from jaxrl_llm.config import ModelSource
from jaxrl_llm.launch.settings import CONFIG_FILE
from jaxrl_llm.models.config import LoraConfig, Params
from jaxrl_llm.models.lora import join, split_trainable
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.training.run.checkpoint import Checkpointer
from jaxrl_llm.training.run.resume import CHECKPOINTS

_SCORING = {"RewardModelObjective": "SequenceClassification", "ProcessRewardObjective": "TokenClassification"}
"""Objectives that train a head of scores in place of the one of tokens, and what transformers calls the model."""
_BESIDE = ("model", "warm_start")
"""Folders of a run with a model of its kind, where the run began with none that was named."""


def run_of(source: ModelSource) -> Path | None:
    """The folder of a run of which `source` names a checkpoint, `<run>/checkpoints/<step>`; `None`: it names none."""
    path = Path(source.path or "")
    return path.parent.parent if path.name.isdigit() and path.parent.name == CHECKPOINTS else None


def base_of(source: ModelSource) -> ModelSource:
    """The model that the run of a checkpoint began with, or one of its kind; another source as it is.

    Raises:
        ValueError: the run's folder has no settings, or no model, or the run trained a model of scores.
    """
    run = run_of(source)
    if run is None:
        return source
    if not (run / CONFIG_FILE).is_file():
        raise ValueError(f"{source.path} is a checkpoint of no run: there is no {run / CONFIG_FILE}")
    saved = json.loads((run / CONFIG_FILE).read_text())
    if (kind := _SCORING.get(saved.get("objective.part", ""))) is not None:
        raise ValueError(
            f"{source.path} is a checkpoint of a model with a head of scores, which writes no text: "
            f"{run / 'model'}, which its run leaves, loads in transformers as AutoModelFor{kind}"
        )
    beside = [str(run / name) for name in _BESIDE if (run / name / "config.json").is_file()]
    of_template = "model.template_arguments."
    arguments = {name.removeprefix(of_template): saved[name] for name in saved if name.startswith(of_template)}
    paths = [*filter(None, [saved["model.path"]]), *beside]
    if not paths:
        raise ValueError(f"of what model {source.path} is cannot be known: {run} names none, and has none in model/")
    return dataclasses.replace(
        source,
        path=paths[0],
        param_dtype=saved["model.param_dtype"],
        base_dtype=saved.get("model.base_dtype"),
        long_rope=saved.get("model.long_rope", False),
        lora=LoraConfig(
            rank=saved["model.lora.rank"],
            alpha=saved["model.lora.alpha"],
            targets=tuple(saved["model.lora.targets"]),
            use_rslora=saved["model.lora.use_rslora"],
        ),
        adapters=saved["model.adapters"],
        chat_template=source.chat_template or saved["model.chat_template"],
        template_arguments=source.template_arguments or arguments,
    )


def checkpoint_params(source: ModelSource, model: Transformer, base: Params) -> Params:
    """The parameters of a checkpoint, where those of its base lie, which it leaves out where adapters were trained.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another model.
        DamagedRunError: a file of it is damaged.
    """
    path = Path(source.path or "")
    trained, frozen = split_trainable(base)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), {"params": trained})
    with Checkpointer(path.parent, read_only=True) as checkpoints:
        restored, _ = checkpoints.restore(abstract, int(path.name), part=True)
    return join(restored["params"], frozen)
