"""Every kind of image source to one index of checked, hashed, labelled and split rows, and back to image bytes."""

import hashlib
import io
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import fs

from raysweep.errors import DataError, did_you_mean
from raysweep.images.decode import open_image
from raysweep.images.splits import (
    SPLIT_NAMES,
    SPLITS,
    count_of,
    describe_copies,
    describe_thin_places,
    settle_splits,
)
from raysweep.images.tables import (
    Listing,
    Row,
    absolute_source,
    join_source,
    open_filesystem,
    parquet_images,
    read_file,
    read_parquet_files,
    read_table,
    reading,
)
from raysweep.paths import signature

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SKLEARN_SOURCES = ("sklearn://digits",)
ROWS_PER_JOB = 64


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, for `quarantine.csv`."""

    row_id: int
    source: str
    reason: str


@dataclass(frozen=True)
class ImageIndex:
    """What a source holds, without the pixels.

    Attributes:
        table: One line per good row: `row_id` int64 (place in the source's sorted listing, bad rows counted), `path`
            string (absolute path or URI of the image, or of the Parquet file it is in), `position` int64 (row in that
            file, -1 where the path is the image), `image` large_binary (encoded bytes of sources that are made up in
            memory, else null), `label` int32 (index into `classes`), `split` string, `content_hash` string (SHA-256 of
            the encoded bytes, hex).
        classes: Class names, sorted; by value where all are whole numbers.
        bad_rows: Rows left out, with the reason.
        warnings: What a user should know before trusting a score on this data.
        num_rows_found: Good and bad rows.
        fingerprint: Signature of contents, class names and splits of all good rows; the order and place of the files
            do not count.
        image_column: Column of the images in Parquet files, None where there are none; for `read_image_bytes`.
        derived_splits: Splits that the source did not have and that were taken from train.
    """

    table: pa.Table
    classes: tuple[str, ...]
    bad_rows: tuple[BadRow, ...]
    warnings: tuple[str, ...]
    num_rows_found: int
    fingerprint: str
    image_column: str | None = None
    derived_splits: tuple[str, ...] = ()

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of images by split and class name, zeros included."""
        counted = Counter(zip(self.table["split"].to_pylist(), self.table["label"].to_pylist(), strict=True))
        return {split: {name: counted[split, label] for label, name in enumerate(self.classes)} for split in SPLITS}


def load_index(data: "DataConfig", seed: int) -> ImageIndex:
    """Lists a source, reads every image once to hash it and to look at its header, and settles labels and splits.

    Raises:
        DataError: the data as a whole cannot be used: no images, a missing column, fewer than two classes, no training
            images, or a larger share of bad rows than `data.max_bad_fraction`.
    """
    listing = list_source(data)
    outcomes = _hash_images(listing)
    good, bad_rows = _sort_out(listing.rows, outcomes, data)
    rows = [listing.rows[row_id] for row_id in good]
    names, label_warnings = _label_names(rows)
    classes = _sort_classes(set(names))
    if len(classes) < 2:
        raise DataError(f"{data.source}: at least 2 classes are needed; found {len(classes)}: {', '.join(classes)}")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in names], np.int32)
    hashes = list(good.values())
    fractions = {"test": data.test_fraction, "validation": data.validation_fraction}
    with reading(data.source):
        splits, derived = settle_splits([row.split for row in rows], labels, hashes, fractions, seed)
    shots = max((shots for shots in data.shots if isinstance(shots, int)), default=0)
    warnings = [*listing.warnings, *label_warnings]
    warnings += describe_copies([row.source for row in rows], names, splits, hashes)
    warnings += describe_thin_places(labels, splits, classes, shots)
    columns = {
        "row_id": pa.array(good, pa.int64()),
        "path": pa.array([row.path for row in rows], pa.string()),
        "position": pa.array([row.position for row in rows], pa.int64()),
        "image": pa.array([row.inline for row in rows], pa.large_binary()),
        "label": pa.array(labels),
        "split": pa.array(splits, pa.string()),
        "content_hash": pa.array(hashes, pa.string()),
    }
    return ImageIndex(
        table=pa.table(columns),
        classes=classes,
        bad_rows=bad_rows,
        warnings=tuple(warnings),
        num_rows_found=len(outcomes),
        fingerprint=_fingerprint(hashes, names, splits, classes),
        image_column=listing.image_column,
        derived_splits=derived,
    )


