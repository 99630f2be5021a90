import json
import os
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import indexed, labels_by_split, listed, rows_of, write_images, write_text

from raysweep.errors import DataError
from raysweep.images.row_splits import split_of_table

SPLIT_SIZES = {"train": 12, "validation": 6, "test": 6}
KEYS = {"train": "train", "valid": "validation", "test": "test"}


def image_folder(folder, names=("train", "valid", "test"), table="metadata.csv", shown="{name}", start=0):
    """Split folders of images, each with a table of paths and labels, as Hugging Face's imagefolder has them."""
    for place, (name, size) in enumerate(zip(names, SPLIT_SIZES.values(), strict=False)):
        images = [f"{number}.png" for number in range(size)]
        write_images(folder / name, images, start + 100 * place)
        write_rows(
            folder / name / table,
            [(shown.format(name=image, split=name), "ab"[n % 2]) for n, image in enumerate(images)],
        )
    return folder


def write_rows(table, rows):
    table.parent.mkdir(parents=True, exist_ok=True)
    if table.suffix == ".csv":
        write_text(table, ["file_name,label", *(",".join(row) for row in rows)])
    elif table.suffix == ".jsonl":
        write_text(table, [json.dumps({"file_name": name, "label": label}) for name, label in rows])
    else:
        pq.write_table(pa.table({"file_name": [row[0] for row in rows], "label": [row[1] for row in rows]}), table)


