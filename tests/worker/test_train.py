from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray.train
import ray.train.torch
import torch
from jobs import SMALL_CNN, make_job, make_trial, train_work

from raysweep.encoders.build import build_encoder
from raysweep.errors import TrialError
from raysweep.images.cache_files import write_rows
from raysweep.images.features import feature_table
from raysweep.images.pixels import write_pixels
from raysweep.images.rows import Draws
from raysweep.training import bias_correction
from raysweep.training.bias_correction import unpack_row_losses
from raysweep.training.checkpoint import load_checkpoint
from raysweep.training.loop import evaluate_classifier
from raysweep.training.population import train_population
from raysweep.worker.inputs import build_classifier, feature_set, load_heads, pixel_set, subsets_of
from raysweep.worker.job import EpochReport, StudySpec, TrainLoopConfig, from_tune
from raysweep.worker.train import train_worker

CPU = torch.device("cpu")
ENCODER = build_encoder(SMALL_CNN, seed=0)
DRAWS = Draws(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), np.array([[0, 1, 2], [3, 4, 5]]))

pytestmark = pytest.mark.usefixtures("own_process")


def timeless(history):
    return [
        {name: value for name, value in epoch.items() if name not in ("time/epoch_s", "train/images_per_second")}
        for epoch in history
    ]


def run(job, *trials, report=lambda _report: None, micro_batch_size=None):
    work = train_work(*trials, micro_batch_size=micro_batch_size)
    return train_worker(TrainLoopConfig(job=job, work=work, report=report))


# Heads


@pytest.fixture
def probe_job(tmp_path):
    """Two studies on the features of 36 rows, one of all rows and one of two draws."""
    noise = np.random.default_rng(0).normal(size=(36, 4))
    features = noise + 2 * np.eye(4)[np.arange(36) % 3]
    write_rows(str(tmp_path / "cache"), feature_table(np.arange(36), {"pooled": features}))
    few = StudySpec("few", str(tmp_path / "few"), DRAWS)
    return make_job(studies=("all", few), folder=str(tmp_path), cache=str(tmp_path / "cache"))


def head_trial(number, study, **more):
    return make_trial(number, study, {"features": "pooled", "normalize": "none"} | more)


TRIALS = (
    head_trial(4, "all", learning_rate=1e-12),
    head_trial(5, "all", learning_rate=0.3, epochs=9),
    head_trial(6, "all", learning_rate=1e-6),
    head_trial(0, "few", learning_rate=0.3, epochs=3),
    head_trial(1, "few", learning_rate=1e-12),
)


def check_row_losses(result, num_rows):
    hits, losses = unpack_row_losses(result.row_losses)
    assert len(hits) == num_rows
    assert hits.mean() == pytest.approx(result.final["val/accuracy"])
    assert losses.mean() == pytest.approx(result.final["val/loss"], rel=2e-3)


def test_the_losses_of_many_rows_are_those_of_evenly_spaced_ones(probe_job, monkeypatch):
    whole = run(probe_job, *TRIALS)
    monkeypatch.setattr(bias_correction, "MAX_ROWS", 4)
    for one, other in zip(whole, run(probe_job, *TRIALS), strict=True):
        losses, fewer = (unpack_row_losses(result.row_losses)[1] for result in (one, other))
        # Both draws of three rows share the room.
        kept = losses[::3] if one.study == "all" else losses[[0, 2, 3, 5]]
        np.testing.assert_allclose(fewer, kept, rtol=1e-2, atol=1e-4)


def test_the_heads_of_all_studies_train_as_a_population_of_each(probe_job):
    results = run(probe_job, *TRIALS)
    assert [(result.study, result.number) for result in results] == [(t.study, t.number) for t in TRIALS]
    for name in ("all", "few"):
        members = [trial for trial in TRIALS if trial.study == name]
        heads = train_population(
            feature_set(probe_job, "train", CPU),
            feature_set(probe_job, "validation", CPU),
            [trial.setting for trial in members],
            sources=ENCODER.sources,
            num_classes=3,
            batch_size=4,
            seed=0,
            subsets=subsets_of(probe_job.studies[name], CPU),
        )
        found = [result for result in results if result.study == name]
        for result, trial, head in zip(found, members, heads, strict=True):
            assert result.setting == trial.setting
            assert timeless(result.history) == timeless(head.history)
            assert result.final == result.history[-1], "a probe is ranked by its last epoch"
            assert result.best_epoch == len(result.history) - 1 == trial.setting["epochs"] - 1
    for result in results:
        check_row_losses(result, num_rows=6 if result.study == "few" else 12)
        assert (result.error, result.pruned, result.peak_gpu_memory_bytes) == (None, False, 0)
        assert min(result.train_seconds, result.images_per_second, result.peak_memory_bytes) > 0


def test_only_the_best_heads_of_each_study_are_kept(probe_job, tmp_path):
    results = run(probe_job, *TRIALS)
    kept = {(result.study, result.number): result.checkpoint for result in results if result.checkpoint}
    ranking = probe_job.loop.ranking
    best = [
        max((result for result in results if result.study == name), key=lambda result: ranking.key(result.final))
        for name in ("all", "few")
    ]
    assert list(kept) == [(result.study, result.number) for result in best]
    files = [str(path) for path in tmp_path.rglob("*.safetensors")]
    assert sorted(files) == sorted(str(Path(path)) for path in kept.values())
    for result, num_heads in zip(best, (1, 2), strict=True):
        assert result.checkpoint == str(tmp_path / result.study / "trials" / str(result.number) / "best.safetensors")
        heads, source = load_heads(Path(result.checkpoint))
        assert (len(heads), source) == (num_heads, "pooled")
        assert load_checkpoint(Path(result.checkpoint))[1]["trial"] == result.number


