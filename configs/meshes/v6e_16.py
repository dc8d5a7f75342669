"""A TPU v6e (Trillium) slice of 4 x 4 chips, four hosts: 7B and below with all parameters.

./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh v6e_16 \\
    --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import V6E, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=V6E,
    topology="v6e:4x4",
    devices=16,
    hosts=4,
    train=MeshConfig(fsdp=16),
    sample=MeshConfig(replica=8, fsdp=1, tensor=2),
)
