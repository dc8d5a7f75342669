"""Every test sees eight CPU devices and has the shapes in signatures checked."""

import importlib.metadata
import os
from pathlib import Path

# Before jax starts. The number of devices cannot change afterwards; three quarters of compiling are saved by leaving out what
# makes the programs fast; what one test or process compiled, and the last run of the tests, the next one reads.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # other versions end at a flag they do not know
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxtyping
import numpy as np
import pytest

import tests.support.checker  # noqa: F401 (the hook names it by its path)

# what is jitted takes numpy arrays as well
jaxtyping.Array = jax.Array | np.ndarray  # type: ignore[misc]
jaxtyping.install_import_hook(["jaxmllm.methods", "jaxmllm.model", "jaxmllm.rollout"], "tests.support.checker.check")


LONGEST = ("multiprocess", "train", "train_features", "mesh", "model", "sampler", "cli", "api", "rcrn")


def pytest_collection_modifyitems(items):
    """Files that take minutes come first: begun last, one would keep a single process busy at the end."""
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.fixture(scope="module")
def one_device():
    """For modules that run whole trainings."""
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        yield
