import math

import pytest
import torch

from raysweep.training.augment import augmentation_draws, random_resized_crop
from raysweep.training.distributed import seeded_generator


def noise(num_rows, height=40, width=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (num_rows, height, width, 3), generator=generator, dtype=torch.uint8)


def crop(pixels, draws, size=(32, 32), min_scale=0.35, horizontal_flip=True):
    return random_resized_crop(pixels, draws, size, min_scale, horizontal_flip)


def boxes(draws, min_scale, side=128, size=64):
    """Left, top, width and height of each crop, in shares of the image, off images whose pixels say where they are.

    Asserts on the way that each is a straight line from edge to edge: a box that reached out of the image would show
    a flat stretch, where the border is repeated.
    """
    ramp = torch.arange(side, dtype=torch.uint8) * (256 // side)
    image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), ramp.expand(side, side)], dim=-1)
    crops = crop(image.expand(len(draws), side, side, 3), draws, (size, size), min_scale, horizontal_flip=False)
    found = []
    for line in (crops[:, size // 2, :, 0], crops[:, :, size // 2, 1]):
        places = (line.double() / (256 // side) + 0.5) / side
        step = (places[:, -1] - places[:, 0]) / (size - 1)
        straight = places[:, :1] + step[:, None] * torch.arange(size)
        assert (places - straight).abs().max() < 1.5 / 256
        found += [places[:, 0] - step / 2, step * size]
    left, width, top, height = found
    return left, top, width, height


@pytest.mark.parametrize("min_scale", [0.08, 0.35, 0.9, 1.0])
def test_boxes_lie_in_the_image_and_take_the_area_and_ratio_they_should(min_scale):
    left, top, width, height = boxes(augmentation_draws(300, seed=1, epoch=0), min_scale)
    slack = 0.01
    assert min(left.min(), top.min()) > -slack
    assert max((left + width).max(), (top + height).max()) < 1 + slack
    area, ratio = width * height, width / height
    assert min_scale - 0.02 < area.min()
    assert area.max() < 1 + 2 * slack
    assert area.mean() == pytest.approx((min_scale + 1) / 2, abs=0.05)
    assert ratio.min() > 0.75 * 0.95
    assert ratio.max() < 4 / 3 * 1.05
    if min_scale < 0.5:
        assert area.max() - area.min() > 0.8 * (1 - min_scale)
        assert ratio.max() > 1.2
        assert ratio.min() < 1 / 1.2
        assert left.std() > 0.05
        assert top.std() > 0.05


def test_extreme_draws_stay_in_the_image():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    left, top, width, height = boxes(corners, 0.35)
    assert min(left.min(), top.min()) > -0.01
    assert max((left + width).max(), (top + height).max()) < 1.01


@pytest.mark.parametrize("size", [(40, 40), (40, 24)])
def test_the_whole_image_at_its_own_size_is_left_as_it_is(size):
    pixels = noise(50, *size)
    draws = augmentation_draws(50, seed=0, epoch=0)
    assert torch.equal(crop(pixels, draws, size, 1.0, horizontal_flip=False), pixels)
    flipped = draws[:, 4] < 0.5
    mirrored = torch.where(flipped[:, None, None, None], pixels.flip(2), pixels)
    assert torch.equal(crop(pixels, draws, size, 1.0, horizontal_flip=True), mirrored)
    assert 10 < flipped.sum() < 40


def test_a_flip_mirrors_the_crop():
    pixels, draws = noise(8), augmentation_draws(8, seed=2, epoch=0)
    draws[:, 4] = 0.1
    flipped = crop(pixels, draws).flip(2).int()
    draws[:, 4] = 0.9
    assert (flipped - crop(pixels, draws).int()).abs().max() <= 1


def test_constant_images_stay_constant():
    levels = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    pixels = levels.view(-1, 1, 1, 1).expand(-1, 40, 40, 3)
    crops = crop(pixels, augmentation_draws(5, seed=0, epoch=0), (24, 32))
    assert crops.dtype == torch.uint8
    assert torch.equal(crops, levels.view(-1, 1, 1, 1).expand(-1, 24, 32, 3))


def test_an_images_crop_does_not_depend_on_its_batch():
    pixels, draws = noise(9), augmentation_draws(9, seed=5, epoch=2)
    together = crop(pixels, draws)
    order = torch.tensor([4, 0, 8, 2])
    assert torch.equal(crop(pixels[order], draws[order]), together[order])
    for row in range(9):
        assert torch.equal(crop(pixels[row : row + 1], draws[row : row + 1])[0], together[row])


def test_draws_follow_seed_and_epoch_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = augmentation_draws(100, seed=1, epoch=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(4)
    assert torch.equal(draws, augmentation_draws(100, seed=1, epoch=3))
    assert not torch.equal(draws, augmentation_draws(100, seed=1, epoch=4))
    assert not torch.equal(draws, augmentation_draws(100, seed=2, epoch=3))
    # The epoch's order of rows comes from the same seed and epoch, and must not go with the crops.
    assert not torch.equal(draws, torch.rand(100, 5, generator=seeded_generator(1, 3)))
    assert draws.shape == (100, 5)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert math.isclose(draws.mean(), 0.5, abs_tol=0.05)
