"""Checks that an encoder is a function of one image: only then can its features be cached."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from raysweep.encoders.base import Encoder
from raysweep.encoders.pretrained import describe_error
from raysweep.errors import EncoderError

# Differences are relative to the largest feature. Sums in another order differ by about 1e-6.
MAX_DIFFERENCE = 1e-3


# no_grad, not inference_mode: training must be able to use what a model caches in its first call.
@torch.no_grad()
def check_is_function(encoder: Encoder) -> None:
    """Encodes two images of noise, twice together and once alone, and compares the features.

    Args:
        encoder: The encoder, in evaluation mode, on the CPU.

    Raises:
        EncoderError: the features are not finite, or depend on more than the image.
    """
    name = encoder.spec.origin.name or encoder.spec.type
    training = [module_name or "the model" for module_name, module in encoder.named_modules() if module.training]
    if training:
        raise EncoderError(f"{name}: {training[0]} stays in training mode after eval(), as {len(training)} modules do")
    pixel_values = encoder.preprocessing.normalize(torch.from_numpy(_noise(encoder.preprocessing.output_size)))
    try:
        together, again, alone = encoder(pixel_values), encoder(pixel_values), encoder(pixel_values[:1])
    except Exception as error:
        raise EncoderError(f"{name}: it fails on two images of noise or on one: {describe_error(error)}") from error
    for part, features in together.items():
        num_bad = int((~torch.isfinite(features)).sum())
        if num_bad:
            raise EncoderError(f"{name}: {num_bad} of {features.numel()} features '{part}' are NaN or infinite")
    _check_agreement(name, "two calls for the same images differ", together, again)
    _check_agreement(name, "an image alone and the same image beside another differ", together, alone)


def _check_agreement(name: str, problem: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    for part, features in second.items():
        difference = _difference(first[part][: len(features)], features)
        if not difference <= MAX_DIFFERENCE:
            raise EncoderError(
                f"{name}: features '{part}' of {problem} by {difference:.2g} of the largest feature; accepted: at most "
                f"{MAX_DIFFERENCE:g}. Its features depend on chance or on other images, so they cannot be cached; "
                "choose another checkpoint"
            )


def _difference(first: Tensor, second: Tensor) -> float:
    """Returns the largest difference, relative to the largest feature."""
    scale = max(float(first.abs().max()), float(second.abs().max()))
    return float((first - second).abs().max()) / scale if scale else 0.0


def _noise(size: tuple[int, int]) -> np.ndarray:
    """Returns two images of noise, uint8 `(2, height, width, 3)`: a dark reddish one and a light bluish one."""
    noise = np.random.default_rng(0).integers(0, 128, (2, *size, 3))
    colours = np.array([[48, 16, 0], [64, 96, 127]])
    images: np.ndarray = (noise + colours[:, None, None, :]).astype(np.uint8)
    return images
