"""M-RoPE positions of Qwen2-VL (arXiv 2409.12191 section 2.1) and Qwen2.5-VL."""

import numpy as np
from jaxtyping import Int

from jaxmllm.model.config import ModelConfig
from jaxmllm.model.family import Clip


def positions(clip: Clip, cfg: ModelConfig) -> Int[np.ndarray, "3 f rows columns"]:
    """Positions of one picture's vision tokens, counted from its first: temporal, height, width.

    Time runs at `tokens_per_second` where the model has it (Qwen2.5-VL, arXiv 2502.13923 section 2.1.2), else by one a
    temporal patch; rounded down in float32 as torch does.
    """
    step = np.float32(1)
    if clip.seconds_per_grid is not None and cfg.vision.tokens_per_second is not None:
        step = np.float32(cfg.vision.tokens_per_second) * np.float32(clip.seconds_per_grid)
    time = (np.arange(clip.grid[0], dtype=np.float32) * step).astype(np.int64)
    rows, columns = (side // cfg.vision.spatial_merge_size for side in clip.grid[1:])
    return np.stack(np.meshgrid(time, np.arange(rows), np.arange(columns), indexing="ij"))
