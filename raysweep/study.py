"""One study of a sweep: an encoder in a mode, from its cache to its row of the leaderboard."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.cluster import num_concurrent_trials, uses_gpu
from raysweep.context import EncoderInUse, SweepContext, select_rows
from raysweep.encoders import encoder_from_spec, weights_signature
from raysweep.encoders.head import Classifier
from raysweep.errors import TrialError
from raysweep.experiment.config import StudyConfig
from raysweep.images.cache import Cache
from raysweep.paths import read_json, signature, write_json
from raysweep.results.leaderboard import describe_setting
from raysweep.results.model import export_model
from raysweep.results.selection import evaluate_test
from raysweep.search import Listener, Search, TrialRecord, study_space
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.trial import run_test
from raysweep.worker import build_classifier, load_head


@dataclass
class Study:
    """One study of a sweep, from its cache to its row of the leaderboard."""

    sweep: SweepContext
    config: StudyConfig

    def run(self) -> dict[str, Any]:
        """Returns `row` (of the leaderboard), `correct` (per test row), `model_uri`."""
        started, sweep = time.perf_counter(), self.sweep
        used = sweep.encoder(self.config)
        precision = self._precision()
        cache = sweep.cache(self.config, precision)
        rows = select_rows(sweep.index, list(sweep.bad_rows.values()), self.config.shots, sweep.experiment.seed)
        block = sweep.experiment.search.block(self.config.mode)
        space = study_space(block, list(used.encoder.sources), self.config.encoder_name)
        head = self._probe_head()
        key = self._signature(used, space, head)
        folder = sweep.paths.study(self.config.name, key)
        search = Search(
            sweep.paths.optuna_journal,
            f"{self.config.name}-{key}",
            block,
            space,
            sweep.experiment.metric,
            sweep.experiment.direction,
            sweep.experiment.seed,
        )
        run_id = self._start_run(key, used, rows)
        past = self._catch_up(run_id, search, key)
        job: dict[str, Any] = {}
        if search.num_remaining:
            job = self._job(used, cache, rows, folder, key, head, precision)
            self._search(search, job, run_id, key)
        best = search.best()
        if self.config.mode == "linear_probe":
            sweep.best_heads[self.config.encoder_name, self.config.shots] = Path(str(best.checkpoint))
        result = sweep.paths.study_result(self.config.name, key)
        outcome = read_json(result) if result.exists() else None
        if outcome is None or outcome["num_records"] != len(search.records) or not self._has_model(key, best):
            job = job or self._job(used, cache, rows, folder, key, head, precision)
            earlier = outcome["row"]["study_seconds"] if outcome else 0.0
            outcome = self._finalize(search, best, job, rows, cache, key)
            outcome["row"]["study_seconds"] = earlier + time.perf_counter() - started
            _drop_other_checkpoints(records=search.records, best=best)
        else:
            sweep.progress.say(f"{self.config.name}: all {past} trials are there, nothing left to do")
            outcome["row"]["encoder_passes"] = int(cache.made_now and self.config.mode == "linear_probe")
        if outcome["row"]["mlflow_run_id"] != run_id:
            outcome["row"]["mlflow_run_id"] = run_id
            outcome["model_uri"] = self._log_result(run_id, outcome["row"], best, outcome["test"])
        write_json(result, outcome)
        sweep.tracker.finish(run_id)
        return outcome

    def _has_model(self, key: str, best: TrialRecord) -> bool:
        """Whether the exported model is that of this trial; a study of the same name may have been changed and back."""
        description = self.sweep.paths.model(self.config.name) / "model.json"
        about = read_json(description)["about"] if description.exists() else {}
        return (about.get("key"), about.get("trial")) == (key, best.number)

    def _precision(self) -> str:
        """For `auto`: bf16 where training runs on GPUs (that have it, as far as this machine can tell), else fp32."""
        wanted = self.sweep.experiment.train.precision
        if wanted != "auto":
            return wanted
        import torch

        on_gpu = uses_gpu(self.sweep.experiment.resources, self.sweep.present)
        lacks_it = torch.cuda.is_available() and not torch.cuda.is_bf16_supported()
        return "bf16" if on_gpu and not lacks_it else "fp32"

    def _probe_head(self) -> Path | None:
        """The best head of the probe study of the same encoder and shots, which fine-tuning starts from (LP-FT)."""
        if self.config.mode != "fine_tune":
            return None
        return self.sweep.best_heads.get((self.config.encoder_name, self.config.shots))

    def _signature(self, used: EncoderInUse, space: dict[str, Any], head: Path | None) -> str:
        """Signature of all that a trial's result depends on; how many trials there are is not part of it."""
        experiment = self.sweep.experiment
        return signature(
            [
                [self.sweep.index.fingerprint, sorted(self.sweep.bad_rows)],
                [used.encoder.spec(), used.weights, self.config.mode, self.config.shots],
                [{name: dimension.model_dump() for name, dimension in space.items()}],
                [experiment.search.block(self.config.mode).sampler, experiment.metric, experiment.seed],
                experiment.train.model_dump(),
                weights_signature(load_head(head)[0]) if head else None,
            ]
        )

    def _start_run(self, key: str, used: EncoderInUse, rows: dict[str, Any]) -> str:
        sweep, config = self.sweep, self.config
        run_id, created = sweep.tracker.start_run(key, config.name, "study", parent=sweep.run_id)
        if created:
            origin = used.encoder.origin
            params = {
                "encoder": config.encoder_name,
                "mode": config.mode,
                "shots": config.shots,
                "weights": origin["name"],
                "revision": origin["revision"],
                "image_size": used.encoder.preprocessing.output_size[0],
                "metric": sweep.experiment.metric,
                "seed": sweep.experiment.seed,
                **{f"num_{split}": len(labels) for split, (_, labels) in rows.items()},
            }
            sweep.tracker.log_once(run_id, params)
        return run_id

    def _catch_up(self, run_id: str, search: Search, key: str) -> int:
        """Logs trials that Optuna knows and MLflow does not: the sweep was killed in between, or has a new store."""
        records = search.records
        for record in records:
            status = self.sweep.tracker.status(f"{key}/{record.number}", run_id)
            if status is None or (status != "FINISHED" and record.error is None):
                self._log_trial(run_id, key, record, 0)
        return len(records)

    def _log_trial(self, run_id: str, key: str, record: TrialRecord, num_logged: int) -> None:
        tracker, name = self.sweep.tracker, f"{self.config.name}-{record.number}"
        trial_run, created = tracker.start_run(f"{key}/{record.number}", name, "trial", parent=run_id)
        if created or num_logged:
            tracker.log_once(trial_run, record.setting, {"raysweep.error": record.error} if record.error else {})
            tracker.log_history(trial_run, record.history[num_logged:], num_logged)
            tracker.log_metrics(trial_run, {f"best/{k}": v for k, v in record.final.items() if k.startswith("val/")})
        value = record.final.get(self.sweep.experiment.metric, math.nan)
        tracker.finish(trial_run, failed=record.error is not None or not math.isfinite(value))

    def _job(
        self,
        used: EncoderInUse,
        cache: Cache,
        rows: dict[str, Any],
        folder: Path,
        key: str,
        head: Path | None,
        precision: str,
    ) -> dict[str, Any]:
        """What all trials of the study share, as a plain dict; see `worker.train_worker`."""
        experiment, present = self.sweep.experiment, self.sweep.resources
        train, resources = experiment.train, experiment.resources
        num_concurrent = self._num_concurrent()
        return {
            "mode": self.config.mode,
            "cache": cache.folder,
            "data_key": key,
            "shape": list(used.encoder.preprocessing.training_size),
            "rows": rows,
            "num_classes": len(self.sweep.index.classes),
            "encoder": used.encoder.spec(),
            "weights": None if self.config.mode == "linear_probe" else used.put(),
            "head": str(head) if head else None,
            "source": next(iter(used.encoder.sources)),
            "folder": str(folder),
            "num_workers": resources.num_workers,
            "use_gpu": uses_gpu(resources, present),
            "cpus_per_worker": resources.cpus_per_worker,
            "gpus_per_worker": resources.gpus_per_worker,
            "num_threads": max(1, present.num_cpus // (num_concurrent * resources.num_workers)),
            "loop": {
                "batch_size": train.batch_size,
                "seed": experiment.seed,
                "metric": experiment.metric,
                "direction": experiment.direction,
                "patience": train.early_stopping_patience,
                "precision": precision,
                "augmentation": train.augmentation.model_dump() if train.augmentation else None,
                "warmup_fraction": train.warmup_fraction,
                "gradient_clip": train.gradient_clip,
            },
        }

    def _num_concurrent(self) -> int:
        """Training runs side by side. Probe Populations run one by one: each learns from those before it."""
        if self.config.mode == "linear_probe":
            return 1
        num_trials = self.sweep.experiment.search.block(self.config.mode).num_trials
        return min(num_trials, num_concurrent_trials(self.sweep.experiment.resources, self.sweep.resources))

    def _search(self, search: Search, job: dict[str, Any], run_id: str, key: str) -> None:
        from raysweep.searcher import run_study  # imports Ray Tune, which a finished sweep does not need

        sweep, tracker = self.sweep, self.sweep.tracker
        total, num_epochs_logged = search.block.num_trials, dict[int, int]()
        num_done, errors = total - search.num_remaining, set[str]()
        sweep.progress.start(self.config.name, total)

        def on_epoch(number: int, setting: Any, epoch: int, metrics: dict[str, float]) -> None:
            name = f"{self.config.name}-{number}"
            trial_run, created = tracker.start_run(f"{key}/{number}", name, "trial", parent=run_id)
            if created:
                tracker.log_once(trial_run, setting)
            tracker.log_history(trial_run, [metrics], epoch)
            num_epochs_logged[number] = epoch + 1
            score = (
                f"trial {number} epoch {epoch + 1}: {sweep.experiment.metric} {metrics[sweep.experiment.metric]:.3f}"
            )
            sweep.progress.update(num_done, total, score)

        def on_trial(record: TrialRecord) -> None:
            nonlocal num_done
            self._log_trial(run_id, key, record, num_epochs_logged.get(record.number, 0))
            if record.error and record.error not in errors:
                errors.add(record.error)
                sweep.progress.warn(f"{self.config.name}: trial {record.number} failed: {record.error}")
                sweep.progress.say(f"its traceback is in {job['folder']}/trials/")
            num_done += 1
            sweep.num_new_trials += 1
            sweep.progress.update(num_done, total, self._best_so_far(search))

        run_study(search, job, Listener(on_epoch, on_trial), sweep.paths.tune, self._num_concurrent())
        sweep.progress.finish()

    def _best_so_far(self, search: Search) -> str:
        try:
            return f"best {self.sweep.experiment.metric} {search.best().final[self.sweep.experiment.metric]:.3f}"
        except TrialError:
            return "no trial has succeeded yet"

    def _finalize(
        self,
        search: Search,
        best: TrialRecord,
        job: dict[str, Any],
        rows: dict[str, Any],
        cache: Cache,
        key: str,
    ) -> dict[str, Any]:
        """Opens the test split once, for the chosen trial; exports its model; makes the row."""
        sweep, config = self.sweep, self.config
        assert best.checkpoint is not None, "the best trial of a study has a checkpoint"
        tested = run_test(job, best.checkpoint)
        test = evaluate_test(tested["logits"], rows["test"][1], sweep.experiment.seed)
        model_path = sweep.paths.model(config.name)
        about = {
            "study": config.name,
            "key": key,
            "trial": best.number,
            "setting": best.setting,
            "test_accuracy": test["accuracy"],
        }
        export_model(model_path, self._classifier(job, best.checkpoint), sweep.index.classes, about)
        records, is_probe = [r for r in search.records if r.error is None], config.mode == "linear_probe"
        peak_memory = max(int(record.details.get("peak_memory_bytes", 0)) for record in records)
        peak_gpu = max(int(record.details.get("peak_gpu_memory_bytes", 0)) for record in records)
        row = {
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
            "peak_memory_bytes": max(peak_memory, cache.peak_memory_bytes),
            "peak_gpu_memory_bytes": max(peak_gpu, cache.peak_gpu_memory_bytes, tested["peak_gpu_memory_bytes"]),
            "images_per_second": cache.num_rows / cache.seconds if is_probe else best.details["images_per_second"],
            "mlflow_run_id": None,
            "model_path": str(model_path),
        }
        if is_probe and config.encoder.saved_weights_in_checkpoint:
            self._add_encoder_weights(Path(best.checkpoint))
        interval = f"[{row['test_accuracy_low']:.3f}, {row['test_accuracy_high']:.3f}]"
        sweep.progress.say(
            f"{config.name}: test accuracy {row['test_accuracy']:.3f} {interval} with {describe_setting(best.setting)}"
        )
        return {
            "num_records": len(search.records),
            "row": row,
            "val_metric": best.final[sweep.experiment.metric],
            "correct": test.pop("correct"),
            "test": test,
        }

    def _classifier(self, job: dict[str, Any], checkpoint: str) -> Classifier:
        encoder = encoder_from_spec(job["encoder"])
        encoder.load_state_dict(self.sweep.encoder(self.config).encoder.state_dict())
        if self.config.mode == "linear_probe":
            head, source, _ = load_head(Path(checkpoint))
            return Classifier(encoder, head, source)
        model = build_classifier(job)
        model.load_state_dict(load_checkpoint(Path(checkpoint))[0])
        return model

    def _add_encoder_weights(self, checkpoint: Path) -> None:
        tensors, metadata = load_checkpoint(checkpoint)
        weights = self.sweep.encoder(self.config).encoder.state_dict()
        save_checkpoint(checkpoint, tensors | {f"encoder.{name}": t for name, t in weights.items()}, metadata)

    def _log_result(self, run_id: str, row: dict[str, Any], best: TrialRecord, test: dict[str, Any]) -> str:
        tracker = self.sweep.tracker
        renamed = {
            "val/accuracy": row["val_accuracy"],
            "val/macro_f1": best.final["val/macro_f1"],
            "val/loss": best.final["val/loss"],
            "test/accuracy": row["test_accuracy"],
            "test/accuracy_low": row["test_accuracy_low"],
            "test/accuracy_high": row["test_accuracy_high"],
            "test/macro_f1": row["test_macro_f1"],
            "test/loss": test["loss"],
            "time/train_s": row["train_seconds"],
            "memory/peak_bytes": row["peak_memory_bytes"],
            "gpu/peak_memory_bytes": row["peak_gpu_memory_bytes"],
            "train/images_per_second": row["images_per_second"],
        }
        tracker.log_metrics(run_id, renamed)
        matrix = {"labels": list(self.sweep.index.classes), "counts": test["confusion_matrix"]}
        tracker.log_dict(run_id, matrix, "confusion_matrix.json")
        tracker.log_once(run_id, {}, {"raysweep.best_trial": str(best.number)} | _as_tags(best.setting))
        tracker.log_file(run_id, Path(str(best.checkpoint)), "checkpoint")
        return tracker.log_model(run_id, Path(row["model_path"]), self.sweep.index.classes)


def _drop_other_checkpoints(records: Sequence[TrialRecord], best: TrialRecord) -> None:
    """Deletes the weights of trials that were not chosen: eight fine-tunes of a large encoder would keep 10 GB."""
    for record in records:
        if record.checkpoint and record.checkpoint != best.checkpoint:
            Path(record.checkpoint).unlink(missing_ok=True)


def _as_tags(setting: dict[str, Any]) -> dict[str, str]:
    return {f"raysweep.best.{name}": str(value) for name, value in setting.items()}
