import math

import pytest
import torch

from raysweep.training.augment import (
    Augmentation,
    augmentation_draws,
    mixing_draws,
    mixing_masks,
    random_resized_crop,
)
from raysweep.training.distributed import seeded_generator


def noise(num_rows, height=40, width=40):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (num_rows, height, width, 3), generator=generator, dtype=torch.uint8)


def crop(pixels, draws, size=(32, 32), min_scale=0.35, horizontal_flip=True):
    return random_resized_crop(pixels, draws, size, Augmentation(min_scale, horizontal_flip))


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


def mixes(**more):
    return Augmentation(min_crop_scale=0.35, horizontal_flip=True, **more)


def test_mixup_blends_whole_images_by_its_share():
    draws = mixing_draws(4000, mixes(mixup=0.4), seed=1, epoch=2)
    masks = mixing_masks(draws, (6, 4))
    assert masks.shape == (4000, 1, 6, 4)
    assert torch.equal(masks, draws[:, :1, None, None].expand(-1, -1, 6, 4))
    shares = draws[:, 0].double()
    # Mean and variance of Beta(a, a).
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.4 + 1)), rel=0.05)
    assert draws[:, 1].sum() == 0


def test_cutmix_puts_in_a_box_of_the_other_share():
    draws = torch.tensor([[0.75, 1, 0.5, 0.5], [0.75, 1, 0.0, 1.0], [1.0, 1, 0.3, 0.3], [0.0, 1, 0.5, 0.5]])
    masks = mixing_masks(draws, (8, 16))[:, 0]
    middle = torch.ones(8, 16)
    middle[2:6, 4:12] = 0
    assert torch.equal(masks[0], middle)
    corner = torch.ones(8, 16)
    corner[:2, 12:] = 0
    assert torch.equal(masks[1], corner), "what reaches out of the image does not count"
    assert masks[2].min() == 1
    assert masks[3].max() == 0
    assert masks.mean((1, 2)).tolist() == [0.75, 0.9375, 1, 0]
    drawn = mixing_masks(mixing_draws(500, mixes(cutmix=1.0), seed=0, epoch=0), (32, 32))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert 0.5 < drawn.mean() < 0.75


def test_both_kinds_of_mixing_take_half_of_the_rows_each():
    draws = mixing_draws(2000, mixes(mixup=0.4, cutmix=1.0), seed=1, epoch=0)
    assert draws[:, 1].mean() == pytest.approx(0.5, abs=0.05)
    half = mixing_draws(2000, mixes(mixup=0.4, cutmix=1.0, mixing_share=0.5), seed=1, epoch=0)
    assert (half[:, 0] == 1).float().mean() == pytest.approx(0.5, abs=0.05)


def test_mixing_follows_seed_and_epoch_alone():
    def drawn(seed, epoch):
        return mixing_draws(9, mixes(mixup=1.0), seed, epoch)

    assert torch.equal(drawn(1, 2), drawn(1, 2))
    assert not torch.equal(drawn(1, 2), drawn(1, 3))
    assert not torch.equal(drawn(1, 2), drawn(2, 2))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_moves_the_crop_and_the_mixing(strength):
    scaled = mixes(mixup=0.2).scaled(strength)
    assert (scaled.strength, scaled.mixing_share) == (strength, strength)
    assert scaled.horizontal_flip
    assert scaled.mixes == (strength > 0)


@pytest.mark.parametrize(("side", "size"), [(40, (32, 32)), (37, (32, 32)), (37, (32, 20)), (32, (32, 32))])
def test_without_strength_the_crop_is_that_of_evaluation(side, size):
    images = noise(6, side, side)
    draws = augmentation_draws(6, 1, 2)
    found = random_resized_crop(images, draws, size, Augmentation(0.3, horizontal_flip=False).scaled(0.0))
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    assert torch.equal(found, images[:, top : top + size[0], left : left + size[1]])


def test_half_the_strength_is_half_the_way_from_the_centre_crop_to_the_random_one():
    """A ramp shows where a crop begins: its first pixel moves linearly with the strength."""
    ramp = torch.arange(0, 250, 2, dtype=torch.uint8)
    images = ramp[None, None, :, None].expand(1, len(ramp), len(ramp), 3)
    draws = augmentation_draws(1, 3, 4)
    augmentation = Augmentation(0.2, horizontal_flip=False)
    first = [
        int(random_resized_crop(images, draws, (75, 75), augmentation.scaled(strength))[0, 0, 0, 0])
        for strength in (0.0, 0.5, 1.0)
    ]
    assert first[0] == 2 * 25
    assert first[2] != first[0]
    assert first[1] == pytest.approx((first[0] + first[2]) / 2, abs=1)
