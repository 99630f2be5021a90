"""Images that belong together, by a column or by their paths."""

import csv
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysweep.errors import ConfigError, DataError
from raysweep.experiment.config import DataConfig, load_experiment
from raysweep.images.contents import contents_of
from raysweep.images.groups import Groups, join_copies
from raysweep.images.index import load_index

NUM_PATIENTS = 30


def names(kind="png"):
    """Three images of each patient, of which every third patient is mostly of class b."""
    for patient in range(NUM_PATIENTS):
        for visit in range(3):
            label = "b" if (patient % 3 == 0) != (visit == 2 and patient % 2) else "a"
            yield patient, label, f"{label}/p{patient:02d}_v{visit}.{kind}"


@pytest.fixture
def folder(tmp_path):
    for number, (_, _, name) in enumerate(names()):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return tmp_path / "images"


def write_csv(folder, split_of=None):
    rows = [(name, label, f"{patient}") for patient, label, name in names()]
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "patient", *(["split"] if split_of else [])])
        for number, row in enumerate(rows):
            writer.writerow([*row, *([split_of(number)] if split_of else [])])
    return folder / "table.csv"


def write_parquet(folder):
    table = {"image": [], "label": [], "patient": []}
    for patient, label, name in names():
        table["image"].append({"bytes": (folder / name).read_bytes(), "path": name})
        table["label"].append(label)
        table["patient"].append(patient)
    pq.write_table(pa.table(table), folder / "table.parquet")
    return folder / "table.parquet"


def assert_groups(index, order):
    """Each patient is in one split, and each split has its share of each class."""
    patients = defaultdict(set)
    for row_id, split in zip(index.table["row_id"].to_pylist(), index.table["split"].to_pylist(), strict=True):
        patients[order[row_id]].add(split)
    assert len(patients) == NUM_PATIENTS
    assert all(len(splits) == 1 for splits in patients.values())
    counts = index.counts()
    for label in ("a", "b"):
        total = sum(counts[split][label] for split in counts)
        assert abs(counts["test"][label] / total - 0.2) < 0.1
        assert abs(counts["validation"][label] / total - 0.1) < 0.1


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_a_column_keeps_a_group_in_one_split(folder, write):
    index = load_index(DataConfig(source=str(write(folder)), group="patient"), seed=0)
    assert_groups(index, [patient for patient, _, _ in names()])


@pytest.mark.parametrize("pattern", ["p([0-9]+)_", "p[0-9]+", "/(?:p)([0-9]+)_v[0-9]"])
def test_a_pattern_for_the_paths_keeps_a_group_in_one_split(folder, pattern):
    index = load_index(DataConfig(source=str(folder), group={"pattern": pattern}), seed=0)
    order = [int(name.rsplit("/", 1)[1][1:3]) for name in sorted(name for _, _, name in names())]
    assert_groups(index, order)
    table = load_index(DataConfig(source=str(write_csv(folder)), group={"pattern": pattern}), seed=0)
    assert_groups(table, [patient for patient, _, _ in names()])


def test_the_index_says_which_rows_belong_together(folder):
    index = load_index(DataConfig(source=str(folder), group={"pattern": "p([0-9]+)_"}), seed=0)
    patients = [path.rpartition("/")[2][:3] for path in index.table["path"].to_pylist()]
    assert len(set(zip(patients, index.groups.tolist(), strict=True))) == NUM_PATIENTS
    assert len(set(index.groups.tolist())) == NUM_PATIENTS
    assert load_index(DataConfig(source=str(folder)), seed=0).groups is None


def test_copies_of_one_image_belong_together(folder):
    (folder / "a" / "copy.png").write_bytes((folder / "a" / "p01_v0.png").read_bytes())
    index = load_index(DataConfig(source=str(folder)), seed=0)
    paths = [path.rpartition("/")[2] for path in index.table["path"].to_pylist()]
    assert index.groups[paths.index("copy.png")] == index.groups[paths.index("p01_v0.png")]
    assert len(set(index.groups.tolist())) == 3 * NUM_PATIENTS


