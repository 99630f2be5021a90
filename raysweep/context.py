"""What the studies of one sweep share: the images, the encoders, their caches, Ray, and the tracker."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.cluster import Resources, check_resources, local_resources, ray_session, uses_gpu
from raysweep.encoders import Encoder, build_encoder, weights_signature
from raysweep.errors import DataError
from raysweep.experiment.config import Experiment, StudyConfig
from raysweep.images.cache import Cache
from raysweep.images.features import build_feature_cache, feature_signature
from raysweep.images.pixels import build_pixel_cache, pixel_signature
from raysweep.images.sources import BadRow, ImageIndex
from raysweep.images.splits import SPLITS, few_shot
from raysweep.paths import SweepPaths, signature, write_atomically
from raysweep.progress import Progress
from raysweep.results.tracking import Tracker, environment_tags

MIN_FEW_SHOT_VALIDATION = 16


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

    Raises:
        DataError: a split has no usable image.
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
        if len(chosen) == 0:
            lost = f" left of {int((splits == split).sum())}: see quarantine.csv" if (splits == split).any() else ""
            hint = "each split needs one; splits the source lacks are taken from train, where it has enough images"
            raise DataError(f"data: no {split} images{lost}; {hint}")
        rows[split] = (ids[chosen], labels[chosen])
    return rows


@dataclass
class EncoderInUse:
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
class SweepContext:
    """The state that the studies of one sweep share.

    `bad_rows` are those that a pass found, by row id; `best_heads` the checkpoints of the
    probes done, by encoder and shots.
    """

    experiment: Experiment
    paths: SweepPaths
    index: ImageIndex
    tracker: Tracker
    progress: Progress
    verbose: bool
    stack: ExitStack
    encoders: dict[str, EncoderInUse] = field(default_factory=dict)
    bad_rows: dict[int, BadRow] = field(default_factory=dict)
    best_heads: dict[tuple[str, int | str], Path] = field(default_factory=dict)
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
        # How much is tried, where it runs and where it is kept may change between invocations of one sweep.
        settings = self.experiment.model_dump(exclude={"tracking", "resources", "storage"})
        for block in settings["search"].values():
            del block["num_trials"], block["time_budget_s"], block["population"]
        root = str(self.paths.root)
        key = signature([self.index.fingerprint, settings])
        run_id, created = self.tracker.start_run(key, self.experiment.name, "sweep", tags=environment_tags(root))
        if created:
            counts = self.index.counts()
            profile = {split: sum(by_class.values()) for split, by_class in counts.items()}
            name, source = self.experiment.data.source.rstrip("/").split("/")[-1], self.experiment.data.source
            self.tracker.log_dataset(run_id, name, self.index.fingerprint, source, str(profile))
        self.tracker.log_file(run_id, self.paths.resolved_experiment)
        self.tracker.fail_abandoned(root)
        return run_id

    def encoder(self, config: StudyConfig) -> EncoderInUse:
        """Builds an encoder on first use."""
        if config.encoder_name not in self.encoders:
            encoder = build_encoder(config.encoder.model_dump(), self.experiment.seed)
            self.encoders[config.encoder_name] = EncoderInUse(encoder, weights_signature(encoder))
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
        self.set_aside(cache.bad_rows)
        return cache

    def _describe_cache(self, cache: Cache, label: str) -> None:
        self.progress.finish()
        if cache.made_now:
            speed = cache.num_rows / cache.seconds
            self.progress.say(f"{label} of {cache.num_rows:,} images in {cache.seconds:.1f} s ({speed:.0f} images/s)")
        else:
            self.progress.say(f"{label}: none needed, {cache.num_rows:,} images are cached")

    def set_aside(self, bad_rows: Sequence[BadRow]) -> None:
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
