"""Which rows train, which choose, and which judge: split names, stratified splits and few-shot subsets."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Sized
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from raysweep.errors import DataError, did_you_mean

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "validate": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
FEW_IMAGES = 30  # below this, one image moves a split's accuracy by more than three points


def normalize_split(value: object) -> Split:
    """Returns the split that a name (`"val"`, `"Training"`) or a number (0, 1, 2, as Ludwig has them) stands for.

    Raises:
        DataError: the value names no split.
    """
    text = str(value).strip().lower()
    if text in SPLIT_NAMES:
        return SPLIT_NAMES[text]
    for number, split in enumerate(SPLITS):
        # "1.0" is what a column of integers becomes in a table that once had gaps.
        if text in (str(number), f"{number}.0"):
            return split
    accepted = "accepted: train, validation (val, valid, dev, eval), test, or 0, 1, 2"
    hint = did_you_mean(text, SPLIT_NAMES)
    raise DataError(f"{value!r} names no split; {hint + ' ' if hint.startswith('did') else ''}{accepted}")


def stratified_split(
    labels: npt.NDArray[np.integer], groups: Sequence[str], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Chooses about `fraction` of each class, never parting the rows of one group.

    Depends on the groups' names and the seed only, not on the order of the rows, so that the split stays the same when
    a folder is listed differently or moved.

    Args:
        labels: Class index of each row, `(rows,)`.
        groups: Group of each row, such as its content hash: copies of one image must not meet themselves across splits.
        fraction: Share of each class's rows to take, in [0, 1).
        seed: Chooses among the possible splits.

    Returns:
        Mask `(rows,)` of the rows taken. A class with two groups or more gives at least one and keeps at least one.
    """
    assert 0 <= fraction < 1
    assert len(labels) == len(groups)
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    by_class: dict[int, list[str]] = defaultdict(list)
    for group, rows in members.items():
        by_class[_commonest(labels[rows])].append(group)
    mask = np.zeros(len(labels), dtype=np.bool_)
    if fraction > 0:
        for class_groups in by_class.values():
            for group in _choose(class_groups, members, fraction, seed):
                mask[members[group]] = True
    return mask


def _commonest(labels: npt.NDArray[np.integer]) -> int:
    """The label that most rows have, the smallest of equals: a group counts for one class."""
    counts = Counter(int(label) for label in labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _choose(groups: list[str], members: dict[str, list[int]], fraction: float, seed: int) -> list[str]:
    """Takes groups in an order drawn by the seed, as long as they fit into the share that is due."""
    if len(groups) < 2:
        return []
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    room = max(1, round(fraction * sum(len(members[group]) for group in groups)))
    chosen: list[str] = []
    for group in order[:-1]:  # the last one stays, whatever its size
        if len(members[group]) <= room:
            chosen.append(group)
            room -= len(members[group])
    # Where every group is larger than the share, the smallest is the least wrong.
    return chosen or [min(order, key=lambda group: len(members[group]))]


def few_shot(labels: npt.NDArray[np.integer], shots: int, seed: int) -> npt.NDArray[np.int64]:
    """Chooses `shots` rows of each class (all of a class that has fewer).

    Nested: for one seed the rows of 5 shots are among those of 10, as in CLIP's and ELEVATER's few-shot protocols, so
    that a curve over shots shows the effect of more images and not of other images.

    Returns:
        Ascending row indices into `labels`.
    """
    assert shots >= 1
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen.append(np.random.default_rng([seed, int(label)]).permutation(rows)[:shots])
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.empty(0, np.int64)


def settle_splits(
    given: Sequence[Any],
    labels: npt.NDArray[np.int32],
    hashes: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
) -> tuple[list[str], tuple[str, ...]]:
    """Names each row's split, and takes from train those of `fractions` that the source does not have.

    Args:
        given: The source's own value for each row; None counts as train.
        labels: Class index of each row.
        hashes: Content hash of each row; copies of an image stay in one split.
        fractions: Share of the original train rows for each split that may be missing, in the order of taking.
        seed: Chooses the rows taken.

    Returns:
        The split of each row, and the names of the splits that were taken from train.

    Raises:
        DataError: a value names no split, or there is nothing to train on or to rank trials on.
    """
    known: dict[Any, str] = {None: "train"}
    for value in set(given) - {None}:
        try:
            known[value] = normalize_split(value)
        except DataError as error:
            raise DataError(f"{sum(other == value for other in given)} rows in split {error}") from error
    splits = np.array([known[value] for value in given], dtype="<U10")
    if "train" not in splits:
        raise DataError(f"no training images; found only {', '.join(sorted(set(splits.tolist())))}")
    derived = tuple(split for split in fractions if split not in splits)
    if sum(fractions[split] for split in derived) >= 1:
        raise DataError("data.validation_fraction and data.test_fraction leave nothing to train on")
    left = 1.0
    for split in derived:
        train = np.flatnonzero(splits == "train")
        mask = stratified_split(labels[train], [hashes[row] for row in train.tolist()], fractions[split] / left, seed)
        splits[train[mask]] = split
        left -= fractions[split]
    for split, purpose in (("validation", "to rank trials on"), ("test", "to report on")):
        if split not in splits:
            raise DataError(f"no {split} images {purpose}, and none could be taken from train: add images")
    return splits.tolist(), tuple(split for split in derived if split in splits)


def describe_copies(
    where: Sequence[str], names: Sequence[str], splits: Sequence[str], hashes: Sequence[str]
) -> list[str]:
    """Returns warnings about images that stand in several splits or under several class names, each with an example."""
    by_hash: dict[str, list[int]] = defaultdict(list)
    for row, content in enumerate(hashes):
        by_hash[content].append(row)
    copies = [group for group in by_hash.values() if len(group) > 1]
    warnings = []
    for values, trouble in ((splits, "split (leakage)"), (names, "class (conflicting labels)")):
        groups = [group for group in copies if len({values[row] for row in group}) > 1]
        if groups:
            first = groups[0][0]
            other = next(row for row in groups[0] if values[row] != values[first])
            warnings.append(
                f"{count_of(groups, 'image')} in more than one {trouble}: "
                f"{where[first]} ({values[first]}) and {where[other]} ({values[other]})"
            )
    return warnings


def describe_thin_places(
    labels: npt.NDArray[np.int32], splits: Sequence[str], classes: Sequence[str], shots: int
) -> list[str]:
    """Returns warnings about splits and classes with too few images to learn or judge from, or to draw `shots`.

    No split is empty: `settle_splits` refuses that.
    """
    warnings = []
    members = {split: labels[np.array(splits) == split] for split in SPLITS}
    for split, present in members.items():
        absent = [name for label, name in enumerate(classes) if label not in present]
        if absent:
            warnings.append(f"{count_of(absent, 'class')} without {split} images: {', '.join(absent[:5])}")
        if split != "train" and len(present) < FEW_IMAGES:
            warnings.append(f"only {count_of(present, f'{split} image')}: each is {1 / len(present):.1%} of accuracy")
    counts = np.bincount(members["train"], minlength=len(classes))
    if 0 < counts.min() < shots:
        fewest = int(counts.argmin())
        warnings.append(
            f"data.shots asks for {shots} images per class; {classes[fewest]} has {counts[fewest]} to train on"
        )
    return warnings


def count_of(things: Sized, noun: str) -> str:
    """Returns `"1 image"`, `"2 images"`, `"3 classes"`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(things)} {noun if len(things) == 1 else plural}"
