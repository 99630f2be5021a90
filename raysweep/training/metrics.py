"""Classification metrics: from sums over batches and workers, for one head or many, and from all scores of a split."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from raysweep.experiment.metrics import METRICS, validation_key
from raysweep.training.distributed import sum_over_workers

TOP_K = 5
NUM_BINS = 15
CHUNK_ROWS = 4096  # whose scores are float64 at once


def top_k(num_classes: int) -> int:
    """Returns the k of `top_k_accuracy`: 5, or one less than the number of classes, as all classes hold every label."""
    return max(1, min(TOP_K, num_classes - 1))


class MetricSums:
    """Running sums that give the exact metrics of several heads, for any split into batches.

    Stores only counts `(num_heads, num_classes)`. Confusion matrices of 64 heads and 1,000 classes would take half a
    gigabyte.
    """

    def __init__(self, num_heads: int, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_heads, self.num_classes = num_heads, num_classes
        # One float64 vector per head: sums of the loss and the Brier score, labels among the top k, row count, then
        # true positives, predictions and labels per class.
        self._sums = torch.zeros(num_heads, 4 + 3 * num_classes, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds float logits `(batch, num_heads, num_classes)` and int64 labels `(batch,)`."""
        num_rows, num_heads, num_classes = logits.shape
        if num_rows == 0:
            return
        predicted = logits.argmax(-1)
        expanded = labels[:, None].expand(num_rows, num_heads)
        index = expanded[:, :, None]
        log_probabilities = logits.float().log_softmax(-1)
        losses = -log_probabilities.gather(-1, index)[:, :, 0]
        # The error of each probability: its label's is 1 too high.
        errors = log_probabilities.exp_().scatter_(-1, index, -1, reduce="add")
        correct = (predicted == expanded).double()
        in_top_k = _ranks(logits, labels) < top_k(num_classes) if top_k(num_classes) > 1 else correct
        self._sums[:, 0] += losses.sum(0, dtype=torch.float64)
        self._sums[:, 1] += errors.norm(dim=-1).square().sum(0, dtype=torch.float64)
        self._sums[:, 2] += in_top_k.sum(0, dtype=torch.float64)
        self._sums[:, 3] += num_rows
        ones = torch.ones_like(correct)
        *_, true_positives, predictions, supports = self._split(self._sums)
        true_positives.scatter_add_(1, expanded.T, correct.T)
        predictions.scatter_add_(1, predicted.T, ones.T)
        supports.scatter_add_(1, expanded.T, ones.T)

    def _split(self, sums: Tensor) -> tuple[Tensor, ...]:
        return torch.split(sums, [1, 1, 1, 1, *[self.num_classes] * 3], dim=1)

    def compute(self) -> dict[str, Tensor]:
        """Returns every metric of `METRICS` and `num_rows`, each `(num_heads,)` float64, over all workers.

        As in scikit-learn, macro F1 is the mean over the classes that occur in labels or predictions, balanced accuracy
        that of the recall of the classes that occur in labels, and the Brier score the sum of the squared errors of all
        classes, halved for two classes. Of classes with equal scores, the first counts as the more probable.

        If the loss of a head is not finite, its other metrics are NaN. Otherwise the class that argmax returns for NaNs
        would count as a prediction, and rank high if that class is frequent.
        """
        sums = sum_over_workers(self._sums.clone())
        loss, brier, in_top_k, num_rows, true_positives, predictions, supports = self._split(sums)
        num_rows = num_rows[:, 0]
        valid = torch.where(loss[:, 0].isfinite(), 1.0, torch.nan)
        f1 = 2 * true_positives / (predictions + supports).clamp(min=1)
        recall = true_positives / supports.clamp(min=1)
        return {
            "loss": loss[:, 0] / num_rows,
            "accuracy": valid * true_positives.sum(1) / num_rows,
            "macro_f1": valid * f1.sum(1) / (predictions + supports > 0).sum(1),
            "balanced_accuracy": valid * recall.sum(1) / (supports > 0).sum(1),
            "top_k_accuracy": valid * in_top_k[:, 0] / num_rows,
            "brier": valid * brier[:, 0] / num_rows / (2 if self.num_classes == 2 else 1),
            "num_rows": num_rows,
        }


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns how many classes are more probable than the label, int32 `(batch, num_heads)`.

    Args:
        logits: `(batch, num_heads, num_classes)`.
        labels: int64 `(batch,)`.
    """
    labels = labels[:, None, None]
    own = logits.gather(-1, labels.expand(-1, logits.shape[1], 1))
    is_earlier = torch.arange(logits.shape[-1], device=logits.device) < labels
    before = logits > own
    before |= (logits == own) & is_earlier
    return before.view(torch.uint8).sum(-1, dtype=torch.int32)  # sums of bools take ten times as long


def validation_metrics(computed: Mapping[str, Tensor], head: int = 0) -> dict[str, float]:
    """Returns one head's metrics from `MetricSums.compute`, with the keys of the validation split."""
    return {validation_key(name): float(computed[name][head]) for name in METRICS}


