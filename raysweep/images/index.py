"""From any image source to one index of checked, hashed, labelled and split rows, and from its rows to image bytes."""

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from raysweep.errors import DataError, one_line
from raysweep.images.decode import DEFAULT_OPTIONS, DecodeOptions, open_image
from raysweep.images.groups import describe_groups, find_groups, join_copies
from raysweep.images.index_table import make_table
from raysweep.images.labels import label_names, sort_classes
from raysweep.images.listing import list_source
from raysweep.images.parquet import parquet_images
from raysweep.images.pixel_depth import USUAL_WHITES, WhiteLevels, describe_whites, is_deep, judge_whites
from raysweep.images.splits import SPLITS, describe_copies, describe_few_images, settle_splits
from raysweep.images.tables import Listing, Row, read_file, reading
from raysweep.storage.paths import signature

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

ROWS_PER_CHUNK = 64
UNREAD = "not read in the pass"
DEPTH_SAMPLE = 256  # images whose values tell which value is white, where channels have more than 8 bits


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, for `quarantine.csv`.

    Attributes:
        row_id: Position of the row in the sorted listing of its source.
        source: Where the row was found, for people.
        reason: Why the row cannot be used.
    """

    row_id: int
    source: str
    reason: str

    @property
    def is_unread(self) -> bool:
        """Whether a pass did not get the image that was hashed. A later pass may, so caches do not keep this reason."""
        return self.reason.startswith(UNREAD)


@dataclass(frozen=True)
class ImageIndex:
    """The images of a source, without their pixels.

    Attributes:
        table: One line per good row: `row_id` int64 (position in the source's sorted listing, which includes bad rows),
            `path` string (absolute path or URI of the image, or of the Parquet file that contains it, then as a
            dictionary), `position` int32 (row in that file, -1 where the path is the image), `image` large_binary
            (encoded bytes for sources that are generated in memory; a column of nulls for others), `label` int32
            (index into `classes`), `split` dictionary of strings, `content_hash` 32 bytes (SHA-256 of the encoded
            bytes).
        classes: Class names, sorted; by value if all are whole numbers.
        bad_rows: Rows that were left out, with the reasons.
        warnings: What a user should know before trusting a score on this data.
        num_rows_found: Number of good and bad rows.
        fingerprint: Signature of the contents, class names and splits of all good rows, and of white. It does not
            depend on the order or the location of the files.
        image_column: Column of the images in Parquet files, None where there are none; for `read_image_bytes`.
        derived_splits: Splits that the source did not have. Their rows were taken from train.
        decode_options: How the images are decoded.
    """

    table: pa.Table
    classes: tuple[str, ...]
    bad_rows: tuple[BadRow, ...]
    warnings: tuple[str, ...]
    num_rows_found: int
    fingerprint: str
    image_column: str | None = None
    derived_splits: tuple[str, ...] = ()
    decode_options: DecodeOptions = DEFAULT_OPTIONS

    @cached_property
    def row_signature(self) -> str:
        """Signature of row ids and contents in their order, and of white. Caches of all rows depend on it."""
        row_ids, contents = hashlib.sha256(), hashlib.sha256()
        for batch in self.table.select(["row_id", "content_hash"]).to_batches(max_chunksize=2**16):
            row_ids.update(batch["row_id"].to_numpy().tobytes())
            contents.update("".join(f"{content.hex()}\n" for content in batch["content_hash"].to_pylist()).encode())
        kept = [row_ids.hexdigest(), contents.hexdigest()]
        whites = self.decode_options.whites
        return signature(kept if whites == USUAL_WHITES else [*kept, asdict(whites)])

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of images by split and class name, zeros included."""
        counted = Counter(zip(self.table["split"].to_pylist(), self.table["label"].to_pylist(), strict=True))
        return {split: {name: counted[split, label] for label, name in enumerate(self.classes)} for split in SPLITS}


def load_index(data: "DataConfig", seed: int) -> ImageIndex:
    """Lists a source, reads every image once to hash it and to check its header, and determines labels and splits.

    Raises:
        DataError: the data cannot be used: there are no images, a column is missing, there are fewer than two classes
            or no training images, or the share of bad rows exceeds `data.max_bad_fraction`.
    """
    listing = list_source(data)
    outcomes, deep = _hash_images(listing, DecodeOptions(data.max_megapixels))
    good, bad_rows = _separate(listing.rows, outcomes, data)
    rows = [listing.rows[row_id] for row_id in good]
    names, label_warnings = label_names(rows)
    classes = sort_classes(set(names))
    if len(classes) < 2:
        raise DataError(f"{data.source}: at least 2 classes are needed; found {len(classes)}: {', '.join(classes)}")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name] for name in names], np.int32)
    hashes = list(good.values())
    fractions = {"test": data.test_fraction, "validation": data.validation_fraction}
    groups, group_warnings = find_groups(rows, data)
    together, is_grouped = join_copies(groups, hashes), data.group is not None
    with reading(data.source):
        splits, derived = settle_splits([row.split for row in rows], labels, together, fractions, seed, is_grouped)
    options, warning = _decode_options(data, listing, {row_id: good[row_id] for row_id in deep if row_id in good})
    shots = max((shots for shots in data.shots if isinstance(shots, int)), default=0)
    warnings = [*listing.warnings, *label_warnings, *warning]
    warnings += [*group_warnings, *describe_groups(groups, splits)]
    warnings += describe_copies([row.source for row in rows], names, splits, hashes)
    warnings += describe_few_images(labels, splits, classes, shots)
    return ImageIndex(
        table=make_table(rows, good, labels, splits),
        classes=classes,
        bad_rows=bad_rows,
        warnings=tuple(warnings),
        num_rows_found=len(outcomes),
        fingerprint=_fingerprint(hashes, names, splits, classes, options),
        image_column=listing.image_column,
        derived_splits=derived,
        decode_options=options,
    )