def list_source(data: "DataConfig") -> Listing:
    """Lists the rows of a source; no image is opened.

    Raises:
        DataError: there is no such source, or nothing in it that raysweep can read.
    """
    source = absolute_source(data.source)
    if source.startswith("sklearn://"):
        return _list_sklearn(source)
    with reading(source):
        filesystem, inner = open_filesystem(source)
        kind = filesystem.get_file_info(inner).type
        if kind == fs.FileType.NotFound:
            raise DataError(f"data.source: {source}: no such file or folder")
        if kind != fs.FileType.Directory:
            return read_table(source, data)
        files = sorted(_local_files(source) if "://" not in source else _remote_files(source))
    images = [file for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    tables = [file for file in files if file.lower().endswith(".parquet")]
    # Repositories of Parquet files often hold a picture or two for their README.
    if tables and (not images or any(_split_of_file(table)[0] for table in tables)):
        listing = _list_parquet_folder(source, tables, data)
        used = set(tables)
    else:
        listing = _list_image_folder(source, images, files)
        listing.warnings.extend(_unused_columns(source, data))
        used = set(images)
    left_out = [file for file in files if file not in used]
    if left_out:
        listing.warnings.append(f"{count_of(left_out, 'file')} left out: {_kinds(left_out)}")
    return listing


def _unused_columns(source: str, data: "DataConfig") -> list[str]:
    named = [f"data.{key}" for key in ("image", "label", "split") if getattr(data, key) not in (None, "split")]
    return [f"{', '.join(named)} not used: {source} is a folder of images, not a table"] if named else []


def _list_sklearn(source: str) -> Listing:
    if source not in SKLEARN_SOURCES:
        raise DataError(f"data.source: no source '{source}'; {did_you_mean(source, SKLEARN_SOURCES)}")
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8)).save(buffer, "PNG")
        rows.append(Row(f"{source}/{number}", int(label), inline=buffer.getvalue()))
    return Listing(rows)


