"""The pure functions are for other code bases, too: importing them must not load the rest of the stack."""

import subprocess
import sys
from pathlib import Path

import pytest

MODULES = ("jaxrl_llm", "jaxrl_llm.losses", "jaxrl_llm.advantages", "jaxrl_llm.masking")
HEAVY = ("flax", "optax", "orbax", "transformers", "tensorflow", "torch", "grain", "datasets", "matplotlib")


@pytest.mark.parametrize("module", ["jaxrl_llm", "jaxrl_llm.losses", "jaxrl_llm.advantages", "jaxrl_llm.masking"])
def test_import_loads_only_jax_and_numpy(module):
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "jaxrl_llm" in loaded
    assert not loaded.intersection(HEAVY)