def assert_published_splits(index):
    assert labels_by_split(index) == {
        split: Counter({"a": size // 2, "b": size // 2}) for split, size in SPLIT_SIZES.items()
    }
    assert index.derived_splits == ()
    assert index.bad_rows == ()


@pytest.mark.parametrize(
    "table", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "labels.csv", "_annotations.csv"]
)
def test_the_tables_of_split_folders_are_one_set(tmp_path, table):
    index = indexed(image_folder(tmp_path, table=table))
    assert_published_splits(index)
    assert not any("left out" in warning for warning in index.warnings), index.warnings


@pytest.mark.parametrize("names", [("Train", "Val", "Test"), ("TRAINING", "VALIDATION", "TESTING")])
def test_split_folders_in_any_spelling(tmp_path, names):
    assert_published_splits(indexed(image_folder(tmp_path, names)))


def test_split_folders_with_tables_below_another_folder(tmp_path):
    assert_published_splits(indexed(image_folder(tmp_path / "archive" / "data").parent))


def test_paths_that_start_from_the_folder_of_all_splits(tmp_path):
    index = indexed(image_folder(tmp_path, shown="{split}/{name}"))
    assert_published_splits(index)
    assert any("train/metadata.csv: its paths start from" in warning for warning in index.warnings)


def test_tables_beside_the_folders_of_their_images(tmp_path):
    image_folder(tmp_path)
    for split in ("train", "valid", "test"):
        os.rename(tmp_path / split / "metadata.csv", tmp_path / f"{split}.csv")
    assert_published_splits(indexed(tmp_path))


def test_images_in_a_folder_of_their_own(tmp_path):
    image_folder(tmp_path)
    for split in ("train", "valid", "test"):
        os.renames(tmp_path / split / "metadata.csv", tmp_path / "annotations" / f"labels_{split}.csv")
        os.renames(tmp_path / split, tmp_path / "images" / split)
    assert_published_splits(indexed(tmp_path))


def test_a_table_in_parts(tmp_path):
    write_images(tmp_path / "train", [f"{number}.png" for number in range(8)])
    for part in (0, 1):
        rows = [(f"{number}.png", "ab"[number % 2]) for number in range(4 * part, 4 * part + 4)]
        write_rows(tmp_path / "train" / f"labels-{part}.csv", rows)
    assert len(listed(tmp_path).rows) == 8


def test_links_to_split_folders(tmp_path):
    image_folder(tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / split).symlink_to(tmp_path / "elsewhere" / split)
    assert_published_splits(indexed(tmp_path / "data"))


def test_a_column_of_splits_goes_before_the_place_of_the_table(tmp_path):
    image_folder(tmp_path)
    rows = [f"{number}.png,{'ab'[number % 2]},{'test' if number < 2 else 'train'}" for number in range(12)]
    write_text(tmp_path / "train" / "metadata.csv", ["file_name,label,split", *rows])
    index = indexed(tmp_path)
    assert sum(labels_by_split(index)["test"].values()) == 8
    assert any("2 rows with another split in the column of splits, which is used" in text for text in index.warnings)


def test_a_test_table_without_labels_is_left_out_with_a_word(tmp_path):
    image_folder(tmp_path, table="labels.csv")
    write_text(tmp_path / "test" / "labels.csv", ["file_name", *(f"{number}.png" for number in range(6))])
    index = indexed(tmp_path)
    assert index.derived_splits == ("test",)
    assert any("test/labels.csv: no column for the label" in warning for warning in index.warnings)
    assert "7 files left out: 6 .png, 1 .csv" in index.warnings


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_training_table_is_never_made_up_for_by_the_test_table(tmp_path, split):
    image_folder(tmp_path)
    write_text(tmp_path / "train" / "metadata.csv", ["file_name,text", "0.png,a cat"])
    with pytest.raises(DataError, match=r"train/metadata\.csv: no column for the label") as raised:
        indexed(tmp_path)
    assert "test/metadata.csv" not in str(raised.value)


def test_captions_leave_the_labels_to_the_class_folders(tmp_path):
    write_images(tmp_path, [f"{s}/{c}/{n}.png" for s in ("train", "test") for c in "ab" for n in range(5)])
    for split in ("train", "test"):
        write_text(tmp_path / split / "metadata.csv", ["file_name,text", *(f"a/{n}.png,a cat" for n in range(5))])
    index = indexed(tmp_path)
    assert labels_by_split(index)["test"] == {"a": 5, "b": 5}
    assert any("train/metadata.csv: no column for the label" in warning for warning in index.warnings)


def test_a_table_goes_before_class_folders_and_says_where_they_differ(tmp_path):
    names = [f"{c}/{n}.png" for c in "ab" for n in range(6)]
    for place, split in enumerate(("train", "test")):
        write_images(tmp_path / split, names, 100 * place)
        write_rows(tmp_path / split / "metadata.csv", [(name, "b" if name == "a/0.png" else name[0]) for name in names])
    index = indexed(tmp_path)
    assert labels_by_split(index)["test"] == {"a": 5, "b": 7}
    assert any("2 images in the folder of another class than their table says" in text for text in index.warnings)


def test_tables_beside_split_folders_as_the_traffic_signs_have_them(tmp_path):
    write_images(tmp_path, [f"Train/{c}/{n}.png" for c in (0, 1) for n in range(6)])
    write_images(tmp_path, [*(f"Test/{n}.png" for n in range(6)), *(f"Meta/{n}.png" for n in range(2))], 100)
    for split, images in (("Train", [f"{c}/{n}" for c in (0, 1) for n in range(6)]), ("Test", range(6))):
        rows = [f"9,{str(image)[0] if split == 'Train' else image % 2},{split}/{image}.png" for image in images]
        write_text(tmp_path / f"{split}.csv", ["Width,ClassId,Path", *rows])
    write_text(tmp_path / "Meta.csv", ["Path,ClassId", "Meta/0.png,0"])
    index = indexed(tmp_path)
    assert labels_by_split(index)["test"] == {"0": 3, "1": 3}
    assert index.num_rows_found == 18
    assert "3 files left out: 2 .png, 1 .csv" in index.warnings


def test_class_folders_of_a_split_join_the_table_of_another(tmp_path):
    write_images(tmp_path, [f"Train/{c}/{n}.png" for c in "01" for n in range(6)])
    write_images(tmp_path, [f"Test/{n}.png" for n in range(6)], 100)
    write_rows(tmp_path / "Test.csv", [(f"Test/{n}.png", str(n % 2)) for n in range(6)])
    index = indexed(tmp_path)
    counts = labels_by_split(index)
    assert counts["test"] == {"0": 3, "1": 3}
    assert sum(counts["train"].values()) + sum(counts["validation"].values()) == 12
    assert index.derived_splits == ("validation",)


def test_tables_of_two_datasets_ask_for_one(tmp_path):
    for name in ("en", "fr"):
        image_folder(tmp_path / name)
    with pytest.raises(DataError, match=r"tables of splits in several folders \(en, fr\); name one"):
        indexed(tmp_path)
    assert_published_splits(indexed(tmp_path / "fr"))


def test_a_table_in_another_place_than_the_others_is_named(tmp_path):
    os.renames(image_folder(tmp_path, names=("train", "test")) / "test", tmp_path / "official" / "test")
    index = indexed(tmp_path)
    assert index.derived_splits == ("test", "validation")
    assert any("official/test/metadata.csv: in another folder than the tables of train" in w for w in index.warnings)


def test_images_that_no_table_names_are_counted(tmp_path):
    write_images(image_folder(tmp_path), ["train/extra.png", "train/more.png"], 900)
    index = indexed(tmp_path)
    assert_published_splits(index)
    assert "2 files left out: 2 .png" in index.warnings


def test_the_best_known_table_of_a_split_is_read_and_others_are_counted(tmp_path):
    image_folder(tmp_path)
    for split in ("train", "valid", "test"):
        write_rows(tmp_path / split / "boxes.csv", [("0.png", "z")])
    index = indexed(tmp_path)
    assert_published_splits(index)
    assert "3 files left out: 3 .csv" in index.warnings


@pytest.mark.parametrize("shown", ["{stem}", "{split}/{stem}"])
def test_ids_without_a_suffix_beside_the_folders_of_their_images(tmp_path, shown):
    image_folder(tmp_path)
    for split in ("train", "valid", "test"):
        rows = [(shown.format(stem=n, split=split), "ab"[n % 2]) for n in range(SPLIT_SIZES[KEYS[split]])]
        os.remove(tmp_path / split / "metadata.csv")
        write_rows(tmp_path / f"{split}_labels.csv", rows)
    assert_published_splits(indexed(tmp_path))


def test_a_table_of_boxes_is_refused_as_multi_label(tmp_path):
    write_images(tmp_path / "train", [f"{number}.png" for number in range(8)])
    boxes = [f"{number}.png,9,9,{name},1,1,5,5" for number in range(8) for name in ("cat", "dog")]
    write_text(tmp_path / "train" / "_annotations.csv", ["filename,width,height,class,xmin,ymin,xmax,ymax", *boxes])
    with pytest.raises(DataError, match=r"multi-label: 8 of 8 images have rows with different labels, such as .*0.png"):
        indexed(tmp_path)


# One column a class


def one_hot(folder, rows, header="filename, cat, dog"):
    for place, split in enumerate(("train", "valid", "test")):
        write_images(folder / split, [f"{number}.png" for number in range(len(rows))], 100 * place)
        write_text(folder / split / "_classes.csv", [header, *(f"{n}.png, {row}" for n, row in enumerate(rows))])
    return folder


def test_one_column_a_class_as_roboflow_writes_it(tmp_path):
    index = indexed(one_hot(tmp_path, ["1, 0", "0, 1"] * 4))
    assert index.classes == ("cat", "dog")
    assert labels_by_split(index) == {s: Counter(cat=4, dog=4) for s in ("train", "validation", "test")}


def test_one_column_a_class_with_numbers_for_ids_as_the_isic_archive_writes_it(tmp_path):
    folder = one_hot(tmp_path, ["0.0,1.0,0.0", "1.0,0.0,0.0", "0.0,0.0,1.0"] * 3, header="image,MEL,NV,BCC")
    index = indexed(folder)
    assert index.classes == ("BCC", "MEL", "NV")
    assert index.derived_splits == ()


@pytest.mark.parametrize("kind", [int, float, bool])
def test_one_column_a_class_in_parquet(tmp_path, kind):
    write_images(tmp_path, [f"train/{number}.png" for number in range(12)])
    columns = {name: [kind(number % 2 == place) for number in range(12)] for place, name in enumerate(("cat", "dog"))}
    table = pa.table({"file_name": [f"{number}.png" for number in range(12)], **columns})
    pq.write_table(table, tmp_path / "train" / "metadata.parquet")
    rows = rows_of(listed(tmp_path), tmp_path)
    assert (rows["train/0.png"], rows["train/1.png"]) == (("cat", "train"), ("dog", "train"))


def test_a_row_without_any_one_has_no_label(tmp_path):
    index = indexed(one_hot(tmp_path, ["1, 0", "0, 1", "0, 1", "1, 0", "0, 0"]), max_bad_fraction=0.2)
    assert [bad.reason for bad in index.bad_rows] == ["no label"] * 3


def test_one_column_a_class_with_several_ones_is_refused_as_multi_label(tmp_path):
    with pytest.raises(
        DataError, match=r"train/_classes.csv: multi-label: 2 of 8 rows have a 1 in several of .*cat, dog"
    ):
        indexed(one_hot(tmp_path, ["1, 0", "0, 1", "1, 1", "1, 0"] * 2))


# A table of all images


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_splits_come_from_the_paths_of_a_table_at_the_top(tmp_path, name, is_folder):
    image_folder(tmp_path)
    rows = []
    for split in ("train", "valid", "test"):
        os.remove(tmp_path / split / "metadata.csv")
        rows += [(f"{split}/{image}", "ab"[int(image[:-4]) % 2]) for image in sorted(os.listdir(tmp_path / split))]
    write_rows(tmp_path / name, rows)
    index = indexed(tmp_path if is_folder else tmp_path / name)
    assert_published_splits(index)
    assert any(
        "splits taken from the folders in the paths (12 train, 6 validation, 6 test)" in w for w in index.warnings
    )
    assert indexed(tmp_path / name, split=None).derived_splits == ("test", "validation")


def test_a_table_at_the_top_without_splits_in_its_paths(tmp_path):
    names = [f"images/{number}.png" for number in range(20)]
    write_images(tmp_path, names)
    write_rows(tmp_path / "metadata.csv", [(name, "ab"[n % 2]) for n, name in enumerate(names)])
    index = indexed(tmp_path)
    assert index.num_rows_found == 20
    assert index.derived_splits == ("test", "validation")


@pytest.mark.parametrize(("names", "num_test"), [(["cat/0.png", "dog/1.png"], 2), (["0.png", "1.png"], 0)])
def test_a_split_folder_beside_a_table_at_the_top(tmp_path, names, num_test):
    images = [f"train/{number}.png" for number in range(12)]
    write_images(tmp_path, [*images, *(f"test/{name}" for name in names)])
    write_rows(tmp_path / "metadata.csv", [(name, ("cat", "dog")[n % 2]) for n, name in enumerate(images)])
    index = indexed(tmp_path)
    assert index.num_rows_found == 12 + num_test
    assert ("test" in index.derived_splits) == (num_test == 0)
    assert any("2 images of test in no table" in warning for warning in index.warnings) == (num_test == 0)


def test_the_table_of_one_split_alone_is_warned_about(tmp_path):
    image_folder(tmp_path)
    warnings = listed(tmp_path / "test" / "metadata.csv").warnings
    assert any("names the table of the test split alone" in warning for warning in warnings)
    assert listed(tmp_path / "train" / "metadata.csv").warnings == []


def test_the_folder_of_one_split_alone_is_warned_about(tmp_path):
    image_folder(tmp_path)
    write_images(tmp_path / "classes" / "test", [f"{name}/{number}.png" for name in "ab" for number in range(4)])
    for folder in (tmp_path / "test", tmp_path / "classes" / "test"):
        assert any("names the folder of the test split alone" in warning for warning in listed(folder).warnings)
    assert listed(tmp_path / "train").warnings == []


def kaggle_folder(folder, header="image,label"):
    write_images(folder, [f"train_images/{number}.png" for number in range(12)])
    write_images(folder, [f"test_images/{number}.png" for number in range(5)], 100)
    write_text(folder / "train.csv", [header, *(f"{number}.png,{'ab'[number % 2]}" for number in range(12))])
    write_text(folder / "test.csv", ["image", *(f"{number}.png" for number in range(5))])
    return folder


def test_images_of_a_test_split_without_labels_are_left_out_with_a_word(tmp_path):
    index = indexed(kaggle_folder(tmp_path))
    assert index.classes == ("a", "b")
    assert index.num_rows_found == 12
    words = "5 images of test in no table and in no folder of a class that a table has"
    assert {words, "6 files left out: 5 .png, 1 .csv"} <= set(index.warnings)


def test_folders_of_splits_are_no_classes_where_their_tables_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"train\.csv: no column for the image"):
        indexed(kaggle_folder(tmp_path, header="id_code,diagnosis"))


