"""Near copies by features: images of validation and test that show what an image of train shows.

They find what hashes do not (see `near_copies`). An image and its copy, rotated or cropped a little, have nearly the
same features. How near is near depends on the encoder and on the data, so the nearest training image is compared with
others of its class, as Lowe's ratio test does (Lowe 2004): a copy is far nearer than the tenth nearest. Measured with
MobileNetV2, as the ratio of the two distances: photos rotated by up to 5 degrees have .04 (median), by up to 12 degrees
.08; images without a copy .5 and more on the bean leaves and on drawn shapes, .32 and more on the digits.

Features of few effective dimensions, as those of small or random encoders, have small ratios by chance: of k neighbours
in m dimensions the nearest has a ratio below r with probability (k - 1) r^m. The dimension is estimated from the other
neighbours (Levina and Bickel 2004), and the limit is lowered until fewer than one image is expected below it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEIGHBOURS = 10  # a copy may have several others in train
FEWEST_NEIGHBOURS = 4  # in a smaller class nothing tells how near its images are to one another
MAX_RATIO = 0.2
EXPECTED_BY_CHANCE = 0.5  # images
MAX_CHECKED = 1_000  # images of each split
MAX_TRAIN_BYTES = 2**30  # of half floats
ROWS_AT_ONCE = 256


class FeatureCopy(NamedTuple):
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


def find_feature_copies(features: np.ndarray, train: np.ndarray, labels: np.ndarray) -> list[FeatureCopy]:
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
    candidates: list[FeatureCopy] = []
    ratios, dimensions = [np.empty(0)], [np.empty(0)]
    for start in range(0, len(features), ROWS_AT_ONCE):
        cosines = _directions(features[start : start + ROWS_AT_ONCE], centre) @ known.T
        nearest = cosines.argmax(axis=1)
        for label in np.unique(labels[nearest]):
            if len(members[label]) < FEWEST_NEIGHBOURS:
                continue
            rows = np.flatnonzero(labels[nearest] == label)
            num_known = min(2 * NEIGHBOURS, len(members[label]))
            distances = 1 - cosines[np.ix_(rows, members[label])]
            distances = np.sort(np.partition(distances, num_known - 1, axis=1)[:, :num_known], axis=1)
            distances = np.maximum(distances, 1e-12)
            ratios.append(distances[:, 0] / distances[:, min(NEIGHBOURS, num_known) - 1])
            dimensions.append(_dimensions(distances))
            candidates += [
                FeatureCopy(start + int(row), int(nearest[row]), float(cosines[row, nearest[row]])) for row in rows
            ]
    own = np.concatenate(ratios)
    limit = _largest_ratio(np.concatenate(dimensions))
    found = [copy for copy, ratio in zip(candidates, own, strict=True) if ratio <= limit]
    return sorted(found, key=lambda copy: (-copy.similarity, copy.row))


def _dimensions(distances: np.ndarray) -> np.ndarray:
    """Estimates the effective dimension around each image, `(num_images,)`.

    Args:
        distances: `(num_images, num_neighbours)`, ascending. Only the farther half counts, since the nearer ones may be
            copies: of k neighbours in m dimensions, log(distance k / distance j) is (1/j + ... + 1/(k - 1)) / m on
            average.
    """
    num = distances.shape[1]
    expected = np.cumsum(1 / np.arange(num - 1, num // 2, -1))[::-1]
    logs = np.log(distances[:, -1:] / distances[:, num // 2 : -1])
    return np.asarray(expected.sum() / np.maximum(logs.sum(axis=1), 1e-6))


def _largest_ratio(dimensions: np.ndarray) -> float:
    """Returns the ratio up to which an image counts as a copy, from the dimension around each image."""
    if not len(dimensions):
        return 0.0
    by_chance = EXPECTED_BY_CHANCE / (len(dimensions) * (NEIGHBOURS - 1))
    return min(MAX_RATIO, float(by_chance ** (1 / np.median(dimensions))))


def _directions(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    centred = features.astype(np.float32) - centre
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(lengths, np.float32(1e-12)))


def describe_feature_copies(split: str, num_checked: int, num_images: int, pairs: Sequence[tuple[str, str]]) -> str:
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
        f"{len(pairs):,} of {of_all} {split} images {verb} nearly the features of one in train (leakage), such as "
        f"{examples}. If they show the same thing, set data.group; the pairs are in feature_copies.json"
    )
