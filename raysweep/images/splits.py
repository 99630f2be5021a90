"""The splits train, validation and test: their names, stratified splits, and few-shot subsets."""

import hashlib
from collections.abc import Mapping, Sequence, Sized
from typing import Literal

import numpy as np
import numpy.typing as npt

from raysweep.errors import DataError, did_you_mean
from raysweep.images.contents import Contents, Together
from raysweep.images.listed_rows import Row, Values

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
EVERY_ROW = slice(None)
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
    labels: npt.NDArray[np.integer],
    groups: Together,
    fraction: float,
    seed: int,
    among: npt.NDArray[np.bool_] | slice = EVERY_ROW,
) -> npt.NDArray[np.bool_]:
    """Takes about `fraction` of the rows of each class, and keeps the rows of each group together.

    The result depends only on the groups' names and the seed, not on the order of the rows, so that the split stays the
    same when a folder is moved or listed in another order.

    Args:
        labels: Class index of each row, `(rows,)`.
        groups: The group of each row, such as its copies: copies of one image must not be in different splits.
        fraction: Share of each class's rows to take, in [0, 1).
        seed: Determines which of the possible splits is made.
        among: Mask `(rows,)` of the rows that can be taken; the others do not count.

    Returns:
        Mask `(rows,)` of the taken rows. Of a class with at least two groups, at least one is taken and one is left.
    """
    assert 0 <= fraction < 1
    assert len(labels) == len(groups.numbers)
    sizes = np.bincount(groups.numbers[among]).astype(np.int32)
    classes = _commonest(labels[among], groups.numbers[among], len(sizes))
    is_taken = np.zeros(int(groups.numbers.max(initial=0)) + 1, np.bool_)
    if fraction > 0:
        by_class = np.argsort(classes, kind="stable")  # groups without rows, whose class is -1, come first
        starts = np.searchsorted(classes[by_class], np.unique(classes[classes >= 0]))
        for members in np.split(by_class, starts)[1:]:
            is_taken[_choose(members, sizes, groups, fraction, seed)] = True
    return _only_among(is_taken[groups.numbers], among)


def _only_among(taken: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_] | slice) -> npt.NDArray[np.bool_]:
    return taken if isinstance(among, slice) else taken & among


def grouped_split(
    labels: npt.NDArray[np.integer],
    groups: Together,
    fraction: float,
    seed: int,
    among: npt.NDArray[np.bool_] | slice = EVERY_ROW,
) -> npt.NDArray[np.bool_]:
    """Does what `stratified_split` does for groups whose rows may have different labels.

    Groups come in a random order that the seed determines. One is taken, or given back, if the share of each class then
    comes closer to the wanted share, in the sum of squares over the classes; this repeats until none is.

    Returns:
        Mask `(rows,)` of the taken rows. At least one group is taken and one is left, if there are two.
    """
    assert 0 <= fraction < 1
    present, members = np.unique(groups.numbers[among], return_inverse=True)
    names, places = np.unique([groups.name_of(number) for number in present.tolist()], return_inverse=True)
    members = places[members]
    kinds, classes = np.unique(labels[among], return_inverse=True)
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
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[among] = taken[members]
    return mask


def _draw(group: str, seed: int) -> bytes:
    """Returns a number that looks random, to sort groups by; independent of the order of the rows."""
    return hashlib.sha256(f"{seed}:{group}".encode()).digest()


def _commonest(
    labels: npt.NDArray[np.integer], groups: npt.NDArray[np.integer], num_groups: int
) -> npt.NDArray[np.int32]:
    """Returns the class of each group: the label that most of its rows have, or the smallest such; -1 without rows."""
    classes = np.full(num_groups, -1, np.int32)
    classes[groups] = labels
    mixed = np.unique(groups[classes[groups] != labels])
    if not len(mixed):
        return classes
    rows = np.flatnonzero(np.isin(groups, mixed))
    pairs, counts = np.unique(np.stack([groups[rows], labels[rows]]), axis=1, return_counts=True)
    order = np.lexsort((-pairs[1], counts, pairs[0]))  # the last one of each group is what is wanted
    classes[pairs[0, order]] = pairs[1, order]
    return classes


