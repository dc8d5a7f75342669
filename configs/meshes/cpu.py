"""This machine's CPU; set jax's number of CPU devices (jax_num_cpu_devices) to rehearse a larger mesh.

./launch/local.sh jaxmllm plan configs/quickstart.py --mesh cpu
"""

from jaxmllm.machine.targets import CPU, MeshTarget
from jaxmllm.training.config import MeshConfig

mesh = MeshTarget(chip=CPU, topology="", devices=1, hosts=1, train=MeshConfig(), sample=MeshConfig())
