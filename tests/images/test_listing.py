import io
import random
import re

import numpy as np
import pytest
from PIL import Image
from published import indexed, labels_by_split, listed, rows_of, write_images, write_text

from raysweep.errors import DataError
from raysweep.images.decode import decode_image
from raysweep.images.formats import FORMATS, IMAGE_SUFFIXES

CLASSES = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(6)]
SPLITS = [f"{split}/{name}" for split in ("Training", "Testing") for name in CLASSES]


def encoded(suffix: str, number: int) -> bytes:
    formats = {".jp2": "JPEG2000", ".j2k": "JPEG2000", ".jfif": "JPEG", ".avif": "AVIF", ".apng": "PNG"}
    kind = formats.get(suffix) or Image.registered_extensions()[suffix]
    mode = {".pbm": "1", ".pgm": "L"}.get(suffix, "RGB")
    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


# Formats


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_format_is_taken_from_a_folder_and_from_a_table(tmp_path, suffix):
    Image.init()
    for number in range(16):
        file = tmp_path / "images" / "ab"[number % 2] / f"{number}{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(suffix, number))
    rows = [f"images/{'ab'[number % 2]}/{number}{suffix},{'ab'[number % 2]}" for number in range(16)]
    write_text(tmp_path / "labels.csv", ["image,label", *rows])
    folder, table = indexed(tmp_path / "images"), indexed(tmp_path / "labels.csv")
    assert folder.num_rows_found == table.num_rows_found == 16
    assert folder.bad_rows == table.bad_rows == ()
    assert folder.fingerprint == table.fingerprint
    assert decode_image(encoded(suffix, 0)).size == (32, 32)


def test_no_format_that_other_programs_read_is_accepted():
    assert not {"EPS", "WMF", "MPEG", "PDF"} & set(FORMATS)


def test_files_that_are_passed_over_are_counted_by_suffix(tmp_path):
    write_images(tmp_path, CLASSES)
    for number in range(30):
        write_text(tmp_path / "cat" / f"{number}.txt", ["x"])
        write_text(tmp_path / "dog" / f"{number}.heic", ["x"])
    for number in range(12):
        write_text(tmp_path / "dog" / f"no-suffix-{number}", ["x"])
    assert "72 files left out: 30 .txt, 30 .heic, 12 without suffix" in listed(tmp_path).warnings


# Files of other programs

JUNK = [
    *("cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/x.png", "cat/SYNOPHOTO_THUMB_M.jpg", "#recycle/cat/9.png"),
    *("__MACOSX/cat/._0.png", "cat/._0.png", "Thumbs.db", "dog/desktop.ini", ".DS_Store", "lost+found/1.png"),
    *(".ipynb_checkpoints/0-checkpoint.png", "System Volume Information/x.png", "$RECYCLE.BIN/S-1/x.png"),
    ".thumbnails/large/x.png",
]


@pytest.mark.parametrize("images", [CLASSES, SPLITS])
@pytest.mark.parametrize(
    "source", ["", "hf://datasets/org/pets", "s3://bucket/a/pets?region=x", "gs://anonymous@bucket/a/pets"]
)
def test_files_of_other_programs_are_ignored_and_counted(tmp_path, request, images, source):
    root = request.getfixturevalue("hub" if source.startswith("hf") else "buckets")
    folder = root / source.partition("?")[0].rpartition("@")[2].replace("s3:/", "").replace("hf:/", "").lstrip("/")
    write_images(folder, [*images, *JUNK])
    write_text(folder / ".gitattributes", ["x"])
    listing = listed(source or folder)
    assert len(listing.rows) == len(images)
    assert {row.label for row in listing.rows} == {"cat", "dog"}
    assert {row.problem for row in listing.rows} == {None}
    (warning,) = listing.warnings
    assert warning.startswith("14 hidden or system files ignored: 2 @eaDir, ")
    for name in ("1 #recycle", "1 __MACOSX", "1 Thumbs.db", "1 .DS_Store", "1 lost+found", "1 SYNOPHOTO_*"):
        assert name in warning


