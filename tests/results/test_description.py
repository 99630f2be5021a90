from raysweep.results.description import MAX_ROWS, sweep_description
from raysweep.results.leaderboard import Row


def make_row(study, accuracy, encoder="dinov2", mode="linear_probe", **more):
    return Row(
        study=study, encoder=encoder, mode=mode, shots="all", num_seeds=1, num_trials=8,
        best_params={"learning_rate": 0.003, "epochs": 15, "features": "cls"}, val_accuracy=0.9, test_accuracy=accuracy,
        test_accuracy_low=accuracy - 0.05, test_accuracy_high=accuracy + 0.05, test_macro_f1=accuracy, num_test=100,
        encoder_passes=1, train_seconds=75.0, study_seconds=80.0, peak_memory_bytes=1, peak_gpu_memory_bytes=0,
        images_per_second=80.0, mlflow_run_id=None, model_path=None, **more,
    )  # fmt: skip


def test_the_description_begins_with_the_conclusion_of_the_sweep():
    best = make_row("a", 0.953, mode="fine_tune", tied_with_best=True)
    probe = make_row("b", 0.948, tied_with_best=True, is_recommended=True)
    said = sweep_description([best, probe]).splitlines()[0]
    assert said.startswith("**dinov2 fine\\_tune is first on validation; its test accuracy is 0.953")
    assert "dinov2 linear\\_probe (0.948) cannot be told from it on 100 test images" in said


def test_long_names_do_not_cut_off_how_to_run_it_again():
    text = sweep_description([make_row(str(n), 0.5, encoder="x" * 300) for n in range(25)])
    assert len(text) < 5000
    assert "To run it again" in text
    assert "more rows" in text


def test_the_description_has_a_line_a_row_and_escapes_names():
    text = sweep_description([make_row("a", 0.9, encoder="x|y <b>"), *(make_row(str(n), 0.5) for n in range(MAX_ROWS))])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == MAX_ROWS + 1, "the head, and the first rows"
    assert "x\\|y \\<b\\>" in lines[1]
    assert "lr 0.003, 15 epochs, cls" in lines[1]
    assert "1 more rows" in text
    assert len(text) < 5000