def _choose(
    members: npt.NDArray[np.integer], sizes: npt.NDArray[np.integer], groups: Together, fraction: float, seed: int
) -> npt.NDArray[np.integer]:
    """Takes groups in a random order that the seed determines, as long as they fit into the wanted share."""
    if len(members) < 2:
        return members[:0]
    # Of the number that looks random, 64 bits are enough: nobody has so many groups that two of these are the same.
    draws = (int.from_bytes(_draw(groups.name_of(number), seed)[:8], "big") for number in members.tolist())
    order = members[np.argsort(np.fromiter(draws, np.uint64, len(members)), kind="stable")]
    room = max(1, round(fraction * int(sizes[order].sum())))
    chosen = []
    for place, size in enumerate(sizes[order[:-1]].tolist()):  # the last one is never taken
        if size <= room:
            chosen.append(place)
            room -= size
    # If every group is larger than the share, the smallest comes closest to it.
    return order[chosen or [int(sizes[order].argmin())]]


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
    given: Values,
    labels: npt.NDArray[np.int32],
    groups: Together,
    fractions: Mapping[Split, float],
    seed: int,
    is_grouped: bool = False,
) -> tuple[npt.NDArray[np.int8], tuple[Split, ...]]:
    """Determines the split of each row. Splits of `fractions` that the source does not have are taken from train.

    Args:
        given: The value in the source for each row; None counts as train.
        labels: Class index of each row.
        groups: Each row's group, such as the copies of one image; a group stays in one split.
        fractions: For each split that may be missing, its share of the original train rows. Splits are taken in this
            order.
        seed: Determines which rows are taken.
        is_grouped: Whether a group may have many rows of several classes, and not only copies of one image.

    Returns:
        The split of each row as its number in `SPLITS`, and the names of the splits that were taken from train.

    Raises:
        DataError: a value is not the name of a split, or a split has no images.
    """
    counts = given.counts()
    known = np.zeros(len(given.distinct), np.int8)
    for number in counts:
        value = given.distinct[number]
        try:
            known[number] = 0 if value is None else SPLITS.index(normalize_split(value))
        except DataError as error:
            num_rows = sum(count for other, count in counts.items() if given.distinct[other] == value)
            raise DataError(f"{num_rows} rows in split {error}") from error
    splits = known[given.numbers]
    present = {split for number, split in enumerate(SPLITS) if (splits == number).any()}
    if "train" not in present:
        raise DataError(f"no training images; found only {', '.join(sorted(present))}")
    derived = tuple(split for split in fractions if split not in present)
    if sum(fractions[split] for split in derived) >= 1:
        raise DataError("data.validation_fraction and data.test_fraction leave nothing to train on")
    left = 1.0
    for split in derived:
        take = grouped_split if is_grouped else stratified_split
        mask = take(labels, groups, fractions[split] / left, seed, splits == 0)
        splits[mask] = SPLITS.index(split)
        left -= fractions[split]
        if mask.any():
            present.add(split)
    for split, purpose in (("validation", "to rank trials on"), ("test", "to report on")):
        if split not in present:
            raise DataError(f"no {split} images {purpose}, and none could be taken from train: add images")
    return splits, tuple(split for split in derived if split in present)


def describe_copies(
    rows: Sequence[Row], contents: Contents, splits: npt.NDArray[np.int8], labels: npt.NDArray[np.int32],
    classes: Sequence[str],
) -> list[str]:  # fmt: skip
    """Returns warnings about images that are in several splits or have several class names, each with an example."""
    warnings = []
    for numbers, names, trouble in (
        (splits, SPLITS, "split (leakage)"),
        (labels, classes, "class (conflicting labels)"),
    ):
        num_images, members = contents.differing(numbers)
        if num_images:
            first, other = int(members[0]), int(members[(numbers[members] != numbers[members[0]]).argmax()])
            warnings.append(
                f"{count_of(range(num_images), 'image')} in more than one {trouble}: {rows[first].source} "
                f"({names[numbers[first]]}) and {rows[other].source} ({names[numbers[other]]})"
            )
    return warnings


def describe_few_images(
    labels: npt.NDArray[np.int32], splits: npt.NDArray[np.int8], classes: Sequence[str], shots: int
) -> list[str]:
    """Returns warnings about splits and classes with too few images to train, to evaluate, or to draw `shots`.

    No split may be empty: `settle_splits` raises an error for that.
    """
    warnings = []
    counts = {
        split: np.bincount(labels[splits == number], minlength=len(classes)) for number, split in enumerate(SPLITS)
    }
    for split, present in counts.items():
        absent = [name for name, count in zip(classes, present, strict=True) if not count]
        if absent:
            warnings.append(f"{count_of(absent, 'class')} without {split} images: {', '.join(absent[:5])}")
        if split != "train" and present.sum() < FEW_IMAGES:
            images = count_of(range(present.sum()), f"{split} image")
            warnings.append(f"only {images}: each is {1 / present.sum():.1%} of accuracy")
    fewest = int(counts["train"].argmin())
    if 0 < counts["train"][fewest] < shots:
        warnings.append(
            f"data.shots asks for {shots} images per class; {classes[fewest]} has {counts['train'][fewest]} to train on"
        )
    return warnings


def count_of(things: Sized, noun: str) -> str:
    """Returns `"1 image"`, `"2 images"`, `"3 classes"`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(things)} {noun if len(things) == 1 else plural}"
