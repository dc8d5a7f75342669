"""Names and fields of the sheet reper.md, mapped to the library."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.methods import unlikelihood

_INTS = ("targets", "turn_id")


def _arrays(inputs):
    """The call's arguments: lists and the fields that are arrays become arrays, every other is passed as it stands."""
    return {
        name: jnp.asarray(np.asarray(value, int if name in _INTS else float))
        if isinstance(value, list) or name in ("r", "sigma")
        else value
        for name, value in inputs.items()
    }


def _call(function):
    def evaluate(inputs):
        if isinstance(inputs, list):
            return [evaluate(item) for item in inputs]
        with jax.enable_x64(True):
            return np.asarray(function(**_arrays(inputs))).tolist()

    return evaluate


FUNCTIONS = {
    "reper_loss": _call(unlikelihood.reper_loss),
    "reper_logit_grad": _call(unlikelihood.reper_logit_grad),
    "normalize_rewards": _call(unlikelihood.normalize_rewards),
    "token_optimum": _call(unlikelihood.token_optimum),
}
