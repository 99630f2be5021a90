"""Heads (features -> logits), and classifiers (an encoder and a head)."""

from typing import Any

import torch
from torch import Tensor, nn

from raysweep.encoders.base import Encoder
from raysweep.encoders.families import NORMALIZATIONS


class Head(nn.Module):
    """A linear layer over normalised features.

    The normalisation belongs to the head, for two reasons. Features that are cached once can be used with every
    normalisation. And a fine-tune that starts from the head of a probe gives that probe's logits at step 0.

    Attributes:
        weight: `(num_classes, num_features)`.
        bias: `(num_classes,)`.
        mean: `(num_features,)`, of the train split; used by `standardize` only, as is `scale`.
        scale: `(num_features,)`, from `standard_scale`.
        normalize: One of `families.NORMALIZATIONS`.
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
        """Maps features `(batch, num_features)` to logits `(batch, num_classes)`."""
        normalized = normalize_features(features, self.normalize, self.mean, self.scale)
        return nn.functional.linear(normalized, self.weight, self.bias)

    def spec(self) -> dict[str, Any]:
        """Returns the arguments of `Head` that build this head again, as a dict that JSON can hold."""
        num_classes, num_features = self.weight.shape
        return {"num_features": num_features, "num_classes": num_classes, "normalize": self.normalize}


def normalize_features(features: Tensor, normalize: str, mean: Tensor, scale: Tensor) -> Tensor:
    """Normalises features.

    Args:
        features: `(..., num_features)`.
        normalize: `l2` divides each row by its length, `standardize` uses `mean` and `scale`, `none` does nothing.
        mean: Mean of each feature in the train split; must broadcast with `features`.
        scale: Scale of each feature in the train split, from `standard_scale`; must broadcast with `features`.
    """
    if normalize == "l2":
        return nn.functional.normalize(features, dim=-1)
    if normalize == "standardize":
        return (features - mean) / scale
    return features


def standard_scale(mean: Tensor, deviation: Tensor) -> Tensor:
    """Returns the scale that `standardize` divides each feature by: its standard deviation, or 1 if it is constant.

    Args:
        mean: Mean of each feature in the train split, of any shape.
        deviation: Standard deviation of each feature, of the same shape. The result has its dtype.
    """
    # The threshold is relative to the mean. A deviation from sums of squares is subject to cancellation: for a constant
    # feature it may be about 1e-8 of the mean instead of 0.
    return torch.where(deviation > 1e-6 * mean.abs().clamp(min=1), deviation, 1.0)


class Classifier(nn.Module):
    """An encoder, a head, and the feature source that the head reads.

    Attributes:
        encoder: Maps pixels to the parts.
        head: Maps the features of `source` to logits.
        source: A feature source of the encoder.
    """

    def __init__(self, encoder: Encoder, head: Head, source: str) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.source = source

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps normalised pixels `(batch, 3, height, width)` to float32 logits `(batch, num_classes)`."""
        features = self.encoder.select(self.encoder(pixel_values), self.source)
        # In full precision, also under autocast: standardised features are small differences of large numbers.
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())  # type: ignore[no-any-return]
