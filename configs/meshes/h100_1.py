"""One H100 with 80 GB: 3B and below with all parameters, 7B with adapters.

./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh h100_1
"""

from jaxmllm.machine.targets import H100, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=H100,
    topology="1x1x1",
    devices=1,
    hosts=1,
    train=MeshConfig(fsdp=1),
    sample=MeshConfig(fsdp=1),
)
