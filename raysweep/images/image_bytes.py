"""From rows of an index to encoded images, wherever these are."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence

from raysweep.errors import DataError, one_line
from raysweep.images.parquet import parquet_images
from raysweep.images.tables import read_file


def content_hash(image: bytes) -> bytes:
    """Returns the SHA-256 of an encoded image, as `ImageIndex.table` has it."""
    return hashlib.sha256(image).digest()


def read_image_bytes(
    paths: Sequence[str], positions: Sequence[int], inline: Sequence[bytes | None], image_column: str | None
) -> list[bytes | DataError]:
    """Reads the encoded images of rows of an `ImageIndex`, on any machine that can read the paths.

    A row that cannot be read does not affect the others. Each Parquet row group with a wanted row is read once.

    Returns:
        For each row, in order: the encoded image, or the reason why it cannot be read.
    """
    images: list[bytes | DataError] = [DataError("not read")] * len(paths)
    for row, image in stream_images(paths, positions, inline, image_column):
        images[row] = image
    return images


def stream_images(
    paths: Sequence[str], positions: Sequence[int], inline: Sequence[bytes | None], image_column: str | None
) -> Iterator[tuple[int, bytes | DataError]]:
    """Yields what `read_image_bytes` returns, one image at a time in any order, each with the place of its row."""
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
