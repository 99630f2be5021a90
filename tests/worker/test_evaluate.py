from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import SMALL_CNN, make_job, test_work

from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Classifier, Head
from raysweep.images.cache_files import write_rows
from raysweep.images.features import feature_table
from raysweep.images.pixels import write_pixels
from raysweep.images.rows import Draws
from raysweep.storage.paths import TEST_ROWS
from raysweep.storage.test_rows import read_test_rows
from raysweep.training import baseline_task
from raysweep.training.baseline_task import REFITTED, BaselineTask
from raysweep.training.baselines import RUN_BASELINE
from raysweep.training.calibration import fit_temperature
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.training.evaluation import evaluate_test
from raysweep.training.loop import predict_logits
from raysweep.training.nested_folds import estimate_by_folds
from raysweep.training.population import FeatureSet, train_population
from raysweep.worker import evaluate
from raysweep.worker.evaluate import run_test
from raysweep.worker.inputs import START_HEAD, feature_set, load_heads, save_heads, subsets_of
from raysweep.worker.job import StudySpec, TestResult, WorkReport, from_tune, to_tune

CPU = torch.device("cpu")
ENCODER = build_encoder(SMALL_CNN, seed=0)
FEATURES = np.random.default_rng(0).normal(size=(36, 4)) + 2 * np.eye(4)[np.arange(36) % 3]
DRAWS = Draws(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), np.array([[0, 1, 2], [3, 4, 5]]))

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture
def job(tmp_path):
    """A probe on all rows and one on two draws, and the baselines of both."""
    write_rows(str(tmp_path / "cache"), feature_table(np.arange(36), {"pooled": FEATURES}))
    studies = [
        StudySpec(f"{kind}-{shots}", str(tmp_path / f"{kind}-{shots}"), draws, baseline, refit=kind == "ridge")
        for shots, draws in (("all", None), ("few", DRAWS))
        for kind, baseline in (("probe", None), ("knn", "knn"), ("ridge", "ridge"))
    ]
    return make_job(studies=studies, cache=str(tmp_path / "cache"))


def make_heads(number):
    heads = [Head(4, 3, "standardize") for _ in range(number)]
    generator = torch.Generator().manual_seed(number)
    for head in heads:
        for tensor in head.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return heads


def save(path, heads):
    save_heads(path, heads, "pooled", {})
    return str(path)


def scores(job, heads, split="test"):
    features = feature_set(job, split, CPU).source(("pooled",), torch.arange(12))
    return [head(features).detach().numpy() for head in heads]