def _decode_options(data: "DataConfig", listing: Listing, deep: dict[int, str]) -> tuple[DecodeOptions, list[str]]:
    """Returns how the images are decoded, and a warning if their values are not read as the files declare.

    Args:
        data: Limits, and perhaps the bit depth.
        listing: The rows.
        deep: Content hash of each good row with more than 8 bits a channel, by row id.
    """
    if data.bit_depth is not None:
        return DecodeOptions(data.max_megapixels, WhiteLevels.of_bits(data.bit_depth)), []
    # The smallest hashes are a sample that depends only on the contents.
    sample = sorted(deep, key=lambda row_id: (deep[row_id], row_id))[:DEPTH_SAMPLE]
    rows = [listing.rows[row_id] for row_id in sample]
    columns = [row.path for row in rows], [row.position for row in rows], [row.inline for row in rows]
    options = DecodeOptions(data.max_megapixels)
    whites, num_judged = judge_whites(
        (open_image(image, options), image)
        for place, image in _stream_images(*columns, listing.image_column)
        if isinstance(image, bytes) and content_hash(image).hex() == deep[sample[place]]
    )
    warning = describe_whites(whites, len(deep), num_judged)
    return DecodeOptions(data.max_megapixels, whites), [warning] if warning else []


def read_image_bytes(
    paths: Sequence[str], positions: Sequence[int], inline: Sequence[bytes | None], image_column: str | None
) -> list[bytes | DataError]:
    """Reads the encoded images of rows of an `ImageIndex`, on any machine that can read the paths.

    A row that cannot be read does not affect the others. Each Parquet row group with a wanted row is read once.

    Returns:
        For each row, in order: the encoded image, or the reason why it cannot be read.
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
        except Exception as error:  # rows of other row groups may have been read already
            reason = f"the Parquet file cannot be read: {one_line(error)}"[:200]
        for rows in waiting.values():
            for row in rows:
                yield row, DataError(reason)


def _hash_images(listing: Listing, options: DecodeOptions) -> tuple[list[str | DataError], set[int]]:
    """Reads all images; their bytes are not kept.

    Returns:
        For each row its content hash, or the reason why it is bad; and the rows with more than 8 bits a channel.
    """
    deep: set[int] = set()
    unread = DataError("not read")  # one object for all rows, because an exception needs more memory than a row
    outcomes: list[str | DataError] = [DataError(row.problem) if row.problem else unread for row in listing.rows]
    files: list[int] = []
    tables: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(listing.rows):
        if row.problem is None:
            (files if row.position < 0 else tables[row.path]).append(number)
    chunks = [files[start : start + ROWS_PER_CHUNK] for start in range(0, len(files), ROWS_PER_CHUNK)]
    chunks += tables.values()

    def hash_image(number: int, image: bytes | DataError) -> str | DataError:
        if isinstance(image, DataError):
            return image
        try:
            with open_image(image, options) as opened:
                if is_deep(opened):
                    deep.add(number)
        except DataError as error:
            return error
        return content_hash(image).hex()

    def hash_rows(numbers: list[int]) -> None:
        rows = [listing.rows[number] for number in numbers]
        columns = [row.path for row in rows], [row.position for row in rows], [row.inline for row in rows]
        for offset, image in _stream_images(*columns, listing.image_column):
            outcomes[numbers[offset]] = hash_image(numbers[offset], image)

    remote = any("://" in row.path for row in listing.rows[:1])
    with warnings.catch_warnings(), ThreadPoolExecutor(32 if remote else min(16, 2 * (os.cpu_count() or 1))) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # data.max_megapixels is the limit
        list(pool.map(hash_rows, chunks))
    return outcomes, deep


def content_hash(image: bytes) -> bytes:
    """Returns the SHA-256 of an encoded image, as `ImageIndex.table` has it."""
    return hashlib.sha256(image).digest()


def _separate(
    rows: list[Row], outcomes: list[str | DataError], data: "DataConfig"
) -> tuple[dict[int, str], tuple[BadRow, ...]]:
    """Returns the content hash of each good row, by row id, and the bad rows.

    Raises:
        DataError: there are no good rows, or too many bad ones.
    """
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


def _fingerprint(
    hashes: list[str], names: list[str], splits: list[str], classes: tuple[str, ...], options: DecodeOptions
) -> str:
    digest = hashlib.sha256()
    for row in sorted(zip(hashes, names, splits, strict=True)):
        digest.update("\0".join((*row, "")).encode())
    values: dict[str, Any] = {"rows": digest.hexdigest(), "classes": classes}
    if options.whites != USUAL_WHITES:
        values["whites"] = asdict(options.whites)
    return signature(values)
