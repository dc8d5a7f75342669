"""A TPU v5e slice of 8 x 8 chips, sixteen hosts: 7B and below with all parameters.

A microbatch is a multiple of 64 prompts; for fewer, `fsdp` 16 and `tensor` 4.

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh v5e_64 \\
        --batch_size 64 --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import V5E, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=V5E,
    topology="v5e:8x8",
    devices=64,
    hosts=16,
    train=MeshConfig(fsdp=64),
    sample=MeshConfig(replica=16, fsdp=1, tensor=4),
)
