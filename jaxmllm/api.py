"""The few calls a notebook or another program needs: load, generate, stream, score."""

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmllm.data.chat import Buckets, Example, Processor, collate, collate_completions
from jaxmllm.data.examples import Asking
from jaxmllm.errors import InputError
from jaxmllm.machine import processes
from jaxmllm.machine.mesh import param_shardings, shard_batch
from jaxmllm.model import family, hf
from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import load_model_config
from jaxmllm.model.logprobs import Sampling
from jaxmllm.rollout import sampler
from jaxmllm.rollout.scorer import score_jit
from jaxmllm.runfiles import not_a_bucket
from jaxmllm.types import Completions, Prompts

log = logging.getLogger(__name__)
TINY = Path(__file__).parent / "assets" / "tiny"
TINY_TOKENS = 64  # of the largest picture that it was made for, 112 x 112 pixels
Conversation = Sequence[Mapping[str, Any]]  # Hugging Face chat messages


@dataclasses.dataclass
class Model:
    """A loaded model: parameters, architecture, tokenizer and preprocessing."""

    params: dict
    cfg: ModelConfig
    processor: Processor
    mesh: Mesh | None = None
    folder: Path | None = None  # where it was loaded from: exports copy its tokenizer files
    buckets: Buckets = dataclasses.field(default_factory=Buckets)

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The config's end tokens and the tokenizer's: a chat turn ends with <|im_end|>."""
        ids = [*self.cfg.eos_token_id, self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.stop_ids[0] if pad is None else pad

    def prepare(self, examples: Sequence[Example], at_least: int = 0) -> tuple[Prompts, int]:
        """Prompts on the device, padded to `at_least` rows and to what the mesh divides; and the number of real rows."""
        rows = len(examples)
        parts = 1 if self.mesh is None else self.mesh.shape["replica"] * self.mesh.shape["fsdp"]
        wanted = -(-max(rows, at_least) // parts) * parts
        padded = [*examples, *[examples[-1]] * (wanted - rows)]
        prompts = collate(padded, self.buckets)
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, prompts), rows
        return shard_batch(processes.own_block(prompts, self.mesh), self.mesh), rows


@dataclasses.dataclass(frozen=True)
class Generation:
    """One completion of a conversation."""

    text: str  # without the stop token
    token_ids: list[int]  # the stop token included
    logprobs: np.ndarray  # [len(token_ids)], nats, under the distribution it was drawn from
    stop_reason: str  # "stop" (a stop token was written) or "length"


def resolve(path_or_hub_id: str | Path) -> Path:
    """A local checkpoint folder: the path itself, "tiny" for the embedded model, or a hub download.

    Raises InputError when it is neither a folder nor a reachable hub id.
    """
    if str(path_or_hub_id) == "tiny":
        return TINY
    not_a_bucket(path_or_hub_id, "model")
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path_or_hub_id).count("/") != 1 or str(path_or_hub_id).startswith((".", "/")):
        raise InputError(
            f"{path_or_hub_id}: no such checkpoint folder (a hub id looks like Qwen/Qwen2.5-VL-3B-Instruct)"
        )
    if folder.parent.is_dir():  # such as runs/NAME: meant as a folder, not as a hub id
        there = ", ".join(sorted(path.name for path in folder.parent.iterdir() if path.is_dir())[:8]) or "no folder"
        raise InputError(f"{path_or_hub_id}: no such checkpoint folder; {folder.parent} holds {there}")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(str(path_or_hub_id), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt"])
        )
    except Exception as error:
        raise InputError(f"{path_or_hub_id}: not a local folder, and the hub download failed: {error}") from error


def load(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_source_pixels: int | None = None,
    max_prompt_length: int = 16384,
    buckets: Buckets | None = None,
    family: str = "",
    **run: Any,
) -> Model:
    """Loads a Qwen2-VL or Qwen2.5-VL checkpoint.

    Args:
        path_or_hub_id: a Hugging Face folder, a hub id, or "tiny" (the model inside the package).
        mesh: parameters are streamed into their shards on it; None: the first device.
        dtype: of parameters and activations, e.g. "bfloat16"; None keeps the checkpoint's parameters and computes in their
            dtype, in float32 where that is float16: activations of these models leave its range.
        min_pixels, max_pixels: of a resized image; None: the checkpoint's.
        max_source_pixels: of a stored image; a larger one is refused before it is decoded. None: 89,478,485.
        max_prompt_length: tokens, vision included; longer prompts are refused.
        family: module:object of a model family from outside the package; empty: the one of the checkpoint's model_type.
        run: other fields of ModelConfig that say how to run it (remat, unroll, attention).

    Raises InputError naming the file and the field when anything does not fit.
    """
    folder = resolve(path_or_hub_id)
    changes: dict[str, Any] = ({"dtype": dtype} if dtype else {}) | run
    cfg = dataclasses.replace(load_model_config(folder, family), **changes)
    processor = Processor.from_pretrained(
        folder,
        cfg,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_source_pixels=max_source_pixels,
        max_prompt_length=max_prompt_length,
    )
    sharding = None
    if mesh is not None:
        tree = param_shardings(hf.abstract_params(cfg), mesh)

        def sharding(path, _):
            node = tree
            for key in path:
                node = node[key]
            return node

    params = hf.load_params(folder, cfg, dtype=dtype, sharding=sharding)
    stored = params["embed"].dtype.name
    if dtype is None and stored == "float16":
        log.warning('%s is stored in float16 and computed in float32; dtype="bfloat16" is faster', folder)
        stored = "float32"
    cfg = dataclasses.replace(cfg, dtype=dtype or stored)
    return Model(params, cfg, processor, mesh, folder, buckets or Buckets())


def identity(model: Model) -> list[str]:
    """Names, sizes and times of the checkpoint's weight files: what a resumed evaluation must find unchanged."""
    files = sorted(model.folder.glob("*.safetensors")) if model.folder else []
    return [str(model.folder), *(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files)]


