"""Evaluation on the test split: metrics, and the confidence interval of the accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raysweep.experiment.metrics import TEST_METRICS
from raysweep.training.intervals import accuracy_interval
from raysweep.training.metrics import MetricSums, confusion_matrix, metrics_of_scores


@dataclass(frozen=True, slots=True)
class TestMetrics:
    """Metrics of one model, or of one model per few-shot seed, on the test rows.

    Attributes:
        values: the metrics of `TEST_METRICS` that are defined, means over the few-shot seeds.
        num_rows: number of test rows.
        num_seeds: number of models; 1 if all images train.
        accuracy_low: lower end of the accuracy's 95 % interval, over test rows and, for several models, over seeds.
        accuracy_high: upper end of that interval.
        accuracies: accuracy per seed.
        confusion_matrix: counts summed over the seeds, `(num_classes, num_classes)`: row true, column predicted class.
        hits: per model, a text with a 1 for each test row that is right and a 0 for the others. Empty for several
            models that version 0.1 tested.
        temperatures: per model, what divides its logits in `calibrated_ece` and in the exported model. Empty if an
            earlier version tested it.
    """

    __test__ = False  # not a test class, despite its name

    values: Mapping[str, float]
    num_rows: int
    num_seeds: int
    accuracy_low: float
    accuracy_high: float
    accuracies: tuple[float, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]
    hits: tuple[str, ...]
    temperatures: tuple[float, ...] = ()

    def hit_table(self) -> npt.NDArray[np.bool_]:
        """Returns `hits` as bools `(num_seeds, num_rows)`."""
        letters = np.frombuffer("".join(self.hits).encode(), np.uint8)
        return np.equal(letters.reshape(-1, self.num_rows), ord("1"))


def evaluate_test(
    logits: np.ndarray | Sequence[np.ndarray], labels: np.ndarray, temperatures: Sequence[float] | None = None
) -> TestMetrics:
    """Returns the metrics of a study's model, or of its models per few-shot seed, on the test rows.

    Args:
        logits: float32 `(num_test, num_classes)`, or one such array per few-shot seed.
        labels: integers `(num_test,)`.
        temperatures: one per model, fitted on validation; 1 where left out.
    """
    targets = torch.from_numpy(labels).long()
    models = [logits] if isinstance(logits, np.ndarray) else list(logits)
    scores = torch.stack([torch.from_numpy(each) for each in models], 1)
    num_seeds, num_classes = scores.shape[1:]
    sums = MetricSums(num_seeds, num_classes)
    sums.add(scores, targets)
    temperatures = [1.0] * num_seeds if temperatures is None else temperatures
    pairs = zip(scores.unbind(1), temperatures, strict=True)
    per_model = [metrics_of_scores(own, targets, temperature) for own, temperature in pairs]
    means = {name: float(values.mean()) for name, values in sums.compute().items()}
    means |= {name: sum(one[name] for one in per_model) / num_seeds for name in per_model[0]}
    predicted = scores.argmax(-1)
    hits = (predicted == targets[:, None]).numpy().T
    low, high = accuracy_interval(hits)
    matrix = confusion_matrix(predicted.flatten(), targets.repeat_interleave(num_seeds), num_classes)
    return TestMetrics(
        values={name: means[name] for name in TEST_METRICS if name in means},
        num_rows=len(labels),
        num_seeds=num_seeds,
        accuracy_low=low,
        accuracy_high=high,
        accuracies=tuple(hits.mean(1).tolist()),
        confusion_matrix=tuple(map(tuple, matrix.tolist())),
        hits=tuple("".join(map(str, model)) for model in hits.astype(int).tolist()),
        temperatures=tuple(temperatures),
    )