def test_folders_within_split_folders_that_are_no_classes_of_a_table(tmp_path):
    image_folder(tmp_path, names=("train",))
    write_images(tmp_path, [f"test/images/{number}.png" for number in range(6)], 100)
    assert indexed(tmp_path).classes == ("a", "b")


def test_the_hint_never_names_the_table_of_one_split(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, ["0.png", "1.png"])
        write_text(tmp_path / split / "boxes.csv", ["x,y", "1,2"])
    write_text(tmp_path / "test_labels.tsv", ["x\ty", "1\t2"])
    with pytest.raises(DataError) as raised:
        indexed(tmp_path)
    assert "set data.source to" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("train/metadata.csv", ("train", "")),
        ("data/VAL/metadata.csv", ("validation", "data")),
        ("train.csv", ("train", "")),
        ("labels/trainLabels.csv", ("train", "labels")),
        ("annotations/labels_test.csv", ("test", "annotations")),
        ("train_test_split.csv", (None, "")),
        ("labels.csv", (None, "")),
        ("contest/latest.csv", (None, "contest")),
    ],
)
def test_the_split_that_a_table_is_of(file, expected):
    assert split_of_table(file) == expected


def test_rows_keep_their_order_and_label(tmp_path):
    image_folder(tmp_path, names=("train", "test"))
    rows = rows_of(listed(tmp_path), tmp_path)
    assert rows["train/1.png"] == ("b", "train")
    assert rows["test/0.png"] == ("a", "test")


