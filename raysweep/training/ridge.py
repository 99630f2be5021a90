"""Ridge regression of one-hot targets on cached features: one eigendecomposition for every strength.

After big_vision's evaluators/fewshot_lsr.py, which fixes the strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.encoders.head import Head, normalize_features, standard_scale
from raysweep.training.metrics import MetricSums
from raysweep.training.population import FeatureSet

# In mean eigenvalues of the covariance; twelve a decade, from hardly any shrinkage to hardly anything left.
STRENGTHS = tuple(10 ** (step / 12) for step in range(-60, 37))
# In standard deviations of the scores; logits sharper than the first would claim what few validation rows cannot show.
TEMPERATURES = tuple(10 ** (step / 8) for step in range(-12, 13))
# Near enough to tell the losses of two strengths apart, for a third of the cost.
COARSE_TEMPERATURES = TEMPERATURES[::3]
# Rows of every class alike that calibration adds. On 133 rows of 3 classes told apart to 99 %, test loss was 76 % above
# the least without any, 10 % with 0.3 of one, 39 % with one; where classes overlap more it hardly matters.
EVEN_ROWS = 0.3
# Rows that are read at once, and scores of all rows, strengths and classes that are held at once.
CHUNK_ROWS = 4096
MAX_SCORES = 2**24


@dataclass(frozen=True)
class _Inputs:
    """Reads rows as ridge regression wants them: normalised as a `Head` does it, centred, float64."""

    parts: tuple[str, ...]
    normalize: str
    mean: Tensor
    scale: Tensor
    center: Tensor

    def __call__(self, features: FeatureSet, rows: Tensor) -> Tensor:
        found = features.source(self.parts, rows)
        return normalize_features(found, self.normalize, self.mean, self.scale).double() - self.center

    def moments(self, features: FeatureSet, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation `(num_features,)` of what is read."""
        total, squares = torch.zeros(2, *self.center.shape, dtype=torch.float64, device=self.center.device)
        for chunk in rows.split(CHUNK_ROWS):
            found = self(features, chunk)
            total += found.sum(0)
            squares += found.square().sum(0)
        mean = total / len(rows)
        return mean, (squares / len(rows) - mean.square()).clamp(min=0).sqrt()


def _fit_inputs(train: FeatureSet, rows: Tensor, parts: tuple[str, ...], normalize: str) -> _Inputs:
    num_features, device = sum(train.parts[part].shape[1] for part in parts), rows.device
    zero, one = torch.zeros(num_features, device=device), torch.ones(num_features, device=device)
    inputs = _Inputs(parts, "none" if normalize == "standardize" else normalize, zero, one, zero.double())
    mean, deviation = inputs.moments(train, rows)
    if normalize == "standardize":
        scale = standard_scale(mean, deviation).float()
        inputs = replace(inputs, normalize=normalize, mean=mean.float(), scale=scale)
        mean, _ = inputs.moments(train, rows)
    return replace(inputs, center=mean)


