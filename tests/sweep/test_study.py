import io
import json
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from raysweep.sweep import outcome as finalize
from raysweep.sweep import study as module
from raysweep.sweep.state import SweepContext
from raysweep.encoders import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.errors import TrialError
from raysweep.experiment.config import Experiment
from raysweep.images.cache import Cache
from raysweep.images.sources import ImageIndex
from raysweep.worker.inputs import save_heads
from raysweep.paths import SweepPaths, read_json
from raysweep.results.progress import Progress
from raysweep.results.model import load_model
from raysweep.training.evaluation import evaluate_test
from raysweep.sweep.study import SearchStudy, Study
from raysweep.training.checkpoint import save_checkpoint

CNN = {"type": "stacked_cnn", "config": {"channels": [4]}, "image_size": 16}
CACHE = Cache("features-1", "features-1/a-pass", 120, (), 2.0, 10**9, 0, made_now=True)


class FakeRecorder:
    """Remembers what was sent; every run is created once, and every model has a URI."""

    def __init__(self):
        self.sent, self.runs = [], {}

    def call(self, method, key, *arguments):
        assert method == "start_run"
        created = key not in self.runs
        return self.runs.setdefault(key, f"run{len(self.runs)}"), created

    def wait(self):
        pass

    def send(self, method, *arguments):
        self.sent.append((method, *arguments))
        answer = Future()
        answer.set_result("models:/m-1")
        return answer

    def of(self, method):
        return [arguments for name, *arguments in self.sent if name == method]


def index_of(num_per_class=40):
    """Three classes; of each one's rows half are train, a quarter validation, a quarter test."""
    labels, quarter = np.repeat(np.arange(3, dtype=np.int32), num_per_class), num_per_class // 4
    splits = (["train"] * 2 * quarter + ["validation"] * quarter + ["test"] * quarter) * 3
    table = pa.table({"row_id": np.arange(len(labels)), "label": labels, "split": splits})
    return ImageIndex(table, ("a", "b", "c"), (), (), len(labels), "fingerprint")


@pytest.fixture
def open_sweep(tmp_path):
    """Opens the sweep of one frozen encoder, as a resumed invocation would; keys are the experiment's."""

    def opened(recorder=None, **keys):
        values = {"name": "x", "data": {"source": "s"}, "encoders": [{"type": "dinov2"}], **keys}
        experiment = Experiment.model_validate(values)
        progress = Progress(Console(file=io.StringIO(), width=200))
        paths = SweepPaths(str(tmp_path), "x")
        sweep = SweepContext(experiment, paths, index_of(), recorder or FakeRecorder(), progress, None)
        # A small encoder stands in for the one that would be downloaded.
        cnn = build_encoder(CNN, 0)
        sweep.encoders["dinov2"] = SimpleNamespace(description=cnn, model=cnn, weights="weights", precision="fp32")
        return sweep

    return opened


def open_study(sweep, mode="linear_probe", shots="all"):
    config = next(c for c in sweep.experiment.studies() if (c.mode, c.shots) == (mode, shots))
    return SearchStudy(sweep, config, CACHE)


def probe(**keys):
    return {"modes": ["linear_probe"], "search": {"linear_probe": keys}}


def fine_tune(**keys):
    return {"modes": ["fine_tune"], "search": {"fine_tune": keys}}


def result_of(trial, accuracy=0.5, checkpoint=None):
    epoch = {"val/accuracy": accuracy, "val/loss": 1.0, "time/epoch_s": 0.1}
    details = {"best_epoch": 1, "train_seconds": 3.0, "images_per_second": 7.0, "peak_memory_bytes": 5,
               "peak_gpu_memory_bytes": 0}  # fmt: skip
    own = {"study": trial["study"], "number": trial["number"]}
    return own | {"final": epoch, "history": [epoch, epoch], "checkpoint": checkpoint} | details


def tell_all(study, trials, accuracy=0.5):
    for trial in trials:
        study.tell(trial["number"], result_of(trial, accuracy), "unused")


