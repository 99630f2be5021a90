"""Studies that share one job, and the pieces of work into which they are cut for Ray Tune.

The probes of one encoder are one group, over every number of shots: they read the same features, so that one Population
holds the next settings of each. A fine_tune or from_scratch study is a group of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from raysweep.sweep.state import Rows, SweepContext
from raysweep.images.streaming import DECODING_CPUS
from raysweep.cluster.resources import num_concurrent_trials, uses_gpu
from raysweep.storage import location
from raysweep.sweep.study import SearchStudy, Study
from raysweep.worker.tune_trial import rows_to_begin_with

Work = dict[str, Any]


class Group:
    """Hands out Populations until the budget of its studies is spent, then the test of what they chose.

    Args:
        sweep: what the studies share.
        searches: studies of one encoder and mode.
        baselines: further studies of the same features, which have no trials.
    """

    def __init__(self, sweep: SweepContext, searches: Sequence[SearchStudy], baselines: Sequence[Study] = ()) -> None:
        self.sweep, self.searches, self.baselines = sweep, list(searches), list(baselines)
        self.first = self.searches[0]
        self.name, self.mode = self.first.config.name, self.first.config.mode
        self.num_running, self.is_tested = 0, False
        self.job: dict[str, Any] = {}
        self.micro_batch_size: int | None = None  # the largest that fits, once memory has run out

    @property
    def has_work(self) -> bool:
        """Whether anything is left to do, for all that is known before it is begun."""
        return not all(study.is_settled for study in [*self.searches, *self.baselines])

    @property
    def reserved_cpus(self) -> int:
        """CPUs that must stay free beside the training runs."""
        return DECODING_CPUS if self.first.cache.streamed else 0

    def next_work(self) -> Work | None:
        """Returns the next piece of work; None while the rest depends on what is running, or when there is none."""
        # Populations of a probe run one by one, each learning from those before it.
        if self.is_tested or (self.num_running and self.mode == "linear_probe"):
            return None
        trials = [trial for study in self.searches if study.num_left for trial in study.ask()]
        if trials:
            return self._begin({"trials": trials, "micro_batch_size": self.micro_batch_size})
        if self.num_running:
            return None
        chosen = self.choose()
        baselines = [study.config.name for study in self.baselines if not study.is_settled]
        return self._begin({"test": chosen, "baselines": baselines}) if chosen or baselines else None

    def choose(self) -> dict[str, str]:
        """Ends the searches; returns the checkpoints that are still to be tested, by study."""
        self.is_tested = True
        checkpoints = {study: study.choose() for study in self.searches}
        return {study.config.name: path for study, path in checkpoints.items() if path and not study.is_settled}

    def _begin(self, work: Work) -> Work:
        self.num_running += 1
        return {"group": self.name, "started": time.time(), **work}

    def on_epoch(self, epoch: dict[str, Any]) -> bool:
        """Passes an epoch of a lone trial on; returns whether the trial is to be stopped."""
        self._note_micro_batch_size(epoch["metrics"].get("train/micro_batch_size"))
        stops = self.first.on_epoch(epoch["number"], epoch["epoch"], epoch["metrics"])
        if stops and self.job["num_workers"] > 1:
            # Tune would end its own process, and Train's placement group would never be removed (docs/decisions/0013).
            self.first.ask_to_stop(epoch["number"])
            return False
        return stops

    def _note_micro_batch_size(self, size: float | None) -> None:
        """Lets later trials begin with what has fitted, where memory has run out."""
        if size is not None and size < (before := self.micro_batch_size or rows_to_begin_with(self.job)):
            self.micro_batch_size = int(size)
            batch_size = self.sweep.experiment.train.batch_size
            self.sweep.progress.warn(
                f"{self.name}: out of memory with {before} images at once; a worker takes {int(size)} and accumulates "
                f"(the batch stays {batch_size}); train.micro_batch_size: {int(size)} would begin with that"
            )

    def take(self, work: Work, results: dict[str, Any] | None, reason: str) -> None:
        """Takes what came of a piece of work.

        Args:
            work: from `next_work`.
            results: what `trial.run_work` reported, None when nothing came.
            reason: why it did not.
        """
        self.num_running -= 1
        studies = {study.config.name: study for study in [*self.searches, *self.baselines]}
        names = (
            {trial["study"] for trial in work["trials"]} if "trials" in work else {*work["test"], *work["baselines"]}
        )
        for name in names:
            studies[name].seconds += (time.time() - work["started"]) / len(names)
        if "trials" in work:
            found = {(one["study"], one["number"]): one for one in (results or {}).get("trials", [])}
            for trial in work["trials"]:
                study = studies[trial["study"]]
                assert isinstance(study, SearchStudy)
                study.tell(trial["number"], found.get((trial["study"], trial["number"])), reason)
            return
        for name in [*work["test"], *work["baselines"]]:
            tested = {"error": reason} if results is None else results["tested"][name]
            if "error" in tested:
                studies[name].failure = f"{name}: its test failed: {tested['error']}"
            else:
                studies[name].settle(tested, self.job)

    def build_job(self, num_side_by_side: int) -> dict[str, Any]:
        """Builds what all work of the group shares, as a plain dict; see `worker.train_worker`.

        Args:
            num_side_by_side: groups that may run at the same time.
        """
        sweep, first = self.sweep, self.first
        experiment, present, encoder = sweep.experiment, sweep.resources, first.encoder.description
        train, resources = experiment.train, experiment.resources
        precision = sweep.precision(first.config)
        is_probe = self.mode == "linear_probe"
        num_concurrent = min(
            num_concurrent_trials(resources, present, self.reserved_cpus),
            num_side_by_side * (1 if is_probe else max(1, first.num_left)),
        )
        num_cpus = present.num_cpus - self.reserved_cpus
        self.job = {
            "mode": self.mode,
            "cache": first.cache.rows,
            "stream": sweep.stream if first.cache.streamed else None,
            "data_key": first.key,
            "shape": list(encoder.preprocessing.training_size),
            "rows": self._rows(),
            "num_classes": len(sweep.index.classes),
            "encoder": encoder.spec(),
            "weights": None if is_probe else first.encoder.put(),
            "head": location(first.head) if first.head else None,
            "source": next(iter(encoder.sources)),
            "studies": {study.config.name: study.spec for study in [*self.searches, *self.baselines]},
            "memory_bytes": int(resources.feature_memory_gb * 1e9),
            "num_workers": resources.num_workers,
            "use_gpu": uses_gpu(resources, present),
            "cpus_per_worker": resources.cpus_per_worker,
            "gpus_per_worker": resources.gpus_per_worker,
            "placement": resources.placement,
            "gradient_checkpointing": self._checkpoints_gradients(),
            "compile": train.compile,
            "num_threads": max(1, num_cpus // max(len(present.cpus_by_node), num_concurrent * resources.num_workers)),
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
                "label_smoothing": train.label_smoothing,
                "ema_decay": train.ema_decay,
                "micro_batch_size": train.micro_batch_size,
            },
        }
        return self.job

    def _checkpoints_gradients(self) -> bool:
        """Whether to do what `train.gradient_checkpointing` says; says so where the encoder cannot."""
        if self.mode == "linear_probe" or not self.sweep.experiment.train.gradient_checkpointing:
            return False
        if not self.first.encoder.model.supports_gradient_checkpointing:
            self.sweep.progress.warn(f"{self.name}: its encoder knows no gradient checkpointing and is trained without")
            return False
        return True

    def _rows(self) -> Rows:
        """Probes read all rows, and take their subsets as places in them; the others read just their own."""
        subsets = self.first.subsets
        if self.mode == "linear_probe" or subsets is None:
            return self.sweep.rows
        return {
            split: (ids[subsets[split][0]], labels[subsets[split][0]]) if split in subsets else (ids, labels)
            for split, (ids, labels) in self.sweep.rows.items()
        }