def test_hidden_images_are_counted(tmp_path):
    write_images(tmp_path, [*CLASSES, ".cache/a.png", "cat/.b.png"])
    assert listed(tmp_path).warnings == ["2 hidden or system files ignored: 2 hidden image"]


def test_a_class_may_be_called_like_waste(tmp_path):
    write_images(tmp_path, [f"{name}/{number}.png" for name in ("recycled", "trash") for number in range(3)])
    assert {row.label for row in listed(tmp_path).rows} == {"recycled", "trash"}


# Single pictures and empty folders


@pytest.mark.parametrize("images", [CLASSES, SPLITS])
@pytest.mark.parametrize("stray", [["banner.png"], ["logo.jpg", "banner.png"]])
def test_a_picture_beside_the_folders_is_passed_over_with_a_word(tmp_path, images, stray):
    write_images(tmp_path, [*images, *stray])
    index = indexed(tmp_path)
    assert index.num_rows_found == len(images)
    assert index.bad_rows == ()
    words = (
        f"{len(stray)} image{'s' * (len(stray) > 1)} outside the class folders passed over: {', '.join(sorted(stray))}"
    )
    assert words in index.warnings


@pytest.mark.parametrize("stray", ["docs/banner.png", "Training/overview.png", "docs/figures/1.png"])
def test_a_picture_in_a_folder_beside_split_or_class_folders(tmp_path, stray):
    write_images(tmp_path, [*SPLITS, stray])
    index = indexed(tmp_path)
    assert index.num_rows_found == len(SPLITS)
    assert f"1 image outside the class folders passed over: {stray}" in index.warnings


def test_many_images_outside_the_class_folders_stop_the_sweep(tmp_path):
    write_images(tmp_path, [*CLASSES, *(f"{number}.png" for number in range(6))], 0)
    with pytest.raises(DataError, match=r"6 of 18 rows cannot be used .*(?s:.*)lies outside every class folder"):
        indexed(tmp_path)


def test_empty_folders_get_a_word(tmp_path):
    write_images(tmp_path, CLASSES)
    (tmp_path / "owl").mkdir()
    write_text(tmp_path / "emu" / "readme.txt", ["x"])
    assert "2 folders without images: emu, owl" in listed(tmp_path).warnings


def test_empty_split_and_class_folders_get_a_word(tmp_path):
    write_images(tmp_path, SPLITS)
    for folder in ("val", "Testing/owl", "docs"):
        (tmp_path / folder).mkdir()
    index = indexed(tmp_path)
    assert "2 folders without images: Testing/owl, val" in index.warnings
    assert index.derived_splits == ("validation",)


# Split folders below another folder


@pytest.mark.parametrize("above", ["data", "archive/data"])
def test_split_folders_below_another_folder(tmp_path, above):
    write_images(tmp_path, [*(f"{above}/{name}" for name in SPLITS), "preview.png"])
    index = indexed(tmp_path)
    assert set(labels_by_split(index)) == {"train", "validation", "test"}
    assert labels_by_split(index)["test"] == {"cat": 6, "dog": 6}
    assert index.derived_splits == ("validation",)
    assert rows_of(listed(tmp_path), tmp_path)[f"{above}/Training/cat/0.png"] == ("cat", "train")


@pytest.mark.parametrize(
    "names",
    [("training_set", "test_set"), ("train2017", "val2017"), ("trainset", "testset"), ("TrainImages", "Valid-Data")],
)
def test_names_of_split_folders_that_say_what_they_contain(tmp_path, names):
    write_images(tmp_path, [f"{split}/{name}" for split in names for name in CLASSES])
    index = indexed(tmp_path)
    assert index.classes == ("cat", "dog")
    assert len(index.derived_splits) == 1


def test_classes_may_be_called_like_splits(tmp_path):
    write_images(tmp_path, [f"test {number}/{image}.png" for number in (1, 2) for image in range(5)])
    assert indexed(tmp_path).classes == ("test 1", "test 2")


