import pytest
import torch
from jobs import make_job, make_trial, test_work, train_work
from ray import tune
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError

from raysweep.worker import evaluate, tune_trial
from raysweep.worker.job import TestResult, TrialResult, WorkReport, from_tune
from raysweep.worker.tune_trial import (
    initial_micro_batch_size,
    lost_a_worker,
    run_work,
    train_in_smaller_populations,
    train_with_smaller_batches,
    work_resources,
    worker_resources,
)

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def trains_up_to(limit, tried, error=OUT_OF_MEMORY):
    def train(size):
        tried.append(size)
        if size is None or size > limit:
            raise error
        return (TrialResult("study", 0, {}, final={"train/micro_batch_size": size}),)

    return train


@pytest.mark.parametrize(
    ("limit", "begin", "expected"),
    [
        (100, 64, [64]),
        (20, None, [None, 32, 16]),
        (20, 16, [16]),
        (1, 5, [5, 3, 2, 1]),
        (3, None, [None, 32, 16, 8, 4, 2]),
    ],
)
def test_micro_batches_are_halved_until_they_fit(limit, begin, expected):
    tried = []
    (result,) = train_with_smaller_batches(trains_up_to(limit, tried), begin, 64)
    assert result.final == {"train/micro_batch_size": expected[-1]}
    assert tried == expected


def test_a_single_image_that_does_not_fit_fails_the_trial():
    tried = []
    with pytest.raises(torch.OutOfMemoryError):
        train_with_smaller_batches(trains_up_to(0, tried), None, 4)
    assert tried == [None, 2, 1]


def test_the_error_of_one_of_several_workers_is_known():
    """Ray shortens each worker's text, and leaves out its middle."""
    tried, cause = [], torch.OutOfMemoryError("CUDA " + "had many things to say of its memory. " * 50)
    error = WorkerGroupError(f"[Rank 1] {str(cause)[-500:]}", {1: cause})
    train_with_smaller_batches(trains_up_to(2, tried, error), None, 4)
    assert tried == [None, 2]


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_cudas_libraries_say_it_in_their_own_ways(text):
    tried = []
    train_with_smaller_batches(trains_up_to(2, tried, RuntimeError(text)), None, 4)
    assert tried == [None, 2]


def test_other_errors_are_not_tried_again():
    tried = []
    with pytest.raises(ValueError, match="no such thing"):
        train_with_smaller_batches(trains_up_to(0, tried, ValueError("no such thing")), None, 64)
    assert tried == [None]


def test_a_population_that_does_not_fit_trains_in_parts_and_only_a_trial_that_fits_nowhere_fails():
    tried = []

    def train(work, largest=3):
        numbers = [trial.number for trial in work.trials]
        tried.append(numbers)
        if len(numbers) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tuple(TrialResult(trial.study, trial.number, trial.setting) for trial in work.trials)

    work = train_work(*[make_trial(number) for number in range(7)])
    results = train_in_smaller_populations(train, work)
    assert [result.number for result in results] == list(range(7))
    assert tried == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], [3, 4, 5, 6], [3, 4], [5, 6]]
    with pytest.raises(torch.OutOfMemoryError):
        train_in_smaller_populations(lambda part: train(part, largest=0), work)
    tried.clear()

    def fail(work):
        tried.append(len(work.trials))
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing"):
        train_in_smaller_populations(fail, work)
    assert tried == [7]


def test_nothing_of_a_failed_attempt_is_held_while_the_next_one_runs():
    class Model:
        alive = 0

        def __init__(self):
            Model.alive += 1

        def __del__(self):
            Model.alive -= 1

    def train(size):
        model = Model()
        assert Model.alive == 1, "its memory is what the next attempt needs"
        if size != 1:
            raise torch.OutOfMemoryError(f"{model}")
        return ()

    train_with_smaller_batches(train, None, 8)


@pytest.mark.parametrize(
    ("use_gpu", "num_workers", "given", "expected"),
    [
        (True, 1, None, 64),
        (True, 3, None, 22),
        (True, 1, 8, 8),
        (True, 4, 50, 16),
        (False, 1, None, 16),
        (False, 8, None, 8),
    ],
)
def test_what_is_tried_first(use_gpu, num_workers, given, expected):
    loop = {"batch_size": 64, "micro_batch_size": given}
    job = make_job("fine_tune", use_gpu=use_gpu, resources={"num_workers": num_workers}, loop=loop)
    assert initial_micro_batch_size(job) == expected


# What a piece of work reports


@pytest.fixture
def reports(monkeypatch):
    """What Tune is told, read again."""
    told = []
    monkeypatch.setattr(tune, "report", lambda result: told.append(from_tune(WorkReport, result)))
    return told