def work_through(study):
    """Works through what is left; the checkpoints are real, the last trial is the best."""
    while trials := study.ask():
        for trial in trials:
            path = study.folder / "trials" / str(trial["number"]) / "best.safetensors"
            save_heads(path, [Head(4, 3)], "pooled", {"trial": trial["number"]})
            study.tell(trial["number"], result_of(trial, 0.5 + 0.01 * trial["number"], str(path)), "unused")


def what_test_found(**more):
    labels = np.arange(30) % 3
    logits = np.eye(3, dtype=np.float32)[np.where(np.arange(30) < 24, labels, (labels + 1) % 3)]
    return {"test": evaluate_test(logits, labels, 1), "peak_gpu_memory_bytes": 0, **more}


def test_a_cache_that_is_made_again_keeps_its_studies_and_another_one_has_others(open_sweep):
    sweep = open_sweep()
    study = open_study(sweep)
    keys = [
        SearchStudy(sweep, study.config, replace(CACHE, **where)).key
        for where in (
            {"rows": "features-1/another-pass"},
            {"folder": "/elsewhere/features-1"},
            {"folder": "features-2"},
        )
    ]
    assert [key == study.key for key in keys] == [True, True, False]


def test_what_a_lone_trial_is_told_reaches_the_bucket_before_it_runs(open_sweep, monkeypatch):
    """Or a sweep that goes on elsewhere would give its number, and with it its checkpoint, to another setting."""
    published = []
    monkeypatch.setattr(module, "publish", lambda path: published.append(path.read_text()))
    study = open_study(open_sweep(**fine_tune(num_trials=3)), "fine_tune")
    (trial,) = study.ask()
    assert published[0].count('"trial_id":0'), "the journal knows of the trial"
    study.tell(trial["number"], result_of(trial), "unused")
    assert len(published) == 2


def test_sweeps_that_share_a_database_share_no_study(open_sweep, monkeypatch, tmp_path):
    names = []

    class Found(Exception):
        pass

    def search(store, name, *_rest):
        names.append(name)
        raise Found

    monkeypatch.setattr(module, "Search", search)
    database = {"tracking": {"optuna_uri": "postgresql://h/optuna"}, **probe()}
    for sweep in (open_sweep(**database), open_sweep(**database), open_sweep(**probe())):
        with pytest.raises(Found):
            open_study(sweep)
    monkeypatch.setattr(SweepPaths, "root", tmp_path / "elsewhere" / "x")
    with pytest.raises(Found):
        open_study(open_sweep(**database))
    assert names[0] == names[1]
    assert names[0].startswith("x-")
    assert len(set(names)) == 3
    assert names[0].endswith(names[2])


def finish(study):
    work_through(study)
    study.choose()
    study.settle(what_test_found(), {})
    return study.conclude()


def text_of(sweep):
    return sweep.progress.console.file.getvalue()


# Budgets


def test_populations_are_asked_for_until_the_budget_is_spent(open_sweep):
    study = open_study(open_sweep(**probe(num_trials=8, population=3)))
    sizes = []
    while trials := study.ask():
        sizes.append(len(trials))
        tell_all(study, trials)
    assert sizes == [3, 3, 2]
    assert (study.num_left, study.search.num_remaining, study.sweep.num_new_trials) == (0, 0, 8)
    assert [record.number for record in study.search.records] == list(range(8))


