"""The end of a run: the trained model exported, its curves drawn, and what came out in a few lines."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from jaxrl_llm.config import Experiment, OfflineExperiment
from jaxrl_llm.launch.errors import plain_errors
from jaxrl_llm.launch.loading import Policy
from jaxrl_llm.models.checkpoints.peft import save_adapters
from jaxrl_llm.models.checkpoints.pretrained import save_pretrained
from jaxrl_llm.models.checkpoints.score_pretrained import save_score_model
from jaxrl_llm.models.config import Params
from jaxrl_llm.models.heads import ScoreModel
from jaxrl_llm.training.run.curves import plot_curves
from jaxrl_llm.training.run.distributed import is_main_process
from jaxrl_llm.training.run.formatting import duration
from jaxrl_llm.training.run.metrics import METRICS_FILE, read_metrics
from jaxrl_llm.training.run.page.document import PAGE_FILE
from jaxrl_llm.training.run.report import Report
from jaxrl_llm.training.stage import TrainingResult

Panels = tuple[tuple[str, ...], ...]

PANELS: Panels = (
    ("reward", "eval/reward"),
    ("eval/accuracy",),
    ("entropy",),
    ("completions/mean_length",),
    ("grad_norm",),
)
"""What the picture of a run shows, where it was recorded."""

_SUMMED_UP = (
    "eval/accuracy",
    "eval/reward",
    "eval/completion_length",
    "eval/loss",
    "eval/margin",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
)
"""What the summary compares with the beginning, where it was recorded."""


@plain_errors((OSError, SafetensorError))  # the second is what a full disk is to safetensors
def finish(
    config: Experiment | OfflineExperiment,
    policy: Policy,
    result: TrainingResult,
    *,
    seconds: float,
    next_steps: tuple[str, ...] = (),
    panels: Panels = PANELS,
) -> None:
    """Exports the trained model, draws the curves, and says what came out and where it is.

    Adapters are merged into the model, and exported by themselves, too. A critic's head on the policy's trunk stays in
    the checkpoints: it is no part of the policy.

    Args:
        config: settings.
        policy: the model, without parameters.
        result: what training left.
        seconds: how long it all took.
        next_steps: what to try next, one line each.
        panels: what the picture shows, where it was recorded.
    """
    folder = Path(config.run_dir or "")
    exported = _export(config, policy, result.params, folder)
    if not is_main_process():
        return
    rows = [("steps", f"{result.step}" + (f" of {config.training.steps} ({result.stopped})" if result.stopped else ""))]
    for name in _SUMMED_UP:
        if name in result.last_evaluation:
            rows.append((name, f"{result.first_evaluation[name]:.3f} → {result.last_evaluation[name]:.3f}"))
    rows.append(("time", f"{duration(seconds)}, compilation included"))
    recorded = {name for line in read_metrics(folder / METRICS_FILE) for name in line}
    shown = [kept for panel in panels if (kept := [name for name in panel if name in recorded])]
    if shown:
        plot_curves(folder / METRICS_FILE, folder / "curves.png", shown, title=config.name)
        rows.append(("curves", str(folder / "curves.png")))
    rows.append(("report", f"{folder / PAGE_FILE} (a browser shows it)"))
    rows += [("metrics", str(folder / METRICS_FILE)), *exported]
    Report(result.step).summary(config.name, rows, next_steps=next_steps)


def _export(
    config: Experiment | OfflineExperiment, policy: Policy, params: Params, folder: Path
) -> list[tuple[str, str]]:
    """Writes the model, and its adapters if it has any; what the summary says of them."""
    model, scores = folder / "model", isinstance(policy.model, ScoreModel)
    params = {name: params[name] for name in policy.model.abstract_params()}
    if scores:
        save_score_model(model, policy.model, params, tokenizer=policy.tokenizer, overwrite=True)
    else:
        save_pretrained(
            model,
            policy.model,
            params,
            tokenizer=policy.tokenizer,
            generation_config=policy.generation_config,
            overwrite=True,
        )
    exported = [("model", f"{model} (transformers loads it)")]
    if policy.model.config.lora is not None and not scores:
        adapters = folder / "adapters"
        save_adapters(adapters, policy.model, params, base_name=config.model.path, overwrite=True)
        exported.append(("adapters", f"{adapters} (PEFT loads it)"))
    return exported
