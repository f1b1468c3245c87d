from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm.training.run.curves import plot_curves, running_mean
from jaxrl_llm.training.run.metrics import MetricsWriter

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def metrics_path(tmp_path: Path) -> Path:
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(60):
            writer.write(step, {"reward": math.tanh(step / 20), "kl": math.nan if step == 5 else step / 1e3})
            if step % 10 == 0:
                writer.write(step, {"eval/accuracy": step / 60})
    return writer.path


def test_running_mean() -> None:
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert running_mean([1, math.nan, 3], 2) == [1, 1, 3]
    assert math.isnan(running_mean([math.inf], 3)[0])


def test_writes_a_picture_as_wide_as_its_panels(metrics_path: Path, tmp_path: Path) -> None:
    sizes = []
    for panels in (["kl"], [("reward", "eval/accuracy"), "kl"]):
        picture = tmp_path / "curves.png"
        plot_curves(metrics_path, picture, panels, title="GRPO")
        data = picture.read_bytes()
        assert data.startswith(PNG) and len(data) > 5000
        sizes.append((int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")))
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])


def test_unknown_metric_names_the_known_ones(metrics_path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'rewad'.*it has: eval/accuracy, kl, reward"):
        plot_curves(metrics_path, tmp_path / "curves.png", ["rewad"])
    with pytest.raises(ValueError, match="at least one"):
        plot_curves(metrics_path, tmp_path / "curves.png", [])


def test_pyplot_is_not_loaded(metrics_path: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from jaxrl_llm.training.run.curves import plot_curves;"
        "assert 'matplotlib' not in sys.modules, 'imported for runs that draw nothing';"
        f"plot_curves({str(metrics_path)!r}, {str(tmp_path / 'c.png')!r}, ['kl']);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
