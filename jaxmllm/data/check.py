"""Every record of a source, read as training reads it: what would stop a run, what does not fit, what cannot be learned."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxmllm.data.chat import Processor
from jaxmllm.data.examples import Asking, sized
from jaxmllm.data.formats import Record
from jaxmllm.data.overlap import question_key
from jaxmllm.data.parts import checked_text
from jaxmllm.data.selection import RecordSource, all_records, where
from jaxmllm.errors import InputError

Earns = Callable[
    [str, Record], float | None
]  # what the task's reward gives a text; None: it gives nothing to this record
SHOWN = 10  # rows named of each kind of finding
BARS = 12  # of a histogram
NO_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Seen:
    """One record, looked at."""

    where: str  # how messages name it
    problem: str = ""  # why a run would stop at it, or leave it out
    never: str = ""  # why no answer can be right
    prompt: int = 0  # tokens, vision included
    vision: int = 0  # tokens of its pictures
    answer: int | None = None  # tokens of its gold answer; None: it has none
    pictures: tuple[tuple[int, int], ...] = ()  # pixels [W, H] of its images as they are stored
    resized: tuple[tuple[int, int], ...] = ()  # and as the model sees them
    question: str = ""  # equal for records with the same pictures and the same question


class Look:
    """Reads records. `earns` says what a gold answer earns: nothing for a right answer means that none is right."""

    def __init__(self, processor: Processor, asking: Asking, earns: Earns):
        self.processor, self.asking, self.earns = processor, asking, earns
        self.processor.max_prompt_length = NO_LIMIT  # lengths are reported, not refused

    def source(self, source: RecordSource, limit: int | None = None) -> Iterator[Seen]:
        """Each record of the first `limit` items of a source; several where they share an image."""
        for index in range(min(len(source), limit or len(source))):
            name = where(source, index)
            try:
                records = all_records(source, index)
            except InputError as error:
                yield Seen(name, problem=_reason(error, name))
                continue
            for record in records:
                yield self.record(record, name)

    def record(self, record: Record, name: str) -> Seen:
        try:
            record = sized(record, self.processor.pixel_config)
            chat = self.asking.conversation(record)
            example = self.processor.encode(chat)
            gold = self.gold(record)
            if gold is not None:
                checked_text(gold, "answer")
            answer = (
                None if gold is None else len(self.processor.tokenizer(gold, add_special_tokens=False)["input_ids"])
            )
            never = "" if gold is None else self.never(gold, record)
        except InputError as error:
            return Seen(name, problem=_reason(error, name))
        except (KeyError, TypeError, ValueError, LookupError) as error:
            return Seen(name, problem=f"a field is missing or has the wrong form ({error!r})")
        pixels = self.processor.pixel_config.patch_size
        images = [frames for frames in example.vision if frames.seconds_per_grid is None]
        return Seen(
            name,
            never=never,
            prompt=len(example.tokens),
            vision=sum(frames.tokens for frames in example.vision),
            answer=answer,
            pictures=(tuple(record["size"]),) if len(images) == 1 and "size" in record else (),
            resized=tuple((frames.grid[2] * pixels, frames.grid[1] * pixels) for frames in images),
            question=question_key(chat),
        )

    def gold(self, record: Record) -> str | None:
        """The gold answer; None of a chat that ends with the question, as those of rewards of one's own do."""
        if "messages" in record and record["messages"][-1]["role"] != "assistant":
            return None
        return self.asking.answer(record)

    def never(self, gold: str, record: Record) -> str:
        """Why no answer can be right; empty where one can."""
        if not gold.strip():
            return "its answer is empty"
        if "messages" in record:
            return ""
        earned = self.earns(gold, record)
        if earned is not None and not earned > 0:
            return f"its own answer {_short(gold)} earns {earned:g}"
        return ""


def _reason(error: InputError, name: str) -> str:
    return str(error).removeprefix(f"{name}: ")


def _short(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[: length - 2] + "..")


# ---------------------------------------------------------------- what is said


@dataclasses.dataclass(frozen=True)
class Limits:
    """Those of a run: `data.max_prompt_length`, and the tokens that an answer may have."""

    prompt: int
    answer: int
    max_pixels: int
    factor: int  # pixels a side of one vision token


