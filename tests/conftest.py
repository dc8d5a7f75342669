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


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """For modules that run whole trainings: one device, and what one run compiled the next one reads."""
    cache = tmp_path_factory.mktemp("compiled")
    options = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
