"""The test of chosen classifiers, on the device of a worker that has already loaded the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from raysweep.encoders.head import Classifier, Head
from raysweep.errors import TrialError
from raysweep.experiment.space import Setting
from raysweep.images.memory import peak_memory_bytes
from raysweep.images.splits import Split
from raysweep.storage.copies import local_path, location
from raysweep.storage.paths import TEST_ROWS
from raysweep.storage.test_rows import TestRows, write_test_rows
from raysweep.training.baseline_task import (
    MAX_VALIDATION_ROWS,
    REFITTED,
    BaselineTask,
    all_rows,
    apply_head,
    joined,
    thinned,
)
from raysweep.training.baselines import RUN_BASELINE
from raysweep.training.calibration import fit_temperature
from raysweep.training.checkpoint import load_checkpoint
from raysweep.training.evaluation import TestMetrics, evaluate_test
from raysweep.training.loop import predict_rows
from raysweep.training.nested_folds import estimate_by_folds
from raysweep.training.population import FeatureSet, Subsets, train_population
from raysweep.worker.inputs import (
    START_HEAD,
    build_classifier,
    feature_set,
    load_heads,
    pixel_set,
    reset_memory_peaks,
    save_heads,
    subsets_of,
)
from raysweep.worker.job import BaselineFit, Job, StudySpec, TestResult, TestWork

FEATURES_PER_THREAD = 2**22  # elements of the train features that a baseline reads


def run_test(job: Job, work: TestWork) -> dict[str, TestResult]:
    """Evaluates each study and baseline once on the test rows, on this worker's device; returns the results by name.

    An error ends only the test of its own study.
    """
    torch.set_num_threads(job.num_threads)
    device = torch.device("cuda" if job.use_gpu else "cpu")
    tested: dict[str, TestResult] = {}
    for name in work.studies:
        reset_memory_peaks(device)
        try:
            if name in work.checkpoints:
                test = _test_probe if job.mode.reads == "features" else _test_classifier
                result = test(job, job.studies[name], work.checkpoints[name], device)
            else:
                result = _run_baseline(job, job.studies[name], device)
        except Exception as error:  # the other studies may still have results
            tested[name] = TestResult(error=f"{type(error).__name__}: {error}"[:500])
            continue
        gpu_memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        tested[name] = replace(result, peak_gpu_memory_bytes=gpu_memory)
    return tested


def _evaluate(job: Job, study: StudySpec, logits: Sequence[Tensor], temperatures: Sequence[float]) -> TestMetrics:
    """Returns the metrics; writes the probabilities of the model that is exported, that of the first few-shot draw."""
    found = evaluate_test([one.numpy() for one in logits], job.rows["test"].labels, temperatures)
    if not math.isfinite(found.values["loss"]):  # and then most others are not either
        num_bad = sum(int((~one.isfinite()).any(1).sum()) for one in logits)
        raise TrialError(
            f"the loss on the test split is not a finite number: the classifier's outputs overflow for {num_bad} of "
            f"its {found.num_rows} images"
        )
    rows, probabilities = job.rows["test"], (logits[0].double() / temperatures[0]).softmax(-1)
    write_test_rows(
        local_path(study.folder) / TEST_ROWS,
        TestRows(rows.ids, rows.labels, logits[0].argmax(-1).numpy(), probabilities.float().numpy()),
    )
    return found


def _run_baseline(job: Job, study: StudySpec, device: torch.device) -> TestResult:
    assert study.baseline is not None, study.name
    train, validation, test = (feature_set(job, split, device) for split in ("train", "validation", "test"))
    num_features = len(train.labels) * job.encoder.widest
    torch.set_num_threads(max(1, min(job.num_threads, num_features // FEATURES_PER_THREAD)))
    task = BaselineTask(
        train,
        validation,
        test,
        sources=job.encoder.sources,
        num_classes=job.num_classes,
        subsets=subsets_of(study, device),
        ranking=job.loop.ranking,
        seed=job.loop.seed,
        refit=study.refit,
    )
    result = RUN_BASELINE[study.baseline](task)
    path = local_path(study.folder) / "best.safetensors" if result.heads else None
    if path is not None:
        source = result.setting["features"]
        save_heads(path, result.heads, source, {"setting": result.setting})
        save_heads(path.with_name(START_HEAD), result.train_heads, source, {})
    tested = _evaluate(job, study, result.test_logits, result.temperatures)
    fit = BaselineFit(
        setting=result.setting,
        num_settings=result.num_settings,
        validation=result.validation,
        checkpoint=location(path) if path else None,
        seconds=result.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        folds=None if study.folds is None else estimate_by_folds(RUN_BASELINE[study.baseline], task, study.folds),
    )
    return TestResult(tested, fit=fit)


def _test_classifier(job: Job, study: StudySpec, checkpoint: str, device: torch.device) -> TestResult:
    model = build_classifier(job)
    model.load_state_dict(load_checkpoint(local_path(checkpoint))[0])
    model.to(device)
    validation = thinned(torch.arange(len(job.rows["validation"])), MAX_VALIDATION_ROWS)
    held_out = _classifier_logits(job, model, "validation", validation, device)
    temperature = fit_temperature(held_out, torch.from_numpy(job.rows["validation"].labels)[validation])
    test = torch.arange(len(job.rows["test"]))
    return TestResult(_evaluate(job, study, [_classifier_logits(job, model, "test", test, device)], [temperature]))


def _classifier_logits(job: Job, model: Classifier, split: Split, rows: Tensor, device: torch.device) -> Tensor:
    return torch.cat([logits.cpu() for _, logits in predict_rows(model, pixel_set(job, split, device), rows, job.loop)])


@torch.no_grad()
def _test_probe(job: Job, study: StudySpec, checkpoint: str, device: torch.device) -> TestResult:
    """Tests the chosen heads, or the head that is fitted again to train and validation together.

    The temperature is always that of heads that have not seen the validation rows.
    """
    (heads, source), subsets = load_heads(local_path(checkpoint)), subsets_of(study, device)
    parts = job.encoder.parts_of(source)
    validation, test = (feature_set(job, split, device) for split in ("validation", "test"))
    seen = thinned(all_rows(validation), MAX_VALIDATION_ROWS)
    temperatures, refitted = [], None
    for number, head in enumerate(heads):
        rows = seen if subsets is None else subsets.validation[number]
        held_out = apply_head(head.to(device), validation, parts, rows)
        temperatures.append(fit_temperature(held_out, validation.labels[rows]))
    if study.refit and subsets is None:
        setting = load_checkpoint(local_path(checkpoint))[1]["setting"]
        heads = [_refitted_head(job, setting, validation, device)]
        path = local_path(study.folder) / "best.safetensors"
        save_heads(path, heads, source, {"setting": setting | REFITTED})
        refitted = location(path)
    logits = [apply_head(head.to(device), test, parts, all_rows(test)).cpu() for head in heads]
    return TestResult(_evaluate(job, study, logits, temperatures), refitted=refitted)


def _refitted_head(job: Job, setting: Setting, validation: FeatureSet, device: torch.device) -> Head:
    """Returns a head of the chosen setting that is trained on train and validation together."""
    both = joined(feature_set(job, "train", device), validation)
    rows = all_rows(both)
    torch.set_num_threads(1)  # see `worker.train`
    (result,) = train_population(
        both,
        both,
        [setting],
        sources=job.encoder.sources,
        num_classes=job.num_classes,
        batch_size=job.loop.batch_size,
        seed=job.loop.seed,
        subsets=Subsets(rows[None], rows[None, :1]),  # every epoch is evaluated, and the result is not used
    )
    return result.head
