from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jobs import SETTING, SMALL_CNN, make_job, make_trial

from raysweep.cluster.resources import Resources
from raysweep.encoders.build import build_encoder
from raysweep.experiment.config import Experiment
from raysweep.experiment.modes import MODES
from raysweep.images.pass_processes import PROCESS_BYTES
from raysweep.images.pass_tasks import IndexReference
from raysweep.images.rows import Draws, SplitRows
from raysweep.sweep import study_group as module
from raysweep.sweep.leaderboard_entry import BaselineEntry, LeaderboardEntry
from raysweep.sweep.study import Study
from raysweep.sweep.study_group import StudyGroup
from raysweep.sweep.training_runs import bytes_of_trial
from raysweep.training.augment import Augmentation
from raysweep.training.loop import CPU_MICRO_BATCH, LoopOptions
from raysweep.training.ranking import Ranking
from raysweep.worker.job import EpochReport, TestResult, TestWork, TrialResult, WorkReport


class FakeStudy(Study):
    """A study that hands out Populations of given sizes, and remembers what it was told."""

    is_settled = False

    def __init__(self, name, sizes, mode="linear_probe", checkpoint="best.safetensors", draws=None):
        self.name, self.config = name, SimpleNamespace(mode=MODES[mode], reads_features=mode == "linear_probe")
        self.sizes, self.checkpoint, self.draws = list(sizes), checkpoint, draws
        self.num_asked, self.told, self.epochs, self.settled_with = 0, [], [], None
        self.failure, self.head, self.seconds, self.lost = None, None, 0.0, None
        self.key, self.folder, self.cache = "key", Path("folder"), SimpleNamespace(rows="cache", streamed=False)

    @property
    def num_left(self):
        return sum(self.sizes)

    @property
    def spec(self):
        return LeaderboardEntry.spec.fget(self)

    def ask(self):
        numbers = range(self.num_asked, self.num_asked + self.sizes.pop(0))
        self.num_asked = numbers.stop
        return [make_trial(number, self.name) for number in numbers]

    def tell(self, number, result, reason):
        self.told.append((number, result, reason))

    def on_epoch(self, report):
        self.epochs.append(report)
        return report.epoch == 5

    def ask_to_stop(self, number):
        self.asked_to_stop = number

    def find_lost_trial(self):
        lost, self.lost = self.lost, None
        return lost

    def choose(self):
        return self.checkpoint

    def settle(self, tested, job):
        self.settled_with = tested, job


class FakeBaseline(BaselineEntry):
    is_settled = False

    def __init__(self, name, is_settled=False):
        config = SimpleNamespace(baseline="knn", refit=False, folds=None)
        self.name, self.config, self.is_settled = name, config, is_settled
        self.failure, self.settled_with, self.seconds = None, None, 0.0
        self.folder, self.draws = Path("folder"), None

    def settle(self, tested, job):
        self.settled_with = tested, job


def group_of(*studies, baselines=(), **job):
    """A group whose job has been built, for one process; `job` are changes to it."""
    group = StudyGroup(None, studies, baselines)
    group._job = make_job(group.mode.name, [study.name for study in studies], **job)
    return group


def trials_of(work):
    return [(trial.study, trial.number) for trial in work.trials]


def result_of(trial):
    return TrialResult(trial.study, trial.number, trial.setting)


def finish(group, work):
    group.take(work, WorkReport(trials=tuple(map(result_of, work.trials))))


# What is handed out


def test_probes_run_one_population_at_a_time_that_holds_the_next_trials_of_each_study():
    group = group_of(FakeStudy("all", [2, 1]), FakeStudy("5shot", [2]))
    first = group.next_work()
    assert trials_of(first) == [("all", 0), ("all", 1), ("5shot", 0), ("5shot", 1)]
    assert first.group == group.name == "all"
    assert group.next_work() is None, "the next settings follow from these results"
    finish(group, first)
    second = group.next_work()
    assert trials_of(second) == [("all", 2)]
    assert group.next_work() is None
    finish(group, second)
    assert group.next_work().checkpoints == {"all": "best.safetensors", "5shot": "best.safetensors"}


