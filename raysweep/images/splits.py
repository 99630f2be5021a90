"""The splits train, validation and test: their names, stratified splits, and few-shot subsets."""

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
FEW_IMAGES = 30  # with fewer, one image changes a split's accuracy by more than three points


def normalize_split(value: object) -> Split:
    """Returns the split that a name (`"val"`, `"Training"`) or a number (0, 1, 2, as Ludwig has them) stands for.

    Raises:
        DataError: the value is not the name or number of a split.
    """
    text = str(value).strip().lower()
    if text in SPLIT_NAMES:
        return SPLIT_NAMES[text]
    for number, split in enumerate(SPLITS):
        # Integers become "1.0" in a table whose column once had missing values.
        if text in (str(number), f"{number}.0"):
            return split
    accepted = "accepted: train, validation (val, valid, dev, eval), test, or 0, 1, 2"
    hint = did_you_mean(text, SPLIT_NAMES)
    raise DataError(f"{value!r} names no split; {hint + ' ' if hint.startswith('did') else ''}{accepted}")


def stratified_split(
    labels: npt.NDArray[np.integer], groups: Sequence[str], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Takes about `fraction` of the rows of each class, and keeps the rows of each group together.

    The result depends only on the groups' names and the seed, not on the order of the rows, so that the split stays the
    same when a folder is moved or listed in another order.

    Args:
        labels: Class index of each row, `(rows,)`.
        groups: Group of each row, such as its content hash: copies of one image must not be in different splits.
        fraction: Share of each class's rows to take, in [0, 1).
        seed: Determines which of the possible splits is made.

    Returns:
        Mask `(rows,)` of the taken rows. Of a class with at least two groups, at least one is taken and one is left.
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


def grouped_split(
    labels: npt.NDArray[np.integer], groups: Sequence[str], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Does what `stratified_split` does for groups whose rows may have different labels.

    Groups come in a random order that the seed determines. One is taken, or given back, if the share of each class then
    comes closer to the wanted share, in the sum of squares over the classes; this repeats until none is.

    Returns:
        Mask `(rows,)` of the taken rows. At least one group is taken and one is left, if there are two.
    """
    assert 0 <= fraction < 1
    names, members = np.unique(np.array(groups, dtype=object).astype(str), return_inverse=True)
    kinds, classes = np.unique(labels, return_inverse=True)
    if len(names) < 2 or fraction == 0:
        return np.zeros(len(labels), dtype=np.bool_)
    counts = np.zeros((len(names), len(kinds)))
    np.add.at(counts, (members, classes), 1)
    shares = counts / counts.sum(axis=0)
    order = sorted(range(len(names)), key=lambda number: _draw(str(names[number]), seed))
    taken, missing, has_changed = np.zeros(len(names), dtype=np.bool_), np.full(len(kinds), float(fraction)), True
    while has_changed:
        has_changed = False
        for number in order[:-1]:
            left = missing + (shares[number] if taken[number] else -shares[number])
            if (left**2).sum() < (missing**2).sum() - 1e-12:
                taken[number], missing, has_changed = not taken[number], left, True
    if not taken.any():
        taken[counts.sum(axis=1).argmin()] = True
    return taken[members]


def _draw(group: str, seed: int) -> bytes:
    """Returns a number that looks random, to sort groups by; independent of the order of the rows."""
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()


def _commonest(labels: npt.NDArray[np.integer]) -> int:
    """Returns the label that most rows have, or the smallest such label. It is the class of a whole group."""
    counts = Counter(int(label) for label in labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _choose(groups: list[str], members: dict[str, list[int]], fraction: float, seed: int) -> list[str]:
    """Takes groups in a random order that the seed determines, as long as they fit into the wanted share."""
    if len(groups) < 2:
        return []
    order = sorted(groups, key=lambda group: _draw(group, seed))
    room = max(1, round(fraction * sum(len(members[group]) for group in groups)))
    chosen: list[str] = []
    for group in order[:-1]:  # the last one is never taken
        if len(members[group]) <= room:
            chosen.append(group)
            room -= len(members[group])
    # If every group is larger than the share, the smallest comes closest to it.
    return chosen or [min(order, key=lambda group: len(members[group]))]


def few_shot(labels: npt.NDArray[np.integer], shots: int, seed: int) -> npt.NDArray[np.int64]:
    """Chooses `shots` rows of each class, or all rows of a class that has fewer.

    The choices are nested: with the same seed, the rows for 5 shots are among those for 10, as in the few-shot
    protocols of CLIP and ELEVATER. A curve over shots thus shows the effect of more images, not of different images.

    Returns:
        int64 `(rows,)`, ascending indices into `labels`.
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
    groups: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    is_grouped: bool = False,
) -> tuple[list[str], tuple[str, ...]]:
    """Determines the split of each row. Splits of `fractions` that the source does not have are taken from train.

    Args:
        given: The value in the source for each row; None counts as train.
        labels: Class index of each row.
        groups: Name of each row's group, such as its content hash; a group stays in one split.
        fractions: For each split that may be missing, its share of the original train rows. Splits are taken in this
            order.
        seed: Determines which rows are taken.
        is_grouped: Whether a group may have many rows of several classes, and not only copies of one image.

    Returns:
        The split of each row, and the names of the splits that were taken from train.

    Raises:
        DataError: a value is not the name of a split, or a split has no images.
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
        take = grouped_split if is_grouped else stratified_split
        mask = take(labels[train], [groups[row] for row in train.tolist()], fractions[split] / left, seed)
        splits[train[mask]] = split
        left -= fractions[split]
    for split, purpose in (("validation", "to rank trials on"), ("test", "to report on")):
        if split not in splits:
            raise DataError(f"no {split} images {purpose}, and none could be taken from train: add images")
    return splits.tolist(), tuple(split for split in derived if split in splits)


def describe_copies(
    where: Sequence[str], names: Sequence[str], splits: Sequence[str], hashes: Sequence[str]
) -> list[str]:
    """Returns warnings about images that are in several splits or have several class names, each with an example."""
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


def describe_few_images(
    labels: npt.NDArray[np.int32], splits: Sequence[str], classes: Sequence[str], shots: int
) -> list[str]:
    """Returns warnings about splits and classes with too few images to train, to evaluate, or to draw `shots`.

    No split may be empty: `settle_splits` raises an error for that.
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
