"""Names and fields of the sheet reper.md, mapped to the library."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.losses import unlikelihood

_FLOATS = ("logits", "sigma", "r", "logps", "ul_mask")
_INTS = ("targets", "turn_id")


def _arrays(inputs):
    """The call's arguments as arrays; every other field is passed as it stands."""
    out = dict(inputs)
    for names, dtype in ((_FLOATS, float), (_INTS, int)):
        for name in names:
            if out.get(name) is not None:
                out[name] = jnp.asarray(np.asarray(out[name], dtype))
    return out


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