def test_a_population_takes_one_thread(probe_job):
    run(replace(probe_job, num_threads=3), *TRIALS)
    assert torch.get_num_threads() == 1


# Classifiers


@pytest.fixture
def job(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (36, *ENCODER.preprocessing.training_size, 3), np.uint8)
    (tmp_path / "cache").mkdir()
    write_pixels(str(tmp_path / "cache"), np.arange(36), pixels)
    weights = {name: tensor.numpy() for name, tensor in ENCODER.state_dict().items()}
    return make_job("from_scratch", folder=str(tmp_path), cache=str(tmp_path / "cache"), weights=weights)


def test_a_classifier_takes_the_threads_of_its_job(job):
    run(replace(job, num_threads=3), make_trial(setting={"epochs": 1}))
    assert torch.get_num_threads() == 3


def test_a_classifier_reports_its_epochs_and_keeps_its_best(job, tmp_path):
    told = []
    (result,) = run(job, make_trial(3, setting={"epochs": 3}), report=told.append)
    reports = [from_tune(EpochReport, report) for report in told]
    assert [(report.number, report.epoch) for report in reports] == [(3, 0), (3, 1), (3, 2)]
    assert [report.metrics for report in reports] == list(result.history)
    ranks = [job.loop.ranking.key(metrics) for metrics in result.history]
    assert result.best_epoch == ranks.index(max(ranks))
    assert result.final == result.history[result.best_epoch]
    assert (result.study, result.number, result.setting["epochs"]) == ("study", 3, 3)
    assert result.images_per_second == np.median([epoch["train/images_per_second"] for epoch in result.history])
    assert result.train_seconds > sum(epoch["time/epoch_s"] for epoch in result.history)
    assert result.peak_memory_bytes > 0
    assert result.checkpoint == str(tmp_path / "study" / "trials" / "3" / "best.safetensors")
    model = build_classifier(job)
    model.load_state_dict(load_checkpoint(Path(result.checkpoint))[0])
    again = evaluate_classifier(model, pixel_set(job, "validation", CPU), job.loop)
    assert again == pytest.approx({name: result.final[name] for name in again}, abs=1e-5)
    check_row_losses(result, num_rows=12)


def test_a_trial_that_continues_another_passes_its_epochs_on_again(job, tmp_path):
    def interrupted(report):
        if from_tune(EpochReport, report).epoch == 1:
            raise KeyboardInterrupt

    setting = {"epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        run(job, make_trial(0, setting=setting), report=interrupted)
    (expected,) = run(
        replace(job, studies={"study": StudySpec("study", str(tmp_path / "b"), None)}), make_trial(0, setting=setting)
    )
    told = []
    (result,) = run(job, make_trial(1, setting=setting, continues=0), report=told.append)
    assert [(r.number, r.epoch) for r in (from_tune(EpochReport, one) for one in told)] == [(1, 0), (1, 1), (1, 2)]
    assert timeless(result.history) == timeless(expected.history)
    assert (result.number, result.best_epoch) == (1, expected.best_epoch)
    assert result.checkpoint == str(tmp_path / "study" / "trials" / "0" / "best.safetensors")
    assert result.train_seconds >= sum(epoch["time/epoch_s"] for epoch in result.history)


@pytest.mark.parametrize(
    ("of_loop", "of_work", "expected"), [(None, None, None), (3, None, 3), (3, 2, 2), (None, 1, 1)]
)
def test_the_works_micro_batches_win_over_the_jobs(job, of_loop, of_work, expected):
    job = replace(job, loop=replace(job.loop, micro_batch_size=of_loop))
    (result,) = run(job, make_trial(), micro_batch_size=of_work)
    assert [epoch.get("train/micro_batch_size") for epoch in result.history] == [expected] * 2


def test_classifiers_train_one_by_one(job):
    with pytest.raises(AssertionError, match="from_scratch trains one trial per Train run"):
        run(job, make_trial(), make_trial(1))


@pytest.fixture
def reported(monkeypatch):
    """What a worker in a process of its own reports, without the processes."""
    told = []
    monkeypatch.setattr(ray.train, "report", told.append)
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model, move_to_device: model)
    return told


def test_a_worker_in_a_process_of_its_own_reports_through_train(job, reported):
    (result,) = run(job, make_trial(), report=None)
    assert [from_tune(EpochReport, report).metrics for report in reported] == list(result.history)


def test_a_worker_in_a_process_of_its_own_looks_for_the_stop_file(job, reported, tmp_path):
    trial = make_trial(setting={"epochs": 5}, stop_file=str(tmp_path / "stop"))

    def stop_after_two(report):
        reported.append(report)
        if len(reported) == 2:
            (tmp_path / "stop").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.train, "report", stop_after_two)
        with pytest.raises(TrialError, match="stopped early"):
            run(job, trial, report=None)
    assert [from_tune(EpochReport, report).epoch for report in reported] == [0, 1]
    (result,) = run(job, trial)
    assert len(result.history) == 5, "inside the Tune trial nobody asks for that"
