"""`jaxmllm data check`: every record, read as training reads it."""

from rich.progress import Progress
from tyro.conf import Positional

from jaxmllm import api
from jaxmllm.commands.options import MaxPixels, MaxSourcePixels, MinPixels, Style, Thinking, at_least
from jaxmllm.commands.terminal import console
from jaxmllm.data import check
from jaxmllm.data.chat import Processor
from jaxmllm.data.examples import Asking
from jaxmllm.data.sources import Spec, open_source
from jaxmllm.errors import InputError
from jaxmllm.methods.grpo.reward_calls import total_reward
from jaxmllm.model.family import load_model_config
from jaxmllm.training.setup import chosen_style


def run(
    source: Positional[tuple[str, ...]],
    eval: tuple[str, ...] = (),
    model: str = "tiny",
    style: Style = None,
    thinking: Thinking = False,
    max_prompt_length: int = 1024,
    max_new_tokens: int = 512,
    min_pixels: MinPixels = None,
    max_pixels: MaxPixels = None,
    max_source_pixels: MaxSourcePixels = None,
    limit: int | None = None,
) -> None:
    """Read every record as training would: bad ones, lengths and sizes against the limits, answers that are never right.

    Ends with status 2 where a run would stop at a record.

    Args:
        source: training data, such as chat:rows.jsonl; several are looked at one by one.
        eval: sources of the evaluation; records that training has too are counted.
        model: whose tokenizer and picture sizes count: a checkpoint folder, a hub id, or "tiny".
        max_prompt_length: tokens of a prompt that the run allows, vision included: data.max_prompt_length.
        max_new_tokens: tokens of an answer that the run allows.
        limit: first records of each source; every record without it.
    """
    at_least(1, limit=limit, max_prompt_length=max_prompt_length, max_new_tokens=max_new_tokens)
    opened = {spec: open_source(spec) for spec in dict.fromkeys((*source, *eval))}
    folder = api.resolve(model)
    processor = Processor.from_pretrained(
        folder,
        load_model_config(folder),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_source_pixels=max_source_pixels,
    )
    pixels = processor.pixel_config
    limits = check.Limits(max_prompt_length, max_new_tokens, pixels.max_pixels, pixels.factor)
    written = chosen_style(style, processor.model_config)
    look = check.Look(processor, Asking({"style": written, "thinking": thinking}), total_reward(written, thinking))
    seen: dict[str, list[check.Seen]] = {}
    with Progress(console=console(), transient=True) as bar:
        for spec, records in opened.items():
            line = bar.add_task(Spec.parse(spec).name, total=min(len(records), limit or len(records)))
            seen[spec] = []
            for record in look.source(records, limit):
                seen[spec].append(record)
                bar.advance(line)
    for spec in opened:
        print("\n".join(check.summary(spec, seen[spec], limits)))
    if eval:
        train, held_out = ([record for spec in specs for record in seen[spec]] for specs in (source, eval))
        print("\n".join(check.shared(train, held_out)))
    every = [record for records in seen.values() for record in records]
    if stopped := check.stopping(every, limits):
        raise InputError(f"a run would stop at {stopped} of {len(every)} records; see above for the flags")
