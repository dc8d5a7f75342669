"""Every test sees eight CPU devices and has the shapes in signatures checked."""

import os

# before jax starts: the number of devices cannot change afterwards
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import numpy as np
import pytest

import tests.checker  # noqa: F401 (the hook names it by its path)

# what is jitted takes numpy arrays as well
jaxtyping.Array = jax.Array | np.ndarray  # type: ignore[misc]
jaxtyping.install_import_hook(["jaxmllm.losses", "jaxmllm.model", "jaxmllm.rollout"], "tests.checker.check")


@pytest.fixture(scope="module")
def fast_compile():
    """For modules whose time goes into compiling small programs: half the compile time, slower programs."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
