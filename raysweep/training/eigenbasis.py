"""The eigenbasis of features, in which every strength of ridge and of logistic regression has a simple curvature."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raysweep.encoders.head import Head, normalize_features, standard_scale
from raysweep.training.population import FeatureSet

# Rows per read.
CHUNK_ROWS = 4096
# Directions in which the inputs vary less than this, relative to the widest one, are left out.
LEAST_VARIANCE = 1e-10
# Relative variance of rounding errors: features are float32.
ROUNDING_VARIANCE = 1e-14


@dataclass(frozen=True)
class Inputs:
    """Reads the inputs of a linear classifier: features normalised as in `Head`, then centred."""

    parts: tuple[str, ...]
    normalize: str
    mean: Tensor
    scale: Tensor
    center: Tensor

    def __call__(self, features: FeatureSet, rows: Tensor) -> Tensor:
        """Returns the inputs of some rows, float64 `(len(rows), num_features)`."""
        features_read = features.source(self.parts, rows)
        return normalize_features(features_read, self.normalize, self.mean, self.scale).double() - self.center

    def moments(self, features: FeatureSet, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and standard deviation of the inputs, each float64 `(num_features,)`."""
        total, squares = torch.zeros(2, *self.center.shape, dtype=torch.float64, device=self.center.device)
        for chunk in rows.split(CHUNK_ROWS):
            inputs = self(features, chunk)
            total += inputs.sum(0)
            squares += inputs.square().sum(0)
        mean = total / len(rows)
        return mean, (squares / len(rows) - mean.square()).clamp(min=0).sqrt()


def _fit_inputs(train: FeatureSet, rows: Tensor, parts: tuple[str, ...], normalize: str) -> Inputs:
    num_features, device = sum(train.parts[part].shape[1] for part in parts), rows.device
    zero, one = torch.zeros(num_features, device=device), torch.ones(num_features, device=device)
    inputs = Inputs(parts, "none" if normalize == "standardize" else normalize, zero, one, zero.double())
    mean, deviation = inputs.moments(train, rows)
    if normalize == "standardize":
        scale = standard_scale(mean, deviation).float()
        inputs = replace(inputs, normalize=normalize, mean=mean.float(), scale=scale)
        mean, _ = inputs.moments(train, rows)
    return replace(inputs, center=mean)


@dataclass(frozen=True)
class Eigenbasis:
    """The eigenvectors of the inputs X of some train rows, `(num_rows, num_features)`.

    Attributes:
        inputs: reads X.
        vectors: float64 `(num_features, rank)`, orthonormal.
        eigenvalues: float64 `(rank,)`, of X'X.
        unit: the mean eigenvalue of the smaller of X'X and XX', which is the unit of strengths; 1 if that is 0.
    """

    inputs: Inputs
    vectors: Tensor
    eigenvalues: Tensor
    unit: float

    def project(self, features: FeatureSet, rows: Tensor) -> Tensor:
        """Returns the inputs of some rows in the eigenbasis, float32 `(len(rows), rank)`."""
        vectors = self.vectors.float()
        return torch.cat([self.inputs(features, chunk).float() @ vectors for chunk in rows.split(CHUNK_ROWS)])

    def head(self, weight: Tensor, bias: Tensor) -> Head:
        """Returns the head that has weights `(num_classes, rank)` in the eigenbasis and biases `(num_classes,)`."""
        whole = weight.double() @ self.vectors.T
        head = Head(whole.shape[1], whole.shape[0], self.inputs.normalize).to(whole.device)
        head.weight.data.copy_(whole)
        head.bias.data.copy_(bias.double() - whole @ self.inputs.center)
        head.mean.copy_(self.inputs.mean)
        head.scale.copy_(self.inputs.scale)
        return head


def fit_eigenbasis(train: FeatureSet, rows: Tensor, parts: tuple[str, ...], normalize: str) -> Eigenbasis:
    """Computes the eigenbasis of train rows, int64 `(n,)`: that of X'X, by way of XX' if that is smaller.

    Memory: a few float64 matrices of the smaller size squared, and inputs of `CHUNK_ROWS` rows.
    """
    inputs = _fit_inputs(train, rows, parts, normalize)
    num_features = len(inputs.center)
    if len(rows) <= num_features:
        features = inputs(train, rows)
        eigenvalues, vectors = torch.linalg.eigh(features @ features.T)
    else:
        covariance = torch.zeros(num_features, num_features, dtype=torch.float64, device=rows.device)
        for chunk in rows.split(CHUNK_ROWS):
            features = inputs(train, chunk)
            covariance.addmm_(features.T, features)
        eigenvalues, vectors = torch.linalg.eigh(covariance)
    unit = float(eigenvalues.sum()) / len(eigenvalues)
    rounding = ROUNDING_VARIANCE * len(rows) * float(inputs.center.square().sum())
    kept = eigenvalues > max(LEAST_VARIANCE * float(eigenvalues[-1]), rounding)
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    if len(rows) <= num_features:
        vectors = features.T @ (vectors / eigenvalues.sqrt())
    return Eigenbasis(inputs, vectors, eigenvalues, unit if len(eigenvalues) else 1.0)
