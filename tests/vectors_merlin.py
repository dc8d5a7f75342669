"""Names and fields of the merlin vectors mapped to the library."""

from jaxmllm.eval import tracking
from jaxmllm.tasks import trajectories

FUNCTIONS = {
    "encode_box": lambda i: trajectories.encode_box(**i),
    "decode_box": lambda i: trajectories.decode_box(**i),
    "parse_trajectories": lambda i: trajectories.parse_trajectories(**i),
    "parse_boxes": lambda i: trajectories.parse_boxes(**i),
    "tracking_ao": lambda i: trajectories.tracking_ao(**i),
    "ope_metrics": lambda i: tracking.ope_metrics(**i),
    "ade_fde": lambda i: trajectories.ade_fde(**i),
    "trajectory_reward": lambda i: trajectories.trajectory_reward(**i),
}