def _encoded(model: Model, conversations: Sequence[Conversation]) -> list[Example]:
    examples = [model.processor.encode(conversation) for conversation in conversations]
    if model.folder == TINY and any(
        len(picture.token_index) > TINY_TOKENS for one in examples for picture in one.vision
    ):
        _say_what_tiny_is_for()
    return examples


@functools.cache  # once a process
def _say_what_tiny_is_for() -> None:
    log.warning(
        '"tiny" is made for drawings of up to 112 x 112 pixels (world: sources), to try things out in seconds; of photographs '
        "it knows nothing, and what it says about them means nothing. For photographs load a model such as "
        "Qwen/Qwen2.5-VL-3B-Instruct, or train it on yours"
    )


def _generation(model: Model, tokens: np.ndarray, length: int, logps: np.ndarray, stopped: bool) -> Generation:
    ids = tokens[:length].tolist()
    # box and reference markers are part of an answer, only the stop token is not
    text = model.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=False)
    return Generation(text, ids, logps[:length], "stop" if stopped else "length")


def _finite(model: Model, logps: np.ndarray) -> np.ndarray:
    """The same log-probabilities. InputError when one is NaN or infinite: then so were the logits, and the text is none."""
    if not np.isfinite(logps).all():
        advice = (
            'activations left the range of float16; load the model with dtype="bfloat16"'
            if model.cfg.dtype == "float16"
            else "the weights are damaged, or their training diverged"
        )
        raise InputError(
            f"{model.folder or 'model'}: the logits are NaN or infinite, computed in {model.cfg.dtype}: {advice}"
        )
    return logps


def _banned(model: Model) -> tuple[int, ...]:
    return tuple(sorted(set(model.cfg.vision_token_ids)))


def generate(
    model: Model,
    conversations: Sequence[Conversation],
    *,
    num_generations: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 8,
) -> list[list[Generation]]:
    """`num_generations` completions of each conversation.

    Conversations are Hugging Face chat messages; a content part is {"type": "text", "text"}, {"type": "image", "image": path |
    PIL | array} or {"type": "video", "video": path | frames, "fps"}. The images of a conversation are encoded once and its
    prompt is prefilled once, whatever `num_generations`. temperature 0 is greedy. A completion depends on `seed`, its
    conversation's place in the list and its own number, not on `batch_size`.
    """
    if min(num_generations, max_new_tokens, batch_size) < 1:
        raise InputError("num_generations, max_new_tokens and batch_size must be at least 1")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, _banned(model)).validate()
    examples = _encoded(model, conversations)
    results: list[list[Generation]] = []
    for first in range(0, len(examples), batch_size):
        # a last, shorter batch is filled up: another number of rows would be another program
        prompts, rows = model.prepare(examples[first : first + batch_size], min(batch_size, len(examples)))
        padded = prompts.tokens.shape[0]
        keys = sampler.row_keys(jax.random.key(seed), first + jnp.arange(padded), num_generations)
        samples = sampler.sample(
            model.params,
            model.cfg,
            prompts,
            keys,
            sampling,
            max_new_tokens=max_new_tokens,
            stop_ids=model.stop_ids if stop_ids is None else tuple(stop_ids),
            pad_id=model.pad_id,
            counts=jnp.where(jnp.arange(padded) < rows, num_generations, 0),
        )
        host = processes.whole(samples)
        _finite(model, host.logps[:rows])
        for b in range(rows):
            group = zip(host.tokens[b], host.lengths[b], host.logps[b], host.stopped[b], strict=True)
            results.append([_generation(model, *one) for one in group])
    return results


