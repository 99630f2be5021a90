"""Compiled encoders for long passes on a GPU. Whatever fails, the encoder itself is used (docs/decisions/0029)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysweep.encoders.base import Encoder
from raysweep.encoders.preprocess import Preprocessing
from raysweep.encoders.pretrained import describe_error
from raysweep.errors import EncoderError

COMPILED_ON, BACKEND = "cuda", "inductor"
# Images of one actor. Compilation takes about 30 s (assumed; `benchmarks gpu` measures it), and saves 0.10 to 0.18 ms
# an image of a ViT-B with 256 tokens (2,680 and 3,652 images/s, 1,930 and 2,926, in timm's tables).
MIN_IMAGES = 200_000
# Of features that both give for the same image. In bf16 it is .99996 or more with DINOv2, CLIP, SigLIP and MobileNetV2.
MIN_COSINE = 0.9999
MAX_ENCODERS = 64  # of one process; torch compiles the same lines of code for 8, and runs all others plain


@dataclass(frozen=True, eq=False, slots=True)
class CompiledEncoder:
    """Encodes batches of one size with compiled code, and all others with the encoder itself.

    A batch is smaller at the end of the images, beside images that cannot be decoded, and where memory is short. The
    code would be compiled again for each size.
    """

    encoder: Encoder
    compiled: Callable[[Tensor], dict[str, Tensor]]
    batch_size: int

    def __call__(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """As `Encoder.forward`."""
        outputs: dict[str, Tensor] = (self.compiled if len(pixel_values) == self.batch_size else self.encoder)(
            pixel_values
        )
        return outputs

    @property
    def preprocessing(self) -> Preprocessing:
        """As of the encoder."""
        return self.encoder.preprocessing

    @property
    def parts(self) -> Mapping[str, int]:
        """As of the encoder."""
        return self.encoder.parts


PassEncoder = Encoder | CompiledEncoder


@torch.inference_mode()
def encode_batch(encoder: PassEncoder, images: Tensor, precision: str) -> dict[str, Tensor]:
    """Encodes uint8 images `(n, height, width, 3)` that are on the encoder's device.

    Returns:
        Each part, `(n, num_features)`, in the dtype that the encoder gives.
    """
    # What is compiled holds only for the mode and the autocast that it was compiled with: here, for both.
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        outputs: dict[str, Tensor] = encoder(encoder.preprocessing.normalize(images))
        return outputs


def compile_for_pass(
    encoder: Encoder,
    device: torch.device,
    precision: str,
    *,
    batch_size: int,
    num_images: int,
    warn: Callable[[str], None],
) -> PassEncoder:
    """Returns what a pass encodes with: the encoder itself, or compiled where that is worth its time.

    Args:
        encoder: The encoder, on the device, not to be trained.
        device: Where it works. Only GPUs get compiled encoders.
        precision: Precision of the forward pass, `fp32` or `bf16`.
        batch_size: Images of a full batch.
        num_images: Images that this process will encode, about.
        warn: Called with one line if the encoder cannot be compiled.
    """
    if device.type != COMPILED_ON or num_images < MIN_IMAGES:
        return encoder
    try:
        return compile_encoder(encoder, device, precision, batch_size)
    except Exception as error:  # of any of torch's compilers, of the C compiler that they call, or of the GPU
        name = encoder.spec.origin.name or encoder.spec.type
        warn(f"warning: {name}: it is not compiled, so the pass takes longer: {describe_error(error)}")
        return encoder


def compile_encoder(encoder: Encoder, device: torch.device, precision: str, batch_size: int) -> CompiledEncoder:
    """Compiles an encoder for batches of one size, and encodes one batch of noise both ways.

    Raises:
        EncoderError: the features differ.
    """
    # The encoder itself stays as it is, with the names of its state dict.
    compiled: Any = torch.compile(encoder, dynamic=False, backend=BACKEND)
    result = CompiledEncoder(encoder, compiled, batch_size)
    generator, size = torch.Generator().manual_seed(0), encoder.preprocessing.output_size
    images = torch.randint(256, (batch_size, *size, 3), dtype=torch.uint8, generator=generator).to(device)
    expected = encode_batch(encoder, images, precision)
    with torch._dynamo.config.patch(recompile_limit=MAX_ENCODERS):
        found = encode_batch(result, images, precision)
    for part, features in found.items():
        cosine = float(torch.cosine_similarity(features.float(), expected[part].float(), dim=1).min())
        if not cosine >= MIN_COSINE:
            raise EncoderError(f"features '{part}' have a cosine of {cosine:.6f}; accepted: at least {MIN_COSINE:g}")
    return result
