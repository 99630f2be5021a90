from types import SimpleNamespace

import pytest
from jobs import make_result, make_trial

from raysweep.experiment.modes import MODES
from raysweep.storage.paths import SweepPaths
from raysweep.sweep.trial_files import TrialFiles
from raysweep.worker.job import TrialResult


@pytest.fixture
def make_files(tmp_path):
    """Makes the files of four trials; trial 2 goes on in the folder of trial 1, and trial 3 has not ended."""

    def make(mode="fine_tune"):
        for number in (0, 1, 3):
            for name in ("best.safetensors", "last.safetensors", ".last.safetensors.k1ll3d"):
                path = tmp_path / "study" / "trials" / str(number) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("")
        optuna_study = SimpleNamespace(
            block=SimpleNamespace(mode=MODES[mode]),
            folder_number={0: 0, 1: 1, 2: 1, 3: 3}.__getitem__,
            unfinished_folders={"3"},
        )
        return TrialFiles(tmp_path / "study", SweepPaths(str(tmp_path), "x"), optuna_study)

    return make


def left(files):
    return sorted(str(path.relative_to(files.trials)) for path in files.trials.glob("*/*") if path.name[0] != ".")


def failed(number):
    return TrialResult("study", number, {}, error="out of memory")


def stopped(number):
    return TrialResult("study", number, {}, pruned=True)


def succeeded(files, number):
    return make_result(make_trial(number), checkpoint=str(files.trials / str(number) / "best.safetensors"))


def test_a_trial_that_succeeded_keeps_its_best_weights(make_files):
    files = make_files()
    files.remove_unneeded(succeeded(files, 0), was_stopped=False)
    assert [name for name in left(files) if name.startswith("0/")] == ["0/best.safetensors"]


@pytest.mark.parametrize(("mode", "num_left"), [("fine_tune", 0), ("linear_probe", 2)])
def test_a_trial_that_failed_leaves_no_weights_where_it_has_written_any(make_files, mode, num_left):
    files = make_files(mode)
    files.remove_unneeded(failed(2), was_stopped=False)
    assert sum(name.startswith("1/") for name in left(files)) == num_left
    assert sum(name.startswith("0/") for name in left(files)) == 2


def test_a_stopped_trial_gives_up_its_folder_and_the_request_to_stop(make_files):
    files = make_files()
    files.ask_to_stop(2)
    assert files.stop_file(2).exists()
    files.remove_unneeded(stopped(2), was_stopped=True)
    assert not files.stop_file(2).exists()
    assert not (files.trials / "1").exists()
    assert (files.trials / "0").exists()


def test_leftovers_are_temporary_files_and_the_state_of_trials_that_are_over(make_files):
    files = make_files()
    files.remove_leftovers()
    assert left(files) == ["0/best.safetensors", "1/best.safetensors", "3/best.safetensors", "3/last.safetensors"]
    assert not list(files.trials.glob("*/.*"))


def test_only_the_best_weights_are_kept(make_files):
    files = make_files()
    best = succeeded(files, 3)
    files.keep_only(best, [succeeded(files, 0), stopped(2), best])
    assert left(files) == ["0/last.safetensors", "3/best.safetensors", "3/last.safetensors"]


def test_the_error_of_a_process_that_died_is_its_reason(make_files):
    files = make_files()
    (files.trials / "0" / "error.txt").write_text("Traceback ...\nout of memory")
    assert files.error_text(failed(0)) == "Traceback ...\nout of memory"
    assert files.error_text(failed(1)) == "out of memory"
