import pytest
import torch
from torch.nn import functional as F

from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.training import distributed
from raysweep.training.augment import Augmentation
from raysweep.training.batches import EpochInputs, plan_epoch

ENCODER = build_encoder({"type": "stacked_cnn", "image_size": 16, "config": {"channels": [4]}}, seed=0)
SMALL, NUM_CLASSES, NUM_ROWS = ENCODER.preprocessing, 3, 23
MODEL = Classifier(ENCODER, Head(4, NUM_CLASSES), "pooled")
MIXING = Augmentation(min_crop_scale=0.5, horizontal_flip=True, mixup=0.4, cutmix=1.0)


def plans(monkeypatch, size, *, micro_batch_size=None, mixes=True, batch_size=8, num_rows=NUM_ROWS):
    """The plan of each worker."""
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    found = []
    for index in range(size):
        monkeypatch.setattr(distributed, "rank", lambda index=index: index)
        found.append(plan_epoch(num_rows, batch_size, micro_batch_size, 5, 1, mixes=mixes))
    return found


def counted_rows(plan):
    return [row for batch in plan for part in batch.micro_batches if part.weight for row in part.rows.tolist()]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 50])
def test_every_row_is_trained_on_once_an_epoch(monkeypatch, size, micro_batch_size):
    found = plans(monkeypatch, size, micro_batch_size=micro_batch_size)
    assert sorted(row for plan in found for row in counted_rows(plan)) == list(range(NUM_ROWS))
    assert [[batch.num_rows for batch in plan] for plan in found] == [[8, 8, 7]] * size
    parts = [part for plan in found for batch in plan for part in batch.micro_batches]
    assert max(len(part.rows) for part in parts) <= (micro_batch_size or 8)
    sizes = [[len(part.rows) for part in batch.micro_batches] for plan in found for batch in plan]
    assert all(max(parts) - min(parts) <= 1 for parts in sizes)
    assert all(plan[step].micro_batches for plan in found for step in range(3)), "none may be missing in a step"


def test_a_worker_without_a_row_stands_in_with_one_that_does_not_count(monkeypatch):
    found = plans(monkeypatch, 9)
    weights = [[part.weight for batch in plan for part in batch.micro_batches] for plan in found]
    assert weights[:7] == [[1.0] * 3] * 7
    assert weights[7] == [1.0, 1.0, 0.0]
    assert weights[8] == [0.0] * 3


@pytest.mark.parametrize("size", [2, 3])
def test_a_rows_partner_does_not_depend_on_the_number_of_workers(monkeypatch, size):
    def partners(found):
        parts = [part for plan in found for batch in plan for part in batch.micro_batches]
        return {
            row: other for part in parts for row, other in zip(part.rows.tolist(), part.partners.tolist(), strict=True)
        }

    alone = partners(plans(monkeypatch, 1))
    assert partners(plans(monkeypatch, size, micro_batch_size=2)) == alone
    assert sorted(alone.values()) == list(range(NUM_ROWS))
    assert sum(row == other for row, other in alone.items()) == 1, "the middle one of the batch of seven"


def noise():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (NUM_ROWS, *SMALL.training_size, 3), generator=generator, dtype=torch.uint8)
    return pixels, torch.arange(NUM_ROWS) % NUM_CLASSES


def inputs_by_row(found, augmentation):
    """What each row becomes, whichever worker it falls to."""
    pixels, labels = noise()
    inputs_of = EpochInputs.draw(MODEL, labels, augmentation, 5, 1)
    by_row = {}
    for part in [part for plan in found for batch in plan for part in batch.micro_batches if part.weight]:
        inputs, targets = inputs_of(part, pixels[part.reads])
        by_row |= {row: pair for row, *pair in zip(part.rows.tolist(), inputs, targets, strict=True)}
    return by_row


@pytest.mark.parametrize("augmentation", [None, Augmentation(0.5, True), MIXING])
def test_the_same_pixels_on_any_number_of_workers(monkeypatch, augmentation):
    mixes = augmentation is MIXING
    alone = inputs_by_row(plans(monkeypatch, 1, mixes=mixes), augmentation)
    for size in (2, 3):
        found = inputs_by_row(plans(monkeypatch, size, mixes=mixes, micro_batch_size=3), augmentation)
        assert found.keys() == alone.keys() == set(range(NUM_ROWS))
        for row, (image, target) in alone.items():
            assert torch.equal(found[row][0], image)
            assert torch.equal(found[row][1], target)


def test_mixed_images_and_labels_have_the_same_shares(monkeypatch):
    labels = torch.arange(NUM_ROWS) % NUM_CLASSES
    # One grey per class, so that an image's mean says of which classes it is made.
    greys = torch.tensor([0, 100, 255], dtype=torch.uint8)
    pixels = greys[labels].view(-1, 1, 1, 1).expand(-1, *SMALL.training_size, 3)
    inputs_of = EpochInputs.draw(MODEL, labels, MIXING, 5, 1)
    assert inputs_of.mixes
    for batch in plans(monkeypatch, 1)[0]:
        (part,) = batch.micro_batches
        inputs, targets = inputs_of(part, pixels[part.reads])
        assert targets.sum(1) == pytest.approx(torch.ones(len(part.rows)), abs=1e-5)
        whole = SMALL.normalize(greys.view(-1, 1, 1, 1).expand(-1, 4, 4, 3)).mean((1, 2, 3))
        assert inputs.mean((1, 2, 3)) == pytest.approx(targets @ whole, abs=1e-3)
        own = F.one_hot(labels[part.rows], NUM_CLASSES).float()
        assert not torch.equal(targets, own)


def test_without_augmentation_a_row_is_its_centre(monkeypatch):
    (plan,) = plans(monkeypatch, 1, mixes=False)
    pixels, labels = noise()
    inputs_of = EpochInputs.draw(MODEL, labels, None, 5, 1)
    part = plan[0].micro_batches[0]
    inputs, targets = inputs_of(part, pixels[part.reads])
    assert torch.equal(inputs, SMALL.normalize(SMALL.centre_crop(pixels[part.rows])))
    assert torch.equal(targets, labels[part.rows])