def metrics_of_scores(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, float]:
    """Returns the metrics of `TEST_METRICS` that `MetricSums` has not; `auroc` only where it is defined.

    Args:
        logits: `(num_rows, num_classes)`.
        labels: int64 `(num_rows,)`.
        temperature: divides the logits for `calibrated_ece`.
    """
    area = macro_auroc(logits, labels)
    return {
        **({} if area is None else {"auroc": area}),
        "ece": calibration_error(logits, labels),
        "calibrated_ece": calibration_error(logits, labels, temperature),
    }


def macro_auroc(logits: Tensor, labels: Tensor) -> float | None:
    """Returns the mean over classes of the area under the ROC curve of a class against the rest; ties count half.

    Only classes that have rows of their own and of others count; None if there is none.

    Args:
        logits: `(num_rows, num_classes)`.
        labels: int64 `(num_rows,)`.
    """
    normalizers = torch.cat([chunk.double().logsumexp(-1) for chunk in logits.split(CHUNK_ROWS)])
    areas = []
    for number in labels.unique().tolist():
        # As float32, because the last digits of float64 would break ties.
        scores, is_own = (logits[:, number].double() - normalizers).float(), labels == number
        own, rest = scores[is_own], scores[~is_own].sort().values
        if len(rest):
            # The pairs that are in order, and half of those that are tied (Mann and Whitney 1947).
            wins = torch.searchsorted(rest, own) + torch.searchsorted(rest, own, right=True)
            areas.append(float(wins.sum()) / (2 * len(own) * len(rest)))
    return sum(areas) / len(areas) if areas else None


def calibration_error(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Returns the expected calibration error in 15 bins of equal width (Guo et al. 2017).

    That is the mean distance of confidence and accuracy over the bins, weighted by their rows. A bin has its upper
    edge, not its lower one.

    Args:
        logits: `(num_rows, num_classes)`.
        labels: int64 `(num_rows,)`.
        temperature: divides the logits.
    """
    edges = torch.arange(1, NUM_BINS, dtype=torch.float64) / NUM_BINS
    sums = torch.zeros(NUM_BINS, dtype=torch.float64)
    for chunk, own in zip(logits.split(CHUNK_ROWS), labels.split(CHUNK_ROWS), strict=True):
        confidence, predicted = (chunk.double() / temperature).softmax(-1).max(-1)
        sums.scatter_add_(0, torch.bucketize(confidence, edges), (predicted == own).double() - confidence)
    return float(sums.abs().sum()) / len(labels)


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns int64 counts `(num_classes, num_classes)`: row true class, column predicted class.

    Args:
        predicted: int64 `(num_rows,)`.
        labels: int64 `(num_rows,)`.
        num_classes: number of classes.
    """
    flat = labels * num_classes + predicted
    return torch.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)
