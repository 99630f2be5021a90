"""One sweep, from the experiment to the leaderboard: the order of things, and nothing else."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.cluster import Resources, check_resources, local_resources, num_concurrent_trials, ray_session, uses_gpu
from raysweep.encoders import Encoder, build_encoder, encoder_from_spec, weights_signature
from raysweep.encoders.head import Classifier
from raysweep.errors import ConfigError, DataError, TrialError
from raysweep.experiment.config import Experiment, StudyConfig, resolved_yaml
from raysweep.images.cache import Cache
from raysweep.images.features import build_feature_cache, feature_signature
from raysweep.images.pixels import build_pixel_cache, pixel_signature
from raysweep.images.sources import BadRow, ImageIndex, load_index
from raysweep.images.splits import SPLITS, few_shot
from raysweep.paths import SweepPaths, read_json, signature, write_atomically, write_json
from raysweep.progress import Progress
from raysweep.results.leaderboard import describe_setting, rank_rows, write_leaderboard
from raysweep.results.model import export_model
from raysweep.results.selection import evaluate_test
from raysweep.results.tracking import Tracker, environment_tags
from raysweep.study import Listener, Search, TrialRecord, run_study, study_space
from raysweep.training.checkpoint import load_checkpoint, save_checkpoint
from raysweep.trial import run_test
from raysweep.worker import build_classifier, load_head

MIN_FEW_SHOT_VALIDATION = 16


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves behind: the ranked rows, and how much had to be done for them this time."""

    rows: list[dict[str, Any]]
    num_new_trials: int
    num_encoder_passes: int


def run_sweep(experiment: Experiment, progress: Progress, verbose: bool = False) -> SweepResult:
    """Runs every study of an experiment, or what is left of them, and writes the leaderboard.

    Raises:
        RaysweepError: the experiment, data, weights, resources or store cannot be used; the message says which.
    """
    paths = SweepPaths(Path(experiment.storage), experiment.name)
    if not os.environ.get("RAY_ADDRESS"):
        check_resources(experiment.resources, local_resources())
    with only_sweep_in(paths.root):
        progress.say(f"reading {experiment.data.source}")
        index = load_index(experiment.data, experiment.seed)
        describe_index(index, progress)
        write_atomically(paths.resolved_experiment, resolved_yaml(experiment))
        write_quarantine(paths.quarantine, index.bad_rows)
        with ExitStack() as stack:
            tracker = Tracker(experiment.tracking.uri, experiment.tracking.experiment or experiment.name)
            stack.callback(tracker.close)
            sweep = _Sweep(experiment, paths, index, tracker, progress, verbose, stack)
            return sweep.run()


@contextmanager
def only_sweep_in(root: Path) -> Iterator[None]:
    """Holds a lock on the sweep's folder: two sweeps at once would each take the other's trials for lost.

    Raises:
        ConfigError: another sweep holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{root}: another sweep is running here; wait for it, or give this one a name") from None
        yield


def describe_index(index: ImageIndex, progress: Progress) -> None:
    """Says what was found: images by split, classes, bad rows, and what to be wary of."""
    counts = {split: sum(by_class.values()) for split, by_class in index.counts().items()}
    derived = f" ({' and '.join(index.derived_splits)} taken from train)" if index.derived_splits else ""
    splits = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    progress.say(f"{len(index.table):,} images in {len(index.classes)} classes: {splits}{derived}")
    for warning in index.warnings:
        progress.warn(warning)
    if index.bad_rows:
        progress.warn(f"{len(index.bad_rows)} images cannot be used; see quarantine.csv")


def write_quarantine(path: Path, bad_rows: Sequence[BadRow]) -> None:
    """Writes the rows that were set aside, with the reason; a header alone where there are none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row_id", "source", "reason"])
    writer.writerows([row.row_id, row.source, row.reason] for row in bad_rows)
    write_atomically(path, text.getvalue())


