"""Classification metrics from sums over batches and workers, for one head or many."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.experiment.metrics import METRICS, validation_key
from raysweep.training.distributed import sum_over_workers


class MetricSums:
    """Running sums that give exact loss, accuracy and macro F1 of several heads, for any split into batches.

    Stores only counts `(num_heads, num_classes)`. Confusion matrices of 64 heads and 1,000 classes would take half a
    gigabyte.
    """

    def __init__(self, num_heads: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_heads, self.num_classes = num_heads, num_classes
        # One float64 vector per head: loss sum, row count, then true positives, predictions and labels per class.
        self._sums = torch.zeros(num_heads, 2 + 3 * num_classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds float logits `(batch, num_heads, num_classes)` and int64 labels `(batch,)`."""
        num_rows, num_heads, num_classes = logits.shape
        if num_rows == 0:
            return
        predicted = logits.argmax(-1)
        expanded = labels[:, None].expand(num_rows, num_heads)
        losses = F.cross_entropy(logits.float().reshape(-1, num_classes), expanded.reshape(-1), reduction="none")
        self._sums[:, 0] += losses.reshape(num_rows, num_heads).sum(0, dtype=torch.float64)
        self._sums[:, 1] += num_rows
        correct = (predicted == expanded).double()
        ones = torch.ones_like(correct)
        _, _, true_positives, predictions, supports = self._split(self._sums)
        true_positives.scatter_add_(1, expanded.T, correct.T)
        predictions.scatter_add_(1, predicted.T, ones.T)
        supports.scatter_add_(1, expanded.T, ones.T)

    def _split(self, sums: Tensor) -> tuple[Tensor, ...]:
        return torch.split(sums, [1, 1, *[self.num_classes] * 3], dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Returns every metric of `METRICS` and `num_rows`, each `(num_heads,)` float64, over all workers.

        Macro F1 is the mean over the classes that occur in labels or predictions, as in scikit-learn. If the loss of a
        head is not finite, its accuracy and macro F1 are NaN. Otherwise the class that argmax returns for NaNs would
        count as a prediction, and rank high if that class is frequent.
        """
        sums = sum_over_workers(self._sums.clone())
        loss, num_rows, true_positives, predictions, supports = self._split(sums)
        valid = torch.where(loss[:, 0].isfinite(), 1.0, torch.nan)
        occurs = (predictions + supports) > 0
        f1 = 2 * true_positives / (predictions + supports).clamp(min=1)
        return {
            "loss": (loss / num_rows)[:, 0],
            "accuracy": valid * true_positives.sum(1) / num_rows[:, 0],
            "macro_f1": valid * (f1 * occurs).sum(1) / occurs.sum(1),
            "num_rows": num_rows[:, 0],
        }


def validation_metrics(computed: Mapping[str, Tensor], head: int = 0) -> dict[str, float]:
    """Returns one head's metrics from `MetricSums.compute`, with the keys of the validation split."""
    return {validation_key(name): float(computed[name][head]) for name in METRICS}


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns int64 counts `(num_classes, num_classes)`: row true class, column predicted class.

    Args:
        predicted: int64 `(num_rows,)`.
        labels: int64 `(num_rows,)`.
        num_classes: number of classes.
    """
    flat = labels * num_classes + predicted
    return torch.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)