@pytest.mark.parametrize("shown", ["{name}", "{split}/{name}"])
@pytest.mark.parametrize("options", ["", "?region=x"])
def test_a_bucket_of_split_folders_with_tables(buckets, options, shown):
    for split in ("train", "test"):
        write_images(buckets / "b" / "pets" / split, [f"{number}.png" for number in range(8)], 100 * (split == "test"))
        rows = [f"{shown.format(name=f'{n}.png', split=split)},{'ab'[n % 2]}" for n in range(8)]
        write_text(buckets / "b" / "pets" / split / "metadata.csv", ["file_name,label", *rows])
    index = indexed(f"s3://b/pets{options}")
    assert labels_by_split(index)["test"] == {"a": 4, "b": 4}
    assert index.derived_splits == ("validation",)
    assert index.table["path"].to_pylist()[0] == f"s3://b/pets/train/0.png{options}"


def test_one_split_of_a_bucket_alone_is_warned_about(buckets):
    write_images(buckets / "b" / "test", ["0.png", "1.png"])
    write_text(buckets / "b" / "test" / "metadata.csv", ["file_name,label", "0.png,a", "1.png,b"])
    for name, place in (("test/metadata.csv", "table"), ("test", "folder")):
        (warning,) = listed(f"s3://b/{name}?region=x").warnings
        assert f"data.source names the {place} of the test split alone" in warning


@pytest.mark.parametrize("options", ["", "?region=x"])
def test_splits_come_from_the_paths_of_a_table_in_a_bucket(buckets, options):
    names = [f"{split}/{number}.png" for split in ("train", "test") for number in range(8)]
    write_images(buckets / "b" / "pets", names)
    write_text(
        buckets / "b" / "pets" / "m.csv",
        ["file_name,label", *(f"{name},{'ab'[n % 2]}" for n, name in enumerate(names))],
    )
    index = indexed(f"s3://b/pets/m.csv{options}")
    assert labels_by_split(index)["test"] == {"a": 4, "b": 4}


# Any folder

FOLDERS = ["train", "Test", "VAL", "cat", "dog", "01", "data", "images", "training_set", "@eaDir", "docs", "__MACOSX"]
FILES = ["0.png", "1.png", "a.PPM", "x.txt", "metadata.csv", "labels.csv", "train.csv", "test.csv", "_classes.csv"]
HEADERS = ["file_name,label", "filename,a,b", "image,split,label", "file_name,text"]
CELLS = ["0.png", "1.png", "train/0.png", "cat/0.png", "Test/1.png", "0", "..\\x.png", "", "../a.png", "/etc/x.png"]


def random_folder(folder, seed):
    dice = random.Random(seed)
    names = {"/".join([*dice.choices(FOLDERS, k=dice.randint(0, 3)), dice.choice(FILES)]) for _ in range(12)}
    for number, name in enumerate(sorted(names)):
        if name.endswith(".csv"):
            header = dice.choice(HEADERS)
            values = ["0", "1", "a", "train", ""]
            lines = [[dice.choice(CELLS), *dice.choices(values, k=header.count(","))] for _ in range(3)]
            write_text(folder / name, [header, *map(",".join, lines)])
        else:
            write_images(folder, [name], number)
    return len(names)


def test_every_file_of_any_folder_is_read_or_counted_or_an_error_tells(tmp_path):
    read = 0
    for seed in range(80):
        folder = tmp_path / str(seed)
        num_files = random_folder(folder, seed)
        try:
            listing = listed(folder)
        except DataError:
            continue
        read += 1
        used = {*listing.tables, *(row.path for row in listing.rows)}
        counted = [re.match(r"(\d+) (?:files? left out|hidden or system)", warning) for warning in listing.warnings]
        num_used = sum(str(path) in used for path in folder.rglob("*") if path.is_file())
        assert num_used + sum(int(match.group(1)) for match in counted if match) == num_files, seed
    assert read > 20
