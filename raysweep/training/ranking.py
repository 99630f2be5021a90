"""The one rule by which epochs, trials, baselines and studies are ranked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raysweep.experiment.metrics import Direction


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranks by one metric of the validation split; the lower validation loss decides between equals.

    Attributes:
        metric: a key such as `val/accuracy`.
        direction: which way the metric gets better.
    """

    metric: str = "val/accuracy"
    direction: Direction = "maximize"

    def key(self, metrics: Mapping[str, float], tie_breaker: str = "val/loss") -> tuple[float, float]:
        """Returns a key of which the largest is the best; values that are not finite come last.

        Args:
            metrics: must hold the metric and the tie breaker.
            tie_breaker: the metric that decides between equals; lower is better.
        """
        value = metrics[self.metric] if self.direction == "maximize" else -metrics[self.metric]
        return _finite(value), _finite(-metrics[tie_breaker])

    def is_usable(self, metrics: Mapping[str, float]) -> bool:
        """Whether there is a finite value to rank by."""
        return math.isfinite(metrics.get(self.metric, math.nan))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
