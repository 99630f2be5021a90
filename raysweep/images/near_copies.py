"""Near copies: images of validation and test that have a nearly identical image in train, by their features.

An image and its copy, rotated or cropped a little, have nearly the same features. How near is near depends on the
encoder and on the data, so the nearest training image is compared with others of its class, as Lowe's ratio test does
(Lowe 2004): a copy is far nearer than the tenth nearest. Measured with MobileNetV2, as the ratio of the two distances:
photos rotated by up to 5 degrees have .04 (median), by up to 12 degrees .08; images without a copy .5 and more on the
bean leaves and on drawn shapes, .32 and more on the digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEIGHBOURS = 10  # a copy may have several others in train
FEWEST_NEIGHBOURS = 4  # in a smaller class nothing tells how near its images are to one another
MAX_RATIO = 0.15
MAX_CHECKED = 1_000  # images of each split
MAX_TRAIN_BYTES = 2**30  # of half floats
ROWS_AT_ONCE = 256


class NearCopy(NamedTuple):
    """An image that has a near copy in train.

    Attributes:
        row: Position of the image among those that were checked.
        train_row: Position of the nearest training image.
        similarity: Cosine of the angle between their centred features.
    """

    row: int
    train_row: int
    similarity: float


def spread(num_rows: int, limit: int) -> np.ndarray:
    """Returns at most `limit` positions out of `num_rows`, evenly spaced."""
    return np.arange(num_rows) if num_rows <= limit else np.linspace(0, num_rows - 1, limit).astype(np.int64)


def find_near_copies(features: np.ndarray, train: np.ndarray, labels: np.ndarray) -> list[NearCopy]:
    """Finds the images that have a near copy in train.

    Args:
        features: `(num_images, num_features)` of the images to check.
        train: `(num_train, num_features)` of the training images.
        labels: `(num_train,)`, their classes.
    """
    if not len(features) or not len(train):
        return []
    centre = train.mean(axis=0, dtype=np.float32)
    known = _directions(train, centre)
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    found: list[NearCopy] = []
    for start in range(0, len(features), ROWS_AT_ONCE):
        cosines = _directions(features[start : start + ROWS_AT_ONCE], centre) @ known.T
        nearest = cosines.argmax(axis=1)
        for label in np.unique(labels[nearest]):
            if len(members[label]) < FEWEST_NEIGHBOURS:
                continue
            rows = np.flatnonzero(labels[nearest] == label)
            place = min(NEIGHBOURS, len(members[label])) - 1
            distances = np.partition(1 - cosines[np.ix_(rows, members[label])], [0, place], axis=1)
            is_copy = distances[:, 0] <= MAX_RATIO * distances[:, place]
            found += [
                NearCopy(start + int(row), int(nearest[row]), float(cosines[row, nearest[row]]))
                for row in rows[is_copy]
            ]
    return sorted(found, key=lambda copy: (-copy.similarity, copy.row))


def _directions(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    centred = features.astype(np.float32) - centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(lengths, np.float32(1e-12)))


def describe_near_copies(split: str, num_checked: int, num_images: int, pairs: Sequence[tuple[str, str]]) -> str:
    """Returns the warning about one split.

    Args:
        split: Name of the split.
        num_checked: Number of its images that were checked.
        num_images: Number of its images.
        pairs: The images that have a near copy in train, each with that copy; at least one.
    """
    of_all = f"{num_images:,}" if num_checked == num_images else f"{num_checked:,} checked"
    verb = "has" if len(pairs) == 1 else "have"
    examples = "; ".join(f"{image} and {copy}" for image, copy in pairs[:3])
    return (
        f"{len(pairs):,} of {of_all} {split} images {verb} a near copy in train (leakage), such as {examples}. "
        "If they show the same thing, set data.group; the pairs are in near_copies.json"
    )
