import csv
import io
import json

import numpy as np
import pytest
from rich.console import Console

from raysweep.results.leaderboard import (
    COLUMNS,
    describe_seconds,
    describe_setting,
    rank_rows,
    render_leaderboard,
    write_leaderboard,
)


def make_row(study, accuracy, **more):
    row = {
        "study": study,
        "encoder": "dinov2",
        "mode": "linear_probe",
        "shots": "all",
        "num_trials": 8,
        "best_params": {"learning_rate": 0.003, "epochs": 15, "features": "cls"},
        "val_accuracy": 0.9,
        "test_accuracy": accuracy,
        "test_accuracy_low": accuracy - 0.05,
        "test_accuracy_high": accuracy + 0.05,
        "test_macro_f1": accuracy,
        "num_test": 100,
        "encoder_passes": 1,
        "train_seconds": 75.0,
        "study_seconds": 80.0,
        "peak_memory_bytes": 1_500_000_000,
        "peak_gpu_memory_bytes": 0,
        "images_per_second": 80.0,
        "mlflow_run_id": "f00",
        "model_path": f"/runs/x/models/{study}",
    }
    return row | more


def right(num_right, num_rows=100):
    return [number < num_right for number in range(num_rows)]


@pytest.fixture
def rows():
    made = [make_row("worst", 0.5), make_row("best", 0.91), make_row("close", 0.90)]
    return rank_rows(made, [right(50), right(91), right(90)], seed=0)


def test_rows_are_ranked_and_what_cannot_be_told_apart_is_marked(rows):
    assert [row["study"] for row in rows] == ["best", "close", "worst"]
    assert [row["tied_with_best"] for row in rows] == [True, True, False]


def test_among_equals_the_cheaper_stands_first():
    made = [make_row("dear", 0.9, train_seconds=100.0), make_row("cheap", 0.9, train_seconds=3.0)]
    assert [row["study"] for row in rank_rows(made, [right(90), right(90)], 0)] == ["cheap", "dear"]


def test_one_test_row_can_be_ranked():
    ranked = rank_rows([make_row("a", 0.0), make_row("b", 1.0)], [[False], [True]], 0)
    assert [row["study"] for row in ranked] == ["b", "a"]


def test_the_files_hold_the_same_rows(rows, tmp_path):
    write_leaderboard(rows, tmp_path / "new" / "board.json", tmp_path / "new" / "board.csv")
    from_json = json.loads((tmp_path / "new" / "board.json").read_text())
    assert from_json == [{column: row[column] for column in COLUMNS} for row in rows]
    with (tmp_path / "new" / "board.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    assert list(from_csv[0]) == list(COLUMNS)
    assert [row["study"] for row in from_csv] == ["best", "close", "worst"]
    assert json.loads(from_csv[0]["best_params"]) == rows[0]["best_params"]
    assert float(from_csv[0]["test_accuracy"]) == 0.91


def test_a_figure_that_is_not_json_is_refused_before_a_file_is_touched(tmp_path):
    row = make_row("a", float("nan"), tied_with_best=True)
    with pytest.raises(ValueError, match="JSON"):
        write_leaderboard([row], tmp_path / "board.json", tmp_path / "board.csv")
    assert list(tmp_path.iterdir()) == []


def rendered(rows, width=120):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_leaderboard(rows))
    return console.file.getvalue()


def test_the_table_shows_interval_cost_and_ties(rows):
    text = rendered(rows)
    lines = [line.split() for line in text.splitlines()]
    first = next(line for line in lines if line[:1] == ["1"])
    assert " ".join(first) == "1 dinov2 linear_probe 0.910 [0.860, 0.960] 8 1 min 15 s 1.5 GB"
    assert any(line[:1] == ["="] and "0.900" in line for line in lines)
    assert any(line[:1] == ["3"] and "0.500" in line for line in lines)
    assert "cannot tell" in text
    assert "accuracy [95 % interval]" in text
    assert "shots" not in text


def test_without_a_tie_there_is_no_legend():
    made = rank_rows([make_row("a", 0.9), make_row("b", 0.3)], [right(90), right(30)], 0)
    assert "cannot tell" not in rendered(made)


def test_shots_and_gpu_memory_are_shown_where_there_are_any(rows):
    more = [rows[0], rows[1] | {"shots": 5, "peak_gpu_memory_bytes": 3_000_000_000}]
    text = rendered(more)
    assert "shots" in text
    assert "peak GPU memory" in text
    assert "3.0 GB" in text


def test_settings_in_a_few_words():
    setting = {"learning_rate": 0.00312, "epochs": 15, "weight_decay": 1e-4, "features": "cls", "normalize": "l2"}
    assert describe_setting(setting) == "lr 0.0031, 15 epochs, cls, l2"
    assert describe_setting({"learning_rate": 1e-4, "epochs": 5}) == "lr 0.0001, 5 epochs"


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.42, "8.4 s"), (60, "1 min 00 s"), (200.9, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert describe_seconds(seconds) == text


def test_ranking_does_not_change_the_rows_it_is_given():
    made = [make_row("a", 0.9)]
    rank_rows(made, [np.array(right(90))], 0)
    assert "tied_with_best" not in made[0]
