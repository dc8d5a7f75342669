"""The subcommands of `jaxmllm`: one file each, with a function `run` whose parameters are the flags.

A new command is a file here and its line in `COMMANDS`. The file of `data check` is data_check.py.
"""

import importlib
from collections.abc import Callable
from typing import Any

COMMANDS = {  # in the order of the help, which reads these lines without an import
    "train": "Train by a config, or go on with a run: GRPO, SFT, DPO and others.",
    "eval": "Evaluate greedily, with confidence intervals; goes on where it stopped.",
    "sample": "Answer a prompt about images and videos.",
    "score": "Log-probabilities of given completions.",
    "report": "Write the HTML report of a run folder again.",
    "plan": "Memory, products and time of a config on a machine that is not here.",
    "data check": "Read every record as training would, and say what does not fit.",
    "data fetch": "Download a published data set; goes on where it stopped.",
    "data preview": "Draw the first records of a source on one sheet.",
    "data materialise": "Write a slice of the procedural world as a TFDS data set.",
    "data tracks": "Make clips with tracks out of real video.",
    "data relations": "Make pairs of expressions that fit and do not, by one relation.",
    "convert": "Convert a Hugging Face folder to an Orbax one, or back; export a checkpoint of a run.",
    "reflect": "Answer, critique, refined answer: RePer's loop, or its training data.",
    "tpl": "Temporal perplexity of clips, and a filter of training data by it.",
}
GROUPS = {"data": "Look at data before a model does."}


def function(name: str) -> Callable[..., Any]:
    """The function of a command, such as "data check"."""
    module = importlib.import_module(f"{__name__}.{name.replace(' ', '_')}")
    run: Callable[..., Any] = module.run
    return run