def test_other_studies_hand_out_as_many_as_run_at_once():
    group = group_of(FakeStudy("tune", [1, 1, 1], mode="fine_tune"))
    works = [group.next_work() for _ in range(3)]
    assert [trials_of(work) for work in works] == [[("tune", 0)], [("tune", 1)], [("tune", 2)]]
    for work in works:
        assert group.next_work() is None, "the test waits for every trial"
        finish(group, work)
    last = group.next_work()
    assert (last.group, last.checkpoints, last.baselines) == ("tune", {"tune": "best.safetensors"}, ())


@pytest.fixture
def long_baselines(monkeypatch):
    monkeypatch.setattr(module, "FEATURES_PER_PROCESS", 1)


@pytest.mark.usefixtures("long_baselines")
def test_long_baselines_run_beside_the_trials():
    group = group_of(FakeStudy("a", [2, 2]), baselines=[FakeBaseline("knn"), FakeBaseline("done", is_settled=True)])
    first, beside = group.next_work(), group.next_work()
    assert trials_of(first) == [("a", 0), ("a", 1)]
    assert (beside.checkpoints, beside.baselines) == ({}, ("knn",))
    assert group.next_work() is None, "the next settings follow from the first ones"
    group.take(beside, WorkReport(tested={"knn": TestResult()}))
    assert group.next_work() is None
    finish(group, first)
    second = group.next_work()
    assert trials_of(second) == [("a", 2), ("a", 3)]
    finish(group, second)
    last = group.next_work()
    assert (last.checkpoints, last.baselines) == ({"a": "best.safetensors"}, ())
    assert group.next_work() is None


@pytest.mark.usefixtures("long_baselines")
def test_the_test_does_not_wait_for_baselines():
    group = group_of(FakeStudy("a", [2]), baselines=[FakeBaseline("knn")])
    first, beside = group.next_work(), group.next_work()
    finish(group, first)
    test = group.next_work()
    assert (test.checkpoints, test.baselines, beside.baselines) == ({"a": "best.safetensors"}, (), ("knn",))


def test_short_baselines_wait_for_the_test():
    group = group_of(FakeStudy("a", [2]), baselines=[FakeBaseline("knn")])
    first = group.next_work()
    assert group.next_work() is None
    finish(group, first)
    assert group.next_work().baselines == ("knn",)


@pytest.mark.usefixtures("long_baselines")
def test_baselines_wait_for_memory():
    group = group_of(FakeStudy("a", [2]), baselines=[FakeBaseline("knn")])
    group.most_running = 1
    first = group.next_work()
    assert group.next_work() is None
    finish(group, first)
    last = group.next_work()
    assert (last.checkpoints, last.baselines) == ({"a": "best.safetensors"}, ("knn",))


@pytest.mark.usefixtures("long_baselines")
def test_baselines_beside_the_trials_take_memory_too(monkeypatch):
    group = group_of(FakeStudy("a", [4, 1]), baselines=[FakeBaseline("knn")])
    group.most_running, group.num_processes = 2, 3
    monkeypatch.setattr(module, "WORK_PER_PROCESS", 1)
    first, second = group.next_work(), group.next_work()
    assert group.next_work() is None, "a part of the Population waits for memory"
    finish(group, first)
    third = group.next_work()
    assert len(trials_of(third)) == 1
    finish(group, second)
    beside = group.next_work()
    assert beside.baselines == ("knn",)
    finish(group, third)
    last = group.next_work()
    assert trials_of(last) == [("a", 4)]
    group.take(beside, WorkReport(tested={"knn": TestResult()}))
    finish(group, last)
    assert group.next_work().checkpoints == {"a": "best.safetensors"}