def summary(name: str, found: Sequence[Seen], limits: Limits) -> list[str]:
    """Lines about one source: what stops a run first, then what does not fit, then what there is."""
    bad = [one for one in found if one.problem]
    good = [one for one in found if not one.problem]
    lines = [f"{name}: {len(found)} records, {len(bad)} of them bad"]
    lines += _listed(bad, lambda one: one.problem)
    if bad:
        lines.append(f"  to leave them out: --data.max_bad_records {len(bad)}")
    never = [one for one in good if one.never]
    if never:
        lines.append(f"  {len(never)} with an answer that is never right:")
        lines += _listed(never, lambda one: one.never)
    counts = collections.Counter(one.question for one in good)
    if repeated := sum(count - 1 for count in counts.values()):
        lines.append(f"  {repeated} ask the same about the same picture as another record of this source")
    if good:
        lines += _lengths(good, limits) + _pictures(good, limits)
    return lines


def stopping(found: Iterable[Seen], limits: Limits) -> int:
    """Records at which a run would stop."""
    return sum(1 for one in found if one.problem or one.prompt > limits.prompt)


def shared(training: Sequence[Seen], evaluation: Sequence[Seen]) -> list[str]:
    """Lines about records of the evaluation that training has too: the same pictures and the same question."""
    known = {one.question: one.where for one in training if one.question}
    both = [(one, known[one.question]) for one in evaluation if one.question in known]
    if not both:
        return ["no record of the evaluation is among the training's"]
    twins = {one.where: place for one, place in both}
    lines = [f"{len(both)} of {len(evaluation)} records of the evaluation are among the training's:"]
    return lines + _listed([one for one, _ in both], lambda one: f"also {twins[one.where]}")


def _listed(found: Sequence[Seen], say: Callable[[Seen], str]) -> list[str]:
    lines = [f"    {one.where}: {say(one)}" for one in found[:SHOWN]]
    return lines + ([f"    and {len(found) - SHOWN} more"] if len(found) > SHOWN else [])


def _lengths(good: Sequence[Seen], limits: Limits) -> list[str]:
    prompts = np.array([one.prompt for one in good])
    lines = [f"  prompts: {_spread(prompts)} tokens, vision included"] + histogram(prompts, limits.prompt)
    if long := [one for one in good if one.prompt > limits.prompt]:
        lines.append(f"  longer than data.max_prompt_length = {limits.prompt}: {len(long)}")
        lines += _listed(long, lambda one: f"{one.prompt} tokens, {one.vision} of them vision")
        lines.append(f"  to fit them: --data.max_prompt_length {prompts.max()}{_or_fewer_pixels(long, limits)}")
    answers = np.array([one.answer for one in good if one.answer is not None])
    if not len(answers):
        return [*lines, "  no answers: such records need a reward of your own"]
    lines.append(f"  answers: {_spread(answers)} tokens; {len(good) - len(answers)} records have none")
    if answers.max() >= limits.answer:
        need = f"{answers.max() + 1}"  # and the end of the turn
        lines.append(
            f"  the longest needs --method.max_completion_length {need} in GRPO and --evaluation.max_new_tokens {need}"
        )
    return lines


def _or_fewer_pixels(long: Sequence[Seen], limits: Limits) -> str:
    """A flag that fits the same prompts by smaller pictures, where that can be."""
    room = [(limits.prompt - one.prompt + one.vision) // len(one.resized) for one in long if one.resized]
    if len(room) < len(long) or min(room) < 1:
        return ""
    return f", or smaller pictures: --data.max_pixels {min(room) * limits.factor**2}"


def _pictures(good: Sequence[Seen], limits: Limits) -> list[str]:
    stored = [size for one in good for size in one.pictures]
    if not stored:
        return []
    areas = np.array([width * height for width, height in stored])
    smallest, largest = stored[int(areas.argmin())], stored[int(areas.argmax())]
    lines = [f"  pictures: {smallest[0]} x {smallest[1]} to {largest[0]} x {largest[1]} pixels"]
    if shrunk := int((areas > limits.max_pixels).sum()):
        lines.append(
            f"  {shrunk} of {len(areas)} are made smaller, to {limits.max_pixels} pixels; none would be with "
            f"--data.max_pixels {math.ceil(areas.max() / limits.factor**2) * limits.factor**2}"
        )
    return lines


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}, half of them up to {int(np.median(values))}"


def histogram(values: np.ndarray, limit: int) -> list[str]:
    """A bar for each of a few ranges of equal width; the ranges beyond the limit are marked."""
    low, high = int(values.min()), int(values.max())
    width = max(1, math.ceil((high - low + 1) / BARS))
    counts = np.bincount((values - low) // width)
    tall = counts.max()
    lines = []
    for k, count in enumerate(counts):
        first, last = low + k * width, min(low + (k + 1) * width - 1, high)
        bar = "█" * math.ceil(40 * count / tall)
        lines.append(f"    {first:>7} - {last:<7} {count:>7} {bar}{' too long' if first > limit else ''}")
    return lines
