from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from raysweep.sweep import study_group as groups
from raysweep.encoders import build_encoder
from raysweep.experiment.config import Experiment
from raysweep.sweep.study_group import Group
from raysweep.cluster.resources import Resources
from raysweep.sweep.study import SearchStudy


class FakeSearch(SearchStudy):
    """A search that hands out Populations of given sizes, and remembers what it was told."""

    is_settled = False

    def __init__(self, name, sizes, mode="linear_probe", checkpoint="best.safetensors", subsets=None):
        self.config = SimpleNamespace(name=name, mode=mode)
        self.sizes, self.checkpoint, self.subsets = list(sizes), checkpoint, subsets
        self.num_asked, self.told, self.epochs, self.settled_with = 0, [], [], None
        self.failure, self.head, self.seconds = None, None, 0.0
        self.key, self.folder, self.cache = "key", Path("folder"), SimpleNamespace(rows="cache", streamed=False)

    @property
    def num_left(self):
        return sum(self.sizes)

    def ask(self):
        numbers = range(self.num_asked, self.num_asked + self.sizes.pop(0))
        self.num_asked = numbers.stop
        return [{"study": self.config.name, "number": number} for number in numbers]

    def tell(self, number, result, reason):
        self.told.append((number, result, reason))

    def on_epoch(self, number, epoch, metrics):
        self.epochs.append((number, epoch, metrics))
        return epoch == 5

    def ask_to_stop(self, number):
        self.asked_to_stop = number

    def choose(self):
        return self.checkpoint

    def settle(self, tested, job):
        self.settled_with = tested, job


class FakeBaseline:
    def __init__(self, name, is_settled=False):
        self.config, self.is_settled, self.failure = SimpleNamespace(name=name, mode="knn"), is_settled, None
        self.settled_with, self.spec, self.seconds = None, {"name": name}, 0.0

    def settle(self, tested, job):
        self.settled_with = tested, job


def group_of(*searches, baselines=()):
    return Group(None, searches, baselines)


def trials_of(work):
    return [(trial["study"], trial["number"]) for trial in work["trials"]]


def finish(group, work):
    results = [{"study": study, "number": number, "final": {}} for study, number in trials_of(work)]
    group.take(work, {"trials": results}, "unused")


# What is handed out


def test_probes_run_one_population_at_a_time_that_holds_the_next_trials_of_each_study():
    group = group_of(FakeSearch("all", [2, 1]), FakeSearch("5shot", [2]))
    first = group.next_work()
    assert trials_of(first) == [("all", 0), ("all", 1), ("5shot", 0), ("5shot", 1)]
    assert first["group"] == group.name == "all"
    assert group.next_work() is None, "the next settings follow from these results"
    finish(group, first)
    second = group.next_work()
    assert trials_of(second) == [("all", 2)]
    assert group.next_work() is None
    finish(group, second)
    assert group.next_work()["test"] == {"all": "best.safetensors", "5shot": "best.safetensors"}


def test_other_studies_hand_out_as_many_as_run_at_once():
    group = group_of(FakeSearch("tune", [1, 1, 1], mode="fine_tune"))
    works = [group.next_work() for _ in range(3)]
    assert [trials_of(work) for work in works] == [[("tune", 0)], [("tune", 1)], [("tune", 2)]]
    for work in works:
        assert group.next_work() is None, "the test waits for every trial"
        finish(group, work)
    last = group.next_work()
    assert (last["test"], last["baselines"]) == ({"tune": "best.safetensors"}, [])


def test_the_test_is_the_last_piece_of_work():
    group = group_of(FakeSearch("tune", [], mode="fine_tune"))
    assert "test" in group.next_work()
    assert group.is_tested
    assert group.next_work() is None


def test_only_what_is_not_settled_is_tested():
    done, failed, open_one = FakeSearch("done", []), FakeSearch("failed", [], checkpoint=None), FakeSearch("open", [])
    done.is_settled = True
    baselines = [FakeBaseline("knn", is_settled=True), FakeBaseline("ridge")]
    work = group_of(done, failed, open_one, baselines=baselines).next_work()
    assert (work["test"], work["baselines"]) == ({"open": "best.safetensors"}, ["ridge"])


def test_baselines_do_not_need_a_trial_that_succeeded():
    work = group_of(FakeSearch("failed", [], checkpoint=None), baselines=[FakeBaseline("knn")]).next_work()
    assert (work["test"], work["baselines"]) == ({}, ["knn"])


def test_without_anything_to_test_there_is_no_work():
    group = group_of(FakeSearch("failed", [], checkpoint=None))
    assert group.next_work() is None
    assert group.is_tested
    assert group.num_running == 0


def test_a_search_whose_time_is_up_gives_way_to_the_test():
    search = FakeSearch("tune", [1], mode="fine_tune")
    search.ask = lambda: search.sizes.clear() or []
    assert "test" in group_of(search).next_work()