def test_the_test_is_the_last_piece_of_work():
    group = group_of(FakeStudy("tune", [], mode="fine_tune"))
    assert isinstance(group.next_work(), TestWork)
    assert group.is_tested
    assert group.next_work() is None


def test_best_trials_whose_checkpoints_are_lost_are_trained_again_before_the_test():
    done, other = FakeStudy("done", []), FakeStudy("other", [])
    done.is_settled = other.is_settled = True
    group = group_of(done, other)
    assert not group.has_work
    done.lost = make_trial(3, "done")
    assert group.has_work
    work = group.next_work()
    assert trials_of(work) == [("done", 3)]
    assert group.next_work() is None
    group.take(work, WorkReport(error="lost again"))
    assert done.told == [(3, None, "lost again")]
    assert group.next_work() is None, "all is settled"
    assert group.is_tested


def test_only_what_is_not_settled_is_tested():
    done, failed, open_one = FakeStudy("done", []), FakeStudy("failed", [], checkpoint=None), FakeStudy("open", [])
    done.is_settled = True
    baselines = [FakeBaseline("knn", is_settled=True), FakeBaseline("ridge")]
    work = group_of(done, failed, open_one, baselines=baselines).next_work()
    assert (work.checkpoints, work.baselines) == ({"open": "best.safetensors"}, ("ridge",))


def test_baselines_do_not_need_a_trial_that_succeeded():
    work = group_of(FakeStudy("failed", [], checkpoint=None), baselines=[FakeBaseline("knn")]).next_work()
    assert (work.checkpoints, work.baselines) == ({}, ("knn",))


def test_without_anything_to_test_there_is_no_work():
    group = group_of(FakeStudy("failed", [], checkpoint=None))
    assert group.next_work() is None
    assert group.is_tested
    assert group.num_running == 0


def test_a_study_whose_time_is_up_gives_way_to_the_test():
    study = FakeStudy("tune", [1], mode="fine_tune")
    study.ask = lambda: study.sizes.clear() or []
    assert isinstance(group_of(study).next_work(), TestWork)


def test_a_group_has_work_until_each_of_its_entries_is_settled():
    study, baseline = FakeStudy("a", []), FakeBaseline("knn", is_settled=True)
    group = group_of(study, baselines=[baseline])
    assert group.entries == [study, baseline]
    assert group.has_work
    study.is_settled = True
    assert not group.has_work
    baseline.is_settled = False
    assert group.has_work


# What comes back


def test_each_study_is_told_of_its_own_trials():
    one, two = FakeStudy("one", [1]), FakeStudy("two", [1])
    group = group_of(one, two)
    of_one, of_two = map(result_of, (work := group.next_work()).trials)
    group.take(work, WorkReport(trials=(of_two, of_one)))
    assert one.told == [(0, of_one, "no result came back")]
    assert two.told == [(0, of_two, "no result came back")]


@pytest.mark.parametrize(
    ("error", "reason"), [(None, "no result came back"), ("the worker process died", "the worker process died")]
)
def test_a_trial_missing_from_the_results_fails_alone(error, reason):
    study = FakeStudy("a", [2])
    group = group_of(study)
    work = group.next_work()
    found = result_of(work.trials[1])
    group.take(work, WorkReport(trials=(found,), error=error))
    assert study.told == [(0, None, reason), (1, found, reason)]


def test_a_lost_population_fails_all_of_its_trials_and_the_search_goes_on():
    one, two = FakeStudy("one", [2, 1]), FakeStudy("two", [1])
    group = group_of(one, two)
    group.take(group.next_work(), WorkReport(error="out of memory"))
    assert one.told == [(0, None, "out of memory"), (1, None, "out of memory")]
    assert two.told == [(0, None, "out of memory")]
    assert trials_of(group.next_work()) == [("one", 2)]


