"""From any image source to one index of checked, hashed, labelled and split rows, and from its rows to image bytes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import pyarrow as pa

from raysweep.errors import DataError
from raysweep.images.contents import Contents
from raysweep.images.decode import DEFAULT_OPTIONS, DecodeOptions, open_image
from raysweep.images.groups import describe_groups, find_groups, join_copies
from raysweep.images.image_bytes import content_hash, stream_images
from raysweep.images.index_table import make_table
from raysweep.images.index_tasks import CheckedImages, check_listing
from raysweep.images.labels import number_labels
from raysweep.images.listed_rows import Listing, Rows
from raysweep.images.listing import list_source
from raysweep.images.pixel_depth import USUAL_WHITES, WhiteLevels, describe_whites, judge_whites
from raysweep.images.splits import SPLITS, Split, describe_copies, describe_few_images, settle_splits
from raysweep.images.tables import reading
from raysweep.storage.paths import signature

if TYPE_CHECKING:
    from raysweep.experiment.config import DataConfig

ROWS_AT_ONCE = 2**16
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
        groups: int32 `(rows,)`; rows with the same number belong together: by `data.group`, or as copies of one image.
            None if each row stands alone.
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
    groups: np.ndarray | None = None

    @cached_property
    def row_signature(self) -> str:
        """Signature of row ids and contents in their order, and of white. Caches of all rows depend on it."""
        row_ids, contents = hashlib.sha256(), hashlib.sha256()
        for batch in self.table.select(["row_id", "content_hash"]).to_batches(max_chunksize=ROWS_AT_ONCE):
            row_ids.update(batch["row_id"].to_numpy().tobytes())
            contents.update("".join(f"{content.hex()}\n" for content in batch["content_hash"].to_pylist()).encode())
        kept = [row_ids.hexdigest(), contents.hexdigest()]
        whites = self.decode_options.whites
        return signature(kept if whites == USUAL_WHITES else [*kept, asdict(whites)])

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of images by split and class name, zeros included."""
        groups = self.table.group_by(["split", "label"]).aggregate([([], "count_all")]).to_pylist()
        counts = {(group["split"], group["label"]): group["count_all"] for group in groups}
        return {split: {name: counts.get((split, n), 0) for n, name in enumerate(self.classes)} for split in SPLITS}


def load_index(data: "DataConfig", seed: int, start_ray: Callable[[], object] | None = None) -> ImageIndex:
    """Lists a source, reads every image once to hash it and to check its header, and determines labels and splits.

    Args:
        data: The source.
        seed: Determines the splits that are taken from train.
        start_ray: Starts Ray if it does not run. With it, Ray's tasks read the images where there are many.

    Raises:
        DataError: the data cannot be used: there are no images, a column is missing, there are fewer than two classes
            or no training images, or the share of bad rows exceeds `data.max_bad_fraction`.
        ResourceError: processes of tasks were ended too often.
    """
    listing = list_source(data)
    rows, num_rows_found = listing.rows, len(listing.rows)
    checked = check_listing(listing, DecodeOptions(data.max_megapixels), start_ray)
    is_good, bad_rows = _separate(rows, checked, data)
    contents = Contents(_compressed(checked.hashes, is_good))
    labels, classes, label_warnings = number_labels(rows)
    if len(classes) < 2:
        raise DataError(f"{data.source}: at least 2 classes are needed; found {len(classes)}: {', '.join(classes)}")
    fractions: dict[Split, float] = {"test": data.test_fraction, "validation": data.validation_fraction}
    groups, group_warnings = find_groups(rows, data)
    together, is_grouped = join_copies(groups, contents), data.group is not None
    with reading(data.source):
        splits, derived = settle_splits(rows.splits, labels, together, fractions, seed, is_grouped)
    options, warning = _decode_options(data, listing, contents, checked.deep[is_good])
    shots = max((shots for shots in data.shots if isinstance(shots, int)), default=0)
    warnings = [*listing.warnings, *label_warnings, *warning]
    warnings += [*group_warnings, *describe_groups(groups, splits)]
    warnings += describe_copies(rows, contents, splits, labels, classes)
    warnings += describe_few_images(labels, splits, classes, shots)
    return ImageIndex(
        table=make_table(rows, np.flatnonzero(is_good), contents, labels, splits),
        classes=classes,
        bad_rows=bad_rows,
        warnings=tuple(warnings),
        num_rows_found=num_rows_found,
        fingerprint=_fingerprint(contents, labels, splits, classes, options),
        image_column=listing.image_column,
        derived_splits=derived,
        decode_options=options,
        groups=together.numbers if int(together.numbers.max()) + 1 < len(rows) else None,
    )


