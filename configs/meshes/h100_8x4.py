"""Four nodes of eight H100s: 32B and below with all parameters.

Parameters are split over all nodes, so that 32B fits; 7B and below are faster with `replica` 4 and `fsdp` 8, where only
gradients cross the network between nodes.

    ./launch/local.sh jaxmllm plan configs/perception_r1/grounding_2b.py --mesh h100_8x4 \\
        --batch_size 32 --optim.gradient_accumulation_steps 1
"""

from jaxmllm.machine.targets import H100, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(
    chip=H100,
    topology="1x4x8",
    devices=32,
    hosts=4,
    train=MeshConfig(fsdp=32),
    sample=MeshConfig(replica=8, fsdp=1, tensor=4),
)