def test_each_entry_is_settled_with_what_its_test_found():
    one, baseline = FakeStudy("one", []), FakeBaseline("knn")
    group = group_of(one, baselines=[baseline])
    of_one, of_baseline = TestResult(peak_gpu_memory_bytes=1), TestResult(peak_gpu_memory_bytes=2)
    group.take(group.next_work(), WorkReport(tested={"one": of_one, "knn": of_baseline}))
    assert one.settled_with == (of_one, group.job)
    assert baseline.settled_with == (of_baseline, group.job)
    assert one.failure is baseline.failure is None


def test_a_test_that_failed_fails_the_studies_it_was_of():
    one, done, baseline = FakeStudy("one", []), FakeStudy("done", []), FakeBaseline("knn")
    done.is_settled = True
    group = group_of(one, done, baselines=[baseline])
    group.take(group.next_work(), WorkReport(error="CUDA out of memory"))
    assert one.failure == "one: its test failed: CUDA out of memory"
    assert baseline.failure == "knn: its test failed: CUDA out of memory"
    assert done.failure is one.settled_with is baseline.settled_with is None
    assert group.next_work() is None


def test_a_study_that_fails_its_test_fails_alone():
    one, baseline = FakeStudy("one", []), FakeBaseline("ridge")
    group = group_of(one, baselines=[baseline])
    tested = {"one": TestResult(peak_gpu_memory_bytes=1), "ridge": TestResult(error="LinAlgError: no")}
    group.take(group.next_work(), WorkReport(tested=tested))
    assert one.settled_with is not None
    assert baseline.settled_with is None
    assert baseline.failure == "ridge: its test failed: LinAlgError: no"


def test_a_piece_of_work_is_paid_for_by_its_studies_in_equal_parts(monkeypatch):
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    one, five = FakeStudy("one", [1, 1]), FakeStudy("five", [1])
    group = group_of(one, five)
    for seconds in (8.0, 3.0):
        work = group.next_work()
        clock.now += seconds
        finish(group, work)
    assert (one.seconds, five.seconds) == (7.0, 4.0)


def test_a_test_is_paid_for_by_the_entries_it_was_of(monkeypatch):
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    one, baseline, settled = FakeStudy("one", []), FakeBaseline("knn"), FakeBaseline("ridge", is_settled=True)
    group = group_of(one, baselines=[baseline, settled])
    work = group.next_work()
    clock.now += 4.0
    group.take(work, WorkReport(error="lost"))
    assert (one.seconds, baseline.seconds, settled.seconds) == (2.0, 2.0, 0.0)


# Epochs


def test_epochs_go_to_the_study_which_says_whether_to_stop():
    study = FakeStudy("tune", [1], mode="fine_tune")
    group = group_of(study)
    reports = [EpochReport(3, epoch, {"val/loss": 0.5}) for epoch in (4, 5)]
    assert not group.on_epoch(reports[0])
    assert group.on_epoch(reports[1])
    assert study.epochs == reports


def test_several_workers_are_asked_to_stop_and_tune_lets_them():
    study = FakeStudy("tune", [1], mode="fine_tune")
    group = group_of(study, resources={"num_workers": 2})
    assert not group.on_epoch(EpochReport(3, 5, {"val/loss": 0.5}))
    assert study.asked_to_stop == 3


def test_later_trials_begin_with_micro_batches_that_fitted():
    said = []
    study = FakeStudy("tune", [1, 1, 1], mode="fine_tune")
    group = group_of(study, resources={"num_workers": 2}, use_gpu=True, loop={"batch_size": 64})
    group.state = SimpleNamespace(progress=SimpleNamespace(warn=said.append))
    first, second = group.next_work(), group.next_work()
    assert first.micro_batch_size is second.micro_batch_size is None
    for size in (32, 16, 16, 8, 16):
        group.on_epoch(EpochReport(0, 0, {"train/micro_batch_size": float(size)}))
    assert group.next_work().micro_batch_size == 8
    assert [text.split(";")[0] for text in said] == [
        "tune: out of memory with 32 images at once",
        "tune: out of memory with 16 images at once",
    ]
    assert "the batch stays 64" in said[0]


