"""A TPU v5p cube of 4 x 4 x 4 chips, sixteen hosts: 72B and below with all parameters.

The name counts chips, like the others here; Google Cloud counts cores and calls this slice v5p-128.

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh v5p_64 \\
        --batch_size 64 --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import V5P, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=V5P,
    topology="v5p:4x4x4",
    devices=64,
    hosts=16,
    train=MeshConfig(fsdp=64),
    sample=MeshConfig(replica=8, fsdp=1, tensor=8),
)
