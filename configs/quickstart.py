"""The main job in minutes on a laptop: GRPO with verifiable rewards on grounding and counting, from the embedded model.

    ./launch/local.sh jaxmllm train configs/quickstart.py

No network, no accelerator; under eight minutes on two cores. The run folder is runs/quickstart, with report.html at the end.
"""

from jaxmllm.methods import GRPO
from jaxmllm.training.config import DataConfig, OptimConfig, TrainConfig

# The embedded model knows clean pictures (pixel noise of 4 levels of 255); these are grainy, as from a cheap camera in the dark.
SCENES = "size=84x84&objects=2-4&noise=18"
GROUNDING, COUNTING = f"world:grounding?{SCENES}", f"world:counting?{SCENES}"

config = TrainConfig(
    name="quickstart",
    method=GRPO(
        num_generations=8,
        max_completion_length=48,
        epsilon_high=0.28,
    ),
    model="tiny",
    trainable=r"(?!vision/).*",  # the tower is frozen: its output is computed once a rollout
    unroll=True,
    batch_size=16,
    max_steps=100,
    data=DataConfig(
        train=(f"{GROUNDING}&length=1000000", f"{COUNTING}&length=1000000"),
        eval=(f"{GROUNDING}&split=val", f"{COUNTING}&split=val"),
    ),
    optim=OptimConfig(learning_rate=2e-4, lr_scheduler_type="constant", adam_beta2=0.98),
    completions_steps=40,
    save_steps=40,
)
