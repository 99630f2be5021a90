"""Builds encoders: from an encoder block of an experiment, or from a spec."""

from collections.abc import Callable, Mapping
from typing import Any

from raysweep.encoders import huggingface, stacked_cnn
from raysweep.encoders.base import Encoder, EncoderSpec
from raysweep.encoders.families import FAMILIES
from raysweep.errors import EncoderError, did_you_mean

# Families with a network of our own. Every other family comes from transformers.
_BUILD: Mapping[str, Callable[[Mapping[str, Any], int], Encoder]] = {"stacked_cnn": stacked_cnn.build}
_FROM_SPEC: Mapping[str, Callable[[EncoderSpec], Encoder]] = {"stacked_cnn": stacked_cnn.from_spec}


def build_encoder(config: Mapping[str, Any], seed: int) -> Encoder:
    """Builds the encoder of an experiment, in evaluation mode, on the CPU, in float32.

    Args:
        config: An encoder block of the experiment, as a dict; absent keys take their defaults.
        seed: Determines random weights, where there are any. The global random state does not change.

    Raises:
        EncoderError: the type is unknown, or the weights, config or preprocessing cannot be used.
    """
    kind = str(config.get("type"))
    if kind not in FAMILIES:
        raise EncoderError(f"type: '{kind}' is not an encoder; {did_you_mean(kind, FAMILIES)}")
    return _BUILD.get(kind, huggingface.build)(config, seed).eval()


def encoder_from_spec(spec: EncoderSpec) -> Encoder:
    """Rebuilds the architecture of a spec, in evaluation mode, without a network. Load its weights before using it.

    Raises:
        EncoderError: the installed transformers cannot build it.
    """
    return _FROM_SPEC.get(spec.family, huggingface.from_spec)(spec).eval()
