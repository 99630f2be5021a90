"""Folders of images whose labels and splits are the names of the folders: class/*.jpg and split/class/*.jpg."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raysweep.errors import DataError
from raysweep.images.folder_files import FolderFiles, kinds_of
from raysweep.images.formats import IMAGE_SUFFIXES
from raysweep.images.row_splits import split_of_folder, split_words
from raysweep.images.splits import SPLIT_NAMES, count_of
from raysweep.images.tables import Listing, Row
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
    below = [layout.names_below(image) for image in images]
    outside = [image for image, names in zip(images, below, strict=True) if names is None]
    has_few_outside = len(outside) <= min(MAX_STRAY, len(images) // 4)
    if not has_few_outside:
        _check_outside(source, images, outside, layout, hint)
    in_classes = [names for names in below if names is not None]
    _check_names(source, {names[layout.split_levels] for names in in_classes}, hint)
    rows = []
    for image, names in zip(images, below, strict=True):
        path = join_source(source, image)
        if names is not None:
            rows.append(
                Row(path, names[layout.split_levels], split_of_folder(names[0]) if layout.split_levels else None)
            )
        elif not has_few_outside:
            rows.append(Row(path, None, problem="lies outside every class folder"))
    warnings = _nested_folders(source, in_classes, layout) + _empty_folders(found.folders, images, layout)
    if outside and has_few_outside:
        warnings.append(f"{count_of(outside, 'image')} outside the class folders passed over: {', '.join(outside)}")
    return Listing(_printable(rows), warnings=warnings)


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


def compare_labels(source: str, rows: Sequence[Row], images: Sequence[str]) -> list[str]:
    """Returns a warning about rows of tables whose image lies in the folder of another class, if there are any."""
    layout = _find_layout(images)
    folders: dict[str, str] = {}
    for image in images:
        names = layout.names_below(image)
        if names is not None:
            folders[join_source(source, image)] = names[layout.split_levels]
    labels = {str(row.label) for row in rows}
    other = [row for row in rows if folders.get(row.path) in labels - {str(row.label)}]
    if not other:
        return []
    return [
        f"{count_of(other, 'image')} in the folder of another class than their table says, which is followed: "
        f"{other[0].path} ({other[0].label})"
    ]


def _find_layout(images: Iterable[str]) -> _Layout:
    folders = {tuple(image.split("/")[:-1]) for image in images}
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


def _nested_folders(source: str, in_classes: list[list[str]], layout: _Layout) -> list[str]:
    """Returns a warning about images that lie deeper than their class folder.

    Raises:
        DataError: all of them do.
    """
    nested = [names for names in in_classes if len(names) > layout.split_levels + 2]
    if not nested:
        return []
    example = "/".join((*layout.above, *nested[0]))
    if len(nested) == len(in_classes):
        only = list(layout.others) if len(layout.others) == 1 and not layout.split_levels else []
        hint = f" Did you mean data.source: {join_source(source, only[0])}?" if only else ""
        raise DataError(
            f"{source}: every image lies in a folder within a class folder ({example}), so what is the class cannot be "
            f"told; accepted: split/class/*.jpg or class/*.jpg.{hint}"
        )
    classes = {names[layout.split_levels] for names in in_classes}
    twice = next((n for n in nested if n[layout.split_levels + 1] in classes - {n[layout.split_levels]}), None)
    if twice is not None:
        raise DataError(
            f"{source}: {'/'.join((*layout.above, *twice))} lies in the folders of two classes, "
            f"{twice[layout.split_levels]} and {twice[layout.split_levels + 1]}; accepted: split/class/*.jpg or "
            "class/*.jpg"
        )
    return [f"{count_of(nested, 'image')} in folders within class folders, counted for the outer class: {example}"]


def _empty_folders(folders: Sequence[str], images: Sequence[str], layout: _Layout) -> list[str]:
    """Returns a warning about class folders and split folders in which there is no image."""
    used = {
        "/".join(names[:depth]) for names in (image.split("/") for image in images) for depth in range(1, len(names))
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


def _printable(rows: list[Row]) -> list[Row]:
    """Turns files whose names are not UTF-8 into bad rows, because Arrow tables cannot contain such names."""
    shown = [row.path.encode("utf-8", "backslashreplace").decode() for row in rows]
    return [
        row if row.path == path else Row(path, None, problem="file name is not UTF-8")
        for row, path in zip(rows, shown, strict=True)
    ]
