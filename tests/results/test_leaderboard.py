import csv
import io
import json
import subprocess
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from rich.console import Console

from raysweep.experiment.metrics import TEST_METRICS
from raysweep.results.leaderboard import (
    ClassMetrics,
    Row,
    describe_seconds,
    describe_setting,
    rank_rows,
    render_leaderboard,
    uneven_warning,
    write_leaderboard,
)
from raysweep.training.intervals import FoldEstimate


def make_row(study, accuracy, **more):
    row = {
        "study": study,
        "encoder": "dinov2",
        "mode": "linear_probe",
        "shots": "all",
        "num_seeds": 1,
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
    return Row(**(row | more))


def right(num_right, num_rows=100, num_draws=1):
    return np.tile(np.arange(num_rows) < num_right, (num_draws, 1))


def ranked(rows, hits, seed=0):
    return rank_rows(rows, [(row.val_accuracy, 0.0) for row in rows], hits, seed)


@pytest.fixture
def rows():
    made = [
        make_row("worst", 0.5, val_accuracy=0.6),
        make_row("best", 0.90, val_accuracy=0.93),
        make_row("close", 0.91, val_accuracy=0.92, train_seconds=3.0),
    ]
    return ranked(made, [right(50), right(90), right(91)])


def test_rows_are_ranked_by_validation_and_those_that_may_be_the_best_are_marked(rows):
    assert [row.study for row in rows] == ["best", "close", "worst"]
    assert [row.tied_with_best for row in rows] == [True, True, False]
    assert [row.is_recommended for row in rows] == [False, True, False], "the cheapest of those that may be the best"


@pytest.mark.parametrize(("seconds", "recommended"), [(5.9, "best"), (6.1, "close")])
def test_rows_that_cost_about_the_same_are_recommended_by_validation(seconds, recommended):
    made = [
        make_row("best", 0.9, val_accuracy=0.93, train_seconds=seconds),
        make_row("close", 0.9, val_accuracy=0.92, train_seconds=3.0),
        make_row("cheaper but worse", 0.5, val_accuracy=0.91, train_seconds=0.1),
    ]
    found = ranked(made, [right(90), right(90), right(50)])
    assert [row.study for row in found if row.is_recommended] == [recommended]


def test_among_equals_the_cheaper_stands_first():
    made = [make_row("dear", 0.9, train_seconds=100.0), make_row("cheap", 0.9, train_seconds=3.0)]
    found = ranked(made, [right(90), right(90)])
    assert [(row.study, row.is_recommended) for row in found] == [("cheap", True), ("dear", False)]


def test_the_second_part_of_a_score_breaks_ties():
    made = [make_row("a", 0.9, train_seconds=1.0), make_row("b", 0.9)]
    assert [row.study for row in rank_rows(made, [(0.9, -0.5), (0.9, -0.3)], [right(90)] * 2, 0)] == ["b", "a"]


def test_the_first_by_validation_may_be_beaten_on_test():
    made = [make_row("lucky", 0.5, val_accuracy=0.99, train_seconds=1.0), make_row("good", 0.9)]
    first, second = ranked(made, [right(50), right(90)])
    assert (first.study, first.tied_with_best, first.is_recommended) == ("lucky", False, False)
    assert (second.tied_with_best, second.is_recommended) == (True, True)
    lines = [line.split() for line in rendered([first, second]).splitlines()]
    assert [line[0] for line in lines if line[1:2] == ["dinov2"]] == ["1", "2*"]


def test_one_test_row_can_be_ranked():
    made = [make_row("a", 0.0, val_accuracy=0.1), make_row("b", 1.0)]
    found = ranked(made, [np.array([[False]]), np.array([[True]])])
    assert [row.study for row in found] == ["b", "a"]


def test_a_row_of_which_it_is_not_known_where_it_is_right_is_not_left_out():
    made = [make_row("a", 0.9, shots=5), make_row("b", 0.4, shots=5), make_row("c", 0.5, shots=5)]
    found = ranked(made, [right(90, num_draws=5), np.zeros((0, 100), bool), right(50, num_draws=5)])
    assert {row.study: row.tied_with_best for row in found} == {"a": True, "b": True, "c": False}


def test_the_files_hold_the_same_rows(rows, tmp_path):
    write_leaderboard(rows, tmp_path / "new" / "board.json", tmp_path / "new" / "board.csv")
    from_json = json.loads((tmp_path / "new" / "board.json").read_text())
    columns = [column.name for column in fields(Row) if column.name != "test_metrics"]
    assert [{name: row[name] for name in columns} for row in from_json] == [
        {name: value for name, value in asdict(row).items() if name != "test_metrics"} for row in rows
    ]
    with (tmp_path / "new" / "board.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    assert [name for name in from_json[0] if name != "test_per_class"] == list(from_csv[0])
    assert list(from_json[0])[: len(columns)] == columns
    assert [row["study"] for row in from_csv] == ["best", "close", "worst"]
    assert json.loads(from_csv[0]["best_params"]) == rows[0].best_params
    assert float(from_csv[0]["test_accuracy"]) == 0.90


def test_each_metric_of_test_is_a_column_and_those_of_a_class_are_in_the_json(tmp_path):
    metrics = {name: number / 16 for number, name in enumerate(TEST_METRICS, start=1)}
    per_class = {"cat": ClassMetrics(0.5, 0.25), "dog": ClassMetrics(None, 0.0)}
    accuracies = {"test_accuracy": metrics["accuracy"], "test_macro_f1": metrics["macro_f1"]}
    row = make_row("a", 0.5, **accuracies, test_metrics=metrics, test_per_class=per_class)
    of_one_class = replace(row, test_metrics={name: metrics[name] for name in metrics if name != "auroc"})
    earlier = make_row("b", 0.5)
    write_leaderboard([row, of_one_class, earlier], tmp_path / "board.json", tmp_path / "board.csv")
    from_json = json.loads((tmp_path / "board.json").read_text())
    with (tmp_path / "board.csv").open(newline="") as file:
        from_csv = list(csv.DictReader(file))
    for name, value in metrics.items():
        assert from_json[0][f"test_{name}"] == float(from_csv[0][f"test_{name}"]) == value
    assert [one["test_auroc"] for one in (from_json[1], from_csv[1])] == [None, ""]
    assert [one["test_brier"] for one in (from_json[2], from_csv[2])] == [None, ""]
    assert from_json[2]["test_macro_f1"] == 0.5
    assert from_json[0]["test_per_class"] == {
        "cat": {"precision": 0.5, "recall": 0.25}, "dog": {"precision": None, "recall": 0.0}
    }  # fmt: skip
    assert "test_per_class" not in from_csv[0]


FOLDS = FoldEstimate(0.85, 0.8, 0.9, (0.8, 0.9, 0.85))


def test_the_files_hold_the_estimate_over_folds(tmp_path):
    write_leaderboard([make_row("a", 0.5, folds=FOLDS), make_row("b", 0.5)], tmp_path / "b.json", tmp_path / "b.csv")
    from_json = json.loads((tmp_path / "b.json").read_text())
    estimate = {"accuracy": 0.85, "low": 0.8, "high": 0.9, "accuracies": [0.8, 0.9, 0.85]}
    assert [row["folds"] for row in from_json] == [estimate, None]
    with (tmp_path / "b.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert json.loads(first["folds"]) == estimate
    assert second["folds"] == ""


def test_a_figure_that_is_not_json_is_refused_before_a_file_is_touched(tmp_path):
    row = make_row("a", float("nan"), tied_with_best=True)
    with pytest.raises(ValueError, match="JSON"):
        write_leaderboard([row], tmp_path / "board.json", tmp_path / "board.csv")
    assert list(tmp_path.iterdir()) == []


def rendered(rows, width=120, **more):
    console = Console(file=io.StringIO(), width=width)
    console.print(render_leaderboard(rows, **more))
    return console.file.getvalue()


def test_the_table_shows_the_corrected_validation_accuracy():
    made = [make_row("a", 0.9, val_accuracy=0.95, val_accuracy_corrected=0.925), make_row("b", 0.8, val_accuracy=0.94)]
    text = rendered(made)
    assert "0.925" in text
    assert "0.950" not in text.replace("0.950]", "")
    assert "0.940" in text
    assert "without the luck of having been the best of many trials" in text
    assert "luck" not in rendered(made[1:])


@pytest.mark.parametrize(
    ("metric", "name"),
    [("val/accuracy", "accuracy"), ("val/loss", "loss"), ("val/balanced_accuracy", "balanced accuracy")],
)
def test_the_title_says_which_metric_orders_the_rows(rows, metric, name):
    assert rendered(rows, metric=metric).splitlines()[0].strip() == f"Leaderboard, ordered by validation {name}"


def test_the_table_shows_folds_where_they_were_asked_for():
    made = [make_row("a", 0.9, mode="knn", folds=FOLDS), make_row("b", 0.8)]
    text = rendered(made)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any("knn 0.900 0.900 [0.850, 0.950] 0.850 [0.800, 0.900] 8" in line for line in lines)
    assert any("linear_probe 0.900 0.800 [0.750, 0.850] 8" in line for line in lines)
    assert "3 folds: mean accuracy of nested cross-validation" in text
    assert "folds" not in rendered(made[1:])


def test_the_table_shows_interval_cost_and_ties(rows):
    text = rendered(rows)
    lines = [line.split() for line in text.splitlines()]
    first = next(line for line in lines if line[:1] == ["1="])
    assert " ".join(first) == "1= dinov2 linear_probe 0.930 0.900 [0.850, 0.950] 8 1 min 15 s 1.5 GB"
    assert any(line[:1] == ["2*"] and "0.910" in line for line in lines)
    assert any(line[:1] == ["3"] and "0.500" in line for line in lines)
    assert "= may be the best" in text
    assert "recommended" in text
    assert "[95 % interval]" in text
    assert "shots" not in text
    assert "all images" not in text


def test_a_single_row_has_no_marks():
    text = rendered(ranked([make_row("a", 0.9)], [right(90)]))
    assert any(line.split()[:2] == ["1", "dinov2"] for line in text.splitlines())
    assert "may be the best" not in text


def test_gpu_memory_is_shown_where_there_is_any(rows):
    text = rendered([rows[0], replace(rows[1], peak_gpu_memory_bytes=3_000_000_000)])
    assert "GPU" in text
    assert "3.0 GB" in text
    assert "GPU" not in rendered(rows)


@pytest.fixture
def few_shot_rows():
    made, hits = [], []
    for shots, loss in ((5, 0.3), ("all", 0.0), (1, 0.6)):
        for mode, accuracy in (("knn", 0.7), ("linear_probe", 0.9), ("ridge", 0.88)):
            num_seeds = 1 if shots == "all" else 5
            figures = {"val_accuracy": accuracy - loss, "num_seeds": num_seeds}
            made.append(make_row(f"{mode}-{shots}", accuracy - loss, mode=mode, shots=shots, **figures))
            hits.append(right(round(100 * (accuracy - loss)), num_draws=num_seeds))
    return ranked(made, hits)


def test_rows_are_compared_with_those_of_as_many_shots(few_shot_rows):
    assert [row.study for row in few_shot_rows][:3] == ["linear_probe-all", "ridge-all", "knn-all"]
    tied = {row.study for row in few_shot_rows if row.tied_with_best}
    assert tied == {f"{mode}-{shots}" for mode in ("linear_probe", "ridge") for shots in (1, 5, "all")}


@pytest.mark.parametrize("width", [120, 80])
def test_few_shots_stand_in_sections_of_their_own(few_shot_rows, width):
    lines = [" ".join(line.split()) for line in rendered(few_shot_rows, width).splitlines()]
    places = [lines.index(heading) for heading in ("all images", "5 shots", "1 shot")]
    assert places == sorted(places)
    for place in places:
        assert lines[place + 1].startswith("1* dinov2 linear_probe 0.")
        assert lines[place + 2].startswith("2= dinov2 ridge 0.")
        assert lines[place + 3].startswith("3 dinov2 knn 0.")
    assert any("mean of 5 draws" in line for line in lines)


def test_a_narrow_table_folds_the_encoder_and_nothing_else():
    row = make_row("a", 0.9, encoder="siglip-base-patch16-224", tied_with_best=True, peak_gpu_memory_bytes=2e9)
    text = rendered([row], 80)
    assert "…" not in text
    assert "0.900  0.900 [0.850, 0.950]      8  1 min 15 s  2.0 GB" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_has_no_model_is_written_all_the_same(tmp_path):
    (row,) = ranked([make_row("a", 0.9, mode="knn", model_path=None, best_params={"k": 10})], [right(90)])
    write_leaderboard([row], tmp_path / "board.json", tmp_path / "board.csv")
    assert json.loads((tmp_path / "board.json").read_text())[0]["model_path"] is None
    with (tmp_path / "board.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["model_path"] == ""


def test_importing_needs_no_torch():
    check = "import sys, raysweep.results.leaderboard; print([m for m in ('torch', 'scipy') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_settings_in_a_few_words():
    setting = {"learning_rate": 0.00312, "epochs": 15, "weight_decay": 1e-4, "features": "cls", "normalize": "l2"}
    assert describe_setting(setting) == "lr 0.0031, 15 epochs, cls, l2"
    assert describe_setting({"learning_rate": 1e-4, "epochs": 5}) == "lr 0.0001, 5 epochs"
    assert describe_setting({"k": 10, "features": "cls"}) == "k 10, cls"
    ridge = {"strength": 0.3162, "features": "cls+mean", "normalize": "standardize"}
    assert describe_setting(ridge) == "strength 0.32, cls+mean, standardize"


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.42, "8.4 s"), (60, "1 min 00 s"), (200.9, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds, text):
    assert describe_seconds(seconds) == text


def test_ranking_does_not_change_the_rows_it_is_given():
    made = [make_row("a", 0.9)]
    (found,) = ranked(made, [right(90)])
    assert made == [make_row("a", 0.9)]
    assert (made[0].tied_with_best, found.tied_with_best) == (False, True)
    assert replace(found, tied_with_best=False, is_recommended=False) == made[0]


# Uneven classes


def test_macro_f1_and_the_largest_class_are_shown_where_classes_are_uneven():
    uneven = {"test_largest_class": 40 / 45, "test_smallest_class": 5 / 45}
    made = [make_row("best", 0.889, test_macro_f1=0.4706, **uneven), make_row("other", 0.8, **uneven)]
    text = rendered(made)
    assert "macro" in text
    assert "0.471" in text
    assert "always naming the largest class has accuracy 0.889 " in text


def test_macro_f1_is_not_shown_where_classes_are_even():
    text = rendered([make_row("best", 0.9, test_largest_class=0.11, test_smallest_class=0.09)])
    assert "macro" not in text
    assert "largest class" not in text


def test_uneven_classes_are_warned_about():
    assert uneven_warning({"train": {"a": 9, "b": 1}, "test": {"a": 25, "b": 24, "c": 13}}) is None
    assert uneven_warning({"test": {"a": 9}}) is None
    warning = uneven_warning({"test": {"healthy": 40, "ill": 5}})
    assert "of 45 test images, 40 are 'healthy' (88.9%) and 5 'ill'" in warning
    assert "metric: val/macro_f1" in warning


def test_names_of_encoders_are_no_markup_and_steer_nothing():
    text = rendered([make_row("best", 0.9, encoder="[red]x[/red] :smile:\x1b[2J")])
    assert r"[red]x[/red] :smile:\x1b[2J" in text


def test_names_in_the_csv_are_no_formulas(tmp_path):
    write_leaderboard([make_row("=1+1", 0.9, encoder="@SUM(1)")], tmp_path / "b.json", tmp_path / "b.csv")
    with open(tmp_path / "b.csv", newline="") as file:
        (record,) = csv.DictReader(file)
    assert (record["study"], record["encoder"], record["test_accuracy"]) == ("'=1+1", "'@SUM(1)", "0.9")
    assert json.loads((tmp_path / "b.json").read_text())[0]["study"] == "=1+1"
