"""The end of a study: its chosen trial evaluated on test once, exported, put into a row, and logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raysweep.context import SweepContext
from raysweep.encoders import encoder_from_spec
from raysweep.encoders.head import Classifier
from raysweep.experiment.config import StudyConfig
from raysweep.images.cache import Cache
from raysweep.paths import read_json
from raysweep.results.leaderboard import describe_setting
from raysweep.results.model import export_model
from raysweep.results.selection import evaluate_test
from raysweep.search import Search, TrialRecord
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.trial import run_test
from raysweep.worker import build_classifier, load_head


def finalize(
    sweep: SweepContext,
    config: StudyConfig,
    search: Search,
    best: TrialRecord,
    *,
    job: dict[str, Any],
    cache: Cache,
    key: str,
) -> dict[str, Any]:
    """Opens the test split once, for the chosen trial, and exports its model.

    Args:
        sweep: what the studies share.
        config: the study.
        search: its trials.
        best: the chosen one.
        job: what its trials shared.
        cache: what they trained on.
        key: the study's signature.

    Returns:
        `row` of the leaderboard, its `mlflow_run_id` and `study_seconds` still open; `test` metrics; `correct`, one
        bool per test row; `val_metric`, what the trial was chosen by; `num_records`, the trials there were.
    """
    assert best.checkpoint is not None, "the best trial of a study has a checkpoint"
    tested = run_test(job, best.checkpoint)
    test = evaluate_test(tested["logits"], job["rows"]["test"][1], sweep.experiment.seed)
    about = {"study": config.name, "key": key, "trial": best.number, "setting": best.setting}
    about["test_accuracy"] = test["accuracy"]
    classifier = build_best(sweep, config, job, best.checkpoint)
    export_model(sweep.paths.model(config.name), classifier, sweep.index.classes, about)
    if config.mode == "linear_probe" and config.encoder.saved_weights_in_checkpoint:
        add_encoder_weights(Path(best.checkpoint), classifier)
    succeeded = [record for record in search.records if record.error is None]
    row = make_row(config, best, succeeded, cache, test) | {"model_path": str(sweep.paths.model(config.name))}
    row["peak_gpu_memory_bytes"] = max(row["peak_gpu_memory_bytes"], tested["peak_gpu_memory_bytes"])
    interval = f"{test['accuracy']:.3f} [{test['accuracy_low']:.3f}, {test['accuracy_high']:.3f}]"
    sweep.progress.say(f"{config.name}: test accuracy {interval} with {describe_setting(best.setting)}")
    return {
        "num_records": len(search.records),
        "row": row,
        "val_metric": best.final[sweep.experiment.metric],
        "correct": test.pop("correct"),
        "test": test,
    }


def make_row(
    config: StudyConfig, best: TrialRecord, records: Sequence[TrialRecord], cache: Cache, test: dict[str, Any]
) -> dict[str, Any]:
    """Returns a study's row of the leaderboard.

    `train_seconds` is what the chosen model cost from images to weights: the pass that made its cache, and its
    training. `encoder_passes` counts the passes over the images: of a probe the one that was made now, or none.
    """
    is_probe = config.mode == "linear_probe"
    memory, gpu_memory = "peak_memory_bytes", "peak_gpu_memory_bytes"
    peaks = {name: max(int(record.details[name]) for record in records) for name in (memory, gpu_memory)}
    return {
        "study": config.name,
        "encoder": config.encoder_name,
        "mode": config.mode,
        "shots": config.shots,
        "num_trials": len(records),
        "best_params": best.setting,
        "val_accuracy": best.final["val/accuracy"],
        "test_accuracy": test["accuracy"],
        "test_accuracy_low": test["accuracy_low"],
        "test_accuracy_high": test["accuracy_high"],
        "test_macro_f1": test["macro_f1"],
        "num_test": test["num_rows"],
        "encoder_passes": int(cache.made_now) if is_probe else sum(len(record.history) for record in records),
        "train_seconds": best.details["train_seconds"] + cache.seconds,
        "study_seconds": 0.0,
        "peak_memory_bytes": max(cache.peak_memory_bytes, peaks[memory]),
        "peak_gpu_memory_bytes": max(cache.peak_gpu_memory_bytes, peaks[gpu_memory]),
        "images_per_second": cache.num_rows / cache.seconds if is_probe else best.details["images_per_second"],
        "mlflow_run_id": None,
    }


def build_best(sweep: SweepContext, config: StudyConfig, job: dict[str, Any], checkpoint: str) -> Classifier:
    """Builds the classifier of a study's best checkpoint, on the CPU."""
    if config.mode != "linear_probe":
        model = build_classifier(job)
        model.load_state_dict(load_checkpoint(Path(checkpoint))[0])
        return model
    encoder = encoder_from_spec(job["encoder"])
    encoder.load_state_dict(sweep.encoder(config).encoder.state_dict())
    head, source, _ = load_head(Path(checkpoint))
    return Classifier(encoder, head, source)


def add_encoder_weights(checkpoint: Path, classifier: Classifier) -> None:
    """Puts the frozen encoder's weights beside the head in a probe's checkpoint (`saved_weights_in_checkpoint`)."""
    tensors, metadata = load_checkpoint(checkpoint)
    weights = {f"encoder.{name}": tensor for name, tensor in classifier.encoder.state_dict().items()}
    save_checkpoint(checkpoint, tensors | weights, metadata)


def has_model(sweep: SweepContext, config: StudyConfig, key: str, best: TrialRecord) -> bool:
    """Whether the exported model is that of this trial; a study of the same name may have been changed and back."""
    description = sweep.paths.model(config.name) / "model.json"
    about = read_json(description)["about"] if description.exists() else {}
    return (about.get("key"), about.get("trial")) == (key, best.number)


def log_outcome(sweep: SweepContext, run_id: str, outcome: dict[str, Any], best: TrialRecord) -> str:
    """Logs a study's figures, confusion matrix, best checkpoint and model to its run; returns the model's URI."""
    tracker, row, test = sweep.tracker, outcome["row"], outcome["test"]
    validation = {name: value for name, value in best.final.items() if name.startswith("val/")}
    tested = {f"test/{name}": test[name] for name in ("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "loss")}
    cost = {
        "time/train_s": row["train_seconds"],
        "memory/peak_bytes": row["peak_memory_bytes"],
        "gpu/peak_memory_bytes": row["peak_gpu_memory_bytes"],
        "train/images_per_second": row["images_per_second"],
    }
    tracker.log_metrics(run_id, validation | tested | cost)
    matrix = {"labels": list(sweep.index.classes), "counts": test["confusion_matrix"]}
    tracker.log_dict(run_id, matrix, "confusion_matrix.json")
    setting = {f"raysweep.best.{name}": str(value) for name, value in best.setting.items()}
    tracker.log_once(run_id, {}, {"raysweep.best_trial": str(best.number)} | setting)
    tracker.log_file(run_id, Path(str(best.checkpoint)), "checkpoint")
    return tracker.log_model(run_id, Path(row["model_path"]), sweep.index.classes)


def drop_other_checkpoints(records: Sequence[TrialRecord], best: TrialRecord) -> None:
    """Deletes the weights of trials that were not chosen: eight fine-tunes of a large encoder would keep 10 GB."""
    for record in records:
        if record.checkpoint and record.checkpoint != best.checkpoint:
            Path(record.checkpoint).unlink(missing_ok=True)
