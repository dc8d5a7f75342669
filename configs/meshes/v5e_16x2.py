"""Two TPU v5e slices of 4 x 4 chips joined by the data centre's network, eight hosts: 3B and below with all parameters.

Each slice is a replica, so that only gradients cross between slices.

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh v5e_16x2 \\
        --batch_size 32 --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import V5E, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=V5E,
    topology="v5e:4x4",
    devices=32,
    hosts=8,
    slices=2,
    train=MeshConfig(replica=2, fsdp=16),
    sample=MeshConfig(replica=16, fsdp=1, tensor=2),
)
