"""Rewards as people write them, and as they go wrong. Importing takes longer than a reward may."""

import sys
import time
from decimal import Decimal

import numpy as np

IMPORT_SECONDS = 3.0
time.sleep(IMPORT_SECONDS)


class StatusError(Exception):
    """As openai's and other clients': a keyword that the constructor requires does not survive pickling."""

    def __init__(self, message, *, response):
        super().__init__(message)
        self.response = response


def limited(text, record):
    if text.startswith("a"):
        raise StatusError("429: slow down", response={"code": 429})
    return 1.0


def leaves(text, record):
    sys.exit(0)


def numpy_bool(text, record):
    return np.float32(len(text)) > 1


def numpy_array(text, record):
    return np.asarray(len(text) / 4)


def jax_scalar(text, record):
    import jax.numpy as jnp

    return jnp.asarray(len(text) / 4)


def decimal(text, record):
    return Decimal(len(text)) / 4


def named_with_text(text, record):
    return {"reward": 1.0, "pred": text}


def too_large(text, record):
    return 1e39


async def later(text, record):
    return 1.0


def as_trl(completions, **kwargs):
    return [1.0 for _ in completions]


def never(text, record):
    return None