@dataclass(frozen=True)
class RidgePath:
    """Ridge regressions of every strength on one train set.

    By the eigendecomposition of the covariance, or of the Gram matrix where that is smaller, the weights of a strength
    are `basis / (eigenvalues + strength) @ targets`: `(num_features, rank)` and `(rank, num_classes)`. All float64.
    """

    inputs: _Inputs
    prior: Tensor
    basis: Tensor
    eigenvalues: Tensor
    targets: Tensor

    def metrics(self, validation: FeatureSet, rows: Tensor, metric: str) -> list[dict[str, float]]:
        """Returns accuracy, macro F1 and squared error of each strength; the calibrated loss if it is the metric."""
        projected, labels = self._projected(validation, rows), validation.labels[rows]
        num_classes = len(self.prior)
        table: list[dict[str, float]] = []
        step = max(1, MAX_SCORES // (num_classes * max(projected.shape)))
        for start in range(0, len(STRENGTHS), step):
            scores = self._scores(projected, STRENGTHS[start : start + step])
            sums = MetricSums(scores.shape[1], num_classes, scores.device)
            sums.add(scores, labels)
            columns = {f"val/{name}": values for name, values in sums.compute().items() if name != "loss"}
            columns["squared_error"] = (scores - F.one_hot(labels, num_classes)[:, None]).square().mean((0, 2))
            if metric == "val/loss":
                columns["val/loss"] = _calibrate(scores, labels, COARSE_TEMPERATURES)[1]
            lines = zip(*(values.tolist() for values in columns.values()), strict=True)
            table.extend(dict(zip(columns, line, strict=True)) for line in lines)
        return table

    def head(self, strength: float, validation: FeatureSet, rows: Tensor) -> Head:
        """Returns the head of one strength, its logits calibrated on validation rows."""
        scores = self._scores(self._projected(validation, rows), [strength])
        temperature = _calibrate(scores, validation.labels[rows], TEMPERATURES)[0].double()
        weight = (self.targets.T * self._gains([strength])) @ self.basis.T
        head = Head(weight.shape[1], weight.shape[0], self.inputs.normalize).to(weight.device)
        head.weight.data.copy_(weight / temperature)
        head.bias.data.copy_((self.prior - weight @ self.inputs.center) / temperature)
        head.mean.copy_(self.inputs.mean)
        head.scale.copy_(self.inputs.scale)
        return head

    def _gains(self, strengths: Sequence[float]) -> Tensor:
        """Returns `1 / (eigenvalues + strength)`, `(num_strengths, rank)`; a strength counts mean eigenvalues."""
        unit = self.eigenvalues.mean()
        unit = torch.where(unit > 0, unit, 1.0)
        return 1 / (self.eigenvalues + unit * unit.new_tensor(strengths)[:, None])

    def _projected(self, features: FeatureSet, rows: Tensor) -> Tensor:
        """Returns rows in the basis, `(len(rows), rank)` float32."""
        basis = self.basis.float()
        return torch.cat([self.inputs(features, chunk).float() @ basis for chunk in rows.split(CHUNK_ROWS)])

    def _scores(self, projected: Tensor, strengths: Sequence[float]) -> Tensor:
        """Returns estimates of the one-hot targets, `(num_rows, num_strengths, num_classes)` float32."""
        weights = self._gains(strengths).T[:, :, None] * self.targets[:, None]
        flat = projected @ weights.flatten(1).float()
        return flat.view(len(projected), len(strengths), -1) + self.prior.float()


def fit_ridge_path(
    train: FeatureSet, rows: Tensor, parts: tuple[str, ...], normalize: str, num_classes: int
) -> RidgePath:
    """Decomposes what the train rows `(n,)` say, once for every strength."""
    inputs = _fit_inputs(train, rows, parts, normalize)
    prior = torch.bincount(train.labels[rows], minlength=num_classes).double() / len(rows)
    num_features = len(inputs.center)
    if len(rows) <= num_features:
        features = inputs(train, rows)
        eigenvalues, vectors = torch.linalg.eigh(features @ features.T)
        basis, targets = features.T @ vectors, vectors.T @ (F.one_hot(train.labels[rows], num_classes) - prior)
    else:
        covariance = torch.zeros(num_features, num_features, dtype=torch.float64, device=rows.device)
        products = torch.zeros(num_features, num_classes, dtype=torch.float64, device=rows.device)
        for chunk in rows.split(CHUNK_ROWS):
            features = inputs(train, chunk)
            covariance.addmm_(features.T, features)
            products.addmm_(features.T, F.one_hot(train.labels[chunk], num_classes) - prior)
        eigenvalues, basis = torch.linalg.eigh(covariance)
        targets = basis.T @ products
    return RidgePath(inputs, prior, basis, eigenvalues, targets)


def _calibrate(scores: Tensor, labels: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Finds the temperature of least cross-entropy for scores `(num_rows, num_strengths, num_classes)`.

    The temperatures tried are in standard deviations of the scores. A part of a row that is of every class alike keeps
    few rows, all of them right, from asking for logits without bound (as the targets of Platt 1999 do).

    Returns:
        Temperatures and losses, `(num_strengths,)` each.
    """
    spread = scores.std((0, 2), correction=0)
    spread = torch.where(spread > 0, spread, 1.0)
    tried = spread * spread.new_tensor(temperatures)[:, None]
    own = scores[torch.arange(len(labels), device=labels.device), :, labels].sum(0)
    even = scores.mean((0, 2))
    losses = []
    for temperature in tried:
        normalizers = (scores / temperature[:, None]).logsumexp(2)
        loss_of_even_row = normalizers.mean(0) - even / temperature
        losses.append(normalizers.sum(0) - own / temperature + EVEN_ROWS * loss_of_even_row)
    least, places = torch.stack(losses).min(0)
    return tried.gather(0, places[None])[0], least / (len(labels) + EVEN_ROWS)