def _local_files(folder: str) -> list[str]:
    """Paths relative to the folder, hidden ones left out; linked folders are followed, but not in circles."""

    def walk(path: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(path)
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    if os.path.realpath(entry.path) not in (*above, real):
                        yield from walk(entry.path, (*above, real))
                # A link to nothing is listed, and becomes a bad row; a pipe or socket would block whoever reads it.
                elif entry.is_file() or not os.path.exists(entry.path):
                    yield entry.path

    return [os.path.relpath(path, folder).replace(os.sep, "/") for path in walk(folder, ())]


def _remote_files(source: str) -> list[str]:
    filesystem, base = open_filesystem(source)
    # Cut by depth, since file systems differ in whether they repeat a leading slash.
    depth = len(base.strip("/").split("/"))
    infos = filesystem.get_file_info(fs.FileSelector(base, recursive=True))
    parts = [info.path.strip("/").split("/")[depth:] for info in infos if info.is_file]
    return ["/".join(names) for names in parts if not any(name.startswith(".") for name in names)]


def _list_image_folder(source: str, images: list[str], files: list[str]) -> Listing:
    """Tells `class/*.jpg` from `split/class/*.jpg` and takes labels and splits from the folders' names."""
    tables = [file for file in files if file.lower().endswith((".csv", ".tsv", ".jsonl"))]
    hint = f"; to use its table, set data.source to {join_source(source, tables[0])}" if tables else ""
    if not images:
        found = f"{count_of(files, 'file')}: {_kinds(files)}" if files else "nothing"
        raise DataError(
            f"{source}: no images found; looked for {' '.join(IMAGE_SUFFIXES)} and .parquet; found {found}{hint}"
        )
    parts = [image.split("/") for image in images]
    top = {names[0] for names in parts if len(names) > 1}
    # Letters only: folders 0, 1, 2 are classes, whatever those numbers mean in a split column.
    splits = {name for name in top if name.lower() in SPLIT_NAMES}
    split_levels = int(bool(splits) and (splits == top or any(len(names) > 2 for names in parts if names[0] in splits)))
    if split_levels and splits != top:
        raise DataError(
            f"{source}: split folders ({', '.join(sorted(splits))}) and others ({', '.join(sorted(top - splits))}) "
            "side by side; accepted: split/class/*.jpg or class/*.jpg"
        )
    depth = split_levels + 2
    if not any(len(names) >= depth for names in parts):
        raise DataError(
            f"{source}: no class folders; accepted: {'split/' * split_levels}class/*.jpg; found {images[0]}{hint}"
        )
    rows = []
    for image, names in zip(images, parts, strict=True):
        path = join_source(source, image)
        if len(names) < depth:
            rows.append(Row(path, None, problem="lies outside every class folder"))
        else:
            rows.append(Row(path, names[split_levels], names[0] if split_levels else None))
    return Listing(_printable(rows), warnings=_nested_folders(source, parts, depth, top))


def _printable(rows: list[Row]) -> list[Row]:
    """Sets aside file names that are not UTF-8: no table can hold them."""
    shown = [row.path.encode("utf-8", "backslashreplace").decode() for row in rows]
    return [
        row if row.path == path else Row(path, None, problem="file name is not UTF-8")
        for row, path in zip(rows, shown, strict=True)
    ]


def _nested_folders(source: str, parts: list[list[str]], depth: int, top: set[str]) -> list[str]:
    nested = [names for names in parts if len(names) > depth]
    if not nested:
        return []
    example = "/".join(nested[0])
    if len(nested) == sum(len(names) >= depth for names in parts):
        hint = (
            f" Did you mean data.source: {join_source(source, next(iter(top)))}?"
            if len(top) == 1 and depth == 2
            else ""
        )
        raise DataError(
            f"{source}: every image lies in a folder within a class folder ({example}), so what is the class cannot be "
            f"told; accepted: split/class/*.jpg or class/*.jpg.{hint}"
        )
    return [f"{count_of(nested, 'image')} in folders within class folders, counted for the outer class: {example}"]


def _list_parquet_folder(source: str, files: list[str], data: "DataConfig") -> Listing:
    """Takes splits from the files' names, as the Hugging Face hub lays them out."""
    splits = {file: _split_of_file(file) for file in files}
    known = [file for file in files if splits[file][0]] or files
    configurations = sorted({splits[file][1] for file in known})
    if len(configurations) > 1:
        raise DataError(
            f"{source}: Parquet files in several folders ({', '.join(name or '.' for name in configurations)}); "
            f"name one, as in data.source: {join_source(source, configurations[-1])}"
        )
    listing = read_parquet_files([(join_source(source, file), splits[file][0]) for file in known], data)
    other = sorted(set(files) - set(known))
    if other:
        listing.warnings.append(f"{count_of(other, 'Parquet file')} of no known split left out: {', '.join(other[:3])}")
    return listing


def _split_of_file(file: str) -> tuple[str | None, str]:
    """Split and configuration folder: `en/train-00000-of-00002.parquet`, `en/train/0000.parquet` -> train, en."""
    folder, _, name = file.rpartition("/")
    above, _, last = folder.rpartition("/")
    match = re.match(r"[a-z]+", name.lower())
    if match and match.group() in SPLIT_NAMES:
        return SPLIT_NAMES[match.group()], folder
    return (SPLIT_NAMES[last.lower()], above) if last.lower() in SPLIT_NAMES else (None, folder)


def read_image_bytes(
    paths: Sequence[str], positions: Sequence[int], inline: Sequence[bytes | None], image_column: str | None
) -> list[bytes | DataError]:
    """Reads the encoded images of rows of an `ImageIndex`, on any machine that reaches the paths.

    Returns:
        One entry per row, in order: the bytes, or why they cannot be had. A row that fails never fails the others. Each
        Parquet row group that holds a wanted row is read once.
    """
    images: list[bytes | DataError] = [DataError("not read")] * len(paths)
    for row, image in _stream_images(paths, positions, inline, image_column):
        images[row] = image
    return images


def _stream_images(
    paths: Sequence[str], positions: Sequence[int], inline: Sequence[bytes | None], image_column: str | None
) -> Iterator[tuple[int, bytes | DataError]]:
    tables: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, (path, position, image) in enumerate(zip(paths, positions, inline, strict=True)):
        if image is not None:
            yield row, image
        elif position >= 0:
            tables[path][position].append(row)
        else:
            try:
                yield row, read_file(path)
            except DataError as error:
                yield row, error
    for table, waiting in tables.items():
        assert image_column is not None
        reason = "no such row in the Parquet file"
        try:
            for position, content in parquet_images(table, image_column, list(waiting)):
                for row in waiting.pop(position):
                    yield row, content
        except Exception as error:  # a damaged row group must not take the readable ones with it
            reason = f"the Parquet file cannot be read: {' '.join(str(error).split())}"[:200]
        for rows in waiting.values():
            for row in rows:
                yield row, DataError(reason)


def _hash_images(listing: Listing) -> list[str | DataError]:
    """Content hash of each row, or why it is bad; the bytes are not kept."""
    outcomes: list[str | DataError] = [DataError(row.problem or "not read") for row in listing.rows]
    files: list[int] = []
    tables: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(listing.rows):
        if row.problem is None:
            (files if row.position < 0 else tables[row.path]).append(number)
    jobs = [files[start : start + ROWS_PER_JOB] for start in range(0, len(files), ROWS_PER_JOB)] + list(tables.values())

    def hash_job(numbers: list[int]) -> None:
        rows = [listing.rows[number] for number in numbers]
        columns = [row.path for row in rows], [row.position for row in rows], [row.inline for row in rows]
        for offset, image in _stream_images(*columns, listing.image_column):
            outcomes[numbers[offset]] = _hash_image(image)

    remote = any("://" in row.path for row in listing.rows[:1])
    with ThreadPoolExecutor(32 if remote else min(16, 2 * (os.cpu_count() or 1))) as pool:
        for _ in pool.map(hash_job, jobs):
            pass
    return outcomes


def _hash_image(image: bytes | DataError) -> str | DataError:
    if isinstance(image, DataError):
        return image
    try:
        open_image(image).close()
    except DataError as error:
        return error
    return hashlib.sha256(image).hexdigest()


def _sort_out(
    rows: list[Row], outcomes: list[str | DataError], data: "DataConfig"
) -> tuple[dict[int, str], tuple[BadRow, ...]]:
    """Content hash by row id of the good rows, and the bad ones, if they are few enough to go on."""
    good: dict[int, str] = {}
    bad: list[BadRow] = []
    for row_id, (row, outcome) in enumerate(zip(rows, outcomes, strict=True)):
        if isinstance(outcome, str):
            good[row_id] = outcome
        else:
            bad.append(BadRow(row_id, row.source, str(outcome)))
    if good and len(bad) <= data.max_bad_fraction * len(rows):
        return good, tuple(bad)
    if not rows:
        raise DataError(f"{data.source}: no rows")
    examples = "".join(f"\n  {row.source}: {row.reason}" for row in bad[:5])
    more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise DataError(
        f"{data.source}: {len(bad)} of {len(rows)} rows cannot be used ({len(bad) / len(rows):.1%}); "
        f"data.max_bad_fraction is {data.max_bad_fraction:g}:{examples}{more}"
    )


def _label_names(rows: list[Row]) -> tuple[list[str], list[str]]:
    """Class name of each row, and warnings about labels that had to be tidied."""
    values = Counter((type(row.label), row.label) if _plain(row.label) else _refuse(row) for row in rows)
    names = {key: _class_name(key[1]) for key in values}
    warnings = []
    if len({issubclass(kind, str) for kind, _ in values}) > 1:
        warnings.append("labels mix numbers and text; a number counts as its digits")
    spaced = sum(count for (_, value), count in values.items() if isinstance(value, str) and value != value.strip())
    if spaced:
        warnings.append(f"{spaced} labels had spaces around them, which were taken off")
    folded = defaultdict(set)
    for name in names.values():
        folded[name.casefold()].add(name)
    alike = [", ".join(sorted(group)) for group in folded.values() if len(group) > 1]
    if alike:
        warnings.append(f"classes that differ only in upper and lower case: {'; '.join(sorted(alike)[:5])}")
    return [names[type(row.label), row.label] for row in rows], warnings


def _plain(label: Any) -> bool:
    return isinstance(label, (str, int)) or (isinstance(label, float) and label.is_integer())


def _refuse(row: Row) -> tuple[type, Any]:
    raise DataError(f"{row.path}: label {row.label!r}; accepted: text or whole numbers, one label per image")


def _class_name(label: Any) -> str:
    # macOS writes decomposed accents into file names; composed, they equal what a keyboard or a table gives.
    return unicodedata.normalize("NFC", str(int(label) if isinstance(label, float) else label).strip())


def _sort_classes(names: set[str]) -> tuple[str, ...]:
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _fingerprint(hashes: list[str], names: list[str], splits: list[str], classes: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for row in sorted(zip(hashes, names, splits, strict=True)):
        digest.update("\0".join((*row, "")).encode())
    return signature({"rows": digest.hexdigest(), "classes": classes})


def _kinds(files: Sequence[str]) -> str:
    """The suffixes of files with their numbers, commonest first."""
    kinds = Counter(os.path.splitext(file)[1].lower() or file.rpartition("/")[2] for file in files)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
