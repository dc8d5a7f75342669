"""The arrays that pass between the host side, the model, the sampler and the losses.

Axis letters, used everywhere: B prompts, G completions a prompt, S prompt tokens, T completion tokens, F frames (temporal
patches), W windows a frame, P patches a window, C pixels a patch, V = F * W * P / merge**2 vision tokens, N query heads,
K key/value heads, H head width, D model width, L layers.

Annotated but never decorated by a type checker: a checked dataclass breaks `jax.tree.map`.
"""

from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int


class Vision(struct.PyTreeNode):
    """Every image and video of each prompt, as frames, in window order.

    A frame is one temporal patch (an image is a clip of one). Its patches are grouped by windows of P = (window_size /
    patch_size)**2 patches, and inside a window by merge units of merge**2 patches, so that window attention, full
    attention and the merger are reshapes. Windows at the right and lower edge, and missing frames, are padded:

        a 3 x 2 unit image, windows of 2 x 2 units      ->  window 0: 00 01 10 11   window 1: 20 21 -- --
    """

    patches: Float[Array, "B F W P C"]  # normalised pixels, C = channels * temporal_patch * patch * patch
    positions: Int[Array, "B F W P 2"]  # (row, column) of the patch in its frame; -1 marks padding


class Prompts(struct.PyTreeNode):
    """Right-padded prompts. `vision` is None for a batch of text."""

    tokens: Int[Array, "B S"]
    positions: Int[Array, "B 3 S"]  # M-RoPE: temporal, height, width
    lengths: Int[Array, "B"]  # real tokens of the row, at least 1
    next_position: Int[Array, "B"]  # M-RoPE position of the first completion token (all three components)
    vision_index: Int[Array, "B S"]  # index into the row's V vision tokens, -1 where the token is text
    vision: Vision | None = None


class Completions(struct.PyTreeNode):
    """G right-padded continuations of each prompt; they see their prompt and themselves, never each other."""

    tokens: Int[Array, "B G T"]
    lengths: Int[Array, "B G"]  # 0 marks a padding row
    weights: Float[Array, "B G T"]  # weight of the token in a loss: 0 on padding and on text the model did not write
    # of completions that hold pictures, such as those that tools return; they are encoded with those of the prompt
    positions: Int[Array, "B G 3 T"] | None = None  # None: one by one from the prompt's next_position
    vision_index: Int[Array, "B G T"] | None = None  # as of Prompts; None: no pictures


class KVCache(struct.PyTreeNode):
    """Keys and values of the prompt, stored once a prompt, and of the completions written so far."""

    prompt_k: Float[Array, "L B S K H"]
    prompt_v: Float[Array, "L B S K H"]
    prompt_lengths: Int[Array, "B"]
    next_position: Int[Array, "B"]
    k: Float[Array, "L B G T K H"]
    v: Float[Array, "L B G T K H"]


class Samples(struct.PyTreeNode):
    """What the sampler returns; `logps` are those of the distribution that was sampled (after temperature and filters)."""

    tokens: Int[Array, "B G T"]  # pad_token_id after the end
    lengths: Int[Array, "B G"]  # tokens written, the stop token included
    logps: Float[Array, "B G T"]  # 0 after the end
    stopped: Bool[Array, "B G"]  # True: a stop token was written; False: max_new_tokens was reached
    steps: Int[Array, ""]  # decode steps the loop ran


class TrainState(struct.PyTreeNode):
    """What an update reads and writes. Randomness is not part of it: every key is derived from the seed and the step."""

    step: Int[Array, ""]  # updates done
    params: Any  # all weights, frozen ones included
    opt_state: Any  # of the trainable part only
    reference: Any = None  # trainable part of the reference model, when a KL term needs one
