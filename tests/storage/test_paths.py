import csv
import json
import os
import stat

import pytest

from raysweep.errors import ConfigError, DataError
from raysweep.storage.copies import location
from raysweep.storage.paths import SweepPaths, file_name, read_json, signature, write_atomically, write_csv, write_json


def test_a_signature_follows_the_value_and_not_the_order_of_keys():
    first = signature({"a": [1, 2.5], "b": None})
    assert first == signature({"b": None, "a": (1, 2.5)})
    assert len(first) == 16
    assert len({first, signature({"a": [2.5, 1], "b": None}), signature({"a": [1, 2.5], "b": 0})}) == 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov2-base", "dinov2-base"),
        ("a b/c", "a-b-c"),
        ("..", "unnamed"),
        (".hidden", "hidden"),
        ("v1.2+x", "v1.2+x"),
    ],
)
def test_file_names(name, expected):
    assert file_name(name) == expected


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(TypeError):
        write_atomically(path, 5)
    assert read_json(path) == {"x": 1}
    assert [item.name for item in path.parent.iterdir()] == ["file.json"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file(tmp_path, umask, mode):
    """Whoever keeps files private keeps results, features and checkpoints private too."""
    before = os.umask(umask)
    try:
        write_json(tmp_path / "new" / "a.json", {})
        write_json(tmp_path / "new" / "a.json", {"again": 1})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "a.json").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~umask
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_text_is_utf_8_and_bytes_stay(tmp_path):
    write_atomically(tmp_path / "text", "größer\n")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
    write_atomically(tmp_path / "text", b"\xff")
    assert (tmp_path / "text").read_bytes() == b"\xff"


def test_json_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/none: no such file"):
        read_json(tmp_path / "none")
    (tmp_path / "half").write_text(json.dumps({"a": 1})[:-2])
    with pytest.raises(DataError, match=f"{tmp_path}/half: not readable as JSON"):
        read_json(tmp_path / "half")


def test_everything_lies_below_the_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = SweepPaths("runs", "beans")
    assert paths.root == tmp_path / "runs" / "beans"
    assert paths.cache("features", "f00") == tmp_path / "runs" / ".cache" / "features-f00"
    for path in (paths.optuna_journal, paths.tune, paths.study("s", "k"),
                 paths.study_result("s", "k"), paths.model("s"), paths.leaderboard_json,
                 paths.leaderboard_csv, paths.resolved_experiment, paths.quarantine):  # fmt: skip
        assert path.is_relative_to(paths.root)
    assert list(tmp_path.iterdir()) == []  # naming places makes none


def test_a_bucket_has_a_copy_on_every_node(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSWEEP_SCRATCH", str(tmp_path / "scratch"))
    paths = SweepPaths("s3://bucket/some/prefix", "beans")
    assert paths.root == tmp_path / "scratch" / "s3" / "bucket" / "some" / "prefix" / "beans"
    assert location(paths.model("s")) == "s3://bucket/some/prefix/beans/models/s"


def test_a_storage_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for storage in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ConfigError, match=f"storage: '{storage}' cannot be a folder: {tmp_path}/file is a file"):
            SweepPaths(str(storage), "x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").write_text("")
    with pytest.raises(ConfigError, match="runs/x is a file"):
        SweepPaths(str(tmp_path / "runs"), "x")


def test_a_storage_without_permission_is_refused(tmp_path, monkeypatch):
    # By a stand-in, because root may write wherever it likes.
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: bool(asked.append(path)))
    with pytest.raises(ConfigError, match=f"storage: '{tmp_path}/a/b' cannot be used: no permission to write to"):
        SweepPaths(str(tmp_path / "a" / "b"), "x")
    assert asked == [tmp_path]


FORMULAS = ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)", " =1", "|calc", "%0A", "\uff1d1", "\uff201"]


def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path):
    safe = ["a=b", "1", "x-y", "", "ü", "{}", "/images/=1.png"]
    write_csv(tmp_path / "new" / "t.csv", ["name", "number"], [(text, -1.5) for text in (*FORMULAS, *safe)])
    with open(tmp_path / "new" / "t.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "number"]
    assert [row[0] for row in rows[1:]] == [*(f"'{text}" for text in FORMULAS), *safe]
    assert {row[1] for row in rows[1:]} == {"-1.5"}


def test_control_characters_break_no_line_of_a_table(tmp_path):
    write_csv(tmp_path / "t.csv", ["name"], [["\t=1"], ["a\rb\n=c"], ["\x1b[2J"]])
    assert (tmp_path / "t.csv").read_bytes() == b"name\n\\t=1\na\\rb\\n=c\n\\x1b[2J\n"
