"""Random resized crop and flip of whole batches on the device that trains."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.training.distributed import seeded_generator

NUM_DRAWS = 5  # area, aspect ratio, horizontal place, vertical place, flip
MAX_ASPECT_RATIO = 4 / 3  # and its inverse at the other end


def augmentation_draws(num_rows: int, seed: int, epoch: int) -> Tensor:
    """Returns uniform numbers `(num_rows, 5)`: what each row's crop and flip in this epoch are made of.

    Drawn by row rather than by batch, so that a row's pixels do not depend on how many workers share the epoch.
    """
    # An offset keeps these numbers apart from the permutation drawn from the same seed and epoch.
    return torch.rand(num_rows, NUM_DRAWS, generator=seeded_generator(seed + 7_919, epoch))


def random_resized_crop(
    pixels: Tensor, draws: Tensor, size: tuple[int, int], min_scale: float, horizontal_flip: bool
) -> Tensor:
    """Crops a random box out of each image, resizes it bilinearly and flips half of them.

    The box is drawn as in Szegedy et al. 2015: a share of the area in [min_scale, 1], then an aspect ratio in
    [3/4, 4/3] among those with which a box of that area fits into the image.

    Args:
        pixels: uint8 `(batch, height, width, 3)`.
        draws: uniform numbers `(batch, 5)` from `augmentation_draws`.
        size: height and width of the result.
        min_scale: the smallest share of the image's area that a crop may take.
        horizontal_flip: whether half of the images are mirrored.

    Returns:
        uint8 `(batch, size[0], size[1], 3)`.
    """
    area = min_scale + draws[:, 0] * (1 - min_scale)
    # Width sqrt(area * ratio) and height sqrt(area / ratio) both fit where ratio lies in [area, 1 / area].
    limit = area.log().neg().clamp(max=math.log(MAX_ASPECT_RATIO))
    stretch = torch.exp((draws[:, 1] - 0.5) * limit)
    width = (area.sqrt() * stretch).clamp(max=1)  # against rounding
    height = (area.sqrt() / stretch).clamp(max=1)
    # Centres in [-1, 1] coordinates, such that the box lies within the image.
    centre_x = (2 * draws[:, 2] - 1) * (1 - width)
    centre_y = (2 * draws[:, 3] - 1) * (1 - height)
    flip = torch.where(draws[:, 4] < 0.5, -1.0, 1.0) if horizontal_flip else torch.ones_like(width)
    zero = torch.zeros_like(width)
    boxes = torch.stack([width * flip, zero, centre_x, zero, height, centre_y], dim=1).view(-1, 2, 3)
    images = pixels.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(boxes, [len(pixels), 3, *size], align_corners=False)
    crops = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crops.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
