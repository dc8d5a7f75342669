"""First and second of the runs that make the embedded model: the tower learns to see, from random weights.

    ./launch/local.sh jaxmllm train configs/tiny/vision.py
    ./launch/local.sh jaxmllm train configs/tiny/vision.py --name tiny_vision_2 --model runs/tiny_vision/export \\
        --no-from-scratch --optim.learning-rate 1.5e-3

The second run starts the schedule again: coordinates read exactly go from .66 to .83, words from .42 to .65.
"""

from jaxmllm.methods import VisionWarmup
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

SCENES = "world:grounding?size=84x84&objects=2-6&length=10000000"
PAGES = "world:ocr?size=84x84&lines=1-2&words=1-1&font_sizes=14-18&length=10000000"  # by turns with scenes

config = TrainConfig(
    name="tiny_vision",
    method=VisionWarmup(),
    model="tiny",
    from_scratch=True,
    trainable=r"vision/.*|embed|warmup/.*",
    unroll=True,
    batch_size=16,
    max_steps=5000,
    data=DataConfig(train=(SCENES, PAGES)),
    optim=OptimConfig(learning_rate=2.5e-3, warmup_steps=100, weight_decay=0.01, adam_beta2=0.98),
    logging_steps=20,
    save_steps=500,
)