def stream(
    model: Model,
    conversation: Conversation,
    *,
    num_generations: int = 1,
    max_new_tokens: int = 512,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    every: int = 8,
) -> Iterator[list[Generation]]:
    """Like `generate` for one conversation, yielding what is written so far every `every` tokens; the last is complete."""
    sampling = dataclasses.replace(sampling, banned=_banned(model)).validate()
    prompts, _ = model.prepare(_encoded(model, [conversation]))
    rows = prompts.tokens.shape[0]
    state = sampler.start(
        model.params,
        model.cfg,
        prompts,
        sampler.row_keys(jax.random.key(seed), jnp.arange(rows), num_generations),
        sampling,
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        stop_ids=model.stop_ids,
        pad_id=model.pad_id,
        counts=jnp.where(jnp.arange(rows) < 1, num_generations, 0),
    )
    while True:
        host = jax.device_get((state.tokens[0], state.lengths[0], state.logps[0], state.stopped[0]))
        _finite(model, host[2])
        yield [_generation(model, *one) for one in zip(*host, strict=True)]
        step = int(state.step)
        if step >= max_new_tokens or bool(state.done.all()):
            return
        until = jnp.asarray(min(step + every, max_new_tokens))
        state = sampler.advance(model.params, model.cfg, state, until, sampling, model.stop_ids)


def score(
    model: Model,
    conversations: Sequence[Conversation],
    completions: Sequence[Sequence[str | Sequence[int]]],
    *,
    sampling: Sampling | None = None,
    batch_size: int = 8,
) -> list[list[np.ndarray]]:
    """Log-probability (nats) of every token of the given completions, texts or lists of token ids.

    `completions[i]` are continuations of conversation i and share its prefix. Texts are tokenised as they are: end them with
    the stop token's text if it should count. `sampling` None: under the model's own distribution; else under the one that
    `generate` draws from with these options, which holds no vision tokens.
    """
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: must be at least 1")
    if sampling is not None:
        sampling = dataclasses.replace(sampling, banned=_banned(model)).validate()
    if len(conversations) != len(completions):
        raise InputError(f"{len(completions)} lists of completions for {len(conversations)} conversations")
    examples = [model.processor.encode(conversation) for conversation in conversations]
    ids = [
        [list(model.tokenizer.encode(c, add_special_tokens=False)) if isinstance(c, str) else list(c) for c in group]
        for group in completions
    ]
    for i, group in enumerate(ids):
        if any(not c for c in group):
            raise InputError(f"conversation {i}: a completion without a token cannot be scored")
        if any(not 0 <= token < model.cfg.text.vocab_size for c in group for token in c):
            raise InputError(
                f"conversation {i}: a completion holds token ids outside 0 .. {model.cfg.text.vocab_size - 1}"
            )
    results: list[list[np.ndarray]] = []
    for first in range(0, len(examples), batch_size):
        some = ids[first : first + batch_size]
        prompts, rows = model.prepare(examples[first : first + batch_size], min(batch_size, len(examples)))
        some = [*some, *[some[-1]] * (prompts.tokens.shape[0] - rows)]
        batch: Completions = collate_completions(some, model.buckets)
        if model.mesh is not None:
            batch = shard_batch(processes.own_block(batch, model.mesh), model.mesh)
        logps, _ = score_jit(model.params, model.cfg, prompts, batch, sampling or Sampling())
        host = processes.whole(logps)
        results += [[_finite(model, host[b, g, : len(c)]) for g, c in enumerate(some[b])] for b in range(rows)]
    return results


def save(model: Model, folder: str | Path, *, dtype: str | None = None) -> None:
    """Writes a Hugging Face folder that transformers loads, tokenizer and processor files included."""
    hf.save_params(model.params, model.cfg, folder, source=model.folder, dtype=dtype)


def init_params(cfg: ModelConfig, seed: int, mesh: Mesh | None = None) -> dict:
    """Random parameters, created in their shards."""
    shardings = None if mesh is None else param_shardings(hf.abstract_params(cfg), mesh)
    make = jax.jit(lambda key: family.init(key, cfg), out_shardings=shardings)
    return make(jax.random.key(seed))


def ask(
    model: Model,
    asking: Asking,
    records: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    batch_size: int | None = None,
) -> list[str]:
    """The model's greedy answer to each record. `batch_size`: prompts a program; None: all of them."""
    found = generate(
        model,
        [asking.conversation(dict(record)) for record in records],
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        repetition_penalty=repetition_penalty,
        batch_size=batch_size or max(len(records), 1),
    )
    return [group[0].text for group in found]
