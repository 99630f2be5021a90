"""Ridge regression of one-hot targets on cached features: one eigendecomposition for all strengths.

As in big_vision's evaluators/fewshot_lsr.py, which has a fixed strength.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.encoders.families import NORMALIZATIONS
from raysweep.encoders.head import Head
from raysweep.training.baseline_task import BaselineResult, BaselineTask, HeldOut, head_result
from raysweep.training.calibration import fit_temperature
from raysweep.training.eigenbasis import CHUNK_ROWS, Eigenbasis, fit_eigenbasis
from raysweep.training.population import FeatureSet

# Unit: the mean eigenvalue of the covariance. Twelve per decade, from almost no to almost complete shrinkage.
STRENGTHS = tuple(10 ** (step / 12) for step in range(-60, 37))
# Folds that sources and normalisations are compared on, before the strengths of the best are compared on all.
FIRST_FOLDS = 2
# The limit for scores (rows x strengths x classes) in memory.
MAX_SCORES = 2**24


def run_ridge(task: BaselineTask) -> BaselineResult:
    """Regresses one-hot targets on features, with intercept; chooses source, normalisation, strength by squared error.

    That is the squared error of held-out rows: of five folds of the train rows; in a few-shot study, of the validation
    rows of each draw. Sources and normalisations are compared on two folds. A temperature, part of the heads,
    calibrates the logits on the same held-out rows (Guo et al. 2017).
    """
    started = time.perf_counter()
    held_out = task.held_out()
    first = held_out if task.subsets else held_out[:FIRST_FOLDS]

    def fit_paths(source: str, normalize: str, some: Sequence[HeldOut]) -> list[RidgePath]:
        parts = task.sources[source]
        return [fit_ridge_path(task.train, held.fit, parts, normalize, task.num_classes) for held in some]

    combinations = [(source, normalize) for source in task.sources for normalize in NORMALIZATIONS]
    best: tuple[float, str, str, list[RidgePath]] | None = None
    for source, normalize in combinations:
        paths = fit_paths(source, normalize, first)
        error = float(_mean_errors(paths, first).min())
        if best is None or error < best[0]:
            best = error, source, normalize, paths
    assert best is not None, "an encoder has at least one feature source"
    _, source, normalize, paths = best
    paths += fit_paths(source, normalize, held_out[len(first) :])
    strength = STRENGTHS[int(_mean_errors(paths, held_out).argmin())]
    scores = [path.scores(held, [strength])[:, 0] for path, held in zip(paths, held_out, strict=True)]
    labels = [held.features.labels[held.rows] for held in held_out]
    temperature = fit_temperature(torch.cat(scores), torch.cat(labels))

    def fit_head(features: FeatureSet, rows: Tensor) -> Head:
        path = fit_ridge_path(features, rows, task.sources[source], normalize, task.num_classes)
        return path.head(strength, temperature)

    setting = {"strength": strength, "features": source, "normalize": normalize}
    return head_result(task, setting, fit_head, len(combinations) * len(STRENGTHS), started)


def _mean_errors(paths: Sequence[RidgePath], held_out: Sequence[HeldOut]) -> Tensor:
    errors = torch.stack([path.squared_errors(held) for path, held in zip(paths, held_out, strict=True)]).mean(0)
    return errors.nan_to_num(nan=torch.inf)  # what is not a number would otherwise win


@dataclass(frozen=True)
class RidgePath:
    """Ridge regressions of all strengths on one train set.

    In the eigenbasis, the weights of a strength are `targets / (eigenvalues + strength)`, `(rank, num_classes)`.
    All float64.
    """

    basis: Eigenbasis
    prior: Tensor
    targets: Tensor

    def squared_errors(self, held_out: HeldOut) -> Tensor:
        """Returns the mean squared error of held-out rows for each strength, `(num_strengths,)`."""
        labels = F.one_hot(held_out.features.labels[held_out.rows], len(self.prior))[:, None]
        step = max(1, MAX_SCORES // max(1, len(held_out.rows) * len(self.prior)))
        pieces = [STRENGTHS[start : start + step] for start in range(0, len(STRENGTHS), step)]
        return torch.cat([(self.scores(held_out, piece) - labels).square().mean((0, 2)) for piece in pieces])

    def scores(self, held_out: HeldOut, strengths: Sequence[float]) -> Tensor:
        """Returns estimates of the one-hot targets, float32 `(num_rows, num_strengths, num_classes)`."""
        projected = self.basis.project(held_out.features, held_out.rows)
        weights = (self._gains(strengths).T[:, :, None] * self.targets[:, None]).flatten(1).float()
        return (projected @ weights).view(len(projected), len(strengths), -1) + self.prior.float()

    def head(self, strength: float, temperature: float) -> Head:
        """Returns the head of one strength; its logits are the scores divided by a temperature."""
        return self.basis.head(self.targets.T * self._gains([strength]) / temperature, self.prior / temperature)

    def _gains(self, strengths: Sequence[float]) -> Tensor:
        """Returns `1 / (eigenvalues + strength)`, `(num_strengths, rank)`; unit of a strength: the mean eigenvalue."""
        eigenvalues = self.basis.eigenvalues
        return 1 / (eigenvalues + self.basis.unit * eigenvalues.new_tensor(strengths)[:, None])


def fit_ridge_path(
    train: FeatureSet, rows: Tensor, parts: tuple[str, ...], normalize: str, num_classes: int
) -> RidgePath:
    """Computes the eigendecomposition of the train rows, int64 `(n,)`, once for all strengths."""
    basis = fit_eigenbasis(train, rows, parts, normalize)
    prior = torch.bincount(train.labels[rows], minlength=num_classes).double() / len(rows)
    products = torch.zeros(len(basis.vectors), num_classes, dtype=torch.float64, device=rows.device)
    for chunk in rows.split(CHUNK_ROWS):
        products.addmm_(basis.inputs(train, chunk).T, F.one_hot(train.labels[chunk], num_classes) - prior)
    return RidgePath(basis, prior, basis.vectors.T @ products)