@pytest.mark.parametrize("rows_at_once", [5, 4096])
def test_probes_are_tested_by_the_heads_that_they_chose(job, tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(baseline_task, "CHUNK_ROWS", rows_at_once)
    one, two = make_heads(1), make_heads(2)
    chosen = {"probe-few": save(tmp_path / "few", two), "probe-all": save(tmp_path / "all", one)}
    found = run_test(job, test_work(checkpoints=chosen))
    labels = job.rows["test"].labels
    assert list(found) == ["probe-few", "probe-all"]
    # Each head has a temperature of the validation rows that it was chosen on.
    seen = {"probe-all": [np.arange(12)], "probe-few": DRAWS.validation}
    for name, heads in (("probe-all", one), ("probe-few", two)):
        held_out = [
            validation_scores[rows]
            for validation_scores, rows in zip(scores(job, heads, "validation"), seen[name], strict=True)
        ]
        targets = [job.rows["validation"].labels[rows] for rows in seen[name]]
        fitted = [fit_temperature(*map(torch.from_numpy, pair)) for pair in zip(held_out, targets, strict=True)]
        assert found[name].metrics.temperatures == pytest.approx(fitted, rel=1e-5)
        assert found[name].metrics == evaluate_test(scores(job, heads), labels, found[name].metrics.temperatures)
    assert (found["probe-all"].metrics.num_seeds, found["probe-few"].metrics.num_seeds) == (1, 2)
    for result in found.values():
        assert (result.fit, result.error, result.peak_gpu_memory_bytes) == (None, None, 0)
    # What the exported model says of each test image: that of the first draw, with its temperature.
    for name, heads in (("probe-all", one), ("probe-few", two)):
        written = read_test_rows(tmp_path / name / TEST_ROWS)
        logits = torch.from_numpy(scores(job, heads)[0])
        expected = (logits / found[name].metrics.temperatures[0]).softmax(-1)
        np.testing.assert_allclose(written.probabilities, expected, rtol=1e-5)
        assert written.predicted.tolist() == logits.argmax(-1).tolist()
        assert written.ids.tolist() == job.rows["test"].ids.tolist()
        assert written.labels.tolist() == labels.tolist()


def test_baselines_are_chosen_on_validation_and_tested(job, tmp_path):
    names = ("ridge-few", "knn-all", "knn-few", "ridge-all")
    found = run_test(job, test_work(baselines=names))
    assert tuple(found) == names
    sets = [feature_set(job, split, CPU) for split in ("train", "validation", "test")]
    for name, result in found.items():
        kind, _, shots = name.partition("-")
        subsets = subsets_of(job.studies[name], CPU)
        refit = job.studies[name].refit
        task = BaselineTask(*sets, ENCODER.sources, 3, subsets, job.loop.ranking, job.loop.seed, refit)
        expected = RUN_BASELINE[kind](task)
        fit = result.fit
        assert fit.setting.get("fitted_to") == ("train+validation" if name == "ridge-all" else None)
        assert (fit.setting, fit.num_settings) == (expected.setting, expected.num_settings)
        assert fit.validation == pytest.approx(expected.validation, abs=1e-5)
        logits = [one.numpy() for one in expected.test_logits]
        labels = job.rows["test"].labels
        assert result.metrics.values == pytest.approx(
            evaluate_test(logits, labels, expected.temperatures).values, abs=1e-5
        )
        assert result.metrics.num_seeds == (2 if shots == "few" else 1)
        assert min(fit.seconds, fit.peak_memory_bytes) > 0
        assert result.error is None
        if kind == "knn":
            assert fit.checkpoint is None
            continue
        assert fit.checkpoint == str(tmp_path / name / "best.safetensors")
        for found_head, head in zip(load_heads(tmp_path / name / START_HEAD)[0], expected.train_heads, strict=True):
            torch.testing.assert_close(found_head.state_dict(), head.state_dict(), rtol=1e-4, atol=1e-5)
        heads, source = load_heads(Path(fit.checkpoint))
        assert source == fit.setting["features"]
        assert load_checkpoint(Path(fit.checkpoint))[1]["setting"] == fit.setting
        for head, logits in zip(heads, expected.test_logits, strict=True):
            torch.testing.assert_close(torch.from_numpy(*scores(job, [head])), logits, rtol=1e-4, atol=1e-4)


def test_folds_judge_a_baseline_beside_its_test(job):
    names = ("knn-all", "ridge-all")
    with_folds = replace(job, studies={name: replace(job.studies[name], folds=4) for name in names})
    plain, found = run_test(job, test_work(baselines=names)), run_test(with_folds, test_work(baselines=names))
    sets = [feature_set(job, split, CPU) for split in ("train", "validation", "test")]
    for name in names:
        kind = name.partition("-")[0]
        task = BaselineTask(*sets, ENCODER.sources, 3, None, job.loop.ranking, job.loop.seed, refit=False)
        assert found[name].fit.folds == estimate_by_folds(RUN_BASELINE[kind], task, 4)
        assert plain[name].fit.folds is None
        assert found[name].metrics == plain[name].metrics
        assert from_tune(WorkReport, to_tune(WorkReport(tested=found))).tested[name] == found[name]


@pytest.mark.parametrize("name", ["probe-all", "probe-few"])
def test_a_probe_is_fitted_again_to_train_and_validation(job, tmp_path, name):
    setting = {
        "learning_rate": 0.05,
        "weight_decay": 0.01,
        "epochs": 7,
        "features": "pooled",
        "normalize": "standardize",
    }
    chosen = make_heads(2 if name == "probe-few" else 1)
    save_heads(tmp_path / "chosen", chosen, "pooled", {"setting": setting})
    job = replace(job, studies={name: replace(job.studies[name], refit=True)})
    work = test_work(checkpoints={name: str(tmp_path / "chosen")})
    result = run_test(job, work)[name]
    plain = run_test(replace(job, studies={name: replace(job.studies[name], refit=False)}), work)[name]
    assert plain.refitted is None
    if name == "probe-few":
        assert result == plain, "the number of their images is what few-shot heads are about"
        return
    train, validation = (feature_set(job, split, CPU) for split in ("train", "validation"))
    both = FeatureSet(
        {part: torch.cat([train.parts[part][:], validation.parts[part][:]]) for part in train.parts},
        torch.cat([train.labels, validation.labels]),
    )
    (expected,) = train_population(
        both, validation, [setting], sources=ENCODER.sources, num_classes=3, batch_size=job.loop.batch_size,
        seed=job.loop.seed,
    )  # fmt: skip
    (head,), source = load_heads(Path(result.refitted))
    assert (Path(result.refitted), source) == (tmp_path / name / "best.safetensors", "pooled")
    assert load_checkpoint(Path(result.refitted))[1]["setting"] == setting | REFITTED
    torch.testing.assert_close(head.state_dict(), expected.head.state_dict())
    assert result.metrics.temperatures == plain.metrics.temperatures, "validation has not been seen by that head"
    assert result.metrics == evaluate_test(scores(job, [head]), job.rows["test"].labels, plain.metrics.temperatures)
    assert result.metrics.values["loss"] != plain.metrics.values["loss"]


def test_an_error_ends_the_test_of_its_own_study_alone(job, tmp_path):
    chosen = {"probe-all": str(tmp_path / "missing"), "probe-few": save(tmp_path / "few", make_heads(2))}
    broken = replace(job.studies["ridge-all"], draws=Draws(np.array([[99]]), np.array([[0]])))
    job = replace(job, studies={**job.studies, "ridge-all": broken})
    found = run_test(job, test_work(checkpoints=chosen, baselines=("ridge-all", "knn-all")))
    assert list(found) == ["probe-all", "probe-few", "ridge-all", "knn-all"]
    lost = found["probe-all"]
    assert lost == TestResult(error=lost.error)
    assert lost.error.startswith(f"TrialError: {tmp_path / 'missing'}: not a readable raysweep checkpoint")
    assert found["ridge-all"].error.startswith("IndexError: ")
    for name in ("probe-few", "knn-all"):
        assert found[name].error is None
        assert found[name].metrics.num_rows == 12


def test_an_errors_text_is_shortened(job, tmp_path, monkeypatch):
    def fails(*_arguments):
        raise RuntimeError("much to say " * 100)

    monkeypatch.setattr(evaluate, "feature_set", fails)
    (result,) = run_test(job, test_work(baselines=("knn-all",))).values()
    assert result.error == ("RuntimeError: " + "much to say " * 100)[:500]


def test_a_classifier_is_tested_with_the_weights_of_its_checkpoint(tmp_path):
    size = ENCODER.preprocessing.training_size
    pixels = np.random.default_rng(0).integers(0, 256, (36, *size, 3), np.uint8)
    (tmp_path / "cache").mkdir()
    write_pixels(str(tmp_path / "cache"), np.arange(36), pixels)
    weights = {name: tensor.numpy() for name, tensor in ENCODER.state_dict().items()}
    job = make_job("fine_tune", cache=str(tmp_path / "cache"), weights=weights)
    tuned = Classifier(build_encoder(SMALL_CNN, seed=7), make_heads(1)[0], "pooled")
    save_checkpoint(tmp_path / "best.safetensors", tuned.state_dict(), {})
    # The head that the job names has another normalisation, as the trained model has where it began from that one.
    job = replace(job, head=save(tmp_path / "probe", make_heads(1)))
    (result,) = run_test(job, test_work(checkpoints={"study": str(tmp_path / "best.safetensors")})).values()
    logits = predict_logits(tuned, torch.from_numpy(pixels[24:]))
    held_out = predict_logits(tuned, torch.from_numpy(pixels[12:24]))
    temperature = fit_temperature(held_out, torch.from_numpy(job.rows["validation"].labels))
    expected = evaluate_test(logits.numpy(), job.rows["test"].labels, [temperature])
    assert result.error is None
    assert result.metrics.temperatures == (pytest.approx(temperature, rel=1e-3),)
    assert result.metrics.values == pytest.approx(expected.values, abs=1e-4)
    assert result.metrics.confusion_matrix == expected.confusion_matrix


def test_a_head_that_overflows_fails_its_own_test(job, tmp_path):
    """Its metrics would be NaN, which no leaderboard can hold."""
    (fine,), (broken,) = make_heads(1), make_heads(1)
    broken.weight.data.fill_(3e38)
    chosen = {"probe-all": save(tmp_path / "broken", [broken]), "probe-few": save(tmp_path / "fine", [fine])}
    found = run_test(job, test_work(checkpoints=chosen))
    assert found["probe-all"].error == (
        "TrialError: the loss on the test split is not a finite number: the classifier's outputs overflow for 12 of "
        "its 12 images"
    )
    assert found["probe-few"].error is None
