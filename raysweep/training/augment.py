"""Random resized crops, flips, mixup and CutMix of whole batches, on the training device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.training.distributed import seeded_generator

NUM_DRAWS = 5  # area, aspect ratio, horizontal position, vertical position, flip
MAX_ASPECT_RATIO = 4 / 3  # the smallest is its inverse


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images.

    Attributes:
        min_crop_scale: smallest share of the image's area that a crop takes.
        horizontal_flip: whether half of the images are mirrored.
        mixup: alpha of mixup (Zhang et al. 2018), 0 for none.
        cutmix: alpha of CutMix (Yun et al. 2019), 0 for none; with both, each row gets one of them.
        mixing_share: share of the rows that are mixed.
        strength: how far a crop's box goes from the centre crop of evaluation (0) to the random box (1).
    """

    min_crop_scale: float
    horizontal_flip: bool
    mixup: float = 0.0
    cutmix: float = 0.0
    mixing_share: float = 1.0
    strength: float = 1.0

    @property
    def mixes(self) -> bool:
        """Whether any row is mixed with another."""
        return self.mixing_share > 0 and (self.mixup > 0 or self.cutmix > 0)

    def scaled(self, strength: float) -> Augmentation:
        """Returns a weaker augmentation: none for strength 0, itself for 1. The flip does not change."""
        return replace(self, strength=strength * self.strength, mixing_share=strength * self.mixing_share)


def mixing_draws(num_rows: int, augmentation: Augmentation, seed: int, epoch: int) -> Tensor:
    """Returns float32 `(num_rows, 4)`: share of the row's own image, 1 for CutMix or 0 for mixup, box centre (y, x).

    Drawn per row, as `augmentation_draws`. Every row is mixed with another row of its global batch.
    """
    generator = np.random.default_rng([seed, epoch])
    is_on = [augmentation.mixup > 0, augmentation.cutmix > 0]
    is_cutmix = generator.random(num_rows) < is_on[1] / sum(is_on)
    alphas = np.where(is_cutmix, augmentation.cutmix, augmentation.mixup)
    shares = np.where(generator.random(num_rows) < augmentation.mixing_share, generator.beta(alphas, alphas), 1.0)
    centres = generator.random((2, num_rows))
    return torch.from_numpy(np.stack([shares, is_cutmix, *centres], axis=1)).float()


def mixing_masks(draws: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns each pixel's share of the row's own image, `(batch, 1, height, width)`; its mean is the label's share.

    Args:
        draws: float32 `(batch, 4)` from `mixing_draws`.
        size: height and width.
    """
    shares, is_cutmix, *centres = (column[:, None, None] for column in draws.unbind(1))
    half_side = (1 - shares).sqrt() / 2  # the part of a box outside the image does not count
    rows, columns = ((torch.arange(side, device=draws.device) + 0.5) / side for side in size)
    inside = ((rows[:, None] - centres[0]).abs() < half_side) & ((columns - centres[1]).abs() < half_side)
    return torch.where(is_cutmix > 0, (~inside).float(), shares)[:, None]


def augmentation_draws(num_rows: int, seed: int, epoch: int) -> Tensor:
    """Returns uniform numbers, float32 `(num_rows, 5)`, for the crop and flip of each row in this epoch.

    Drawn per row and not per batch, so that a row's pixels do not depend on the number of workers.
    """
    # The offset makes these numbers independent of the permutation, which has the same seed and epoch.
    return torch.rand(num_rows, NUM_DRAWS, generator=seeded_generator(seed + 7_919, epoch))


def random_resized_crop(pixels: Tensor, draws: Tensor, size: tuple[int, int], augmentation: Augmentation) -> Tensor:
    """Crops a random box out of each image, resizes it bilinearly, and flips half of the images.

    The box is drawn as in Szegedy et al. 2015: first a share of the area in [min_crop_scale, 1], then an aspect ratio
    in [3/4, 4/3] for which a box of that area fits into the image. With less strength than 1 it lies between that box
    and the centre crop that evaluation sees.

    Args:
        pixels: uint8 `(batch, height, width, 3)`.
        draws: uniform numbers, float32 `(batch, 5)`, from `augmentation_draws`.
        size: height and width of the result.
        augmentation: least area, strength and flip.

    Returns:
        uint8 `(batch, size[0], size[1], 3)`.
    """
    min_scale, strength = augmentation.min_crop_scale, augmentation.strength
    area = min_scale + draws[:, 0] * (1 - min_scale)
    # Width sqrt(area * ratio) and height sqrt(area / ratio) both fit where ratio lies in [area, 1 / area].
    limit = area.log().neg().clamp(max=math.log(MAX_ASPECT_RATIO))
    stretch = torch.exp((draws[:, 1] - 0.5) * limit)
    width = (area.sqrt() * stretch).clamp(max=1)  # against rounding
    height = (area.sqrt() / stretch).clamp(max=1)
    # Centres in [-1, 1] coordinates, such that the box lies within the image.
    centre_x = (2 * draws[:, 2] - 1) * (1 - width)
    centre_y = (2 * draws[:, 3] - 1) * (1 - height)
    if strength < 1:
        drawn = torch.stack([height, width, centre_y, centre_x])
        height, width, centre_y, centre_x = torch.lerp(_centre_box(pixels, size), drawn, strength)
    flip = torch.where(draws[:, 4] < 0.5, -1.0, 1.0) if augmentation.horizontal_flip else torch.ones_like(width)
    zero = torch.zeros_like(width)
    boxes = torch.stack([width * flip, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)
    images = pixels.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(boxes, [len(pixels), 3, *size], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _centre_box(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns height, width, and centre (y, x) of the box that `Preprocessing.centre_crop` takes, float32 `(4, 1)`."""
    sides = list(zip(pixels.shape[1:3], size, strict=True))
    shares = [part / whole for whole, part in sides]
    centres = [(2 * ((whole - part) // 2) + part) / whole - 1 for whole, part in sides]
    return torch.tensor([*shares, *centres], device=pixels.device)[:, None]
