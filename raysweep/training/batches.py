"""The batches of one worker in an epoch: its rows of every global batch, in micro-batches, augmented on its device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from raysweep.encoders.head import Classifier
from raysweep.encoders.preprocess import Preprocessing
from raysweep.training.augment import Augmentation, augmentation_draws, mixing_draws, mixing_masks, random_resized_crop
from raysweep.training.distributed import own_rows, seeded_generator


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        rows: int64 `(n,)` row numbers.
        partners: int64 `(n,)`, the row that each row is mixed with; None without mixing.
        weight: weight of their loss. It is 0 for the placeholder row of a worker without rows, which must still join
            the gradient synchronisation.
    """

    rows: Tensor
    partners: Tensor | None
    weight: float

    @property
    def reads(self) -> Tensor:
        """The rows whose pixels are read: first `rows`, then `partners`."""
        return self.rows if self.partners is None else torch.cat([self.rows, self.partners])


@dataclass(frozen=True)
class Batch:
    """One step: the number of rows of all workers together, and this worker's micro-batches."""

    num_rows: int
    micro_batches: list[MicroBatch]


def plan_epoch(
    num_rows: int, batch_size: int, micro_batch_size: int | None, seed: int, epoch: int, *, mixes: bool
) -> list[Batch]:
    """Splits an epoch's permutation of all rows into batches, and this worker's share of each into micro-batches.

    Sizes differ by at most one row, because a small last batch would have bad batch-norm statistics.
    """
    order = torch.randperm(num_rows, generator=seeded_generator(seed, epoch))
    batches = []
    for batch in order.tensor_split(math.ceil(num_rows / batch_size)):
        rows, partners = own_rows(batch), own_rows(batch.flip(0))
        weight = 1.0 if len(rows) else 0.0
        if len(rows) == 0:
            rows = partners = batch[:1]
        num_parts = math.ceil(len(rows) / (micro_batch_size or len(rows)))
        pairs = zip(rows.tensor_split(num_parts), partners.tensor_split(num_parts), strict=True)
        parts = [MicroBatch(part, mixed_with if mixes else None, weight) for part, mixed_with in pairs]
        batches.append(Batch(len(batch), parts))
    return batches


@dataclass(frozen=True)
class EpochInputs:
    """Makes model inputs from the pixels of micro-batches.

    Attributes:
        preprocessing: preprocessing of the encoder.
        labels: int64 `(num_rows,)` of all training rows; on the training device, as are the draws.
        num_classes: number of classes.
        augmentation: augmentation of the images; None for centre crops.
        crops: float32 `(num_rows, 5)` from `augmentation_draws`.
        mixing: float32 `(num_rows, 4)` from `mixing_draws`; None without mixing.
    """

    preprocessing: Preprocessing
    labels: Tensor
    num_classes: int
    augmentation: Augmentation | None
    crops: Tensor
    mixing: Tensor | None

    @property
    def mixes(self) -> bool:
        """Whether rows are mixed."""
        return self.mixing is not None

    @classmethod
    def draw(
        cls, model: Classifier, labels: Tensor, augmentation: Augmentation | None, seed: int, epoch: int
    ) -> EpochInputs:
        """Draws an epoch's augmentation per row, so that it does not depend on the number of workers."""
        mixing = mixing_draws(len(labels), augmentation, seed, epoch) if augmentation and augmentation.mixes else None
        crops = augmentation_draws(len(labels), seed, epoch).to(labels.device)
        mixing = mixing if mixing is None else mixing.to(labels.device)
        return cls(model.encoder.preprocessing, labels, model.head.weight.shape[0], augmentation, crops, mixing)

    def __call__(self, micro_batch: MicroBatch, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs and targets of a micro-batch.

        Args:
            micro_batch: row numbers.
            pixels: uint8 `(len(micro_batch.reads), height, width, 3)`.

        Returns:
            Normalised pixels `(n, 3, height, width)`, and int64 labels `(n,)`; with mixing, instead of labels the
            shares of the classes, float32 `(n, num_classes)`.
        """
        # Neither this copy nor `normalize` waits for earlier work of the device.
        reads = micro_batch.reads.to(self.labels.device, non_blocking=True)
        labels = self.labels[reads]
        if self.augmentation is None:
            return self.preprocessing.normalize(self.preprocessing.centre_crop(pixels)), labels
        size, augmentation = self.preprocessing.output_size, self.augmentation
        inputs = self.preprocessing.normalize(random_resized_crop(pixels, self.crops[reads], size, augmentation))
        if self.mixing is None:
            return inputs, labels
        masks = mixing_masks(self.mixing[reads[: len(micro_batch.rows)]], size)
        targets = F.one_hot(labels, self.num_classes).float()
        return _mixed(inputs, masks), _mixed(targets, masks.mean((2, 3)))


def _mixed(values: Tensor, share: Tensor) -> Tensor:
    """Mixes the first half of the values with the second half; `share` is the share of the first."""
    first, second = values.chunk(2)
    return share * first + (1 - share) * second
