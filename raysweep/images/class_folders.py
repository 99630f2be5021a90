"""Folders of images whose labels and splits are the names of the folders: class/*.jpg and split/class/*.jpg."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raysweep.errors import DataError
from raysweep.images.folder_files import FolderFiles, kinds_of
from raysweep.images.formats import IMAGE_SUFFIXES
from raysweep.images.listed_rows import Listing, Row, Rows
from raysweep.images.row_splits import split_of_folder, split_words
from raysweep.images.splits import SPLIT_NAMES, Split, count_of
from raysweep.images.texts import Lookup, Texts
from raysweep.storage.filesystems import join_source

# So many images outside the class folders are taken for a banner or a logo, if the dataset has enough others.
MAX_STRAY = 5
# Names of folders in which published datasets have images of all classes, and words in names of their parts.
_NO_CLASSES = {"images", "image", "imgs", "img", "jpegimages", "annotations", "annotation"}
_PARTS = {"images", "imgs", "batch", "fold", "chunk", "shard"}
FOLDERS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the class folders lie.

    Attributes:
        above: Folders that contain nothing but the split folders, such as `("data",)` for `data/train/class/*.jpg`.
        split_levels: 1 for split/class/*.jpg, 0 for class/*.jpg.
        splits: Names of the split folders, as they are written.
        others: Names of the folders beside them.
    """

    above: tuple[str, ...]
    split_levels: int
    splits: frozenset[str]
    others: frozenset[str]

    def names_below(self, file: str) -> list[str] | None:
        """Returns the folders and the name of a file in a class folder; None for a file that lies in none."""
        names = file.split("/")
        if tuple(names[: len(self.above)]) != self.above:
            return None
        names = names[len(self.above) :]
        if len(names) < self.split_levels + 2 or (self.split_levels and names[0] not in self.splits):
            return None
        return None if _lies_in_no_class(file) and len(names) == self.split_levels + 2 else names