# The job that its work shares


ROWS = {split: SplitRows(np.arange(6) + start, np.arange(6) % 2) for split, start in
        (("train", 0), ("validation", 10), ("test", 20))}  # fmt: skip
DRAWS = Draws(np.array([[1, 4], [0, 5]]), np.array([[0, 1, 2], [3, 4, 5]]))
INDEX = IndexReference("index in the object store", None)


def build_group(*studies, num_side_by_side=1, num_cpus=8, num_gpus=0, nodes=(), train=None, **resources):
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "data": {"source": "s"},
            "encoders": [{"type": "stacked_cnn"}],
            "train": {"precision": "fp32"} | (train or {}),
            "resources": resources,
        }
    )
    cnn, told = build_encoder(SMALL_CNN, seed=0), []
    for study in studies:
        study.encoder = SimpleNamespace(spec=cnn.spec, model=cnn, put=lambda: "weights in the object store")
    state = SimpleNamespace(
        experiment=experiment,
        resources=Resources(num_cpus, num_gpus, nodes),
        progress=SimpleNamespace(say=told.append, told=told),
        ranking=Ranking(experiment.metric, experiment.direction),
        index=SimpleNamespace(classes=("a", "b")),
        rows=ROWS,
        index_reference=INDEX,
    )
    group = StudyGroup(state, studies, [FakeBaseline("knn")])
    job = group.build_job(num_side_by_side)
    assert group.job is job
    return group


def job_of(*studies, **options):
    return build_group(*studies, **options).job


@pytest.fixture(autouse=True)
def memory_by_node(monkeypatch):
    """CPUs and free bytes of each node, as Ray says; more than enough, where a test does not change it."""
    nodes = [(8, 1e12)]
    monkeypatch.setattr(module, "cpus_and_memory_by_node", lambda: nodes)
    return nodes


def test_probes_read_all_rows_and_the_others_just_their_own():
    probe = job_of(FakeStudy("probe", [2], draws=DRAWS))
    assert probe.rows is ROWS
    assert probe.studies["probe"].draws is DRAWS
    assert probe.weights is None, "features need no encoder"
    tune = job_of(FakeStudy("tune", [1], mode="fine_tune", draws=DRAWS))
    assert {split: rows.ids.tolist() for split, rows in tune.rows.items()} == {
        "train": [1, 4],
        "validation": [10, 11, 12],
        "test": [20, 21, 22, 23, 24, 25],
    }
    assert tune.rows["train"].labels.tolist() == [1, 0]
    assert tune.weights == "weights in the object store"
    whole = job_of(FakeStudy("tune", [1], mode="fine_tune"))
    assert whole.rows is ROWS


def test_the_job_knows_every_study():
    job = job_of(FakeStudy("all", [2]), FakeStudy("5shot", [2]))
    assert list(job.studies) == ["all", "5shot", "knn"]
    assert [spec.name for spec in job.studies.values()] == ["all", "5shot", "knn"]
    assert [spec.baseline for spec in job.studies.values()] == [None, None, "knn"]


def test_the_job_says_what_the_experiment_asks_for():
    train = {
        "batch_size": 32,
        "early_stopping_patience": 7,
        "augmentation": {"min_crop_scale": 0.5, "horizontal_flip": False},
        "warmup_fraction": 0.2,
        "gradient_clip": 2.0,
        "label_smoothing": 0.1,
        "ema_decay": 0.9,
        "micro_batch_size": 8,
        "compile": True,
        "freeze_batch_norm": False,
    }
    study = FakeStudy("tune", [1], mode="fine_tune")
    study.head = Path("/heads/best.safetensors")
    job = job_of(study, train=train, num_workers=2)
    assert (job.mode, job.data_key, job.cache, job.num_classes) == (MODES["fine_tune"], "key", "cache", 2)
    assert (job.head, job.compile, job.gradient_checkpointing, job.use_gpu) == (str(study.head), True, False, False)
    assert job.encoder is study.encoder.spec
    assert job.resources.num_workers == 2
    assert job.loop == LoopOptions(
        batch_size=32,
        seed=42,
        ranking=Ranking("val/loss", "minimize"),
        patience=7,
        evaluates_start=True,
        precision="fp32",
        augmentation=Augmentation(min_crop_scale=0.5, horizontal_flip=False),
        warmup_fraction=0.2,
        gradient_clip=2.0,
        label_smoothing=0.1,
        ema_decay=0.9,
        micro_batch_size=8,
    )
    assert job_of(FakeStudy("a", [1])).head is None


