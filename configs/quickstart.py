"""The main job in minutes on a laptop: GRPO with verifiable rewards on grounding and counting, from the embedded model.

    ./launch/local.sh jaxmllm train configs/quickstart.py

No network, no accelerator. The run folder is runs/quickstart, with report.html at the end.
"""

from jaxmllm.losses.grpo_options import GRPOOptions
from jaxmllm.train.config import DataConfig, OptimConfig, TrainConfig

RELATION = "world:grounding?size=84x84&objects=3-4&depth=1-1"  # "the star left of the red circle": what it is worst at
COUNTING = "world:counting?size=84x84&objects=2-4"

config = TrainConfig(
    name="quickstart",
    method="grpo",
    model="tiny",
    trainable=r"(?!vision/).*",  # the tower is frozen: its output is computed once a rollout
    unroll=True,
    batch_size=16,
    max_steps=120,
    data=DataConfig(
        train=(f"{RELATION}&length=1000000", f"{COUNTING}&length=1000000"),
        weights=(1.0, 1.0),
        eval=(f"{RELATION}&split=val", f"{COUNTING}&split=val"),
    ),
    optim=OptimConfig(learning_rate=1e-4, lr_scheduler_type="constant", adam_beta2=0.98),
    grpo=GRPOOptions(num_generations=8, max_completion_length=48, epsilon_high=0.28),
    completions_steps=40,
    save_steps=40,
)