@pytest.fixture
def job(tmp_path):
    return make_job(studies=("study", "other"), folder=str(tmp_path))


def test_trials_are_trained_and_reported(job, monkeypatch, reports):
    asked = []

    def train(work, own_job, micro_batch_size):
        asked.append((work, own_job, micro_batch_size))
        return tuple(TrialResult(trial.study, trial.number, trial.setting) for trial in work.trials)

    monkeypatch.setattr(tune_trial, "_train", train)
    work = train_work(make_trial(4), make_trial(5), group="group", micro_batch_size=2)
    run_work({"work": work}, {"group": job, "another": None})
    assert asked == [(work, job, 2)]
    (report,) = reports
    assert [(result.study, result.number, result.setting) for result in report.trials] == [
        (trial.study, trial.number, trial.setting) for trial in work.trials
    ]
    assert (dict(report.tested), report.error) == ({}, None)


def test_a_test_is_run_and_reported(job, monkeypatch, reports):
    work, tested, asked = test_work(checkpoints={"study": "best"}), {"study": TestResult(error="ValueError: lost")}, []
    monkeypatch.setattr(evaluate, "run_test", lambda *arguments: asked.append(arguments) or tested)
    run_work({"work": work}, {"study": job})
    assert asked == [(job, work)]
    assert reports == [WorkReport(tested=tested)]


def raises(error):
    def work(*_arguments):
        raise error

    return work


WORKS = {
    "trials": (train_work(make_trial(3, "other"), make_trial(0, "study"), group="group"), "other/trials/3"),
    "test": (test_work("group", {"study": "best"}, ("other",)), "study/trials/test"),
    "baselines": (test_work("group", baselines=("other", "study")), "other/trials/test"),
}


@pytest.mark.parametrize(("work", "folder"), WORKS.values(), ids=WORKS)
def test_an_error_is_reported_and_its_traceback_kept(job, tmp_path, monkeypatch, reports, work, folder):
    monkeypatch.setattr(tune_trial, "_do", raises(ValueError("no such\n   thing " + "x" * 1_000)))
    run_work({"work": work}, {"group": job})
    assert reports == [WorkReport(error="ValueError: " + ("no such thing " + "x" * 1_000)[:500])]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.txt")] == [f"{folder}/error.txt"]
    assert (tmp_path / folder / "error.txt").read_text().startswith("Traceback")


def test_an_error_without_a_message_is_reported(job, monkeypatch, reports):
    monkeypatch.setattr(tune_trial, "_do", raises(AssertionError()))
    run_work({"work": train_work()}, {"study": job})
    assert reports == [WorkReport(error="AssertionError: no message")]


def test_an_error_is_reported_where_the_storage_is_at_fault(job, tmp_path, monkeypatch, reports):
    (tmp_path / "study").write_text("a file where a folder should be")
    monkeypatch.setattr(tune_trial, "_do", raises(OSError("nothing can be written")))
    run_work({"work": train_work()}, {"study": job})
    assert reports == [WorkReport(error="OSError: nothing can be written")]


def test_a_worker_that_was_lost_is_no_settings_fault(job, tmp_path, monkeypatch, reports):
    lost = WorkerGroupError("a worker died", {0: RayActorError()})
    monkeypatch.setattr(tune_trial, "_do", raises(lost))
    with pytest.raises(WorkerGroupError):
        run_work({"work": train_work()}, {"study": job})
    assert reports == []
    assert (tmp_path / "study" / "trials" / "0" / "error.txt").exists()
    assert lost_a_worker(lost)
    assert not lost_a_worker(WorkerGroupError("a worker died", {0: RayActorError(), 1: OUT_OF_MEMORY}))
    assert not lost_a_worker(ValueError("no such thing"))


# What it holds


@pytest.mark.parametrize(
    ("use_gpu", "resources", "expected"),
    [
        (False, {}, {"CPU": 1}),
        (False, {"cpus_per_worker": 3, "gpus_per_worker": 0.5}, {"CPU": 3}),
        (True, {"cpus_per_worker": 2, "gpus_per_worker": 0.25}, {"CPU": 2, "GPU": 0.25}),
    ],
)
def test_a_worker_holds_what_is_configured(use_gpu, resources, expected):
    job = make_job("fine_tune", use_gpu=use_gpu, resources=resources)
    assert worker_resources(job) == expected
    for work in (train_work(), test_work()):
        assert work_resources(job, work) == expected


def test_a_tune_trial_holds_next_to_nothing_while_several_workers_train():
    job = make_job("fine_tune", resources={"num_workers": 2, "cpus_per_worker": 2})
    assert work_resources(job, train_work()) == {"memory": 1}
    assert work_resources(job, test_work()) == {"CPU": 2}