def test_by_default_fine_tuning_may_stay_at_its_start_and_averages_weights():
    tuned, scratch = (job_of(FakeStudy("a", [1], mode=mode)).loop for mode in ("fine_tune", "from_scratch"))
    assert (tuned.evaluates_start, tuned.freezes_batch_norm, tuned.ema_decay, tuned.patience) == (
        True,
        True,
        "auto",
        None,
    )
    assert (scratch.evaluates_start, scratch.freezes_batch_norm, scratch.ema_decay) == (False, False, None)


@pytest.mark.parametrize(
    ("mode", "num_left", "num_side_by_side", "resources", "expected"),
    [
        ("linear_probe", 64, 1, {}, 8),
        ("linear_probe", 64, 2, {}, 4),
        ("linear_probe", 64, 20, {}, 1),
        ("fine_tune", 3, 1, {}, 2),
        ("fine_tune", 0, 1, {}, 8),
        ("fine_tune", 8, 2, {}, 1),
        ("fine_tune", 8, 1, {"max_concurrent_trials": 2}, 4),
        ("fine_tune", 8, 1, {"num_workers": 2, "max_concurrent_trials": 2}, 2),
    ],
)
def test_cpus_are_divided_among_what_runs_at_once(mode, num_left, num_side_by_side, resources, expected):
    job = job_of(FakeStudy("a", [num_left], mode=mode), num_side_by_side=num_side_by_side, **resources)
    assert job.num_threads == expected


def test_a_head_without_cpus_takes_none():
    job = job_of(FakeStudy("a", [64]), nodes=((0, 0), (8, 0)))
    assert job.num_threads == 8
    job = job_of(FakeStudy("a", [64]), num_cpus=16, nodes=((0, 0), (8, 0), (8, 0)))
    assert job.num_threads == 8


@pytest.mark.parametrize(
    ("num_fitting", "num_side_by_side", "num_running", "num_threads"),
    [(9, 1, 8, 1), (4, 1, 4, 2), (2, 1, 2, 4), (0.5, 1, 1, 8), (4, 2, 2, 2)],
)
def test_fewer_trials_with_more_threads_run_at_once_where_memory_is_short(
    memory_by_node, num_fitting, num_side_by_side, num_running, num_threads
):
    study = FakeStudy("tune", [1] * 8, mode="fine_tune")
    one = bytes_of_trial(build_encoder(SMALL_CNN, seed=0), CPU_MICRO_BATCH)
    memory_by_node[:] = [(0, 1e12), (8, num_fitting * one)]
    group = build_group(study, num_side_by_side=num_side_by_side)
    works = [group.next_work() for _ in range(num_running)]
    assert all(works)
    assert group.next_work() is None or num_fitting > 8, "the others would not fit"
    assert group.job.num_threads == num_threads
    finish(group, works[0])
    assert num_running == 8 or group.next_work() is not None


def test_a_person_is_told_how_trials_run_at_once(memory_by_node):
    memory_by_node[:] = [(8, 1e12)]
    (line,) = build_group(FakeStudy("tune", [1, 1], mode="fine_tune")).state.progress.told
    assert line == "tune: trains 2 at a time x 4 threads on CPUs, about 0.7 GB each"
    (line,) = build_group(FakeStudy("tune", [1] * 9, mode="fine_tune")).state.progress.told
    assert "8 at a time x 1 thread on" in line
    for silent in (
        build_group(FakeStudy("tune", [], mode="fine_tune")),
        build_group(FakeStudy("probe", [64])),
        build_group(FakeStudy("tune", [1, 1], mode="fine_tune"), num_gpus=1),
    ):
        assert silent.state.progress.told == []


