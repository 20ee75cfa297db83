"""A run's metrics as Ray's own, for Prometheus and Grafana beside those of the cluster."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge


class RayMetrics:
    """A sink: each metric is a gauge `rayllm_NAME`, tagged with the run (on the nodes' metrics ports as
    `ray_rayllm_NAME`)."""

    def __init__(self, run_name: str) -> None:
        self._tags = {"run": run_name}
        self._gauges: dict[str, Gauge] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in {**metrics, "step": float(step)}.items():
            name = "rayllm_" + re.sub(r"\W", "_", key.replace("@", "_at_"))
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, description=f"rayllm {key}", tag_keys=("run",))
            self._gauges[name].set(float(value), tags=self._tags)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Ray has no place for texts."""

    def close(self) -> None:
        """What was set stays as long as the process."""
