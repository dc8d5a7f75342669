"""Reward functions that behave and misbehave. Without jax, as the processes that run them."""

import math
import os
import time
import zlib


def checksum(text, record) -> float:
    """Differs between completions, whatever an untrained model writes."""
    return zlib.crc32(text.encode()) % 97 / 97


def raises(text, record):
    raise RuntimeError("no such luck")


def hangs(text, record):
    time.sleep(60)


def hangs_on_a(text, record) -> float:
    return time.sleep(60) or 0.0 if text.startswith("a") else 1.0


def fails_on_a(text, record) -> float:
    if text.startswith("a"):
        raise TimeoutError("of its own")
    return 1.0


def dies_on_a(text, record) -> float:
    if text.startswith("a"):
        os._exit(1)
    return 1.0


def mostly_alike(text, record) -> float:
    """Two of three records give every completion the same reward."""
    return checksum(text, record) if zlib.crc32(record["id"].encode()) % 3 == 0 else 0.5


def alike(text, record) -> float:
    return 0.5


def infinite(text, record):
    return math.inf if text else 0.0


def wrong_type(text, record):
    return "very good"


def no_total(text, record):
    return {"precision": 1.0}


def sometimes(text, record):
    return None if record["task"] == "counting" else {"reward": 1.0, "bonus": 0.5}


NOT_A_FUNCTION = 3


def never(text, record):
    return None