def select_rows(
    index: ImageIndex, bad_rows: Sequence[BadRow], shots: int | str, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Row ids and labels, both int64, of each split of a study.

    A few-shot study trains on `shots` rows per class; its validation split is capped at max(shots, 16) per class, as
    nobody with five images a class has a thousand to validate on, and never joins the training rows.
    """
    ids, labels = (index.table[name].to_numpy().astype(np.int64) for name in ("row_id", "label"))
    splits = np.array(index.table["split"].to_pylist())
    usable = ~np.isin(ids, [row.row_id for row in bad_rows])
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for split in SPLITS:
        chosen = np.flatnonzero((splits == split) & usable)
        if shots != "all" and split != "test":
            limit = int(shots) if split == "train" else max(int(shots), MIN_FEW_SHOT_VALIDATION)
            chosen = chosen[few_shot(labels[chosen], limit, seed)]
        rows[split] = (ids[chosen], labels[chosen])
    return rows


@dataclass
class _EncoderInUse:
    """An encoder built in the driver, with what is derived from it once."""

    encoder: Encoder
    weights: str
    reference: Any = None

    def put(self) -> Any:
        """Reference to the weights in Ray's object store, shared by all studies of the encoder."""
        import ray

        if self.reference is None:
            self.reference = ray.put({name: t.numpy() for name, t in self.encoder.state_dict().items()})
        return self.reference


@dataclass
class _Sweep:
    """The state that the studies of one sweep share."""

    experiment: Experiment
    paths: SweepPaths
    index: ImageIndex
    tracker: Tracker
    progress: Progress
    verbose: bool
    stack: ExitStack
    encoders: dict[str, _EncoderInUse] = field(default_factory=dict)
    bad_rows: dict[int, BadRow] = field(default_factory=dict)
    num_new_trials: int = 0
    num_encoder_passes: int = 0

    @cached_property
    def resources(self) -> Resources:
        """Starts Ray on first use: a sweep with nothing left to do never needs it."""
        present = self.stack.enter_context(ray_session(self.verbose))
        check_resources(self.experiment.resources, present)
        return present

    @property
    def present(self) -> Resources:
        """What there is to run on; found without starting Ray where that is this machine."""
        return self.resources if os.environ.get("RAY_ADDRESS") else local_resources()

    @cached_property
    def run_id(self) -> str:
        """The sweep's MLflow run."""
        ignored = {"tracking", "resources", "storage"}
        key = signature([self.index.fingerprint, self.experiment.model_dump(exclude=ignored)])
        run_id, created = self.tracker.start_run(key, self.experiment.name, "sweep", tags=environment_tags())
        if created:
            counts = self.index.counts()
            profile = {split: sum(by_class.values()) for split, by_class in counts.items()}
            name, source = self.experiment.data.source.rstrip("/").split("/")[-1], self.experiment.data.source
            self.tracker.log_dataset(run_id, name, self.index.fingerprint, source, str(profile))
            self.tracker.log_file(run_id, self.paths.resolved_experiment)
        self.tracker.fail_left_running(run_id)
        return run_id

    def run(self) -> SweepResult:
        """Runs the studies one after the other, then ranks them."""
        outcomes = [_Study(self, config).run() for config in self.experiment.studies()]
        rows = rank_rows(
            [outcome["row"] for outcome in outcomes],
            [outcome["correct"] for outcome in outcomes],
            self.experiment.seed,
        )
        write_leaderboard(rows, self.paths.leaderboard_json, self.paths.leaderboard_csv)
        for path in (self.paths.leaderboard_json, self.paths.leaderboard_csv, self.paths.quarantine):
            self.tracker.log_file(self.run_id, path)
        best = rows[0]
        self.tracker.log_metrics(self.run_id, {"test/accuracy": best["test_accuracy"]})
        if self.experiment.tracking.register_model:
            uri = next(o["model_uri"] for o in outcomes if o["row"]["study"] == best["study"])
            version = self.tracker.register(uri, self.experiment.tracking.register_model)
            self.progress.say(f"registered {best['study']} as {self.experiment.tracking.register_model} v{version}")
        self.tracker.finish(self.run_id)
        return SweepResult(rows, self.num_new_trials, self.num_encoder_passes)

    def encoder(self, config: StudyConfig) -> _EncoderInUse:
        """Builds an encoder on first use."""
        if config.encoder_name not in self.encoders:
            encoder = build_encoder(config.encoder.model_dump(), self.experiment.seed)
            self.encoders[config.encoder_name] = _EncoderInUse(encoder, weights_signature(encoder))
        return self.encoders[config.encoder_name]

    def cache(self, config: StudyConfig, precision: str) -> Cache:
        """The cache that a study trains on, made now if need be."""
        used, label = self.encoder(config), f"{config.encoder_name}: decoding"
        if config.mode == "linear_probe":
            label = f"{config.encoder_name}: encoder pass"
            key = feature_signature(self.index, used.encoder, used.weights, precision)
            folder = self.paths.cache("features", key)
        else:
            folder = self.paths.cache("pixels", pixel_signature(self.index, used.encoder.preprocessing))
        exists = (folder / "manifest.json").exists()
        if not exists:
            present = self.resources
            self.progress.start(label, len(self.index.table))
        if config.mode == "linear_probe":
            num_gpus = 0 if exists or not uses_gpu(self.experiment.resources, present) else present.num_gpus
            weights = None if exists else used.put()
            cache = build_feature_cache(
                folder,
                self.index,
                used.encoder,
                weights,
                precision=precision,
                num_gpus=num_gpus,
                on_progress=self.progress.update,
            )
            self.num_encoder_passes += cache.made_now
        else:
            cache = build_pixel_cache(folder, self.index, used.encoder.preprocessing, self.progress.update)
        self._describe_cache(cache, label)
        self._set_aside(cache.bad_rows)
        return cache

    def _describe_cache(self, cache: Cache, label: str) -> None:
        self.progress.finish()
        if cache.made_now:
            speed = cache.num_rows / cache.seconds
            self.progress.say(f"{label} of {cache.num_rows:,} images in {cache.seconds:.1f} s ({speed:.0f} images/s)")
        else:
            self.progress.say(f"{label}: none needed, {cache.num_rows:,} images are cached")

    def _set_aside(self, bad_rows: Sequence[BadRow]) -> None:
        """Adds rows that did not decode to the quarantine, and stops where there are too many."""
        self.bad_rows |= {row.row_id: row for row in bad_rows}
        if not self.bad_rows:
            return
        everything = [*self.index.bad_rows, *self.bad_rows.values()]
        write_quarantine(self.paths.quarantine, everything)
        share, limit = len(everything) / self.index.num_rows_found, self.experiment.data.max_bad_fraction
        if share > limit:
            first = "; ".join(f"{row.source}: {row.reason}" for row in everything[:3])
            found = f"{len(everything)} of {self.index.num_rows_found} images ({share:.1%})"
            raise DataError(f"{found} cannot be used, data.max_bad_fraction allows {limit:.1%}: {first}")


@dataclass
class _Study:
    """One study of a sweep, from its cache to its row of the leaderboard."""

    sweep: _Sweep
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
        folder = sweep.paths.study(self.config.name) / key
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
        result = folder / "result.json"
        outcome = read_json(result) if result.exists() else None
        if outcome is None or outcome["num_trials"] != len(search.records):
            job = job or self._job(used, cache, rows, folder, key, head, precision)
            outcome = self._finalize(search, best, job, rows, cache, run_id)
            earlier = read_json(result)["row"]["study_seconds"] if result.exists() else 0.0
            outcome["row"]["study_seconds"] = earlier + time.perf_counter() - started
            write_json(result, outcome)
            _drop_other_checkpoints(records=search.records, best=best)
        else:
            sweep.progress.say(f"{self.config.name}: all {past} trials are there, nothing left to do")
            outcome["row"]["encoder_passes"] = int(cache.made_now and self.config.mode == "linear_probe")
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
        name = self.config.name.replace("-fine_tune", "-linear_probe")
        if name not in [study.name for study in self.sweep.experiment.studies()]:
            return None
        return Path(read_json(self.sweep.paths.study(name) / "best.json")["checkpoint"])

    def _signature(self, used: _EncoderInUse, space: dict[str, Any], head: Path | None) -> str:
        """Signature of all that a trial's result depends on; how many trials there are is not part of it."""
        experiment = self.sweep.experiment
        return signature(
            [
                [self.sweep.index.fingerprint, sorted(self.sweep.bad_rows)],
                [used.encoder.spec(), used.weights, self.config.mode, self.config.shots],
                [{name: dimension.model_dump() for name, dimension in space.items()}],
                [experiment.search.block(self.config.mode).sampler, experiment.metric, experiment.seed],
                experiment.train.model_dump(),
                str(load_head(head)[0].state_dict()) if head else None,
            ]
        )

    def _start_run(self, key: str, used: _EncoderInUse, rows: dict[str, Any]) -> str:
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
        self.sweep.tracker.fail_left_running(run_id)
        records = search.records
        for record in records:
            self._log_trial(run_id, key, record, 0)
        return len(records)

    def _log_trial(self, run_id: str, key: str, record: TrialRecord, num_logged: int) -> None:
        tracker, name = self.sweep.tracker, f"{self.config.name}-{record.number}"
        trial_run, created = tracker.start_run(f"{key}/{record.number}", name, "trial", parent=run_id)
        if created or num_logged:
            tracker.log_once(trial_run, record.setting, {"raysweep.error": record.error} if record.error else {})
            tracker.log_history(trial_run, record.history[num_logged:], num_logged)
            tracker.log_metrics(trial_run, {f"best/{k}": v for k, v in record.final.items() if k.startswith("val/")})
        tracker.finish(trial_run, failed=record.error is not None or not record.final)

    def _job(
        self,
        used: _EncoderInUse,
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
        sweep, tracker = self.sweep, self.sweep.tracker
        total, num_epochs_logged = search.block.num_trials, dict[int, int]()
        num_done = total - search.num_remaining
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
            if record.error:
                sweep.progress.warn(f"trial {record.number} failed: {record.error}")
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
        run_id: str,
    ) -> dict[str, Any]:
        """Opens the test split once, for the chosen trial; exports its model; makes the row."""
        sweep, config = self.sweep, self.config
        assert best.checkpoint is not None, "the best trial of a study has a checkpoint"
        tested = run_test(job, best.checkpoint)
        test = evaluate_test(tested["logits"], rows["test"][1], sweep.experiment.seed)
        model_path = sweep.paths.model(config.name)
        about = {"study": config.name, "trial": best.number, "setting": best.setting, "test_accuracy": test["accuracy"]}
        export_model(model_path, self._classifier(job, best.checkpoint), sweep.index.classes, about)
        records, is_probe = search.records, config.mode == "linear_probe"
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
            "train_seconds": best.details["train_seconds"] + (cache.seconds if is_probe else 0.0),
            "study_seconds": 0.0,
            "peak_memory_bytes": max(peak_memory, cache.peak_memory_bytes),
            "peak_gpu_memory_bytes": max(peak_gpu, cache.peak_gpu_memory_bytes, tested["peak_gpu_memory_bytes"]),
            "images_per_second": cache.num_rows / cache.seconds if is_probe else best.details["images_per_second"],
            "mlflow_run_id": run_id,
            "model_path": str(model_path),
        }
        if is_probe and config.encoder.saved_weights_in_checkpoint:
            self._add_encoder_weights(Path(best.checkpoint))
        model_uri = self._log_result(run_id, row, best, test)
        write_json(sweep.paths.study(config.name) / "best.json", {"checkpoint": best.checkpoint, "number": best.number})
        interval = f"[{row['test_accuracy_low']:.3f}, {row['test_accuracy_high']:.3f}]"
        sweep.progress.say(
            f"{config.name}: test accuracy {row['test_accuracy']:.3f} {interval} with {describe_setting(best.setting)}"
        )
        return {
            "num_trials": len(records),
            "row": row,
            "correct": test["correct"],
            "confusion_matrix": test["confusion_matrix"],
            "model_uri": model_uri,
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
