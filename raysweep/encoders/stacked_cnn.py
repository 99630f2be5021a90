"""The encoder that is always trained from scratch: strided stages of convolution, batch norm and ReLU."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from raysweep.encoders.base import Encoder, EncoderSpec, Origin, seeded
from raysweep.encoders.families import FAMILIES
from raysweep.encoders.model_config import check_num_parameters
from raysweep.errors import EncoderError, did_you_mean

CHANNELS = [32, 64, 128, 256]
MAX_STAGES = 32  # each halves the image


class StackedCNN(Encoder):
    """Stages of two 3x3 convolutions, the first of them with stride 2, and a global average pool at the end.

    With default channels it has 1.2 million parameters and one part, `pooled`, of 256 features.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        channels = spec.config["channels"]
        self.stages = nn.ModuleList(
            _stage(before, after) for before, after in zip([3, *channels], channels, strict=False)
        )

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps float `(batch, 3, height, width)`, of any size, to `pooled` `(batch, channels of the last stage)`."""
        features = pixel_values
        for stage in self.stages:
            features = stage(features)
        return {"pooled": features.mean(dim=(2, 3))}


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, stride in ((channels_in, 2), (channels_out, 1)):
        # No bias: the batch norm that follows has one.
        convolution = nn.Conv2d(before, channels_out, 3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        layers += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def build(config: Mapping[str, Any], seed: int) -> StackedCNN:
    """Builds a StackedCNN with random weights from an encoder block of an experiment.

    Raises:
        EncoderError: `config` has an unknown key, or channels that are not positive whole numbers.
    """
    overrides = dict(config.get("config") or {})
    for key in overrides:
        if key != "channels":
            raise EncoderError(f"config: '{key}' is unknown to stacked_cnn; {did_you_mean(key, ['channels'])}")
    channels = overrides.get("channels", CHANNELS)
    _check_channels(channels)
    family, image_size = FAMILIES["stacked_cnn"], config.get("image_size")
    preprocessing = family.preprocessing
    assert preprocessing is not None
    spec = EncoderSpec(
        type="stacked_cnn",
        family="stacked_cnn",
        config={"channels": list(channels)},
        preprocessing=preprocessing.with_image_size(image_size) if image_size else preprocessing,
        parts={"pooled": channels[-1]},
        sources=family.sources,
        origin=Origin(),
    )
    with seeded(seed):
        return StackedCNN(spec)


def from_spec(spec: EncoderSpec) -> StackedCNN:
    """Rebuilds a StackedCNN. Its weights are arbitrary until they are loaded.

    Raises:
        EncoderError: the channels are not those of a network that fits into memory.
    """
    _check_channels(spec.config.get("channels"))
    with seeded(0):
        return StackedCNN(spec)


def _check_channels(channels: Any) -> None:
    if not isinstance(channels, list | tuple) or not channels or not all(_positive(item) for item in channels):
        raise EncoderError(f"config.channels: {channels!r}; accepted: a list of positive whole numbers, one per stage")
    if len(channels) > MAX_STAGES:
        raise EncoderError(f"config.channels: {len(channels):,} stages; accepted: at most {MAX_STAGES}")
    check_num_parameters(sum(9 * after * (before + after) for before, after in pairwise([3, *channels])))


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
