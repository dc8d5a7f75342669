"""A whole TPU v5e pod of 16 x 16 chips, 64 hosts: 32B and below with all parameters.

A copy of 72B for sampling does not fit: eight key/value heads split over eight chips leave 18 GB on each.
`tensor` 4 in training keeps a microbatch at 64 prompts.

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh v5e_256 \\
        --batch_size 128 --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import V5E, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=V5E,
    topology="v5e:16x16",
    devices=256,
    hosts=64,
    train=MeshConfig(fsdp=64, tensor=4),
    sample=MeshConfig(replica=32, fsdp=1, tensor=8),
)
