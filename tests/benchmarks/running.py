"""A run taken step by step, for benchmarks that time its parts."""

from jaxmllm.training.config import TrainConfig


class Running:
    """What `loop.train` turns, without its files."""

    def __init__(self, config: TrainConfig):
        from jaxmllm.training.setup import build

        self.context, self.state = build(config)
        self.work = config.method.work(self.context)
        self.own = self.work.first_own()

    def step(self) -> dict[str, float]:
        """One step's metrics as floats."""
        from jaxmllm.training.window import host_scalars

        self.state, self.own, report = self.work.step(self.state, self.own, lambda: False)
        assert report is not None
        return host_scalars(report.metrics)

    def close(self) -> None:
        self.work.close()
