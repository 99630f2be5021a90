"""The encoder that is trained from scratch: plain strided stages of convolution, batch norm and ReLU."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raysweep.encoders import Encoder, seeded, spec_arguments
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import EncoderError, did_you_mean

CHANNELS = [32, 64, 128, 256]
IMAGE_SIZE = 128
# Statistics of ImageNet: any fixed numbers do for a net that starts from nothing, and these keep encoders comparable.
PREPROCESSING = Preprocessing(
    resize="shortest_edge",
    resize_size=round(1.14 * IMAGE_SIZE),
    crop_size=IMAGE_SIZE,
    resample=2,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


class StackedCNN(Encoder):
    """Stages of two 3x3 convolutions, the first with stride 2, ending in a global average pool.

    The default has 1.2 million parameters and one part, `pooled`, of 256 features.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        channels = self.config["channels"]
        self.stages = nn.ModuleList(
            _stage(before, after) for before, after in zip([3, *channels], channels, strict=False)
        )

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps float (batch, 3, height, width), of any size, to `pooled` (batch, channels of the last stage)."""
        features = pixel_values
        for stage in self.stages:
            features = stage(features)
        return {"pooled": features.mean(dim=(2, 3))}


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, stride in ((channels_in, 2), (channels_out, 1)):
        # The batch norm that follows has a bias of its own.
        convolution = nn.Conv2d(before, channels_out, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build(config: Mapping[str, Any], seed: int) -> StackedCNN:
    """Builds a randomly initialised StackedCNN from an encoder block.

    Raises:
        EncoderError: an unknown key of `config`, or channels that are not positive whole numbers.
    """
    overrides = dict(config.get("config") or {})
    for key in overrides:
        if key != "channels":
            raise EncoderError(f"config: '{key}' is unknown to stacked_cnn; {did_you_mean(key, ['channels'])}")
    channels = overrides.get("channels", CHANNELS)
    if not isinstance(channels, list | tuple) or not channels or not all(_positive(item) for item in channels):
        raise EncoderError(f"config.channels: {channels!r}; accepted: a list of positive whole numbers, one per stage")
    with seeded(seed):
        return StackedCNN(
            encoder_type="stacked_cnn",
            family="stacked_cnn",
            config={"channels": list(channels)},
            preprocessing=PREPROCESSING.with_image_size(config.get("image_size") or IMAGE_SIZE),
            parts={"pooled": channels[-1]},
            sources={"pooled": ("pooled",)},
            origin={"name": None, "revision": None},
        )


def from_spec(spec: Mapping[str, Any]) -> StackedCNN:
    """Rebuilds a StackedCNN; the weights are to be loaded."""
    with seeded(0):
        return StackedCNN(**spec_arguments(spec))


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