def list_class_folders(source: str, images: Sequence[str], found: FolderFiles, hint: str = "") -> Listing:
    """Lists images by the names of their folders. Distinguishes `class/*.jpg` from `split/class/*.jpg`.

    Args:
        source: Absolute path or URI of the folder.
        images: Sorted relative paths of the images to list.
        found: Everything in the folder, to name what has no images.
        hint: What else could be done, for the messages of errors.

    Raises:
        DataError: the folders are arranged in another way.
    """
    if not images:
        contents = f"{count_of(found.files, 'file')}: {kinds_of(found.files)}" if found.files else "nothing"
        raise DataError(
            f"{source}: no images found; looked for {' '.join(IMAGE_SUFFIXES)} and .parquet; found {contents}{hint}"
        )
    layout = _find_layout(images)
    outside = Texts(image for image in images if layout.names_below(image) is None)
    has_few_outside = len(outside) <= min(MAX_STRAY, len(images) // 4)
    if not has_few_outside:
        _check_outside(source, images, outside, layout, hint)
    classes = {names[layout.split_levels] for image in images if (names := layout.names_below(image))}
    _check_names(source, classes, hint)
    listing = Listing()
    for image in images:
        names = layout.names_below(image)
        if names is not None:
            split = split_of_folder(names[0]) if layout.split_levels else None
            listing.rows.append(_row(source, image, names[layout.split_levels], split))
        elif not has_few_outside:
            listing.rows.append(_row(source, image, None, None, "lies outside every class folder"))
    listing.warnings += _nested_folders(source, images, classes, len(images) - len(outside), layout)
    listing.warnings += _empty_folders(found.folders, images, layout)
    if outside and has_few_outside:
        counted = count_of(outside, "image")
        listing.warnings.append(f"{counted} outside the class folders passed over: {', '.join(outside)}")
    return listing


def _row(source: str, image: str, label: str | None, split: Split | None, problem: str | None = None) -> Row:
    """Returns the row of an image. A name that is not UTF-8 is a problem, because Arrow tables cannot contain it."""
    path = join_source(source, image)
    shown = path.encode("utf-8", "backslashreplace").decode()
    if shown != path:
        return Row(shown, None, problem="file name is not UTF-8")
    return Row(path, label, split, problem=problem)


def _check_outside(source: str, images: Sequence[str], outside: Sequence[str], layout: _Layout, hint: str) -> None:
    """Refuses folders in which many images lie outside the class folders, if their places say why."""
    if layout.split_levels and layout.others:
        splits, others = ", ".join(sorted(layout.splits)), ", ".join(sorted(layout.others))
        raise DataError(
            f"{source}: split folders ({splits}) and others ({others}) side by side; "
            "accepted: split/class/*.jpg or class/*.jpg"
        )
    if len(outside) == len(images):
        raise DataError(
            f"{source}: no class folders; accepted: {'split/' * layout.split_levels}class/*.jpg; "
            f"found {images[0]}{hint}"
        )
    if no_classes := [image for image in outside if _lies_in_no_class(image)]:
        raise DataError(
            f"{source}: {count_of(no_classes, 'image')} in folders whose names are no classes, such as "
            f"{no_classes[0]}; accepted: split/class/*.jpg or class/*.jpg, or a table{hint}"
        )


def compare_labels(source: str, rows: Rows, images: Sequence[str]) -> list[str]:
    """Returns a warning about rows of tables whose image lies in the folder of another class, if there are any."""
    layout = _find_layout(images)
    by_path = Lookup(images, key=lambda image: join_source(source, image))
    labels = {str(label) for label in rows.labels.distinct}
    num_others, first = 0, None
    for row in rows:
        place = by_path.find(row.path)
        names = layout.names_below(images[place]) if place >= 0 else None
        if names is not None and names[layout.split_levels] in labels and names[layout.split_levels] != str(row.label):
            num_others, first = num_others + 1, first or row
    if first is None:
        return []
    return [
        f"{count_of(range(num_others), 'image')} in the folder of another class than their table says, which is "
        f"followed: {first.path} ({first.label})"
    ]


def _find_layout(images: Iterable[str]) -> _Layout:
    folders = {tuple(folder.split("/")) if folder else () for folder in _folders_of(images)}
    above = _folders_above_splits(folders)
    below = {folder[len(above) :] for folder in folders if folder[: len(above)] == above}
    top = {folder[0] for folder in below if folder}
    # Only names of letters are splits here. Folders 0, 1, 2 are classes, although a split column may use numbers.
    splits = {name for name in top if split_of_folder(name)}
    is_nested = any(len(folder) > 1 and folder[0] in splits for folder in below)
    is_exact = all(name.lower() in SPLIT_NAMES for name in top)
    if not is_nested and (splits != top or not (is_exact or len(set(map(split_of_folder, top))) > 1)):
        splits = set()  # classes may be called train and bus, or test 1 and test 2
    return _Layout(above, int(bool(splits)), frozenset(splits), frozenset(top - splits))


def _folders_of(images: Iterable[str]) -> set[str]:
    return {image.rpartition("/")[0] for image in images}


def _folders_above_splits(folders: set[tuple[str, ...]]) -> tuple[str, ...]:
    above: tuple[str, ...] = ()
    while True:
        depth = len(above)
        top = {folder[depth] for folder in folders if len(folder) > depth and folder[:depth] == above}
        if top and all(map(split_of_folder, top)):
            return above
        if len(top) != 1:
            return ()
        above = (*above, *top)


def _lies_in_no_class(image: str) -> bool:
    return image.rpartition("/")[0].rpartition("/")[2].lower() in _NO_CLASSES


def _check_names(source: str, classes: set[str], hint: str) -> None:
    """Refuses folders that hold parts of a dataset, as HAM10000_images_part_1 and HAM10000_images_part_2 do."""
    parts = {re.sub(r"[\d_-]+$", "", name) for name in classes}
    if len(classes) > 1 and len(parts) == 1 and split_words("".join(parts)) & _PARTS:
        raise DataError(
            f"{source}: the folders {', '.join(sorted(classes)[:3])} look like parts of a dataset, not like classes; "
            f"accepted: split/class/*.jpg or class/*.jpg, or a table{hint}"
        )


def _nested_folders(
    source: str, images: Iterable[str], classes: set[str], num_in_classes: int, layout: _Layout
) -> list[str]:
    """Returns a warning about images that lie deeper than their class folder.

    Raises:
        DataError: all of them do.
    """
    num_nested, first, twice = 0, None, None
    for image in images:
        names = layout.names_below(image)
        if names is not None and len(names) > layout.split_levels + 2:
            num_nested, first = num_nested + 1, first or names
            outer, inner = names[layout.split_levels : layout.split_levels + 2]
            if inner != outer and inner in classes:
                twice = twice or names
    if first is None:
        return []
    example = "/".join((*layout.above, *first))
    if num_nested == num_in_classes:
        only = list(layout.others) if len(layout.others) == 1 and not layout.split_levels else []
        hint = f" Did you mean data.source: {join_source(source, only[0])}?" if only else ""
        raise DataError(
            f"{source}: every image lies in a folder within a class folder ({example}), so what is the class cannot be "
            f"told; accepted: split/class/*.jpg or class/*.jpg.{hint}"
        )
    if twice is not None:
        raise DataError(
            f"{source}: {'/'.join((*layout.above, *twice))} lies in the folders of two classes, "
            f"{twice[layout.split_levels]} and {twice[layout.split_levels + 1]}; accepted: split/class/*.jpg or "
            "class/*.jpg"
        )
    counted = count_of(range(num_nested), "image")
    return [f"{counted} in folders within class folders, counted for the outer class: {example}"]


def _empty_folders(folders: Sequence[str], images: Sequence[str], layout: _Layout) -> list[str]:
    """Returns a warning about class folders and split folders in which there is no image."""
    used = {
        "/".join(names[:depth])
        for names in (folder.split("/") for folder in _folders_of(images))
        for depth in range(1, len(names) + 1)
    }
    start = len(layout.above)
    empty = []
    for folder in folders:
        names = folder.split("/")
        is_class = len(names) == start + layout.split_levels + 1
        is_split = len(names) == start + 1 and split_of_folder(names[-1]) is not None
        in_split = not layout.split_levels or (len(names) > start and split_of_folder(names[start]) is not None)
        if folder not in used and tuple(names[:start]) == layout.above and (is_split or (is_class and in_split)):
            empty.append(folder)
    if not empty:
        return []
    more = f" and {len(empty) - FOLDERS_SHOWN} more" if len(empty) > FOLDERS_SHOWN else ""
    return [f"{count_of(empty, 'folder')} without images: {', '.join(empty[:FOLDERS_SHOWN])}{more}"]
