"""Names and fields of the merlin vectors mapped to the library."""

from jaxmllm.eval import tracking
from jaxmllm.tasks import trajectories


def _each(function):
    """A list of argument objects gives a list of results."""
    return lambda inputs: [function(**item) for item in inputs] if isinstance(inputs, list) else function(**inputs)


_BY_NAME = {
    "encode_box": trajectories.encode_box,
    "decode_box": trajectories.decode_box,
    "parse_trajectories": trajectories.parse_trajectories,
    "parse_boxes": trajectories.parse_boxes,
    "tracking_ao": trajectories.tracking_ao,
    "ope_metrics": tracking.ope_metrics,
    "ade_fde": trajectories.ade_fde,
    "trajectory_reward": trajectories.trajectory_reward,
}
FUNCTIONS = {name: _each(function) for name, function in _BY_NAME.items()}