def test_a_group_has_work_until_each_of_its_studies_is_settled():
    search, baseline = FakeSearch("a", []), FakeBaseline("knn", is_settled=True)
    group = group_of(search, baselines=[baseline])
    assert group.has_work
    search.is_settled = True
    assert not group.has_work
    baseline.is_settled = False
    assert group.has_work


# What comes back


def test_each_study_is_told_of_its_own_trials():
    one, two = FakeSearch("one", [1]), FakeSearch("two", [1])
    group = group_of(one, two)
    work = group.next_work()
    results = [{"study": "two", "number": 0, "final": 2}, {"study": "one", "number": 0, "final": 1}]
    group.take(work, {"trials": results}, "unused")
    assert one.told == [(0, results[1], "unused")]
    assert two.told == [(0, results[0], "unused")]


def test_a_trial_missing_from_the_results_fails_alone():
    search = FakeSearch("a", [2])
    group = group_of(search)
    found = {"study": "a", "number": 1}
    group.take(group.next_work(), {"trials": [found]}, "the worker process died")
    assert search.told == [(0, None, "the worker process died"), (1, found, "the worker process died")]


def test_a_lost_population_fails_all_of_its_trials_and_the_search_goes_on():
    one, two = FakeSearch("one", [2, 1]), FakeSearch("two", [1])
    group = group_of(one, two)
    group.take(group.next_work(), None, "out of memory")
    assert one.told == [(0, None, "out of memory"), (1, None, "out of memory")]
    assert two.told == [(0, None, "out of memory")]
    assert trials_of(group.next_work()) == [("one", 2)]


def test_each_study_is_settled_with_what_its_test_found():
    one, baseline = FakeSearch("one", []), FakeBaseline("knn")
    group = group_of(one, baselines=[baseline])
    group.job = {"mode": "linear_probe"}
    group.take(group.next_work(), {"tested": {"one": {"test": 1}, "knn": {"test": 2}}}, "unused")
    assert one.settled_with == ({"test": 1}, group.job)
    assert baseline.settled_with == ({"test": 2}, group.job)
    assert one.failure is baseline.failure is None


def test_a_test_that_failed_fails_the_studies_it_was_of():
    one, done, baseline = FakeSearch("one", []), FakeSearch("done", []), FakeBaseline("knn")
    done.is_settled = True
    group = group_of(one, done, baselines=[baseline])
    group.take(group.next_work(), None, "CUDA out of memory")
    assert one.failure == "one: its test failed: CUDA out of memory"
    assert baseline.failure == "knn: its test failed: CUDA out of memory"
    assert done.failure is one.settled_with is baseline.settled_with is None
    assert group.next_work() is None


def test_epochs_go_to_the_study_which_says_whether_to_stop():
    search = FakeSearch("tune", [1], mode="fine_tune")
    group = group_of(search)
    group.job = {"num_workers": 1, "loop": {"batch_size": 64, "micro_batch_size": None}}
    assert not group.on_epoch({"number": 3, "epoch": 4, "metrics": {"val/loss": 0.5}})
    assert group.on_epoch({"number": 3, "epoch": 5, "metrics": {"val/loss": 0.5}})
    assert search.epochs == [(3, 4, {"val/loss": 0.5}), (3, 5, {"val/loss": 0.5})]


def test_several_workers_are_asked_to_stop_and_tune_lets_them():
    search = FakeSearch("tune", [1], mode="fine_tune")
    group = group_of(search)
    group.job = {"num_workers": 2, "loop": {"batch_size": 64, "micro_batch_size": None}}
    assert not group.on_epoch({"number": 3, "epoch": 5, "metrics": {"val/loss": 0.5}})
    assert search.asked_to_stop == 3


# The job that its work shares


ROWS = {split: (np.arange(6) + start, np.arange(6) % 2) for split, start in
        (("train", 0), ("validation", 10), ("test", 20))}  # fmt: skip
SUBSETS = {"train": np.array([[1, 4], [0, 5]]), "validation": np.array([[0, 1, 2], [3, 4, 5]])}


