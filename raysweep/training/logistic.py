"""Multinomial logistic regression on cached features, for many strengths and cross-validation folds at once.

Minimises mean cross-entropy + strength / 2 * |weight|^2; the bias is free. So a strength is scikit-learn's
C = 1 / (n strength). In the eigenbasis of the inputs, Böhning's bound (1992, Multinomial logistic regression algorithm)
on the Hessian is diagonal: `eigenvalue / 2 + strength` for a weight and 1/2 for a bias. It is the preconditioner.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.encoders.families import NORMALIZATIONS
from raysweep.encoders.head import Head
from raysweep.training.baseline_task import NUM_FOLDS, BaselineResult, BaselineTask, head_result
from raysweep.training.eigenbasis import CHUNK_ROWS, Eigenbasis, fit_eigenbasis
from raysweep.training.lbfgs import NUM_PAIRS, minimize
from raysweep.training.population import FeatureSet

# Unit: the mean eigenvalue. The best is nearly always at 10^(-1.25 +- 0.5).
STRENGTHS = tuple(10 ** (step / 4) for step in range(-12, 1))
# Tried where the weakest is the best: a few directions hold nearly all the variance, as in random encoders.
WEAKER = tuple(10 ** (step / 4) for step in range(-24, -12))
# What source and normalisation are compared with, before one of them gets all strengths.
FIRST_STRENGTHS = STRENGTHS[5:10:2]
# The setting where nothing is held out, as in few-shot studies.
USUAL_STRENGTH, USUAL_NORMALIZATION = STRENGTHS[7], "l2"
# Shares of the loss. Looser folds would stop weak strengths early, which regularises them too.
TOLERANCE, FOLD_TOLERANCE = 1e-6, 3e-4
# Rows whose inputs need more are read again for every step.
INPUT_BYTES = 2**29
# Logits of one piece of rows, and everything that L-BFGS remembers of the problems that it solves together.
LOGIT_BYTES = 2**25
SOLVER_BYTES = 2**28


def run_logistic(task: BaselineTask) -> BaselineResult:
    """Fits logistic regressions; source, normalisation and strength have the best loss of five folds of the train rows.

    Sources and normalisations are compared with three strengths, and the best of them gets all, and weaker ones if the
    weakest is the best. In a few-shot study nothing is chosen: the strength is 10^-1.25 mean eigenvalues, on
    l2-normalised features of the first source. Validation chooses nothing, so its metrics are unbiased.
    """
    started = time.perf_counter()
    folds, num_settings = task.folds(), 1
    fit: LogisticFit | None = None
    strength, source, normalize = USUAL_STRENGTH, next(iter(task.sources)), USUAL_NORMALIZATION
    if folds is not None:
        best: tuple[float, LogisticFit, str, str] | None = None
        combinations = [(source, normalize) for source in task.sources for normalize in NORMALIZATIONS]
        for source, normalize in combinations:
            fit = prepare_logistic(task.train, folds[0], task.sources[source], normalize, task.num_classes)
            loss = float(fit.fold_losses(FIRST_STRENGTHS, folds[1]).min())
            if best is None or loss < best[0]:
                best = loss, fit, source, normalize
        assert best is not None, "an encoder has at least one feature source"
        _, fit, source, normalize = best
        strengths, losses = STRENGTHS, fit.fold_losses(STRENGTHS, folds[1])
        if losses.argmin() == 0:
            strengths, losses = (*strengths, *WEAKER), torch.cat([losses, fit.fold_losses(WEAKER, folds[1])])
        strength = strengths[int(losses.argmin())]
        num_settings = len(combinations) * len(FIRST_STRENGTHS) + len(strengths)

    def fit_head(features: FeatureSet, rows: Tensor) -> Head:
        if fit is not None and features is task.train and len(rows) == len(fit.rows):  # the folds had them all
            return fit.head(strength)
        return prepare_logistic(features, rows, task.sources[source], normalize, task.num_classes).head(strength)

    setting = {"strength": strength, "features": source, "normalize": normalize}
    return head_result(task, setting, fit_head, num_settings, started)


@dataclass(frozen=True)
class LogisticFit:
    """Logistic regressions on some train rows.

    Memory beside the features: the inputs in the eigenbasis, at most `INPUT_BYTES` (rows that need more are read again
    for every step); `SOLVER_BYTES` for the solver, or what one problem needs, about 100 bytes for each class and
    feature; a few times `LOGIT_BYTES`; and the eigendecomposition, a few float64 matrices of features x features.

    Attributes:
        basis: the eigenbasis of the rows.
        num_classes: number of classes.
        features: where the rows are read.
        rows: their numbers.
        projected: the rows in the eigenbasis, float32 `(num_rows, rank)`; None if that needs too much memory.
    """

    basis: Eigenbasis
    num_classes: int
    features: FeatureSet
    rows: Tensor
    projected: Tensor | None

    def head(self, strength: float) -> Head:
        """Returns the head of one strength; unit of a strength: the mean eigenvalue."""
        everything = torch.zeros_like(self.rows)
        ((_, points),) = self._solved([(strength, -1)], everything, TOLERANCE)
        weight, bias = self.parameters(points)
        return self.basis.head(weight, bias[:, 0])

    def fold_losses(self, strengths: Sequence[float], folds: Tensor) -> Tensor:
        """Returns the cross-validated mean loss of each strength, float64 `(num_strengths,)`.

        Args:
            strengths: unit: the mean eigenvalue.
            folds: the fold in which each row is held out, int64 `(num_rows,)`.
        """
        problems = [(strength, fold) for strength in strengths for fold in range(NUM_FOLDS)]
        losses = [piece.held_out_losses(points) for piece, points in self._solved(problems, folds, FOLD_TOLERANCE)]
        # What is not a number would otherwise win.
        return torch.cat(losses).view(len(strengths), NUM_FOLDS).sum(1).nan_to_num(nan=torch.inf) / len(folds)

    def parameters(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Returns weights `(num_classes * num_problems, rank)` and biases `(num_classes * num_problems, 1)`."""
        by_class = points.view(len(points), self.num_classes, -1).transpose(0, 1)
        return by_class[..., :-1].flatten(0, 1), by_class[..., -1:].flatten(0, 1)

    def inputs(self, rows_at_once: int) -> Iterator[tuple[slice, Tensor]]:
        """Yields float32 inputs of consecutive rows: in the eigenbasis, or as they were read if not all fit."""
        for start in range(0, len(self.rows), rows_at_once):
            piece = slice(start, min(start + rows_at_once, len(self.rows)))
            if self.projected is None:
                yield piece, self.basis.inputs(self.features, self.rows[piece]).float()
            else:
                yield piece, self.projected[piece]

    def _solved(
        self, problems: Sequence[tuple[float, int]], folds: Tensor, tolerance: float
    ) -> Iterator[tuple[_Problems, Tensor]]:
        """Yields problems, given as strength and held-out fold, that fit into memory together, and their solutions."""
        size = self.num_classes * (len(self.basis.eigenvalues) + 1)
        at_once = max(1, SOLVER_BYTES // (4 * size * (2 * NUM_PAIRS + 8)))
        unit, device = self.basis.unit / len(self.rows), self.rows.device
        for start in range(0, len(problems), at_once):
            strengths, held = zip(*problems[start : start + at_once], strict=True)
            piece = _Problems(
                self, torch.tensor(strengths, device=device) * unit, torch.tensor(held, device=device), folds
            )
            points = torch.zeros(len(held), size, device=device)
            yield piece, minimize(piece, points, piece.preconditioner(), tolerance)


@dataclass(frozen=True)
class _Problems:
    """Logistic regressions that are solved together. A point is `(num_classes, rank + 1)`, flat; the bias comes last.

    Attributes:
        fit: the rows.
        strengths: float32 `(num_problems,)`, of the mean loss.
        held: the fold that is held out, int64 `(num_problems,)`; -1 for none.
        folds: the fold of each row, int64 `(num_rows,)`.
    """

    fit: LogisticFit
    strengths: Tensor
    held: Tensor
    folds: Tensor

    def __call__(self, points: Tensor, problems: Tensor) -> tuple[Tensor, Tensor]:
        """Returns losses and gradients, as `lbfgs.Objective` has it."""
        strengths, held = self.strengths[problems, None], self.held[problems, None]
        counts = (self.folds != held).sum(1, keepdim=True)
        weights = points.view(len(points), self.fit.num_classes, -1).clone()
        weights[..., -1] = 0
        penalty = weights.flatten(1) * strengths
        losses = (penalty * weights.flatten(1)).sum(1, dtype=torch.float64) / 2
        gradient, bias_gradient = torch.zeros((), device=points.device), torch.zeros((), device=points.device)
        for piece, inputs, logits in self._logits(points):
            labels = self.fit.features.labels[self.fit.rows[piece]].expand(1, len(points), -1)
            shares = (self.folds[piece] != held) / counts
            normalizers = logits.logsumexp(0)
            losses += ((normalizers - logits.gather(0, labels)[0]) * shares).sum(1, dtype=torch.float64)
            errors = logits.sub_(normalizers).exp_()
            errors.scatter_add_(0, labels, torch.full_like(errors[:1], -1))
            errors = errors.mul_(shares).flatten(0, 1)
            gradient, bias_gradient = gradient + errors @ inputs, bias_gradient + errors.sum(1, keepdim=True)
        if self.fit.projected is None:
            gradient = gradient @ self.fit.basis.vectors.float()
        found = torch.cat([gradient, bias_gradient], 1).view(self.fit.num_classes, len(points), -1)
        return losses, found.transpose(0, 1).flatten(1) + penalty

    def held_out_losses(self, points: Tensor) -> Tensor:
        """Returns the summed loss of each problem's held-out rows, float64 `(num_problems,)`."""
        losses = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        for piece, _, logits in self._logits(points):
            labels = self.fit.features.labels[self.fit.rows[piece]].expand(1, len(points), -1)
            held_out = self.folds[piece] == self.held[:, None]
            losses += ((logits.logsumexp(0) - logits.gather(0, labels)[0]) * held_out).sum(1, dtype=torch.float64)
        return losses

    def preconditioner(self) -> Tensor:
        """Returns the inverse of the diagonal bound on the Hessian, `(num_problems, num_classes * (rank + 1))`."""
        eigenvalues = (self.fit.basis.eigenvalues / len(self.fit.rows)).float()
        inverse = F.pad(1 / (eigenvalues / 2 + self.strengths[:, None]), (0, 1), value=2.0)
        return inverse[:, None].expand(-1, self.fit.num_classes, -1).flatten(1)

    def _logits(self, points: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields consecutive rows, their inputs, and their logits `(num_classes, num_problems, rows)`."""
        weights, biases = self.fit.parameters(points)
        if self.fit.projected is None:
            weights = weights @ self.fit.basis.vectors.float().T
        rows_at_once = min(CHUNK_ROWS, max(1, LOGIT_BYTES // (4 * len(weights))))
        for piece, inputs in self.fit.inputs(rows_at_once):
            # Rows come last, because softmax over a short last dimension is many times slower.
            logits = torch.addmm(biases, weights, inputs.T)
            yield piece, inputs, logits.view(self.fit.num_classes, len(points), -1)


def prepare_logistic(
    train: FeatureSet, rows: Tensor, parts: tuple[str, ...], normalize: str, num_classes: int
) -> LogisticFit:
    """Computes the eigenbasis of the train rows, int64 `(n,)`, once for all strengths and folds."""
    basis = fit_eigenbasis(train, rows, parts, normalize)
    fits = 4 * len(rows) * len(basis.eigenvalues) <= INPUT_BYTES
    return LogisticFit(basis, num_classes, train, rows, basis.project(train, rows) if fits else None)
