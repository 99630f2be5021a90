import hashlib
import io
import json
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysweep.errors import DataError
from raysweep.images import listing
from raysweep.images.image_bytes import read_image_bytes
from raysweep.images.index import load_index
from raysweep.images.listed_rows import Listing, Row, Rows
from raysweep.storage import filesystems
from raysweep.storage.filesystems import open_filesystem

DECODING = {"max_megapixels": 50.0, "bit_depth": None, "group": None}
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def config(source, **keys):
    usual = {"image": None, "label": None, "split": "split", "validation_fraction": 0.1, "test_fraction": 0.2}
    usual |= {"image_folder": None, "image_suffix": None, "image_prefix": None, "allow_images_from": ()}
    return SimpleNamespace(
        source=str(source), **{**usual, **DECODING, "max_bad_fraction": 0.01, "shots": ("all",), **keys}
    )


def png(number: int) -> bytes:
    """A small image, different for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(folder: Path, names, start=0) -> None:
    for number, name in enumerate(names, start):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def class_folders(folder: Path, classes=("cat", "dog"), each=10) -> Path:
    write_images(folder, [f"{name}/{number}.png" for name in classes for number in range(each)])
    return folder


def column(index, name):
    return index.table[name].to_pylist()


def labels_of(index):
    return [index.classes[label] for label in column(index, "label")]


def read_all(index):
    return read_image_bytes(
        column(index, "path"), column(index, "position"), column(index, "image"), index.image_column
    )


def assert_readable(index):
    """What the index points at is what was hashed."""
    images = read_all(index)
    assert [hashlib.sha256(image).digest() for image in images] == column(index, "content_hash")


# Folders of images


def test_class_folders_and_the_table_they_become(tmp_path, monkeypatch):
    class_folders(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    index = load_index(config("images"), seed=0)
    assert index.classes == ("cat", "dog")
    assert index.num_rows_found == 20
    assert index.bad_rows == ()
    assert index.derived_splits == ("test", "validation")
    assert index.counts() == {
        "train": {"cat": 7, "dog": 7},
        "validation": {"cat": 1, "dog": 1},
        "test": {"cat": 2, "dog": 2},
    }
    split = pa.dictionary(pa.int8(), pa.string())
    assert index.table.schema.types == [
        *(pa.int64(), pa.string(), pa.int32(), pa.null(), pa.int32(), split, pa.binary(32))
    ]
    assert column(index, "path")[0] == str(tmp_path / "images" / "cat" / "0.png")
    assert column(index, "row_id") == list(range(20))
    assert_readable(index)


def test_split_folders_are_kept_under_any_of_their_names(tmp_path):
    write_images(tmp_path, [f"{s}/{c}/{i}.png" for s in ("Train", "val", "testing") for c in "ab" for i in range(5)])
    index = load_index(config(tmp_path), seed=0)
    assert index.derived_splits == ()
    assert {split: sum(row.values()) for split, row in index.counts().items()} == dict.fromkeys(
        ("train", "validation", "test"), 10
    )
    for path, split in zip(column(index, "path"), column(index, "split"), strict=True):
        assert Path(path).parts[-3].lower()[:3] == split[:3]


def test_every_image_suffix_in_any_case_and_nothing_hidden(tmp_path):
    class_folders(tmp_path)
    write_images(tmp_path, ["cat/a.JPG", "cat/b.jpeg", "cat/c.WebP", "cat/d.bmp", "cat/e.gif", "cat/f.TIF"], 100)
    write_images(tmp_path, ["cat/.hidden.png", ".cache/x.png", "dog/._0.png"], 200)
    (tmp_path / "cat" / "notes.txt").write_text("x")
    (tmp_path / "README").write_text("x")
    index = load_index(config(tmp_path), seed=0)
    assert index.num_rows_found == 26
    assert any(warning.startswith("2 files left out: 1 README, 1 .txt") for warning in index.warnings), index.warnings


def test_the_fingerprint_follows_the_contents_and_not_their_place(tmp_path):
    first = load_index(config(class_folders(tmp_path / "a")), seed=0)
    moved = tmp_path / "b"
    shutil.copytree(tmp_path / "a", moved)
    for image in (moved / "cat").iterdir():
        image.rename(image.with_name(f"z{100 - int(image.stem)}.png"))
    assert load_index(config(moved), seed=0).fingerprint == first.fingerprint
    assert load_index(config(moved), seed=1).fingerprint != first.fingerprint
    write_images(moved, ["cat/z100.png"], 999)
    assert load_index(config(moved), seed=0).fingerprint != first.fingerprint


def test_bad_files_become_bad_rows_with_reasons_and_keep_their_row_ids(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "cat" / "00-empty.png").write_bytes(b"")
    (tmp_path / "cat" / "01-text.jpg").write_text("not an image")
    (tmp_path / "cat" / "02-link.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "dog" / "zz.png").mkdir()
    index = load_index(config(tmp_path, max_bad_fraction=0.2), seed=0)
    assert {Path(bad.source).name: bad.reason for bad in index.bad_rows} == {
        "00-empty.png": "empty (0 bytes)",
        "01-text.jpg": "not an image in a known format",
        "02-link.png": "no such file",
    }
    assert index.num_rows_found == 23
    ids = column(index, "row_id") + [bad.row_id for bad in index.bad_rows]
    assert sorted(ids) == list(range(23))


def test_too_many_bad_rows_stop_with_the_first_few_named(tmp_path):
    class_folders(tmp_path)
    for number in range(7):
        (tmp_path / "cat" / f"bad{number}.png").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        load_index(config(tmp_path, max_bad_fraction=0.05), seed=0)
    message = str(raised.value)
    assert "7 of 27 rows cannot be used (25.9%); data.max_bad_fraction is 0.05" in message
    assert "bad0.png: empty (0 bytes)" in message
    assert message.endswith("and 2 more")


def test_numeric_classes_are_sorted_by_value_and_are_no_splits(tmp_path):
    class_folders(tmp_path, ("0", "1", "2", "10"))
    index = load_index(config(tmp_path), seed=0)
    assert index.classes == ("0", "1", "2", "10")
    assert index.derived_splits == ("test", "validation")


def test_class_names_in_unicode_are_composed(tmp_path):
    class_folders(tmp_path, ("cafe\u0301", "日本 語"))
    assert load_index(config(tmp_path), seed=0).classes == ("caf\u00e9", "日本 語")


def test_a_class_may_be_called_train(tmp_path):
    assert load_index(config(class_folders(tmp_path, ("train", "bus"))), seed=0).classes == ("bus", "train")


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    class_folders(tmp_path / "elsewhere", ("dog",))
    class_folders(tmp_path / "images", ("cat",))
    (tmp_path / "images" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "images" / "cat" / "loop").symlink_to(tmp_path / "images")
    index = load_index(config(tmp_path / "images"), seed=0)
    assert index.num_rows_found == 20
    assert str(tmp_path / "images" / "dog" / "0.png") in column(index, "path")


def test_file_names_that_are_not_utf8_are_bad_rows(tmp_path):
    class_folders(tmp_path)
    try:
        with open(os.path.join(os.fsencode(tmp_path), b"cat", b"\xff.png"), "wb") as file:
            file.write(png(500))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    index = load_index(config(tmp_path, max_bad_fraction=0.1), seed=0)
    assert [bad.reason for bad in index.bad_rows] == ["file name is not UTF-8"]


def test_some_nested_folders_count_for_the_outer_class_with_a_warning(tmp_path):
    write_images(class_folders(tmp_path), ["cat/persian/1.png"], 300)
    index = load_index(config(tmp_path), seed=0)
    assert labels_of(index).count("cat") == 11
    assert "1 image in folders within class folders, counted for the outer class: cat/persian/1.png" in index.warnings


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no images found; looked for .jpg .jpeg .png .* found nothing"),
        (["a.txt", "b/c.txt", "README"], "no images found; .* found 3 files: 2 .txt, 1 README"),
        (["a.txt", "labels.csv"], "no images found; .* set data.source to .*/labels.csv"),
        (["a.png", "b.png"], r"no class folders; accepted: class/\*.jpg; found a.png"),
        (["a.png", "labels.csv"], "no class folders.*set data.source to .*/labels.csv"),
        (["train/a.png", "test/b.png"], r"no class folders; accepted: split/class/\*.jpg"),
        (["train/cat/a.png", "dog/b.png"], r"split folders \(train\) and others \(dog\) side by side"),
        (["photo/cat/a.png", "sketch/dog/b.png"], "every image lies in a folder within a class folder"),
        (["images/cat/a.png", "images/dog/b.png"], "Did you mean data.source: .*/images"),
        (["test/cat/a.png", "test/dog/b.png"], "no training images; found only test"),
        (["cat/a.png", "cat/b.png"], "at least 2 classes are needed; found 1: cat"),
        (["train/cat/a.png", "train/cat/b.png"], "at least 2 classes"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, names, message):
    write_images(tmp_path, names)
    with pytest.raises(DataError, match=message):
        load_index(config(tmp_path), seed=0)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "data.source: /no/such/folder: no such file or folder"),
        ("https://example.com/x.csv", "'https://' is not read; accepted"),
        ("hf://beans", "hf://datasets/<organisation>/<name>"),
        ("sklearn://digit", "did you mean 'sklearn://digits'"),
        ("s3://key:secret@bucket/x", "credentials belong into the environment"),
    ],
)
def test_sources_that_are_none(source, message):
    with pytest.raises(DataError, match=message) as raised:
        load_index(config(source), seed=0)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"not a table of images; accepted: .csv, .tsv, .jsonl, .parquet"):
        load_index(config(tmp_path / "x.zip"), seed=0)


def test_column_names_are_of_no_use_for_a_folder(tmp_path):
    index = load_index(config(class_folders(tmp_path), label="species", split="fold"), seed=0)
    assert any(warning.startswith("data.label, data.split not used") for warning in index.warnings)


def test_copies_across_splits_and_classes_are_warned_about(tmp_path):
    write_images(tmp_path, [f"{s}/{c}/{i}.png" for s in ("train", "val", "test") for c in "ab" for i in range(5)])
    shutil.copy(tmp_path / "train/a/0.png", tmp_path / "test/a/copy.png")
    shutil.copy(tmp_path / "train/a/1.png", tmp_path / "train/b/copy.png")
    warnings = load_index(config(tmp_path), seed=0).warnings
    assert sum("1 image in more than one split (leakage)" in warning for warning in warnings) == 1
    assert sum("1 image in more than one class (conflicting labels)" in warning for warning in warnings) == 1


def test_splits_taken_from_train_do_not_part_copies(tmp_path):
    class_folders(tmp_path, each=20)
    for image in list((tmp_path / "cat").iterdir()):
        shutil.copy(image, image.with_name(f"copy{image.name}"))
    index = load_index(config(tmp_path), seed=0)
    assert not any("leakage" in warning for warning in index.warnings)
    assert index.counts()["test"] == {"cat": 8, "dog": 4}


def test_without_test_images_nothing_starts(tmp_path):
    with pytest.raises(DataError, match="no test images to report on"):
        load_index(config(class_folders(tmp_path), test_fraction=0.0), seed=0)


# Text tables


def write_table(folder: Path, rows, name="labels.csv", header="image,label", encoding="utf-8") -> Path:
    class_folders(folder / "files", ("x",), each=20)
    (folder / name).write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
    return folder / name


def usual_rows(separator=","):
    return [f"files/x/{number}.png{separator}{'ab'[number % 2]}" for number in range(20)]


def test_csv_with_paths_relative_to_the_table(tmp_path, monkeypatch):
    write_table(tmp_path / "data", usual_rows())
    monkeypatch.chdir(tmp_path)
    index = load_index(config("data/labels.csv"), seed=0)
    assert labels_of(index) == ["a", "b"] * 10
    assert column(index, "path")[3] == str(tmp_path / "data" / "files" / "x" / "3.png")
    assert_readable(index)


def test_tsv_with_a_byte_order_mark_and_windows_line_ends(tmp_path):
    rows = [row + "\r" for row in usual_rows("\t")]
    table = write_table(tmp_path, rows, "labels.tsv", "image\tlabel\r", "utf-8-sig")
    assert load_index(config(table), seed=0).classes == ("a", "b")


def test_absolute_paths_and_file_uris(tmp_path):
    rows = [row.replace("files", f"{tmp_path}/files") for row in usual_rows()]
    rows[0] = f"file://{tmp_path}/files/x/0.png,a"
    index = load_index(config(f"file://{write_table(tmp_path, rows)}"), seed=0)
    assert column(index, "path")[0] == str(tmp_path / "files" / "x" / "0.png")
    assert_readable(index)


def test_split_column_and_columns_named_by_the_user(tmp_path):
    rows = [f"{row},{number % 3}" for number, row in enumerate(usual_rows())]
    table = write_table(tmp_path, rows, header="file,species,fold")
    index = load_index(config(table, image="file", label="species", split="fold"), seed=0)
    assert column(index, "split")[:3] == ["train", "validation", "test"]
    assert index.derived_splits == ()


def test_bad_lines_of_a_table_are_bad_rows(tmp_path):
    rows = [*usual_rows(), "files/x/gone.png,a", "files/x/1.png,", "files/x/1.png,a,b", ",a", ""]
    index = load_index(config(write_table(tmp_path, rows), max_bad_fraction=0.2), seed=0)
    reasons = {bad.row_id: bad.reason for bad in index.bad_rows}
    assert reasons == {
        20: "no such file",
        21: "no label",
        22: "3 fields where the header has 2",
        23: "no image path",
    }
    assert index.bad_rows[2].source == f"{tmp_path}/labels.csv line 24"
    assert index.num_rows_found == 24


def test_a_table_whose_images_are_all_missing(tmp_path):
    table = write_table(tmp_path, [row.replace("files/x/", "wrong/x/none") for row in usual_rows()])
    with pytest.raises(DataError, match=r"20 of 20 rows cannot be used (?s:.*)wrong/x/none0.png: no such file"):
        load_index(config(table), seed=0)


@pytest.mark.parametrize(
    ("header", "keys", "message"),
    [
        ("image,label", {"label": "lable"}, "data.label: .* has no column 'lable'; did you mean 'label'"),
        ("image,label", {"image": "picture"}, "data.image: .* has no column 'picture'; .*columns: image, label"),
        ("image,label", {"split": "fold"}, "data.split: .* has no column 'fold'"),
        ("image,species", {}, "no column for the label; looked for label, labels, .*set data.label; columns: species"),
        ("a,label", {}, "no column for the image"),
        ("label,label", {}, "a column name stands twice"),
    ],
)
def test_columns_that_are_not_there(tmp_path, header, keys, message):
    with pytest.raises(DataError, match=message):
        load_index(config(write_table(tmp_path, usual_rows(), header=header), **keys), seed=0)


def test_tables_without_rows(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv: the table is empty"):
        load_index(config(tmp_path / "empty.csv"), seed=0)
    (tmp_path / "header.csv").write_text("image,label\n")
    with pytest.raises(DataError, match=r"header\.csv: no rows"):
        load_index(config(tmp_path / "header.csv"), seed=0)


def test_a_table_that_is_not_utf8(tmp_path):
    table = write_table(tmp_path, [*usual_rows(), "files/x/1.png,caf\u00e9"], encoding="latin-1")
    with pytest.raises(DataError, match=r"labels.csv: not UTF-8 text \(byte \d+\)"):
        load_index(config(table), seed=0)


def test_json_lines_with_mixed_labels_and_broken_lines(tmp_path):
    class_folders(tmp_path / "files", ("x",), each=20)
    lines = [
        json.dumps({"file_name": f"files/x/{n}.png", "label": (1, "1 ", 2.0, "\u2028é")[n % 4]}, ensure_ascii=False)
        for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, "{broken", "[]", '{"label": 1}']), encoding="utf-8")
    index = load_index(config(tmp_path / "rows.jsonl", max_bad_fraction=0.2), seed=0)
    assert index.classes == ("1", "2", "é")
    assert labels_of(index)[:4] == ["1", "1", "2", "é"]
    assert [bad.reason.split(" (")[0] for bad in index.bad_rows] == ["not JSON", "not a JSON object", "no image path"]
    assert "labels mix numbers and text; a number counts as its digits" in index.warnings
    words = "10 labels had spaces around them, which were taken off: '1 ' (5) is '1', '\\u2028é' (5) is 'é'"
    assert words in index.warnings


@pytest.mark.parametrize("label", [["a", "b"], 0.37, {"x": 1}])
def test_labels_that_are_no_classes(tmp_path, label):
    write_images(tmp_path, ["0.png", "1.png"])
    lines = [{"image": "0.png", "label": "a"}, {"image": "1.png", "label": label}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match="accepted: text or whole numbers, one label per image"):
        load_index(config(tmp_path / "rows.jsonl"), seed=0)


def test_an_unknown_split_is_named_with_its_count(tmp_path):
    rows = [f"{row},{'train' if number else 'holdout'}" for number, row in enumerate(usual_rows())]
    table = write_table(tmp_path, rows, header="image,label,split")
    with pytest.raises(DataError, match=r"labels\.csv: 1 rows in split 'holdout' names no split; accepted: train"):
        load_index(config(table), seed=0)


def test_rows_without_a_split_are_bad_where_there_is_a_split_column(tmp_path):
    rows = [f"{row},{'train' if number else ''}" for number, row in enumerate(usual_rows())]
    table = write_table(tmp_path, rows, header="image,label,split")
    index = load_index(config(table, max_bad_fraction=0.1), seed=0)
    assert [bad.reason for bad in index.bad_rows] == ["no split"]


# Parquet


def write_parquet(path: Path, images, labels, features=None, row_group_size=3, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": images, "label": labels, **columns})
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def test_parquet_with_bytes(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [png(n) for n in range(20)], [n % 2 for n in range(20)])
    index = load_index(config(path), seed=0)
    assert index.image_column == "image"
    assert index.classes == ("0", "1")
    assert column(index, "position") == list(range(20))
    assert set(column(index, "path")) == {str(path)}
    assert_readable(index)


def test_parquet_structs_with_bytes_or_a_path_or_neither(tmp_path):
    write_images(tmp_path, ["sub/outside.png"], 400)
    cells = [{"bytes": png(n), "path": f"{n}.png"} for n in range(18)]
    cells += [{"bytes": None, "path": "sub/outside.png"}, {"bytes": None, "path": None}, None]
    path = write_parquet(tmp_path / "x.parquet", cells, list("ab" * 10 + "a"))
    index = load_index(config(path, max_bad_fraction=0.2), seed=0)
    assert column(index, "content_hash")[18] == hashlib.sha256(png(400)).digest()
    assert [(bad.source, bad.reason) for bad in index.bad_rows] == [
        (f"{path} row 19", "no image in this row"),
        (f"{path} row 20", "no image in this row"),
    ]
    assert_readable(index)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_paths(tmp_path, kind):
    class_folders(tmp_path / "files", ("x",), each=20)
    paths = pa.array([f"files/x/{n}.png" for n in range(19)] + [None], pa.string()).cast(kind)
    index = load_index(config(write_parquet(tmp_path / "x.parquet", paths, list("ab" * 10)), max_bad_fraction=0.1), 0)
    assert column(index, "path")[5] == str(tmp_path / "files" / "x" / "5.png")
    assert column(index, "position") == [-1] * 19
    assert [bad.reason for bad in index.bad_rows] == ["no image path"]


def test_parquet_with_something_else(tmp_path):
    with pytest.raises(DataError, match=r"column 'image' is list<.*accepted: paths, bytes, or structs"):
        load_index(config(write_parquet(tmp_path / "x.parquet", [[1], [2]], ["a", "b"])), seed=0)


def test_a_file_that_is_not_parquet(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be read"):
        load_index(config(tmp_path / "x.parquet"), seed=0)


FEATURES = {"label": {"names": ["wolf", "ape"], "_type": "ClassLabel"}}


def hub_folder(folder: Path, prefix="") -> Path:
    """Two train files and one of validation, as the Hugging Face hub lays them out."""
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        images = [{"bytes": png(100 * number + n), "path": None} for n in range(40)]
        write_parquet(folder / f"{prefix}{name}.parquet", images, [n % 2 for n in range(40)], FEATURES)
    return folder


def test_parquet_folder_as_on_the_hub(tmp_path):
    (hub_folder(tmp_path, "data/") / "README.md").write_text("x")
    write_images(tmp_path, ["assets/preview.png"])
    index = load_index(config(tmp_path), seed=0)
    assert index.classes == ("ape", "wolf")
    assert labels_of(index)[:2] == ["wolf", "ape"]
    assert index.counts() == {
        "train": {"ape": 32, "wolf": 32},
        "validation": {"ape": 20, "wolf": 20},
        "test": {"ape": 8, "wolf": 8},
    }
    assert index.derived_splits == ("test",)
    assert "2 files left out: 1 .md, 1 .png" in index.warnings
    assert_readable(index)


def test_parquet_folder_with_splits_as_folders(tmp_path):
    for split in ("train", "test"):
        images = [png(n + 100 * (split == "test")) for n in range(40)]
        write_parquet(tmp_path / "default" / split / "0000.parquet", images, list("ab" * 20))
    assert load_index(config(tmp_path), seed=0).derived_splits == ("validation",)


def test_parquet_of_several_configurations_asks_for_one(tmp_path):
    hub_folder(tmp_path, "en/")
    hub_folder(tmp_path, "fr/")
    with pytest.raises(DataError, match=r"several folders \(en, fr\); name one, as in data.source: .*/fr"):
        load_index(config(tmp_path), seed=0)
    assert load_index(config(tmp_path / "fr"), seed=0).num_rows_found == 120


def test_parquet_files_of_no_split_are_left_out_with_a_warning(tmp_path):
    write_parquet(hub_folder(tmp_path) / "extra-00000.parquet", [png(900)], [0])
    index = load_index(config(tmp_path), seed=0)
    assert index.num_rows_found == 120
    assert "1 Parquet file of no known split left out: extra-00000.parquet" in index.warnings


def test_labels_withheld_or_out_of_range_are_bad_rows(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [png(n) for n in range(22)], [0, 1] * 10 + [-1, 2], FEATURES)
    index = load_index(config(path, max_bad_fraction=0.2), seed=0)
    assert [(bad.row_id, bad.reason) for bad in index.bad_rows] == [(20, "no label"), (21, "no label")]


# Reading bytes back


def test_a_row_that_fails_does_not_fail_the_others(tmp_path):
    write_images(tmp_path, ["a.png"])
    table = write_parquet(tmp_path / "x.parquet", [png(n) for n in range(7)], list("abababa"))
    (tmp_path / "broken.parquet").write_bytes(table.read_bytes()[:50])
    paths = ["a.png", "gone.png", "x.parquet", "x.parquet", "broken.parquet", "x.parquet", "a.png", "x.parquet"]
    images = read_image_bytes(
        [str(tmp_path / path) for path in paths],
        [-1, -1, 6, 0, 0, 99, -1, 6],
        [None] * 6 + [b"inline", None],
        "image",
    )
    assert images[0] == png(0)
    assert (images[2], images[3], images[6], images[7]) == (png(6), png(0), b"inline", png(6))
    assert str(images[1]) == "no such file"
    assert str(images[4]).startswith("the Parquet file cannot be read")
    assert str(images[5]) == "no such row in the Parquet file"


def test_each_row_group_is_read_once_and_only_where_needed(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "x.parquet", [png(n) for n in range(300)], [0] * 300, row_group_size=100)
    groups = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **keys):
        groups.append(keys["row_groups"])
        return original(self, *args, **keys)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    positions = [299, 5, 210, 70, 64, 63]
    images = read_image_bytes([str(path)] * 6, positions, [None] * 6, "image")
    assert images == [png(position) for position in positions]
    assert groups == [[0], [2]]


# Made-up and remote sources


def test_digits_come_inline():
    index = load_index(config("sklearn://digits"), seed=0)
    assert index.classes == tuple("0123456789")
    assert index.num_rows_found == 1797
    pixels = np.asarray(Image.open(io.BytesIO(column(index, "image")[0])))
    assert pixels.shape == (8, 8)
    assert pixels.max() > 200
    assert_readable(index)


def test_hub_dataset_of_parquet_files(hub):
    hub_folder(hub / "datasets" / "org" / "animals@v1", "data/")
    index = load_index(config("hf://datasets/org/animals@v1"), seed=0)
    assert column(index, "path")[0] == "hf://datasets/org/animals@v1/data/train-00000-of-00002.parquet"
    assert index.classes == ("ape", "wolf")
    assert_readable(index)


def test_hub_dataset_of_image_folders_and_of_a_table(hub):
    folder = class_folders(hub / "datasets" / "org" / "pets")
    write_images(folder, [".git/x.png"])
    index = load_index(config("hf://datasets/org/pets/"), seed=0)
    assert index.num_rows_found == 20
    assert column(index, "path")[0] == "hf://datasets/org/pets/cat/0.png"
    assert_readable(index)
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted(folder.glob("[!.]*/*.png"))]
    (folder / "labels.csv").write_text("\n".join(["path,class", *rows]))
    table = load_index(config("hf://datasets/org/pets/labels.csv"), seed=0)
    assert table.fingerprint == index.fingerprint


def test_a_hub_dataset_that_is_not_there(hub):
    hub.mkdir()
    with pytest.raises(DataError, match="hf://datasets/org/none: no such file or folder"):
        load_index(config("hf://datasets/org/none"), seed=0)


def test_a_network_that_fails_is_a_data_error(monkeypatch):
    def fail(uri):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(listing, "open_filesystem", fail)
    with pytest.raises(DataError, match=r"s3://b/x: cannot be read \(ConnectionError: name resolution failed\)"):
        load_index(config("s3://b/x"), seed=0)


def test_bucket_uris_keep_their_options_and_their_odd_keys(monkeypatch):
    asked = []
    monkeypatch.setattr(filesystems, "_connect", lambda *parts: asked.append(parts))
    assert open_filesystem("s3://bucket/a b/100%.png?region=x")[1] == "bucket/a b/100%.png"
    assert open_filesystem("gs://anonymous@bucket/x.png")[1] == "bucket/x.png"
    assert asked == [("s3", "bucket", "?region=x"), ("gs", "anonymous@bucket", "")]


# Real images


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared beans images are not here")
def test_beans_as_published():
    start = time.perf_counter()
    index = load_index(config(SHARED / "beans"), seed=42)
    assert time.perf_counter() - start < 20
    assert {split: sum(row.values()) for split, row in index.counts().items()} == {
        "train": 1034,
        "validation": 133,
        "test": 128,
    }
    assert index.classes == ("angular_leaf_spot", "bean_rust", "healthy")
    assert index.bad_rows == ()
    assert index.warnings == ("1 file left out: 1 LICENSE",)


def test_a_row_needs_little_memory_beside_its_path(tmp_path):
    index = load_index(config(class_folders(tmp_path, each=50)), seed=0)
    assert index.table.nbytes - sum(map(len, column(index, "path"))) < 60 * len(index.table)


def test_a_row_of_a_parquet_file_does_not_repeat_its_path(tmp_path):
    cells = [{"bytes": png(number), "path": None} for number in range(100)]
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    index = load_index(config(write_parquet(folder / "x.parquet", cells, list("ab" * 50))), seed=0)
    assert set(column(index, "path")) == {str(folder / "x.parquet")}
    assert index.table.nbytes < 70 * len(index.table)
    assert_readable(index)


def peak_bytes_a_row(make, num_rows):
    tracemalloc.start()
    make()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / num_rows


def test_no_python_object_is_kept_for_a_row_while_the_index_is_made(tmp_path, monkeypatch):
    load_index(config(class_folders(tmp_path)), seed=0)  # imports modules
    monkeypatch.setattr("raysweep.images.texts.TEXTS_PER_CHUNK", 256)
    monkeypatch.setattr("raysweep.images.index.ROWS_AT_ONCE", 256)
    monkeypatch.setattr("raysweep.images.contents.ROWS_AT_ONCE", 256)
    rows = Rows(Row(f"/data/images/class_{number % 20}/{number:08}.png", str(number % 20)) for number in range(20_000))
    monkeypatch.setattr("raysweep.images.index.list_source", lambda _: Listing(rows))
    monkeypatch.setattr("raysweep.images.image_bytes.read_file", lambda path: png(0) + path.encode())
    assert peak_bytes_a_row(lambda: load_index(config("x"), seed=0), 20_000) < 100


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_no_python_object_is_kept_for_a_line_of_a_table(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr("raysweep.images.texts.TEXTS_PER_CHUNK", 256)
    names = [f"images/class_{number % 20}/{number:08}.png" for number in range(20_000)]
    lines = ["image,label", *(f"{name},a" for name in names)]
    if suffix == ".jsonl":
        lines = [json.dumps({"image": name, "label": "a"}) for name in names]
    table = tmp_path / f"table{suffix}"
    table.write_text("\n".join(lines))
    size = table.stat().st_size / 20_000
    assert peak_bytes_a_row(lambda: listing.list_source(config(table, max_bad_fraction=0.9)), 20_000) < 4 * size + 100
