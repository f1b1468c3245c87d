"""One environment for every test: eight virtual CPU devices and a compilation cache that outlives the run."""

from __future__ import annotations

import getpass
import importlib.metadata
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

# JAX reads these when it is imported, and the processes that tests start inherit them. Loading a program from
# the cache still counts as a compilation (`/jax/core/compile/backend_compile_duration`), so that tests that
# count compilations see the same numbers with a warm cache.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"jaxrl_llm-tests-{getpass.getuser()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("MPLBACKEND", "agg")
# XLA's CPU client gives itself one thread per device, and each device holds one while it waits for the others
# of a collective. On JAX 0.10 with fewer cores than devices, programs dispatched one behind the other then
# starve, and the process aborts ("waiting for all reduce ... may be stuck"). Threads are cheap.
os.environ.setdefault("PJRT_NPROC", "32")

# Compiling is most of what these tests do. Without LLVM's optimisations and in one piece, and on JAX 0.10 with the
# emitter of fused kernels that came before the present one, it takes a fraction of the time. XLA_FLAGS="" tests what
# users run. XLA aborts on flags that it does not know, hence the versions that do.
if importlib.metadata.version("jaxlib").startswith(("0.10.", "0.12.")):
    quick = ["backend_optimization_level=0", "cpu_parallel_codegen_split_count=1"]
    quick += ["cpu_use_fusion_emitters=false"] if importlib.metadata.version("jaxlib").startswith("0.10.") else []
    os.environ.setdefault("XLA_FLAGS", " ".join(f"--xla_{flag}" for flag in quick))

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxrl_llm.sharding import MeshConfig

if TYPE_CHECKING:  # tests of the pure functions run where nothing but jax and numpy is installed
    from jaxrl_llm.models.config import ModelConfig, Params
    from jaxrl_llm.models.transformer import Transformer

# In this process alone: the scripts that tests start see one device, as a newcomer's machine does.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def _no_compilation_goes_on() -> Iterator[None]:
    """Waits for programs that a run which failed was compiling ahead: the next test would count them as its own."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("compile_"):
            thread.join()


@pytest.fixture(scope="session")
def examples() -> dict[str, Any]:
    """Golden numbers by name, computed in NumPy from the papers' equations."""
    return json.loads((Path(__file__).parent / "algorithm_examples.json").read_text())


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """Eight devices as data 2 × fsdp 2 × tensor 2, with the axis names of every mesh of the package."""
    return jax.make_mesh(
        (2, 2, 1, 1, 2),
        ("data", "fsdp", "context", "expert", "tensor"),
        axis_types=(AxisType.Auto,) * 5,
    )


@pytest.fixture(
    params=[MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4), MeshConfig(data=2, fsdp=4)],
    ids=["fsdp8", "fsdp2_tensor4", "data2_fsdp4"],
)
def mesh_config(request: pytest.FixtureRequest) -> MeshConfig:
    """The layouts of eight devices that must agree with one device."""
    return request.param


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """A small model that every mesh of `mesh_config` can hold, its settings changed at will."""
    from jaxrl_llm.models.config import LayerKind, ModelConfig

    def make(**changes: Any) -> ModelConfig:
        sizes = {"vocab_size": 64, "embed_dim": 32, "mlp_dim": 48, "num_layers": 2}
        heads = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 4}
        other = {"max_position_embeddings": 128, "remat": "none", "tie_embeddings": True}
        windows = changes.pop("sliding_windows", (None,))  # of each layer
        of_kind = {field: changes.pop(field) for field in ("rope", "activation", "norms") if field in changes}
        kinds = {"layer_kinds": tuple(LayerKind(window, **of_kind) for window in windows)}
        return ModelConfig(**{**sizes, **heads, **other, **kinds, **changes})

    return make


@pytest.fixture(scope="session")
def lively_params() -> Callable[..., Params]:
    """Parameters far from those of `init`: no bias is 0, no norm is 1, and attention and logits have a shape."""

    def make(model: Transformer, seed: int = 0) -> Params:
        rng = np.random.default_rng(seed)

        def one(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            noise = rng.normal(size=leaf.shape)
            match path[-1].key:
                case "weight":
                    noise *= 1.5 / np.sqrt(leaf.shape[-1])
                case "scale":
                    noise = 1 + 0.3 * noise
                case _:
                    noise *= 0.3
            return jax.numpy.asarray(noise, leaf.dtype)

        return jax.tree_util.tree_map_with_path(one, model.abstract_params())

    return make


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """`integration/tiny_experiment.py`, a whole run in a second, as a module."""
    path = Path(__file__).parent / "integration" / "tiny_experiment.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Runs a script in two processes that are to join each other: its arguments are the address, the number, more."""

    def run(script: str, *args: str, timeout: float) -> list[subprocess.CompletedProcess[str]]:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, address, str(number), *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONUTF8": "1"},
            )
            for number in range(2)
        ]
        try:
            results = [process.communicate(timeout=timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [
            subprocess.CompletedProcess(process.args, process.returncode, *result)
            for process, result in zip(processes, results, strict=True)
        ]

    return run
