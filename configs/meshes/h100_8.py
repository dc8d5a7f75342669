"""One node of eight H100s: 7B and below with all parameters.

Sampling splits heads in two, which every size allows (2B and 3B have two key/value heads).

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh h100_8
"""

from jaxmllm.machine.targets import H100, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=H100,
    topology="1x1x8",
    devices=8,
    hosts=1,
    train=MeshConfig(fsdp=8),
    sample=MeshConfig(replica=4, fsdp=1, tensor=2),
)
