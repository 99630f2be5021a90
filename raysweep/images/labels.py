"""From the labels of a source to class names, with warnings about labels that were changed or look alike."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from raysweep.errors import DataError
from raysweep.images.listed_rows import Row, Rows
from raysweep.images.row_splits import known_split
from raysweep.images.splits import SPLITS
from raysweep.images.texts import hashes_of

PAIRS_SHOWN, NAMES_SHOWN, LENGTH_SHOWN = 5, 3, 60
MAX_SEVERAL = 0.25  # share of the images


def number_labels(rows: Rows) -> tuple[np.ndarray, tuple[str, ...], list[str]]:
    """Numbers the class names of rows.

    Returns:
        int32 `(rows,)`, the number of each row's class; the sorted class names; and warnings about labels that were
        changed or look wrong.

    Raises:
        DataError: a label is neither text nor a whole number, or many images have several labels.
    """
    numbers = rows.labels.numbers
    counts = rows.labels.counts()
    values = {number: rows.labels.distinct[number] for number in counts}
    refused = [number for number, value in values.items() if not _is_class(value)]
    if refused:
        _raise_bad_label(rows[int(np.isin(numbers, refused).argmax())])
    names = {number: _class_name(value) for number, value in values.items()}
    classes = sort_classes(set(names.values()))
    places = {name: place for place, name in enumerate(classes)}
    place_of = np.zeros(len(rows.labels.distinct), np.int32)
    for number, name in names.items():
        place_of[number] = places[name]
    labels = place_of[numbers]
    warnings = []
    if len({isinstance(value, str) for value in values.values()}) > 1:
        warnings.append("labels mix numbers and text; a number counts as its digits")
    spaced = {
        value: counts[number] for number, value in values.items() if isinstance(value, str) and value != value.strip()
    }
    if spaced:
        shown = [
            f"{_shown(value)} ({spaced[value]}) is {_shown(value.strip())}" for value in sorted(spaced)[:PAIRS_SHOWN]
        ]
        words = f"{sum(spaced.values())} labels had spaces around them, which were taken off"
        warnings.append(f"{words}: {', '.join(shown)}{_rest(len(spaced))}")
    by_name: Counter[str] = Counter()
    for number, count in counts.items():
        by_name[names[number]] += count
    return labels, classes, [*warnings, *_describe_look_alikes(by_name), *_describe_repeats(rows, labels, classes)]


def check_classes(source: str, rows: Rows) -> None:
    """Checks that the validation and test splits have classes of train.

    Raises:
        DataError: one has none, so that its labels or its folders mean something else; or a split is no text or number.
    """
    usable = rows.usable
    known = [isinstance(value, (str, int, float, type(None))) for value in rows.splits.distinct]
    for number in np.flatnonzero(usable & ~np.array(known, np.bool_)[rows.splits.numbers])[:1]:
        row = rows[int(number)]
        raise DataError(f"{row.source}: split {row.split!r}; accepted: text or numbers")
    classes: dict[str | None, dict[str, str]] = defaultdict(dict)
    num_labels = len(rows.labels.distinct)
    for pair in np.unique(rows.splits.numbers[usable].astype(np.int64) * num_labels + rows.labels.numbers[usable]):
        split, label = rows.splits.distinct[pair // num_labels], rows.labels.distinct[pair % num_labels]
        if _is_class(label):
            name = _class_name(label)
            classes["train" if split is None else known_split(split)][spelling_key(name)] = name
    for split in SPLITS[1:]:
        if classes[split] and classes["train"] and not classes[split].keys() & classes["train"].keys():
            raise DataError(
                f"{source}: no class of {split} ({_some(classes[split])}) is one of train ({_some(classes['train'])}); "
                "accepted: the same classes in every split; or the folder or table of train alone as data.source, "
                "which is split anew"
            )


def _some(names: Mapping[str, str]) -> str:
    shown = [_shown(name) for name in sorted(names.values())[:NAMES_SHOWN]]
    return ", ".join([*shown, *(["..."] if len(names) > NAMES_SHOWN else [])])


def sort_classes(names: set[str]) -> tuple[str, ...]:
    """Sorts class names by value if all are whole numbers, else as text."""
    if all(re.fullmatch(r"-?[0-9]{1,18}", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def spelling_key(name: str) -> str:
    """Returns what look-alike names share: `1` for `01` and `1.0`, `hot dog` for `Hot_Dog` and `hot-dog`."""
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold()).strip()
    if number := re.fullmatch(r"(-?)\+?0*(\d+?)(\.0*)?", folded):
        return "".join(number.group(1, 2))
    words = " ".join(re.split(r"[\s_\u2010-\u2015\u2212-]+", folded)).strip()
    return re.sub(r"(?<![\d.])0+(?=\d)", "", words)


def _is_class(label: Any) -> bool:
    return isinstance(label, (str, int)) or (isinstance(label, float) and label.is_integer())


def _raise_bad_label(row: Row) -> NoReturn:
    raise DataError(f"{row.path}: label {row.label!r}; accepted: text or whole numbers, one label per image")


def _class_name(label: Any) -> str:
    # File names on macOS have decomposed accents. Composed, they equal the same names in a table.
    return unicodedata.normalize("NFC", str(int(label) if isinstance(label, float) else label).strip())


def _describe_repeats(rows: Rows, labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """Returns a warning about files that several rows name, as in tables of boxes, if there are any.

    Raises:
        DataError: so many of them have several labels that these are no mistakes.
    """
    hashes = hashes_of(rows.paths)[rows.named_files]
    hashes.sort()
    repeated = hashes[1:][hashes[1:] == hashes[:-1]]
    if not len(repeated):
        return []
    named: dict[str, set[int]] = defaultdict(set)
    for number in np.flatnonzero(rows.named_files & np.isin(hashes_of(rows.paths), repeated)).tolist():
        named[rows.paths[number]].add(int(labels[number]))
    num_files = len(hashes) - len(repeated)
    several = [path for path in named if len(named[path]) > 1]
    if len(several) > MAX_SEVERAL * num_files:
        names = sorted(classes[label] for label in named[several[0]])
        raise DataError(
            f"multi-label: {len(several)} of {num_files} images have rows with different labels, such as "
            f"{several[0]} ({', '.join(map(_shown, names))}); accepted: one class per image"
        )
    return [f"{len(repeated)} rows name an image that another row names too; such images count several times"]


def _describe_look_alikes(counts: Mapping[str, int]) -> list[str]:
    """Returns one warning about classes that may be one class under several spellings, with their numbers of images."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(counts):
        alike[spelling_key(name)].append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    if not groups:
        return []
    shown = [" and ".join(f"{_shown(name)} ({counts[name]})" for name in names) for names in groups[:PAIRS_SHOWN]]
    return [f"classes whose names look alike, with their numbers of images: {'; '.join(shown)}{_rest(len(groups))}"]


def _shown(label: str) -> str:
    text = repr(label)
    return text if len(text) <= LENGTH_SHOWN else f"{text[:LENGTH_SHOWN]}..."


def _rest(number: int) -> str:
    return f"; and {number - PAIRS_SHOWN} more" if number > PAIRS_SHOWN else ""
