from dataclasses import replace

from run_folder import make_row, make_run, make_test_rows, make_trials

from raysweep.report.advice import next_steps, setting_ties
from raysweep.report.run_files import read_run
from raysweep.training.ranking import Ranking


def steps_of(run):
    return [step.text for step in next_steps(run)]


def test_a_best_rate_at_the_edge_calls_for_a_wider_search(tmp_path):
    run = read_run(str(make_run(tmp_path, rows=[make_row()]).root))
    assert not [step for step in steps_of(run) if "learning rate" in step]
    trials = make_trials()
    rows = (replace(run.rows[0], best_params=trials[0].setting),)
    (step,) = [step for step in steps_of(replace(run, rows=rows)) if "learning rate" in step]
    assert step.startswith("The best learning rate, 0.0013, is among the lowest that were tried: try lower ones")
    assert "search.fine_tune.space.learning_rate" in step
    rows = (replace(run.rows[0], best_params=trials[6].setting),)
    assert any("highest" in step for step in steps_of(replace(run, rows=rows)))


def test_a_class_that_is_rarely_found_is_named(tmp_path):
    tested = make_test_rows(num_right=30)
    tested.predicted[tested.labels == 1] = 2
    run = read_run(str(make_run(tmp_path, tested=tested, rows=[make_row()]).root))
    assert any(step.startswith("'bee' is found least often: 0% of its 10 test images") for step in steps_of(run))


def test_rows_that_tie_call_for_test_images(tmp_path):
    run = read_run(str(make_run(tmp_path).root))
    assert any(step.startswith("2 rows may be the best") and "31 points wide" in step for step in steps_of(run))


def test_settings_that_tie_are_counted():
    trials, by_loss = make_trials(), Ranking().within_study
    assert setting_ties(trials, "val/accuracy", by_loss, 30) == ""
    tied = [*trials, replace(trials[3], number=9)]
    assert setting_ties(tied, "val/accuracy", by_loss, 1300) == (
        "2 of 8 trials reach val/accuracy 0.900 on 1,300 validation images; the trial with the lowest loss is chosen."
    )
    f1 = [replace(trial, metrics={"val/macro_f1": 0.5}) for trial in trials[:2]]
    assert setting_ties(f1, "val/macro_f1", Ranking("val/macro_f1"), 0) == (
        "2 of 2 trials reach val/macro_f1 0.500; of these, the one with the lowest loss is chosen."
    )
    assert setting_ties([trials[7]], "val/accuracy", by_loss, 30) == ""


def test_a_row_without_a_model_names_another_that_may_be_as_good(tmp_path):
    knn = make_row("dino-knn", val_accuracy=0.88, train_seconds=1.0, model_path=None)
    steps = next_steps(read_run(str(make_run(tmp_path, rows=[make_row(), knn]).root)))
    assert steps[0].text.startswith("Use dino knn")
    assert steps[0].command == ""
    assert steps[1].text.endswith("may be as good and has one: cnn fine_tune.")
    assert steps[1].command.endswith("/runs/x/models/cnn-fine_tune IMAGE")