@pytest.mark.parametrize(
    ("options", "sizes"),
    # A head has 2 classes of 4 features, and a process is worth nine rows of each epoch here. A study with draws has
    # two heads of two rows each.
    [
        ({}, [2, 2, 2, 1]),
        ({"num_cpus": 3}, [3, 2, 2]),
        ({"num_side_by_side": 4}, [4, 3]),
        ({"num_side_by_side": 8}, [7]),
        ({"max_concurrent_trials": 1}, [7]),
        ({"num_workers": 2}, [7]),
        ({"num_gpus": 1}, [7]),
    ],
)
def test_the_heads_of_a_large_population_are_shared_among_processes(monkeypatch, options, sizes):
    monkeypatch.setattr(module, "WORK_PER_PROCESS", 9 * 8 * SETTING["epochs"])
    studies = FakeStudy("all", [5, 1]), FakeStudy("5shot", [2, 1], draws=DRAWS)
    group = build_group(*studies, **options)
    works = [group.next_work() for _ in sizes]
    assert [len(work.trials) for work in works] == sizes
    shared = [("all", number) for number in range(5)] + [("5shot", number) for number in range(2)]
    assert sorted(trial for work in works for trial in trials_of(work)) == sorted(shared)
    for work in works:
        assert group.next_work() is None, "the next settings follow from all results"
        finish(group, work)
    assert group.num_running == 0
    assert trials_of(group.next_work())[0] == ("all", 5)


def test_few_processes_share_a_population_where_memory_is_short(monkeypatch, memory_by_node):
    monkeypatch.setattr(module, "WORK_PER_PROCESS", 1)
    memory_by_node[:] = [(8, 2.5 * PROCESS_BYTES)]
    group = build_group(FakeStudy("all", [6]))
    assert [len(group.next_work().trials) for _ in range(2)] == [3, 3]
    assert group.next_work() is None


def test_a_small_population_stays_whole():
    group = build_group(FakeStudy("all", [64]))
    assert len(group.next_work().trials) == 64


def streamed(name, sizes):
    study = FakeStudy(name, sizes, mode="fine_tune")
    study.cache.streamed = True
    return study


@pytest.mark.parametrize(("num_cpus", "num_left", "expected"), [(8, 3, 2), (8, 1, 7), (8, 8, 1), (2, 8, 1), (4, 2, 1)])
def test_a_cpu_is_kept_from_training_where_images_are_decoded_meanwhile(num_cpus, num_left, expected):
    job = job_of(streamed("a", [num_left]), num_cpus=num_cpus)
    assert job.num_threads == expected
    assert job.index is INDEX


def test_what_is_cached_needs_no_index_and_no_cpu_for_it():
    study = FakeStudy("a", [1], mode="fine_tune")
    assert job_of(study).index is None
    assert (group_of(study).reserved_cpus, group_of(streamed("b", [1])).reserved_cpus) == (0, 1)


def test_an_encoder_without_gradient_checkpointing_is_trained_without_and_it_is_said():
    said = []
    group = group_of(FakeStudy("tune", [1], mode="from_scratch"))
    train = SimpleNamespace(gradient_checkpointing=True)
    group.state = SimpleNamespace(experiment=SimpleNamespace(train=train), progress=SimpleNamespace(warn=said.append))
    group.first.encoder = SimpleNamespace(model=SimpleNamespace(supports_gradient_checkpointing=True))
    assert group._checkpoints_gradients()
    group.first.encoder.model.supports_gradient_checkpointing = False
    assert not group._checkpoints_gradients()
    assert said == ["tune: its encoder knows no gradient checkpointing and is trained without"]
