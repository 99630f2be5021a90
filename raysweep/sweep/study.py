"""The studies of a sweep: what a row of the leaderboard needs, from its signature to its outcome."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

from raysweep.sweep.state import SweepContext, draw_subsets
from raysweep.encoders import weights_signature
from raysweep.errors import TrialError
from raysweep.experiment.config import StudyConfig
from raysweep.sweep.outcome import finalize_baseline, finalize_search, has_model, log_outcome, model_about
from raysweep.images.cache import Cache
from raysweep.worker.inputs import load_heads
from raysweep.paths import read_json, signature, write_atomically, write_json
from raysweep.results.progress import Stage
from raysweep.results.tracking import LoggedTrial, RunStatus
from raysweep.sweep.optuna_study import Search, TrialRecord, make_record, population_size, study_space
from raysweep.storage import local_path, location, publish, remove

# Keys of `train` that change how something is computed, and not what.
HOW_NOT_WHAT = ("micro_batch_size", "gradient_checkpointing", "compile")


class Study:
    """One row of the leaderboard: a classifier that is chosen on validation and then meets the test split once.

    Args:
        sweep: what the studies share.
        config: the study.
        cache: of what it trains on.
    """

    def __init__(self, sweep: SweepContext, config: StudyConfig, cache: Cache) -> None:
        self.sweep, self.config, self.cache = sweep, config, cache
        self.encoder = sweep.encoder(config)
        # Training all weights is too dear for more than one draw: it takes the first, as does the probe's model.
        trains_all = config.mode in ("fine_tune", "from_scratch")
        num_draws = 1 if trains_all else sweep.experiment.data.few_shot_seeds
        self.subsets = draw_subsets(sweep.rows, config.shots, num_draws, sweep.experiment.seed)
        self.key = signature(self._identity())
        self.folder = sweep.paths.study(config.name, self.key)
        self.run_id = self._start_run()
        self.seconds = cache.seconds if cache.made_now else 0.0  # what all its pieces of work took, by this invocation
        self.outcome: dict[str, Any] | None = None
        self.model_uri: Future[str] | None = None
        self.failure: str | None = None

    def _identity(self) -> list[Any]:
        """All that the row depends on; how much is tried is not part of it."""
        experiment, used = self.sweep.experiment, self.encoder
        num_draws = len(self.subsets["train"]) if self.subsets else 1
        return [
            [self.sweep.index.fingerprint, sorted(self.sweep.bad_rows)],
            [used.description.spec(), used.weights, self.config.mode, self.config.shots, num_draws],
            [experiment.metric, experiment.seed],
            # Features of another precision are other features.
            [Path(self.cache.folder).name, self.sweep.precision(self.config)],
        ]

    def _start_run(self) -> str:
        sweep, config, origin = self.sweep, self.config, self.encoder.description.origin
        run_id, created = sweep.recorder.call("start_run", self.key, config.name, "study", sweep.run_id)
        if created:
            params = {
                "encoder": config.encoder_name,
                "mode": config.mode,
                "shots": config.shots,
                "weights": origin["name"],
                "revision": origin["revision"],
                "image_size": self.encoder.description.preprocessing.output_size[0],
                "metric": sweep.experiment.metric,
                "seed": sweep.experiment.seed,
                **{f"num_{split}": self.num_rows(split) for split in sweep.rows},
            }
            sweep.recorder.send("log_once", run_id, params)
        return str(run_id)

    def num_rows(self, split: str) -> int:
        """Rows of a split that one model of this study sees."""
        if self.subsets and split in self.subsets:
            return int(self.subsets[split].shape[1])
        return len(self.sweep.rows[split][0])

    def _known(self) -> dict[str, Any] | None:
        """The outcome of an earlier invocation, where there is one."""
        result = self.sweep.paths.study_result(self.config.name, self.key)
        return read_json(result) if result.exists() else None

    @cached_property
    def is_settled(self) -> bool:
        """Whether an earlier invocation has left nothing to do."""
        known = self._known()
        if known is None or known["row"]["model_path"] is None:
            return known is not None
        return bool(model_about(self.sweep, self.config).get("key") == self.key)

    @property
    def spec(self) -> dict[str, Any]:
        """What a worker needs to know of this study alone, beside the job it shares with others."""
        return {
            "name": self.config.name,
            "mode": self.config.mode,
            "folder": location(self.folder),
            "subsets": self.subsets,
        }

    def settle(self, tested: dict[str, Any], job: dict[str, Any]) -> None:  # noqa: ARG002
        """Takes what `worker.run_test` returned of this study."""
        self.outcome = finalize_baseline(self.sweep, self.config, self.cache, tested, self.key)
        self._log(tested["checkpoint"], tested["setting"], None)

    def _log(self, checkpoint: str | None, setting: dict[str, Any], best_trial: int | None) -> None:
        assert self.outcome is not None
        known = self._known()
        earlier = known["row"]["study_seconds"] if known else 0.0
        self.outcome["row"]["study_seconds"] = earlier + self.seconds
        self.model_uri = log_outcome(self.sweep, self.run_id, self.outcome, setting, checkpoint, best_trial)
        self._write(self.outcome)  # a sweep that is killed from here on need not test it again

    def _write(self, outcome: dict[str, Any]) -> None:
        write_json(self.sweep.paths.study_result(self.config.name, self.key), outcome)

    def conclude(self) -> dict[str, Any]:
        """Returns the outcome: `row`, `correct` per test row, `val_metric`, `test`, `model_uri`; ends the MLflow run.

        Raises:
            TrialError: there is none.
        """
        if self.failure:
            raise TrialError(self.failure)
        outcome = self.outcome or self._known()
        assert outcome is not None, self.config.name
        if self.outcome is None:
            self._reuse(outcome)
        if self.model_uri is not None:
            self.sweep.recorder.wait()
            outcome["model_uri"] = self.model_uri.result()
        outcome["row"]["mlflow_run_id"] = self.run_id
        self._write(outcome)
        self.sweep.recorder.send("finish", self.run_id)
        return outcome

    def _reuse(self, outcome: dict[str, Any]) -> None:
        """Brings the outcome of an earlier invocation up to date."""
        uses_features = self.config.mode not in ("fine_tune", "from_scratch")
        outcome["row"]["encoder_passes"] = int(self.cache.made_now and uses_features)
        if outcome["row"]["mlflow_run_id"] != self.run_id:
            checkpoint, best_trial = outcome["checkpoint"], outcome["best_trial"]
            self.model_uri = log_outcome(
                self.sweep, self.run_id, outcome, outcome["row"]["best_params"], checkpoint, best_trial
            )


class SearchStudy(Study):
    """A study whose setting is searched with Optuna, trial by trial."""

    def __init__(self, sweep: SweepContext, config: StudyConfig, cache: Cache) -> None:
        block = sweep.experiment.search.block(config.mode)
        self.space = study_space(block, list(sweep.encoder(config).description.sources), config.encoder_name)
        self.head = None  # the best head of the probe of the same encoder and shots: fine-tuning starts there (LP-FT)
        if config.mode == "fine_tune":
            self.head = sweep.best_heads.get((config.encoder_name, config.shots))
        super().__init__(sweep, config, cache)
        name, database = f"{config.name}-{self.key}", sweep.experiment.tracking.optuna_uri
        if database:  # which sweeps share, unlike their trials' weights
            name = f"{sweep.experiment.name}-{signature(location(sweep.paths.root))}-{name}"
        self.search = Search(
            database or sweep.paths.optuna_journal,
            name,
            block,
            self.space,
            sweep.experiment.metric,
            sweep.experiment.direction,
            sweep.experiment.seed,
        )
        sweep.recorder.send("catch_up", self.run_id, [self._logged(record) for record in self.search.records])
        self.num_left = self.search.num_remaining
        self.num_done, self.total = self.search.num_done, self.search.block.num_trials
        self.waiting: dict[int, Any] = {}
        self.histories: dict[int, list[dict[str, float]]] = {}  # of trials that still run, as far as they are logged
        self.stopped: set[int] = set()
        self.errors: set[str] = set()
        self._stage: Stage | None = None
        self._asked: float | None = None

    def _identity(self) -> list[Any]:
        experiment = self.sweep.experiment
        block = experiment.search.block(self.config.mode)
        return [
            *super()._identity(),
            {name: dimension.model_dump() for name, dimension in self.space.items()},
            block.sampler,
            *([] if block.scheduler == "none" else [block.scheduler]),
            experiment.train.model_dump(exclude=set(HOW_NOT_WHAT)),
            weights_signature(load_heads(self.head)[0][0]) if self.head else None,
        ]

    @cached_property
    def is_settled(self) -> bool:
        """Whether an earlier invocation has left nothing to do."""
        known = self._known()
        if self.num_left or known is None or known["num_records"] != len(self.search.records):
            return False
        return has_model(self.sweep, self.config, self.key, self.search.best())

    def ask(self) -> list[dict[str, Any]]:
        """Draws the settings of the next Population; none when the budget or the time for them is spent."""
        budget = self.search.block.time_budget_s
        if self._asked is None:
            self._asked = time.monotonic() - self.search.seconds_spent
        # The first Population always runs: a study without a trial has no answer.
        elif budget is not None and time.monotonic() - self._asked > budget:
            self.num_left = 0
        trials = self.search.ask(min(population_size(self.search.block), self.num_left))
        self.num_left -= len(trials)
        self.waiting |= {trial.number: trial for trial in trials}
        if self.config.mode != "linear_probe":  # it leaves checkpoints under its number before it is told
            self._publish_journal()
        return [
            {
                "study": self.config.name,
                "number": trial.number,
                "setting": dict(trial.params),
                "continues": trial.user_attrs.get("continues"),
                "stop_file": location(self._stop_file(trial.number)),
            }
            for trial in trials
        ]

    def _publish_journal(self) -> None:
        if self.sweep.experiment.tracking.optuna_uri is None:
            publish(self.sweep.paths.optuna_journal)

    def on_epoch(self, number: int, epoch: int, metrics: dict[str, float]) -> bool:
        """Logs an epoch of a trial that is still running; returns whether the trial is to be stopped."""
        sweep, trial, history = self.sweep, self.waiting[number], self.histories.setdefault(number, [])
        if epoch < len(history):  # the trial began again from its last epoch, with less memory
            return False
        history.append(metrics)
        key, name = f"{self.key}/{number}", f"{self.config.name}-{number}"
        sweep.recorder.send("log_epoch", self.run_id, key, name, dict(trial.params), epoch, metrics)
        score = f"{sweep.experiment.metric} {metrics[sweep.experiment.metric]:.3f}"
        self._show(f"trial {number} epoch {epoch + 1}: {score}")
        if self.search.should_stop(trial, history):
            self.stopped.add(number)
        return number in self.stopped

    def ask_to_stop(self, number: int) -> None:
        """Leaves word for the worker processes of a trial that is to be stopped, since Tune cannot reach them."""
        write_atomically(self._stop_file(number), "")

    def _stop_file(self, number: int) -> Path:
        return self.folder / "stop" / str(number)

    def tell(self, number: int, result: dict[str, Any] | None, reason: str) -> None:
        """Records the end of a trial: what `worker.train_worker` returned of it, or why there is nothing."""
        trial, sweep, history = self.waiting.pop(number), self.sweep, self.histories.pop(number, [])
        if number in self.stopped and result is None:
            record = self.search.stopped_record(trial, history)
        else:
            record = make_record(number, dict(trial.params), result, reason)
        self.search.tell(trial, record)
        # A Population's trials are told together; the others one by one, each the work of minutes.
        if self.config.mode != "linear_probe" or not self.waiting:
            self._publish_journal()
        if number in self.stopped:
            remove(self._stop_file(number))
        if record.checkpoint:  # the optimiser's state has no use once the trial is told, and is twice the model's size
            remove(local_path(record.checkpoint).with_name("last.safetensors"))
        sweep.recorder.send("log_trial", self.run_id, *self._logged(record, len(history)))
        if record.error and record.error not in self.errors:
            self.errors.add(record.error)
            sweep.progress.warn(f"{self.config.name}: trial {record.number} failed: {record.error}")
            sweep.progress.say(f"its traceback is in {location(self.folder)}/trials/")
        self.num_done += 1
        sweep.num_new_trials += 1
        if record.pruned:
            self._discard(number)
            self._show(f"trial {number} stopped after epoch {len(history)} ({self.search.block.scheduler})")
        if not self.waiting:
            self._show(self._best_so_far())

    def _discard(self, number: int) -> None:
        """Deletes what a stopped trial wrote: no weights of it are kept."""
        for writer in {number, self.search.folder_number(number)}:
            remove(self.folder / "trials" / str(writer))

    def _logged(self, record: TrialRecord, num_logged: int = 0) -> tuple[str, str, LoggedTrial]:
        history = record.history[num_logged:]
        if self.config.mode == "linear_probe":  # hundreds of trials, whose epochs take no time of their own
            history = [{k: v for k, v in epoch.items() if not k.startswith("time/")} for epoch in history]
        trial = LoggedTrial(record.setting, history, record.final, self._status(record), record.error, num_logged)
        return f"{self.key}/{record.number}", f"{self.config.name}-{record.number}", trial

    def _status(self, record: TrialRecord) -> RunStatus:
        if record.pruned:
            return "KILLED"
        has_value = math.isfinite(record.final.get(self.sweep.experiment.metric, math.nan))
        return "FINISHED" if record.error is None and has_value else "FAILED"

    def _show(self, note: str) -> None:
        if self._stage is None:
            self._stage = self.sweep.progress.stage(self.config.name, self.total)
        self._stage.update(self.num_done, note)

    def _best_so_far(self) -> str:
        try:
            value = self.search.best().final[self.sweep.experiment.metric]
        except TrialError:
            return "no trial has succeeded yet"
        return ", ".join(filter(None, [f"best {self.sweep.experiment.metric} {value:.3f}", self._how_many_stopped()]))

    def _how_many_stopped(self) -> str:
        num_stopped = sum(record.pruned for record in self.search.records)
        return f"{num_stopped} of {self.num_done} trials stopped early" if num_stopped else ""

    def choose(self) -> str | None:
        """Returns the checkpoint of the best trial; None when every trial failed, which ends the study."""
        if self._stage is not None:
            self._stage.finish()
            if stopped := self._how_many_stopped():
                self.sweep.progress.say(f"{self.config.name}: {stopped} ({self.search.block.scheduler})")
        try:
            best = self.search.best()
        except TrialError as error:
            self.failure = str(error)
            return None
        assert best.checkpoint is not None, "the best trial of a study has a checkpoint"
        if self.config.mode == "linear_probe":
            self.sweep.best_heads[self.config.encoder_name, self.config.shots] = local_path(best.checkpoint)
        return best.checkpoint

    def settle(self, tested: dict[str, Any], job: dict[str, Any]) -> None:
        """Takes what `worker.run_test` returned of this study."""
        best = self.search.best()
        self.outcome = finalize_search(
            self.sweep, self.config, self.search.records, best, job=job, cache=self.cache, key=self.key, tested=tested
        )
        self._log(best.checkpoint, best.setting, best.number)
        for record in self.search.records:  # eight fine-tunes of a large encoder would keep 10 GB
            if record.checkpoint and record.checkpoint != best.checkpoint:
                remove(local_path(record.checkpoint))
            if record.pruned:  # a worker on its way out may have written once more
                self._discard(record.number)

    def conclude(self) -> dict[str, Any]:
        """As `Study.conclude`."""
        if self.outcome is None and self.failure is None:
            self.sweep.progress.say(f"{self.config.name}: all {self.num_done} trials are there, nothing left to do")
        return super().conclude()