# Layouts whose folders or tables could be taken for something else


def write_table(path, column, rows):
    write_text(path, [column, *(",".join(map(str, row)) for row in rows)])


@pytest.mark.parametrize("name", ["sample_submission.csv", "sampleSubmission.csv", "test_submission.csv"])
def test_a_sample_of_a_submission_is_neither_read_nor_proposed(tmp_path, name):
    kaggle_folder(tmp_path / "a")
    write_table(tmp_path / "a" / name, "image,label", [(f"{number}.png", "a") for number in range(5)])
    index = indexed(tmp_path / "a")
    assert index.num_rows_found == 12
    assert "7 files left out: 5 .png, 2 .csv" in index.warnings
    write_images(tmp_path / "b", ["train/cat.0.png", "train/dog.0.png", "test1/1.png"])
    write_table(tmp_path / "b" / name, "image,label", [("test1/1.png", "0")])
    with pytest.raises(DataError) as raised:
        indexed(tmp_path / "b")
    assert name not in str(raised.value)


@pytest.mark.parametrize("table", ["metadata.csv", "HAM10000_metadata.csv"])
def test_ids_of_images_in_folders_of_parts(tmp_path, table):
    for part, numbers in ((1, range(10)), (2, range(10, 20))):
        write_images(tmp_path, [f"HAM10000_images_part_{part}/ISIC_{n}.jpg" for n in numbers], 100 * part)
    write_table(tmp_path / table, "lesion_id,image_id,dx", [(n, f"ISIC_{n}", ("mel", "nv")[n % 2]) for n in range(20)])
    with pytest.raises(DataError, match=r"look like parts of a dataset, not like classes"):
        indexed(tmp_path)
    index = indexed(tmp_path, label="dx")
    assert index.classes == ("mel", "nv")
    assert (index.num_rows_found, index.bad_rows) == (20, ())
    with pytest.raises(DataError, match=r"has no column 'dxx'"):
        indexed(tmp_path, label="dxx")


