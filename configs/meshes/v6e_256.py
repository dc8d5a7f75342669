"""A whole TPU v6e (Trillium) pod of 16 x 16 chips, 64 hosts: 72B and below with all parameters.

`tensor` 2 in training keeps a microbatch at 128 prompts.

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh v6e_256 \\
        --batch_size 128 --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import V6E, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=V6E,
    topology="v6e:16x16",
    devices=256,
    hosts=64,
    train=MeshConfig(fsdp=128, tensor=2),
    sample=MeshConfig(replica=32, fsdp=1, tensor=8),
)
