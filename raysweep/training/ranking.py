"""The rule that ranks epochs, trials, baselines and studies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raysweep.experiment.metrics import Direction


@dataclass(frozen=True, slots=True)
class Ranking:
    """Ranks by one metric of the validation split; the lower validation loss breaks ties.

    Attributes:
        metric: a key such as `val/accuracy`.
        direction: `maximize` or `minimize` the metric.
    """

    metric: str = "val/accuracy"
    direction: Direction = "maximize"

    @property
    def within_study(self) -> Ranking:
        """How the trials, epochs and settings of one study are ranked: by loss where studies are ranked by accuracy.

        Accuracy counts hits, so many trials share the highest one. The loss tells them apart (docs/decisions/0033).
        """
        return Ranking("val/loss", "minimize") if self.metric == "val/accuracy" else self

    def key(self, metrics: Mapping[str, float], tie_breaker: str = "val/loss") -> tuple[float, float]:
        """Returns a sort key; the largest key is the best, and values that are not finite come last.

        Args:
            metrics: metrics with the ranking metric and the tie breaker.
            tie_breaker: the metric that breaks ties; lower is better.

        Raises:
            KeyError: the ranking metric is missing. Without the tie breaker, a tie is lost.
        """
        value = metrics[self.metric] if self.direction == "maximize" else -metrics[self.metric]
        return _finite(value), _finite(-metrics.get(tie_breaker, math.inf))

    def is_usable(self, metrics: Mapping[str, float]) -> bool:
        """Whether the ranking metric exists and is finite."""
        return math.isfinite(metrics.get(self.metric, math.nan))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