def test_a_name_that_several_images_have_is_told(tmp_path):
    write_images(tmp_path, [f"{camera}/{number}.png" for camera in ("left", "right") for number in range(10)])
    write_table(tmp_path / "metadata.csv", "image_id,label", [(number, "ab"[number % 2]) for number in range(10)])
    with pytest.raises(DataError, match=r"several images have the name that a row has, such as left/0.png and right/0"):
        indexed(tmp_path)


def test_a_table_that_is_not_read_beside_class_folders_is_named(tmp_path):
    write_images(tmp_path, [f"{name}/{number}.png" for name in "ab" for number in range(6)])
    write_table(tmp_path / "breeds.csv", "filename,breed", [("a/0.png", "x")])
    words = "the classes are the names of folders; 1 table not read (breeds.csv); to use its table, set data.source to"
    assert any(warning.startswith(words) for warning in indexed(tmp_path).warnings)


@pytest.mark.parametrize("place", ["test/images", "test/annotations", "test/Images"])
def test_folders_of_images_are_no_class(tmp_path, place):
    write_images(tmp_path, [f"train/{name}/{number}.png" for name in "ab" for number in range(6)])
    write_images(tmp_path, [f"{place}/{number}.png" for number in range(6)], 100)
    with pytest.raises(DataError, match=rf"6 images in folders whose names are no classes, such as {place}/0.png"):
        indexed(tmp_path)