def test_a_resumed_budget_is_what_is_left(open_sweep):
    first = open_study(open_sweep(**probe(num_trials=8, population=6)))
    tell_all(first, first.ask())
    again = open_study(open_sweep(**probe(num_trials=8, population=6)))
    assert (again.num_left, again.num_done) == (2, 6)
    assert len(again.ask()) == 2
    assert again.ask() == []


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    clock = SimpleNamespace(now=50.0, monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_no_population_starts_after_the_time_budget(open_sweep, clock):
    study = open_study(open_sweep(**probe(num_trials=30, population=2, time_budget_s=60)))
    clock.now += 1000
    for _ in range(2):  # the budget starts with the first Population
        trials = study.ask()
        assert len(trials) == 2
        tell_all(study, trials)
        clock.now += 59
    clock.now += 2
    assert study.ask() == []
    assert study.num_left == 0


def test_the_first_population_runs_whatever_the_budget(open_sweep, clock, monkeypatch):
    monkeypatch.setattr(module.Search, "seconds_spent", 1000.0)  # on trials that were interrupted
    study = open_study(open_sweep(**probe(num_trials=30, population=2, time_budget_s=60)))
    trials = study.ask()
    assert len(trials) == 2
    clock.now += 1
    tell_all(study, trials)
    assert study.ask() == []


def test_time_that_an_earlier_invocation_spent_counts(open_sweep, clock, monkeypatch):
    keys = probe(num_trials=30, population=2, time_budget_s=60)
    first = open_study(open_sweep(**keys))
    tell_all(first, first.ask())
    monkeypatch.setattr(module.Search, "seconds_spent", 59.0)
    again = open_study(open_sweep(**keys))
    tell_all(again, again.ask())
    clock.now += 2
    assert again.ask() == []


def test_a_time_budget_that_is_spent_leaves_the_trials_that_there_are(open_sweep):
    keys = probe(num_trials=30, population=2, time_budget_s=1e-9)
    finish(open_study(open_sweep(**keys)))
    again = open_study(open_sweep(**keys))
    assert again.is_settled
    assert again.ask() == []
    assert again.conclude()["row"]["num_trials"] == 2
    assert "all 2 trials are there, nothing left to do" in text_of(again.sweep)


# Trials


def test_a_continued_trial_says_which_it_continues(open_sweep):
    open_study(open_sweep(**fine_tune(num_trials=2)), "fine_tune").ask()  # and is killed
    again = open_study(open_sweep(**fine_tune(num_trials=2)), "fine_tune")
    suggested = [again.ask()[0]["continues"] for _ in range(2)]
    assert sorted(suggested, key=str) == [0, None]


def test_a_lost_population_fails_with_its_reason(open_sweep):
    sweep = open_sweep(**probe(num_trials=4, population=2))
    study = open_study(sweep)
    for trial in study.ask():
        study.tell(trial["number"], None, "DataError: no such cache")
    assert [record.error for record in study.search.records] == ["DataError: no such cache"] * 2
    assert [trial.state.name for trial in study.search.optuna_study.get_trials()][:2] == ["FAIL"] * 2
    assert study.search.num_remaining == 4, "they are tried again by the next invocation"
    assert text_of(sweep).count("trial 0 failed: DataError: no such cache") == 1
    assert "trial 1 failed" not in text_of(sweep), "the same reason is said once"
    failed = [trial for *_, trial in sweep.recorder.of("log_trial")]
    assert [(trial.status, trial.error) for trial in failed] == [("FAILED", "DataError: no such cache")] * 2


def test_a_trial_missing_from_the_results_fails_alone(open_sweep):
    study = open_study(open_sweep(**probe(num_trials=2)))
    first, second = study.ask()
    study.tell(first["number"], None, "the worker process died")
    study.tell(second["number"], result_of(second), "the worker process died")
    assert [record.error is None for record in study.search.records] == [False, True]
    assert study.num_done == 2


def test_a_trial_without_a_finite_metric_is_logged_as_failed(open_sweep):
    sweep = open_sweep(**probe(num_trials=2))
    study = open_study(sweep)
    tell_all(study, study.ask(), float("nan"))
    assert [trial.status for *_, trial in sweep.recorder.of("log_trial")] == ["FAILED", "FAILED"]
    assert study.choose() is None


def test_epochs_are_logged_as_they_come_and_not_again_at_the_end(open_sweep):
    sweep = open_sweep(**fine_tune(num_trials=1))
    study = open_study(sweep, "fine_tune")
    (trial,) = study.ask()
    metrics = {"val/accuracy": 0.5, "val/loss": 1.0}
    study.on_epoch(trial["number"], 0, metrics)
    key, name = f"{study.key}/0", "dinov2-fine_tune-0"
    assert sweep.recorder.of("log_epoch") == [[study.run_id, key, name, trial["setting"], 0, metrics]]
    tell_all(study, [trial])
    ((run_id, *named, logged),) = sweep.recorder.of("log_trial")
    assert (run_id, named) == (study.run_id, [key, name])
    assert (len(logged.history), logged.first_epoch) == (1, 1)
    assert "time/epoch_s" in logged.history[0]


def report(study, trial, accuracies):
    """Passes epochs of a trial on until it is to be stopped; returns how many there were."""
    details = {"val/loss": 1.0, "time/epoch_s": 2.0, "train/images_per_second": 50.0}
    for epoch, accuracy in enumerate(accuracies):
        if study.on_epoch(trial["number"], epoch, {"val/accuracy": accuracy, **details}):
            return epoch + 1
    return len(accuracies)


def scheduled(num_trials=3, **keys):
    return fine_tune(num_trials=num_trials, scheduler="asha", space={"epochs": 3}, **keys)


def test_an_epoch_that_is_passed_on_again_is_not_logged_again(open_sweep):
    sweep = open_sweep(**fine_tune(num_trials=1))
    study = open_study(sweep, "fine_tune")
    (trial,) = study.ask()
    report(study, trial, [0.5, 0.6])
    report(study, trial, [0.5, 0.6, 0.7])  # its memory ran out in the third epoch, and it began again
    assert [epoch for *_, epoch, _ in sweep.recorder.of("log_epoch")] == [0, 1, 2]


def test_a_stopped_trial_is_told_logged_and_shown_as_such_and_leaves_no_weights(open_sweep):
    sweep = open_sweep(**scheduled())
    study = open_study(sweep, "fine_tune")
    (good,), (bad,) = study.ask(), study.ask()
    assert report(study, good, [0.5, 0.6, 0.7]) == 3
    last = study.folder / "trials" / str(bad["number"]) / "last.safetensors"
    last.parent.mkdir(parents=True)
    last.write_text("")
    shown = []
    study._show = shown.append
    assert report(study, bad, [0.4, 0.4, 0.4]) == 1
    study.tell(bad["number"], None, "the worker process died")
    assert not last.parent.exists()
    assert shown[1:] == ["trial 1 stopped after epoch 1 (asha)"]
    study.tell(good["number"], result_of(good, 0.7, "/trials/0"), "unused")
    assert shown[2:] == ["best val/accuracy 0.700, 1 of 2 trials stopped early"]
    (*_, logged), _ = sweep.recorder.of("log_trial")
    assert (logged.status, logged.error, logged.history, logged.first_epoch) == ("KILLED", None, [], 1)
    assert logged.final["val/accuracy"] == 0.4
    assert "failed" not in text_of(sweep)
    assert [record.pruned for record in study.search.records] == [False, True]


def test_a_resumed_study_counts_stopped_trials_as_done_and_logs_them_as_stopped(open_sweep):
    study = open_study(open_sweep(**scheduled()), "fine_tune")
    (good,), (bad,) = study.ask(), study.ask()
    report(study, good, [0.5])
    report(study, bad, [0.4])
    study.tell(bad["number"], None, "unused")
    study.tell(good["number"], result_of(good, 0.7), "unused")
    sweep = open_sweep(**scheduled())
    again = open_study(sweep, "fine_tune")
    assert again.num_left == 1
    ((_, trials),) = sweep.recorder.of("catch_up")
    assert sorted((trial.status, len(trial.history)) for *_, trial in trials) == [("FINISHED", 2), ("KILLED", 1)]


def test_a_stopped_trial_that_continued_another_gives_up_its_folder(open_sweep):
    killed = open_study(open_sweep(**scheduled()), "fine_tune")
    (lost,) = killed.ask()
    again = open_study(open_sweep(**scheduled()), "fine_tune")
    trials = [again.ask()[0] for _ in range(2)]
    trials.sort(key=lambda trial: trial["continues"] is None)
    report(again, trials[1], [0.9])
    folder = again.folder / "trials" / str(lost["number"])
    folder.mkdir(parents=True)
    assert report(again, trials[0], [0.4]) == 1
    again.tell(trials[0]["number"], None, "unused")
    assert not folder.exists()


def test_workers_that_are_asked_to_stop_may_report_once_more_or_be_done_already(open_sweep):
    study = open_study(open_sweep(**scheduled()), "fine_tune")
    good, slow, done = (study.ask()[0] for _ in range(3))
    report(study, good, [0.9])
    for trial in (slow, done):
        assert report(study, trial, [0.4]) == 1
        study.ask_to_stop(trial["number"])
        assert Path(trial["stop_file"]).exists()
        assert study.on_epoch(trial["number"], 1, {**result_of(trial, 0.5)["final"], "train/images_per_second": 50.0})
    study.tell(slow["number"], None, "TrialError: stopped early")
    study.tell(done["number"], result_of(done, 0.5), "unused")
    assert [(record.pruned, len(record.history)) for record in study.search.records] == [(True, 2), (False, 2)]
    assert not Path(slow["stop_file"]).exists()


def test_the_curve_of_a_head_has_no_times(open_sweep):
    sweep = open_sweep(**probe(num_trials=1))
    study = open_study(sweep)
    tell_all(study, study.ask())
    ((*_, logged),) = sweep.recorder.of("log_trial")
    assert logged.history == [{"val/accuracy": 0.5, "val/loss": 1.0}] * 2


def test_a_resumed_study_sees_to_it_that_every_trial_is_logged(open_sweep):
    first = open_study(open_sweep(**probe(num_trials=2)))
    tell_all(first, first.ask())
    sweep = open_sweep(**probe(num_trials=2))
    study = open_study(sweep)
    ((run_id, trials),) = sweep.recorder.of("catch_up")
    assert run_id == study.run_id
    assert [(key, name, len(trial.history)) for key, name, trial in trials] == [
        (f"{study.key}/{number}", f"dinov2-linear_probe-{number}", 2) for number in range(2)
    ]


# What a study is


def test_its_run_says_what_it_is_of(open_sweep):
    sweep = open_sweep(data={"source": "s", "shots": [5]}, **probe())
    study = open_study(sweep, shots=5)
    run_id, params = next(sent for sent in sweep.recorder.of("log_once") if "shots" in sent[1])
    assert run_id == study.run_id
    assert (params["encoder"], params["mode"], params["shots"]) == ("dinov2", "linear_probe", 5)
    assert (params["num_train"], params["num_validation"], params["num_test"]) == (15, 30, 30)


def key_of(open_sweep, shots="all", mode="linear_probe", **keys):
    data = {"source": "s", "shots": [5, "all"], **keys.pop("data", {})}
    return open_study(open_sweep(**{"modes": [mode], "data": data, **keys}), mode, shots).key


def test_its_signature_holds_what_its_results_depend_on_and_not_how_much_is_tried(open_sweep):
    base = key_of(open_sweep)
    for more in ({"num_trials": 3}, {"time_budget_s": 9}, {"population": 2}, {"baselines": []}):
        assert key_of(open_sweep, search={"linear_probe": more}) == base
    assert key_of(open_sweep, resources={"num_workers": 2}) == base
    assert key_of(open_sweep, data={"few_shot_seeds": 3}) == base
    others = [
        key_of(open_sweep, seed=7),
        key_of(open_sweep, metric="val/loss"),
        key_of(open_sweep, shots=5),
        key_of(open_sweep, shots=5, data={"few_shot_seeds": 3}),
        key_of(open_sweep, search={"linear_probe": {"sampler": "random"}}),
        key_of(open_sweep, search={"linear_probe": {"space": {"epochs": 9}}}),
        key_of(open_sweep, train={"batch_size": 16}),
        key_of(open_sweep, mode="fine_tune"),
        key_of(open_sweep, mode="fine_tune", search={"fine_tune": {"space": {"epochs": 20}}}),
        key_of(open_sweep, mode="fine_tune", search={"fine_tune": {"scheduler": "asha"}}),
        key_of(open_sweep, mode="fine_tune", search={"fine_tune": {"scheduler": "median"}}),
    ]
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("mode", ["fine_tune", "from_scratch"])
def test_few_shot_probes_draw_often_and_what_trains_all_weights_takes_their_first_draw(open_sweep, mode):
    keys = {
        "data": {"source": "s", "shots": [5, "all"], "few_shot_seeds": 3},
        "encoders": [{"type": "dinov2", "use_pretrained": mode == "fine_tune"}],
    }
    probes = open_study(open_sweep(modes=["linear_probe"], **keys), shots=5)
    other = open_study(open_sweep(modes=[mode], **keys), mode, 5)
    assert (probes.subsets["train"].shape, other.subsets["train"].shape) == ((3, 15), (1, 15))
    assert other.subsets["train"][0].tolist() == probes.subsets["train"][0].tolist()
    assert open_study(open_sweep(modes=["linear_probe"], **keys)).subsets is None


def test_fine_tuning_starts_from_the_best_head_and_depends_on_it(open_sweep, tmp_path):
    keys = {"modes": ["linear_probe", "fine_tune"], "search": {"linear_probe": {"num_trials": 2}}}
    sweep = open_sweep(**keys)
    alone = open_study(open_sweep(**keys), "fine_tune")
    probes = open_study(sweep)
    work_through(probes)
    best = probes.choose()
    assert best.endswith("trials/1/best.safetensors")
    tune = open_study(sweep, "fine_tune")
    assert str(tune.head) == best
    assert alone.head is None
    assert tune.key != alone.key


# How it ends


def test_an_outcome_is_kept_and_found_by_the_next_invocation(open_sweep):
    recorder = FakeRecorder()
    study = open_study(open_sweep(recorder, **probe(num_trials=3)))
    assert not study.is_settled
    outcome = finish(study)
    row = outcome["row"]
    assert (row["study"], row["num_trials"], row["test_accuracy"], row["val_accuracy"]) == (
        "dinov2-linear_probe",
        3,
        0.8,
        pytest.approx(0.52),
    )
    assert (row["encoder_passes"], row["train_seconds"], row["mlflow_run_id"]) == (1, 5.0, study.run_id)
    assert (outcome["model_uri"], outcome["best_trial"]) == ("models:/m-1", 2)
    assert recorder.of("finish") == [[study.run_id]]
    again = open_study(open_sweep(recorder, **probe(num_trials=3)))
    assert again.is_settled
    before = len(recorder.of("log_metrics"))
    assert again.conclude() == read_json(again.sweep.paths.study_result(again.config.name, again.key))
    assert again.conclude()["correct"] == outcome["correct"]
    assert len(recorder.of("log_metrics")) == before, "what is there is not logged again"
    assert "all 3 trials are there, nothing left to do" in text_of(again.sweep)


def test_more_trials_or_a_lost_model_leave_something_to_do(open_sweep):
    study = open_study(open_sweep(**probe(num_trials=2)))
    finish(study)
    assert not open_study(open_sweep(**probe(num_trials=3))).is_settled
    description = study.sweep.paths.model(study.config.name) / "model.json"
    content = json.loads(description.read_text())
    for about in ({"trial": 0}, {"key": "another"}):
        description.write_text(json.dumps(content | {"about": content["about"] | about}))
        assert not open_study(open_sweep(**probe(num_trials=2))).is_settled
    description.unlink()
    assert not open_study(open_sweep(**probe(num_trials=2))).is_settled


def test_a_new_store_is_told_the_outcome_again(open_sweep):
    finish(open_study(open_sweep(**probe(num_trials=2))))
    recorder = FakeRecorder()
    recorder.runs["another"] = "run0"  # so that the run ids are others
    again = open_study(open_sweep(recorder, **probe(num_trials=2)))
    assert again.conclude()["row"]["mlflow_run_id"] == again.run_id
    assert any(metrics["test/accuracy"] == 0.8 for _, metrics in recorder.of("log_metrics"))
    assert [run_id for run_id, *_ in recorder.of("log_model")] == [again.run_id]


def test_a_study_with_stopped_trials_says_how_many_and_what_it_had_of_them(open_sweep, monkeypatch):
    monkeypatch.setattr(
        finalize, "build_classifier", lambda job: Classifier(build_encoder(CNN, 0), Head(4, 3), "pooled")
    )
    sweep = open_sweep(**scheduled())
    study = open_study(sweep, "fine_tune")
    paths = []
    while trials := study.ask():
        (trial,) = trials
        paths.append(study.folder / "trials" / str(trial["number"]) / "best.safetensors")
        save_checkpoint(paths[-1], finalize.build_classifier({}).state_dict(), {})
        stopped = report(study, trial, [0.9 - 0.1 * trial["number"]] * 3) < 3
        study.tell(trial["number"], None if stopped else result_of(trial, 0.9, str(paths[-1])), "unused")
    assert study.choose() == str(paths[0])
    assert "dinov2-fine_tune: 2 of 3 trials stopped early (asha)" in text_of(sweep)
    paths[1].parent.mkdir()  # a worker on its way out wrote once more
    study.settle(what_test_found(), {})
    row = study.conclude()["row"]
    assert (row["num_trials"], row["encoder_passes"], row["peak_memory_bytes"]) == (3, 2 + 1 + 1, 10**9)
    assert [path.parent.exists() for path in paths] == [True, False, False]
    again = open_study(open_sweep(**scheduled()), "fine_tune")
    assert again.is_settled


def test_only_the_chosen_weights_are_kept(open_sweep):
    study = open_study(open_sweep(**probe(num_trials=3)))
    finish(study)
    assert [path.parent.name for path in study.folder.glob("trials/*/best.safetensors")] == ["2"]


def test_the_time_of_a_study_adds_up_over_invocations(open_sweep, clock):
    for num_trials, expected in ((1, 12.0), (2, 24.0)):  # two of them its encoder pass
        study = open_study(open_sweep(**probe(num_trials=num_trials)))
        study.seconds += 10  # as its group counts its pieces of work
        assert finish(study)["row"]["study_seconds"] == pytest.approx(expected)


def test_a_study_whose_trials_all_failed_says_why(open_sweep):
    study = open_study(open_sweep(**probe(num_trials=2)))
    for trial in study.ask():
        study.tell(trial["number"], None, "CUDA out of memory")
    assert study.choose() is None
    assert study.sweep.best_heads == {}
    with pytest.raises(TrialError, match=r"dinov2-linear_probe.*: no trial succeeded; CUDA out of memory"):
        study.conclude()


def test_a_test_that_failed_leaves_no_outcome(open_sweep):
    study = open_study(open_sweep(**probe(num_trials=1)))
    work_through(study)
    study.failure = f"{study.config.name}: its test failed: CUDA out of memory"
    with pytest.raises(TrialError, match="its test failed"):
        study.conclude()
    assert not open_study(open_sweep(**probe(num_trials=1))).is_settled


# Baselines


def open_baseline(sweep, name):
    config = sweep.experiment.studies()[0]
    return Study(sweep, config.model_copy(update={"name": f"dinov2-{name}", "mode": name}), CACHE)


def baseline_result(**more):
    validation = {"val/accuracy": 0.7, "val/loss": 1.0, "val/macro_f1": 0.6}
    return what_test_found(validation=validation, num_settings=4, seconds=1.5, peak_memory_bytes=5) | more


def test_a_baseline_without_a_model_is_a_row(open_sweep):
    recorder = FakeRecorder()
    study = open_baseline(open_sweep(recorder, **probe()), "knn")
    assert not study.is_settled
    study.settle(baseline_result(checkpoint=None, setting={"k": 10, "features": "pooled"}), {})
    row = study.conclude()["row"]
    assert (row["study"], row["mode"], row["num_trials"]) == ("dinov2-knn", "knn", 4)
    assert (row["val_accuracy"], row["train_seconds"], row["model_path"]) == (0.7, 3.5, None)
    assert recorder.of("log_model") == []
    assert open_baseline(open_sweep(**probe()), "knn").is_settled
    assert not open_baseline(open_sweep(**probe()), "ridge").is_settled


def test_a_baseline_that_is_a_head_is_exported(open_sweep, tmp_path):
    recorder = FakeRecorder()
    study = open_baseline(open_sweep(recorder, **probe()), "ridge")
    save_heads(tmp_path / "best.safetensors", [Head(4, 3)], "pooled", {})
    setting = {"strength": 0.3, "features": "pooled", "normalize": "none"}
    study.settle(baseline_result(checkpoint=str(tmp_path / "best.safetensors"), setting=setting), {})
    outcome = study.conclude()
    assert outcome["model_uri"] == "models:/m-1"
    assert load_model(study.sweep.paths.model("dinov2-ridge")).labels == ("a", "b", "c")
    again = open_baseline(open_sweep(**probe()), "ridge")
    assert again.is_settled
    assert again.conclude()["row"]["best_params"] == setting
