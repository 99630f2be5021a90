"""A file of a finished sweep is cut, emptied or garbled: the same command makes that part again, or names the file."""

import json

import pytest

pytestmark = pytest.mark.slow


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    content = bytearray(path.read_bytes())
    start = len(content) // 2
    content[start : start + 64] = bytes(255 - byte for byte in content[start : start + 64])
    path.write_bytes(content)


def cut_last_line(path):
    path.write_bytes(path.read_bytes().rstrip(b"\n")[:-7])


# Several files at a time, of which none depends on another.
REBUILT = {
    "files of features, a manifest, the leaderboard": [
        ("runs/.cache/features-*/*/rows-*0.parquet", garble),
        ("runs/.cache/pixels-*/manifest.json", empty),
        ("runs/digits/leaderboard.json", cut),
    ],
    "the manifest of features, a card, a model's weights": [
        ("runs/.cache/features-*/manifest.json", cut),
        ("runs/.cache/encoder-*.json", cut),
        ("runs/digits/models/dinov2-ridge/model.safetensors", garble),
    ],
    "results, a model's description, the journal's last line": [
        ("runs/digits/studies/dinov2-linear_probe/*/result.json", cut),
        ("runs/digits/studies/dinov2-ridge/*/result.json", empty),
        ("runs/digits/models/stacked_cnn-from_scratch/model.json", cut),
        ("runs/digits/optuna.journal", cut_last_line),
    ],
    "the best checkpoint of a probe": [
        ("runs/digits/studies/dinov2-linear_probe/*/trials/*/best.safetensors", cut),
    ],
}


@pytest.mark.parametrize("what", REBUILT)
def test_damaged_files_are_made_again(uninterrupted, tmp_path, what):
    sweep = uninterrupted.copy(tmp_path / "sweep")
    for pattern, damage in REBUILT[what]:
        damaged = sorted(sweep.folder.glob(pattern))
        assert damaged, pattern
        for path in damaged:
            damage(path)
    ended = sweep.run()
    assert ended.status == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert sweep.problems(uninterrupted.rows()) == []


def test_a_bad_line_within_the_journal_is_named(uninterrupted, tmp_path):
    sweep = uninterrupted.copy(tmp_path / "sweep")
    journal = sweep.root / "optuna.journal"
    lines = journal.read_text().splitlines()
    lines[5] = lines[5][:-9]
    journal.write_text("\n".join(lines) + "\n")
    ended = sweep.run()
    assert ended.status == 1
    assert "Traceback" not in ended.stderr
    assert "optuna.journal" in ended.stderr
    assert "line 6" in ended.stderr


def test_a_broken_mlflow_store_is_named(uninterrupted, tmp_path):
    sweep = uninterrupted.copy(tmp_path / "sweep")
    store = sweep.folder / "mlflow.db"
    store.write_bytes(store.read_bytes()[:3000])
    ended = sweep.run()
    assert ended.status == 1
    assert "Traceback" not in ended.stderr
    assert "mlflow.db" in ended.stderr


def test_a_renamed_project_goes_on(uninterrupted, tmp_path):
    sweep = uninterrupted.copy(tmp_path / "renamed")
    ended = sweep.run("--set", "search.fine_tune.num_trials=3")
    assert ended.status == 0, ended.stderr
    assert "done: 1 new trials" in ended.stderr
    text = (sweep.root / "leaderboard.json").read_text() + (sweep.root / "optuna.journal").read_text()
    assert str(uninterrupted.folder) not in text
    assert {row["study"] for row in json.loads((sweep.root / "leaderboard.json").read_text())} == set(
        uninterrupted.rows()
    )