def test_images_and_masks_beside_each_other_are_no_classes(tmp_path):
    write_images(tmp_path, [f"images/beagle_{number}.png" for number in range(9)])
    write_images(tmp_path, [f"annotations/trimaps/beagle_{number}.png" for number in range(9)], 100)
    with pytest.raises(DataError, match=r"9 images in folders whose names are no classes"):
        indexed(tmp_path)


def test_a_split_without_any_class_of_train_is_refused(tmp_path):
    write_images(tmp_path / "folders", [f"train/{name}/{number}.png" for name in "ab" for number in range(6)])
    write_images(tmp_path / "folders", [f"test/unknown/{number}.png" for number in range(6)], 100)
    image_folder(tmp_path / "tables", ("train", "test"))
    write_table(tmp_path / "tables/test/metadata.csv", "file_name,label", [(f"{n}.png", -1) for n in range(6)])
    for folder, shown in (("folders", "'unknown'"), ("tables", "'-1'")):
        with pytest.raises(DataError, match=rf"no class of test \({shown}\) is one of train \('a', 'b'\)"):
            indexed(tmp_path / folder)


def test_classes_of_splits_in_other_spellings_are_left_to_their_warning(tmp_path):
    names = {"train": ("Cat", "01"), "test": ("cat", "1")}
    write_images(tmp_path, [f"{split}/{name}/{n}.png" for split in names for name in names[split] for n in range(6)])
    assert any("look alike" in warning for warning in indexed(tmp_path).warnings)