def job_of(*searches, num_side_by_side=1, num_cpus=8, nodes=(), **resources):
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s"}, "encoders": [{"type": "stacked_cnn"}], "resources": resources}
    )
    encoder = build_encoder({"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}, seed=0)
    for search in searches:
        search.encoder = SimpleNamespace(description=encoder, put=lambda: "weights in the object store")
    sweep = SimpleNamespace(
        experiment=experiment,
        resources=Resources(num_cpus, 0, nodes),
        precision=lambda config: "fp32",
        index=SimpleNamespace(classes=("a", "b")),
        rows=ROWS,
        stream={"rows": "index in the object store"},
    )
    return Group(sweep, searches, [FakeBaseline("knn")]).build_job(num_side_by_side)


def test_probes_read_all_rows_and_the_others_just_their_own():
    probe = job_of(FakeSearch("probe", [2], subsets=SUBSETS))
    assert probe["rows"] is ROWS
    assert probe["studies"]["probe"]["subsets"] is SUBSETS
    assert probe["weights"] is None, "features need no encoder"
    tune = job_of(FakeSearch("tune", [1], mode="fine_tune", subsets=SUBSETS))
    assert {split: ids.tolist() for split, (ids, _) in tune["rows"].items()} == {
        "train": [1, 4],
        "validation": [10, 11, 12],
        "test": [20, 21, 22, 23, 24, 25],
    }
    assert tune["rows"]["train"][1].tolist() == [1, 0]
    assert tune["weights"] == "weights in the object store"


def test_the_job_knows_every_study():
    job = job_of(FakeSearch("all", [2]), FakeSearch("5shot", [2]))
    assert list(job["studies"]) == ["all", "5shot", "knn"]


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
    job = job_of(FakeSearch("a", [num_left], mode=mode), num_side_by_side=num_side_by_side, **resources)
    assert job["num_threads"] == expected


def test_a_head_without_cpus_takes_none(request):
    job = job_of(FakeSearch("a", [64]), nodes=((0, 0), (8, 0)))
    assert job["num_threads"] == 8
    job = job_of(FakeSearch("a", [64]), num_cpus=16, nodes=((0, 0), (8, 0), (8, 0)))
    assert job["num_threads"] == 8


def streamed(name, sizes):
    search = FakeSearch(name, sizes, mode="fine_tune")
    search.cache.streamed = True
    return search


@pytest.mark.parametrize(("num_cpus", "num_left", "expected"), [(8, 3, 2), (8, 1, 7), (8, 8, 1), (2, 8, 1), (4, 2, 1)])
def test_a_cpu_is_kept_from_training_where_images_are_decoded_meanwhile(num_cpus, num_left, expected):
    job = job_of(streamed("a", [num_left]), num_cpus=num_cpus)
    assert job["num_threads"] == expected
    assert job["stream"] == {"rows": "index in the object store"}


def test_what_is_cached_needs_no_stream_and_no_cpu_for_it():
    search = FakeSearch("a", [1], mode="fine_tune")
    assert job_of(search)["stream"] is None
    assert (group_of(search).reserved_cpus, group_of(streamed("b", [1])).reserved_cpus) == (0, 1)


def test_a_study_that_fails_its_test_fails_alone():
    one, baseline = FakeSearch("one", []), FakeBaseline("ridge")
    group = group_of(one, baselines=[baseline])
    group.take(group.next_work(), {"tested": {"one": {"test": 1}, "ridge": {"error": "LinAlgError: no"}}}, "unused")
    assert one.settled_with is not None
    assert baseline.settled_with is None
    assert baseline.failure == "ridge: its test failed: LinAlgError: no"


def test_a_piece_of_work_is_paid_for_by_its_studies_in_equal_parts(monkeypatch):
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(groups, "time", clock)
    one, five = FakeSearch("one", [1, 1]), FakeSearch("five", [1])
    group = group_of(one, five)
    for seconds in (8.0, 3.0):
        work = group.next_work()
        clock.now += seconds
        finish(group, work)
    assert (one.seconds, five.seconds) == (7.0, 4.0)


def test_later_trials_begin_with_micro_batches_that_fitted():
    said = []
    group = group_of(FakeSearch("tune", [1, 1, 1], mode="fine_tune"))
    group.sweep = SimpleNamespace(
        experiment=SimpleNamespace(train=SimpleNamespace(batch_size=64)), progress=SimpleNamespace(warn=said.append)
    )
    group.job = {"use_gpu": True, "num_workers": 2, "loop": {"batch_size": 64, "micro_batch_size": None}}
    first, second = group.next_work(), group.next_work()
    assert first["micro_batch_size"] is second["micro_batch_size"] is None
    for size in (32, 16, 16, 8, 16):
        group.on_epoch({"number": 0, "epoch": 0, "metrics": {"train/micro_batch_size": float(size)}})
    assert group.next_work()["micro_batch_size"] == 8
    assert [text.split(";")[0] for text in said] == [
        "tune: out of memory with 32 images at once",
        "tune: out of memory with 16 images at once",
    ]
    assert "the batch stays 64" in said[0]


def test_an_encoder_without_gradient_checkpointing_is_trained_without_and_it_is_said():
    said = []
    group = group_of(FakeSearch("tune", [1], mode="from_scratch"))
    train = SimpleNamespace(gradient_checkpointing=True)
    group.sweep = SimpleNamespace(experiment=SimpleNamespace(train=train), progress=SimpleNamespace(warn=said.append))
    group.first.encoder = SimpleNamespace(model=SimpleNamespace(supports_gradient_checkpointing=True))
    assert group._checkpoints_gradients()
    group.first.encoder.model.supports_gradient_checkpointing = False
    assert not group._checkpoints_gradients()
    assert said == ["tune: its encoder knows no gradient checkpointing and is trained without"]
