"""One study of a sweep: an encoder in a mode, from its cache to its row of the leaderboard."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raysweep.cluster import num_concurrent_trials, uses_gpu
from raysweep.context import EncoderInUse, SweepContext, select_rows
from raysweep.encoders import weights_signature
from raysweep.errors import TrialError
from raysweep.experiment.config import StudyConfig
from raysweep.finalize import drop_other_checkpoints, finalize, has_model, log_outcome
from raysweep.images.cache import Cache
from raysweep.paths import read_json, signature, write_json
from raysweep.search import Listener, Search, TrialRecord, study_space
from raysweep.worker import load_head


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
        if (
            outcome is None
            or outcome["num_records"] != len(search.records)
            or not has_model(sweep, self.config, key, best)
        ):
            job = job or self._job(used, cache, rows, folder, key, head, precision)
            earlier = outcome["row"]["study_seconds"] if outcome else 0.0
            outcome = finalize(sweep, self.config, search, best, job=job, cache=cache, key=key)
            outcome["row"]["study_seconds"] = earlier + time.perf_counter() - started
            drop_other_checkpoints(search.records, best)
        else:
            sweep.progress.say(f"{self.config.name}: all {past} trials are there, nothing left to do")
            outcome["row"]["encoder_passes"] = int(cache.made_now and self.config.mode == "linear_probe")
        if outcome["row"]["mlflow_run_id"] != run_id:
            outcome["row"]["mlflow_run_id"] = run_id
            outcome["model_uri"] = log_outcome(sweep, run_id, outcome, best)
        write_json(result, outcome)
        sweep.tracker.finish(run_id)
        return outcome

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
