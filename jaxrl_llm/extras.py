"""What the extras of the distribution bring: the core needs jax and numpy alone, each other room says what it needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MappingProxyType

EXTRA_OF: Mapping[str, str] = MappingProxyType(
    {
        "chex": "train",
        "optax": "train",
        "yaml": "train",
        "flax": "checkpoints",
        "gguf": "checkpoints",
        "jinja2": "checkpoints",
        "orbax": "checkpoints",
        "safetensors": "checkpoints",
        "transformers": "checkpoints",
        "grain": "data",
        "pyarrow": "data",
        "reasoning_gym": "data",
        "tensorflow_datasets": "data",
        "matplotlib": "report",
        "rich": "report",
        "tensorboardX": "report",
    }
)
"""By importable package, the smallest extra that installs it; `train` installs all of them."""


class MissingExtraError(ImportError):
    """A package is not there that an extra installs."""


def require(*packages: str) -> None:
    """Says, before they are imported, how to install the packages among these that are not there.

    Raises:
        MissingExtraError: names them, the extra that brings them, and `train`, which brings all.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extras = sorted({EXTRA_OF[package] for package in missing})
        wanted = "train" if "train" in extras else ",".join(extras)
        more = "" if wanted == "train" else " (jaxrl-llm[train] brings all that training needs)"
        verb = "is" if len(missing) == 1 else "are"
        raise MissingExtraError(f"{', '.join(missing)} {verb} not installed: pip install 'jaxrl-llm[{wanted}]'{more}")