def test_an_image_in_the_folders_of_two_classes_is_refused(tmp_path):
    write_images(tmp_path, [f"{above}{name}/0.png" for above in ("", "brain_tumor/") for name in ("no", "yes")])
    with pytest.raises(DataError, match=r"brain_tumor/no/0.png lies in the folders of two classes, brain_tumor and no"):
        indexed(tmp_path)


def test_folds_and_versions_are_no_parts_of_a_table(tmp_path):
    write_images(tmp_path, [f"images/{number}.png" for number in range(12)])
    rows = [(f"images/{number}.png", "ab"[number // 2 % 2]) for number in range(12)]
    for folder in ("versions", "folds"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "images").symlink_to(tmp_path / "images")
    for version in (1, 2):
        write_table(tmp_path / "versions" / f"train_v{version}.csv", "file_name,label", rows)
        write_table(tmp_path / "folds" / f"train_fold{version}.csv", "file_name,label", rows[version - 1 :: 2])
        write_table(tmp_path / "folds" / f"test_fold{version}.csv", "file_name,label", rows[2 - version :: 2])
    with pytest.raises(DataError, match=r"train_v1.csv and train_v2.csv both name .*0.png, so they are no parts"):
        indexed(tmp_path / "versions")
    with pytest.raises(DataError, match=r"the tables name 12 of 12 files of test in train too"):
        indexed(tmp_path / "folds")


def test_tables_in_folders_of_their_own_as_the_isic_archive_has_them(tmp_path):
    for place, (split, size) in enumerate((("Training", 12), ("Validation", 6), ("Test", 6))):
        write_images(
            tmp_path / f"ISIC2018_Task3_{split}_Input", [f"I_{place}{n}.jpg" for n in range(size)], 100 * place
        )
        name = f"ISIC2018_Task3_{split}_GroundTruth"
        rows = [(f"I_{place}{n}", float(n % 2 == 0), float(n % 2)) for n in range(size)]
        write_table(tmp_path / name / f"{name}.csv", "image,a,b", rows)
    assert_published_splits(indexed(tmp_path))


def test_archives_beside_images_are_named(tmp_path):
    write_images(tmp_path, [f"train/{name}/{number}.png" for name in "ab" for number in range(6)])
    write_text(tmp_path / "test.zip", ["x"])
    assert "1 archive not unpacked, not read: test.zip" in listed(tmp_path).warnings


@pytest.mark.parametrize("folders", [("train_images", "test_images"), ("test_images",)])
def test_the_keys_proposed_for_a_table_of_train_never_lead_to_images_of_test(tmp_path, folders):
    write_images(tmp_path, [f"{folder}/{number}.png" for folder in folders for number in range(12)])
    write_table(tmp_path / "train.csv", "image_id,label", [(number, "ab"[number % 2]) for number in range(12)])
    with pytest.raises(DataError) as raised:
        indexed(tmp_path / "train.csv")
    assert "test_images" not in str(raised.value)
    assert ("image_folder: train_images" in str(raised.value)) == ("train_images" in folders)


def test_images_of_test_are_none_of_the_table_of_train(tmp_path):
    write_images(tmp_path, [f"test_images/{number}.png" for number in range(12)])
    write_table(tmp_path / "train.csv", "image_id,label", [(number, "ab"[number % 2]) for number in range(12)])
    with pytest.raises(DataError):
        indexed(tmp_path)


def test_a_split_that_is_an_object_is_told(tmp_path):
    write_images(tmp_path, [f"{number}.png" for number in range(4)])
    rows = [{"file_name": f"{n}.png", "label": "ab"[n % 2], "split": {"name": "train"}} for n in range(4)]
    write_text(tmp_path / "metadata.jsonl", list(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"0.png: split \{'name': 'train'\}; accepted: text or numbers"):
        indexed(tmp_path)
