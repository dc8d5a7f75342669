"""Third of the runs that make the embedded model: the decoder learns to bind words to objects, tower frozen.

./launch/local.sh jaxmllm train configs/tiny/grounding.py
"""

from jaxmllm.methods import SFT
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

SCENES = "world:grounding?size=84x84&objects=2-4"

config = TrainConfig(
    name="tiny_grounding",
    method=SFT(
        questions_per_image=6,
        first_corner_weight=3.0,
    ),
    model="runs/tiny_vision_2/export",
    trainable=r"(?!vision/).*",
    unroll=True,
    batch_size=16,
    max_steps=1500,
    data=DataConfig(
        train=(f"{SCENES}&questions=6&length=10000000",),
        eval=(f"{SCENES}&split=val",),
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=50, weight_decay=0.01, adam_beta2=0.98),
    logging_steps=20,
    eval_steps=500,
    save_steps=250,
)
