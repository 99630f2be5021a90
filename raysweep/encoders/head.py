"""Heads (features -> logits) and the classifier that an encoder and a head make together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from raysweep.encoders import Encoder

NORMALIZATIONS = ("none", "l2", "standardize")


class Head(nn.Module):
    """A linear layer over normalised features.

    The normalisation belongs to the head, so that features cached once serve heads of every normalisation, and a
    fine-tune that starts from a probe's head gives that probe's logits at step 0.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, num_features: int, num_classes: int, normalize: str = "none") -> None:
        super().__init__()
        assert normalize in NORMALIZATIONS, normalize
        self.normalize = normalize
        self.weight = nn.Parameter(torch.zeros(num_classes, num_features))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def forward(self, features: Tensor) -> Tensor:
        """Features `(batch, num_features)` to logits `(batch, num_classes)`."""
        normalized = normalize_features(features, self.normalize, self.mean, self.scale)
        return nn.functional.linear(normalized, self.weight, self.bias)

    def spec(self) -> dict[str, Any]:
        """Returns what `Head(**spec)` needs to build this head again, JSON-able."""
        num_classes, num_features = self.weight.shape
        return {"num_features": num_features, "num_classes": num_classes, "normalize": self.normalize}


def normalize_features(features: Tensor, normalize: str, mean: Tensor, scale: Tensor) -> Tensor:
    """Normalises `(batch, num_features)` by row (`l2`) or by the train split's statistics (`standardize`)."""
    if normalize == "l2":
        return nn.functional.normalize(features, dim=-1)
    if normalize == "standardize":
        return (features - mean) / scale
    return features


class Classifier(nn.Module):
    """An encoder, the feature source that its head reads, and the head."""

    def __init__(self, encoder: Encoder, head: Head, source: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.source = source

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels `(batch, 3, height, width)` to float32 logits `(batch, num_classes)`."""
        features = self.encoder.select(self.encoder(pixel_values), self.source)
        # In full precision under autocast too: standardised features are small differences of large numbers.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())  # type: ignore[no-any-return]