def test_without_groups_the_patients_cross_the_splits(folder):
    index = load_index(DataConfig(source=str(write_csv(folder))), seed=0)
    with pytest.raises(AssertionError):
        assert_groups(index, [patient for patient, _, _ in names()])


def test_the_folder_above_the_source_is_not_searched(tmp_path, folder):
    moved = folder.rename(tmp_path / "patient_1")
    with pytest.raises(DataError, match=r"data.group: every image has a path that 'patient_\(.\)' does not match"):
        load_index(DataConfig(source=str(moved), group={"pattern": "patient_(.)"}), seed=0)


def test_groups_do_not_depend_on_the_order_of_the_rows(folder):
    table = write_csv(folder)
    first = load_index(DataConfig(source=str(table), group="patient"), seed=3)
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert load_index(DataConfig(source=str(table), group="patient"), seed=3).fingerprint == first.fingerprint
    assert load_index(DataConfig(source=str(table), group="patient"), seed=4).fingerprint != first.fingerprint


def test_given_splits_that_groups_cross_are_counted(folder):
    table = write_csv(folder, lambda number: ["train", "train", "validation", "test"][number % 4 if number < 12 else 0])
    with open(table, "a") as file:
        file.writelines(f"{name},{label},x{label},test\n" for _, label, name in list(names())[-2:])
    index = load_index(DataConfig(source=str(table), group="patient"), seed=0)
    (warning,) = (text for text in index.warnings if "groups are in more than one split" in text)
    assert warning.startswith("4 of 32 groups are in more than one split (leakage): 0 (train, validation); 1 (test, ")
    assert warning.endswith(" and 1 more")


def test_images_without_a_group_are_counted(folder):
    table = write_csv(folder)
    table.write_text(table.read_text().replace(",29\n", ",\n").replace(",29\r\n", ",\r\n"))
    index = load_index(DataConfig(source=str(table), group="patient"), seed=0)
    (warning,) = (text for text in index.warnings if "group of its own" in text)
    assert warning.startswith("3 images with no value in column 'patient'; each of them is a group of its own: ")


def test_a_column_that_is_missing_or_a_source_without_columns(folder):
    with pytest.raises(DataError, match=r"data.group: .* has no column 'patience'; did you mean 'patient'"):
        load_index(DataConfig(source=str(write_csv(folder)), group="patience"), seed=0)
    with pytest.raises(DataError, match=r"data.group: every image has no value in column .*accepted: the name"):
        load_index(DataConfig(source=str(folder), group="patient"), seed=0)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("{pattern: 'p('}", r"data.group.pattern.*no regular expression: .*found p\("),
        ("{pattern: '(a)(b)'}", r"data.group.pattern.*found 2 in \(a\)\(b\)"),
        ("{patern: x}", r"data.group.patern.*unknown key; did you mean 'pattern'"),
        ("{}", r"data.group.pattern.*required, but not given"),
        ("3", r"data.group.*text"),
    ],
)
def test_what_is_no_group_is_said(tmp_path, group, message):
    file = tmp_path / "x.yaml"
    file.write_text(f"data: {{source: x, group: {group}}}\nencoders: [stacked_cnn]\n")
    with pytest.raises(ConfigError, match=message):
        load_experiment(file)


def joined_names(names, hashes):
    known = [name for name in dict.fromkeys(names) if name is not None]
    numbers = np.array([-1 if name is None else known.index(name) for name in names], np.int32)
    together = join_copies(Groups(numbers, known), contents_of(hashes))
    return [together.name_of(number) for number in together.numbers]


def test_groups_with_copies_of_one_image_are_joined():
    one, two, three = (bytes([number]) * 32 for number in (1, 2, 3))
    hashes = [one, one, two, three, three]
    joined = joined_names(["p", "q", None, "r", None], hashes)
    assert joined[0] == joined[1] == "group:p"
    assert joined[2] == two.hex()
    assert joined[3] == joined[4] == three.hex()
    assert joined_names([None] * 3, hashes[:3]) == [one.hex(), one.hex(), two.hex()]
    order = np.random.default_rng(0).permutation(5)
    names = ["p", "q", None, "r", None]
    assert joined_names([names[row] for row in order], [hashes[row] for row in order]) == [joined[row] for row in order]