def _decode_options(
    data: "DataConfig", listing: Listing, contents: Contents, deep: np.ndarray
) -> tuple[DecodeOptions, list[str]]:
    """Returns how the images are decoded, and a warning if their values are not read as the files declare.

    Args:
        data: Limits, and perhaps the bit depth.
        listing: The good rows.
        contents: Their encoded images.
        deep: Which of them have more than 8 bits a channel, bool `(rows,)`.
    """
    if data.bit_depth is not None:
        return DecodeOptions(data.max_megapixels, WhiteLevels.of_bits(data.bit_depth)), []
    # The smallest hashes are a sample that depends only on the contents.
    order = contents.order if deep.any() else np.empty(0, np.int64)
    sample = order[deep[order]][:DEPTH_SAMPLE]
    rows = [listing.rows[row] for row in sample.tolist()]
    columns = [row.path for row in rows], [row.position for row in rows], [row.inline for row in rows]
    options = DecodeOptions(data.max_megapixels)
    whites, num_judged = judge_whites(
        (open_image(image, options), image)
        for place, image in stream_images(*columns, listing.image_column)
        if isinstance(image, bytes) and content_hash(image) == contents.hashes[sample[place]].tobytes()
    )
    warning = describe_whites(whites, int(deep.sum()), num_judged)
    return DecodeOptions(data.max_megapixels, whites), [warning] if warning else []


def _separate(rows: Rows, checked: CheckedImages, data: "DataConfig") -> tuple[np.ndarray, tuple[BadRow, ...]]:
    """Takes the bad rows out.

    Returns:
        Which rows are good, bool `(rows,)`; and the bad rows.

    Raises:
        DataError: there are no good rows, or too many bad ones.
    """
    num_rows, num_bad = len(rows), len(checked.problems)
    if num_bad == num_rows or num_bad > data.max_bad_fraction * num_rows:
        _raise_bad_rows(rows, checked, data)
    bad = tuple(BadRow(row, rows[row].source, checked.problems[row]) for row in sorted(checked.problems))
    is_good = np.ones(num_rows, np.bool_)
    is_good[[row.row_id for row in bad]] = False
    if bad:
        rows.keep(is_good)
    return is_good, bad


def _raise_bad_rows(rows: Rows, checked: CheckedImages, data: "DataConfig") -> NoReturn:
    if not rows:
        raise DataError(f"{data.source}: no rows")
    num_bad = len(checked.problems)
    examples = "".join(f"\n  {rows[row].source}: {checked.problems[row]}" for row in sorted(checked.problems)[:5])
    more = f"\n  and {num_bad - 5} more" if num_bad > 5 else ""
    raise DataError(
        f"{data.source}: {num_bad} of {len(rows)} rows cannot be used ({num_bad / len(rows):.1%}); "
        f"data.max_bad_fraction is {data.max_bad_fraction:g}:{examples}{more}"
    )


def _compressed(hashes: np.ndarray, is_good: np.ndarray) -> np.ndarray:
    """Returns the hashes of good rows. They move within the same memory, because they are most of what is in it."""
    num_good = 0
    for start in range(0, len(hashes), ROWS_AT_ONCE):
        part = hashes[start : start + ROWS_AT_ONCE][is_good[start : start + ROWS_AT_ONCE]]
        hashes[num_good : num_good + len(part)] = part
        num_good += len(part)
    return hashes[:num_good]


def _ranks(names: Sequence[str]) -> np.ndarray:
    ranks = np.empty(len(names), np.int32)
    ranks[sorted(range(len(names)), key=names.__getitem__)] = np.arange(len(names))
    return ranks


def _fingerprint(
    contents: Contents, labels: np.ndarray, splits: np.ndarray, classes: tuple[str, ...], options: DecodeOptions
) -> str:
    # In the order of the hashes, and rows with the same image in the order of their class names and splits.
    order = np.lexsort((_ranks(SPLITS)[splits], _ranks(classes)[labels], contents.numbers))
    digest = hashlib.sha256()
    for start in range(0, len(order), ROWS_AT_ONCE):
        for row in order[start : start + ROWS_AT_ONCE].tolist():
            content, name, split = contents.hashes[row].tobytes().hex(), classes[labels[row]], SPLITS[splits[row]]
            digest.update(f"{content}\0{name}\0{split}\0".encode())
    values: dict[str, Any] = {"rows": digest.hexdigest(), "classes": classes}
    if options.whites != USUAL_WHITES:
        values["whites"] = asdict(options.whites)
    return signature(values)
