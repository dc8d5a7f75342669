"""First of three runs that make the embedded model: the tower learns to see, from random weights.

    ./launch/local.sh jaxmllm train configs/tiny/vision.py
"""

from jaxmllm.train.config import DataConfig, OptimConfig, TrainConfig

SCENES = "world:grounding?size=84x84&objects=2-6&length=10000000"

config = TrainConfig(
    name="tiny_vision",
    method="vision_warmup",
    model="tiny",
    from_scratch=True,
    trainable=r"vision/.*|embed|warmup/.*",
    unroll=True,
    batch_size=16,
    max_steps=3000,
    data=DataConfig(train=(SCENES,)),
    optim=OptimConfig(learning_rate=2.5e-3, warmup_steps=100, weight_decay=0.01, adam_beta2=0.98),
    logging_steps=20,
    save_steps=500,
)
