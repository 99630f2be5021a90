"""What the studies of one sweep share: the images, the encoders, their caches, Ray, and the tracker."""

from __future__ import annotations

import csv
import io
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysweep.sweep.encoder_card import EncoderInUse
from raysweep.cluster.session import RaySession, check_nodes, joins_cluster, wait_for_nodes
from raysweep.encoders.precision import faster_precision, supports_bf16
from raysweep.errors import DataError
from raysweep.experiment.config import Experiment, StudyConfig
from raysweep.images.cache import Cache, has_cache, num_leftover_bytes, open_cache
from raysweep.images.features import FeatureRequest, feature_signature
from raysweep.images.passes import build_caches, put_index
from raysweep.images.pixels import PixelRequest, pixel_bytes, pixel_signature
from raysweep.images.sources import BadRow, ImageIndex
from raysweep.images.splits import SPLITS, few_shot
from raysweep.images.streaming import DECODING_CPUS
from raysweep.paths import SweepPaths, signature, write_atomically
from raysweep.results.progress import Progress
from raysweep.results.recorder import Recorder
from raysweep.cluster.resources import Resources, check_resources, local_resources, uses_gpu
from raysweep.results.tracking import environment_tags
from raysweep.storage import location, on_every_node, remove

MIN_FEW_SHOT_VALIDATION = 16
FREE_DISK_SHARE = 0.8  # that pixel caches may take, unless the experiment says how much
TIMED_IMAGES = 2  # a forward pass, when precisions are compared on a CPU
Rows = dict[str, tuple[np.ndarray, np.ndarray]]


def write_quarantine(path: Path, bad_rows: Sequence[BadRow]) -> None:
    """Writes the rows that were set aside, with the reason; a header alone where there are none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row_id", "source", "reason"])
    writer.writerows([row.row_id, row.source, row.reason] for row in bad_rows)
    write_atomically(path, text.getvalue())


def select_rows(index: ImageIndex, bad_rows: Sequence[BadRow]) -> Rows:
    """Row ids and labels, both int64, of each split.

    Raises:
        DataError: a split has no usable image.
    """
    ids, labels = (index.table[name].to_numpy().astype(np.int64) for name in ("row_id", "label"))
    splits = np.array(index.table["split"].to_pylist())
    usable = ~np.isin(ids, [row.row_id for row in bad_rows])
    rows: Rows = {}
    for split in SPLITS:
        chosen = np.flatnonzero((splits == split) & usable)
        if len(chosen) == 0:
            lost = f" left of {int((splits == split).sum())}: see quarantine.csv" if (splits == split).any() else ""
            hint = "each split needs one; splits the source lacks are taken from train, where it has enough images"
            raise DataError(f"data: no {split} images{lost}; {hint}")
        rows[split] = (ids[chosen], labels[chosen])
    return rows


def draw_subsets(rows: Rows, shots: int | str, num_draws: int, seed: int) -> dict[str, np.ndarray] | None:
    """Draws few-shot subsets of `rows`; None where all rows are meant.

    Train takes `shots` rows per class; validation is capped at max(shots, 16) per class, as nobody with five images a
    class has a thousand to validate on, and never joins the training rows. For one draw the rows of 5 shots are among
    those of 10.

    Returns:
        `train` and `validation`: int64 `(num_draws, rows)`, places in the rows of that split.
    """
    if shots == "all":
        return None
    limits = {"train": int(shots), "validation": max(int(shots), MIN_FEW_SHOT_VALIDATION)}
    return {
        split: np.stack([few_shot(rows[split][1], limit, seed + draw) for draw in range(num_draws)])
        for split, limit in limits.items()
    }


@dataclass
class SweepContext:
    """The state that the studies of one sweep share.

    `bad_rows` are those that a pass found, by row id; `best_heads` the checkpoints of the
    probes done, by encoder and shots.
    """

    experiment: Experiment
    paths: SweepPaths
    index: ImageIndex
    recorder: Recorder
    progress: Progress
    ray: RaySession
    encoders: dict[str, EncoderInUse] = field(default_factory=dict)
    bad_rows: dict[int, BadRow] = field(default_factory=dict)
    best_heads: dict[tuple[str, int | str], Path] = field(default_factory=dict)
    num_new_trials: int = 0
    num_encoder_passes: int = 0

    @cached_property
    def resources(self) -> Resources:
        """Starts Ray on first use, if it was not before: a sweep with nothing left to do never needs it."""
        present = wait_for_nodes(self.experiment.resources, self.ray, self.progress.say)
        self._check_nodes()
        return present

    def _check_nodes(self) -> None:
        """Refuses a storage or a source that some node cannot see."""
        mark = self.paths.caches / f".seen-{uuid.uuid4().hex}"
        places = {f"storage: '{self.experiment.storage}'": location(mark)}
        first = self.index.table.slice(0, 1).to_pylist()[0]
        if first["image"] is None:
            places[f"data.source: '{self.experiment.data.source}'"] = on_every_node(first["path"])
        write_atomically(mark, "")
        try:
            check_nodes(places)
        finally:
            remove(mark)

    @property
    def present(self) -> Resources:
        """What there is to run on; found without starting Ray where that is this machine."""
        return self.resources if joins_cluster() else local_resources()

    @cached_property
    def run_id(self) -> str:
        """The sweep's MLflow run."""
        # How much is tried, where it runs and where it is kept may change between invocations of one sweep.
        settings = self.experiment.model_dump(exclude={"tracking", "resources", "storage"})
        for block in settings["search"].values():
            for name in ("num_trials", "time_budget_s", "population", "baselines"):
                block.pop(name, None)
        root = location(self.paths.root)
        key = signature([self.index.fingerprint, settings])
        run_id, created = self.recorder.call(
            "start_run", key, self.experiment.name, "sweep", None, environment_tags(root)
        )
        if created:
            counts = self.index.counts()
            profile = {split: sum(by_class.values()) for split, by_class in counts.items()}
            name, source = self.experiment.data.source.rstrip("/").split("/")[-1], self.experiment.data.source
            self.recorder.send("log_dataset", run_id, name, self.index.fingerprint, source, str(profile))
        self.recorder.send("log_file", run_id, self.paths.resolved_experiment)
        self.recorder.send("fail_abandoned", root)
        return str(run_id)

    @cached_property
    def rows(self) -> Rows:
        """Usable rows of each split; settled once every cache is there."""
        return select_rows(self.index, list(self.bad_rows.values()))

    def encoder(self, config: StudyConfig) -> EncoderInUse:
        """What is known of a study's encoder; loads it where that is nothing yet."""
        if config.encoder_name not in self.encoders:
            self.encoders[config.encoder_name] = EncoderInUse(config.encoder, self.experiment.seed, self.paths.caches)
        return self.encoders[config.encoder_name]

    def caches(self, configs: Sequence[StudyConfig]) -> dict[str, Cache]:
        """The cache that each study trains on, by its name; those that are missing are made now, in one pass.

        Raises:
            ResourceError: pixels have no room on the disk, and there is no CPU to decode them anew.
        """
        folders = {config.name: self._cache_folder(config) for config in configs}
        wanted: dict[Path, StudyConfig] = {}
        for config in configs:
            wanted.setdefault(folders[config.name], config)
        streamed = self._streamed(wanted)
        missing = {f: config for f, config in wanted.items() if not has_cache(f, streamed=f in streamed)}
        if streamed:
            check_resources(self.experiment.resources, self.present, DECODING_CPUS)
        made = self._make_caches(missing, streamed) if missing else {}
        for config in configs:
            if config.mode == "linear_probe" and folders[config.name] not in made:
                self.progress.say(f"{config.encoder_name}: encoder pass: none needed, its features are cached")
        found = {name: made.get(folder) or open_cache(folder) for name, folder in folders.items()}
        caches = {name: cache for name, cache in found.items() if cache is not None}
        self.set_aside([row for cache in caches.values() for row in cache.bad_rows])
        return caches

    def _streamed(self, wanted: Mapping[Path, StudyConfig]) -> set[Path]:
        """Pixel caches that are not there and for which the disk has no room: their studies decode anew."""
        needed = {
            folder: pixel_bytes(self.index, self.encoder(config).description.preprocessing)
            for folder, config in wanted.items()
            if config.mode != "linear_probe" and not has_cache(folder)
        }
        num_bytes, allowed = sum(needed.values()), self._disk_budget(list(needed))
        if num_bytes <= allowed:
            return set()
        limit = self.experiment.resources.pixel_disk_gb
        key = f"resources.pixel_disk_gb{f': auto ({FREE_DISK_SHARE:g} of what is free)' if limit == 'auto' else ''}"
        sizes = f"a cache takes {num_bytes / 1e9:,.3f} GB, {key} allows {allowed / 1e9:,.3f} GB"
        self.progress.say(f"pixels are decoded anew in every epoch: {sizes}")
        return set(needed)

    def _disk_budget(self, folders: Sequence[Path]) -> float:
        """Bytes that the pixel caches in these folders may take."""
        limit = self.experiment.resources.pixel_disk_gb
        if limit != "auto":
            return limit * 1e9
        # A pass that was cut short has left files, which will be replaced.
        replaced = sum(map(num_leftover_bytes, folders))
        return FREE_DISK_SHARE * (shutil.disk_usage(self.paths.caches).free + replaced)

    @cached_property
    def stream(self) -> dict[str, Any]:
        """What training runs need to decode images themselves."""
        return put_index(self.index)

    def _make_caches(self, missing: Mapping[Path, StudyConfig], streamed: Collection[Path]) -> dict[Path, Cache]:
        present = self.resources
        requests: list[FeatureRequest | PixelRequest] = []
        for folder, config in missing.items():
            used = self.encoder(config)
            if config.mode == "linear_probe":
                requests.append(FeatureRequest(folder, used.description, used.put(), self.precision(config)))
            else:
                requests.append(PixelRequest(folder, used.description.preprocessing, folder in streamed))
        encoded = [config.encoder_name for config in missing.values() if config.mode == "linear_probe"]
        label = f"encoder pass ({', '.join(encoded)})" if encoded else "decoding"
        stage = self.progress.stage(label, len(self.index.table))
        num_gpus = present.num_gpus if uses_gpu(self.experiment.resources, present) else 0
        caches = build_caches(
            requests,
            self.index,
            num_gpus=num_gpus,
            cpus_by_node=present.cpus_by_node if joins_cluster() else (),
            on_progress=lambda done, _total: stage.update(done),
        )
        stage.finish()
        seconds = sum(cache.seconds for cache in caches if cache.made_now)
        if seconds:  # else another sweep made them all in the meantime
            num_images = len(self.index.table)
            speed = f"{seconds:.1f} s ({num_images / seconds:.0f} images/s)"
            self.progress.say(f"{label}: {num_images:,} images in {speed}")
        made = dict(zip(missing, caches, strict=True))
        self.num_encoder_passes += sum(
            made[folder].made_now for folder, config in missing.items() if config.mode == "linear_probe"
        )
        return made

    def _cache_folder(self, config: StudyConfig) -> Path:
        used = self.encoder(config)
        if config.mode != "linear_probe":
            return self.paths.cache("pixels", pixel_signature(self.index, used.description.preprocessing))
        key = feature_signature(self.index, used.description, used.weights, self.precision(config))
        return self.paths.cache("features", key)

    def precision(self, config: StudyConfig) -> str:
        """What a study computes in: `fp32` or `bf16`, as configured; for `auto` bf16 where that is faster.

        GPUs that have bf16 are always faster with it. On CPUs the encoder pass is measured, unless there are features
        of one or the other; training stays in fp32.
        """
        wanted = self.experiment.train.precision
        if wanted != "auto":
            return wanted
        on_gpu = uses_gpu(self.experiment.resources, self.present)
        if config.mode in ("fine_tune", "from_scratch"):
            return self._gpu_precision if on_gpu else "fp32"
        used = self.encoder(config)
        if not used.precision:
            used.precision = self._precision_of_cache(used)
        if not used.precision:
            cpu = torch.device("cpu")
            used.precision = self._gpu_precision if on_gpu else faster_precision(used.model, cpu, TIMED_IMAGES)
        return used.precision

    def _precision_of_cache(self, used: EncoderInUse) -> str:
        for precision in ("bf16", "fp32"):
            key = feature_signature(self.index, used.description, used.weights, precision)
            if open_cache(self.paths.cache("features", key)):
                return precision
        return ""

    @cached_property
    def _gpu_precision(self) -> str:
        if torch.cuda.is_available():
            return "bf16" if supports_bf16(torch.device("cuda")) else "fp32"
        import ray  # a driver without a GPU, on a cluster that has some: one of them is asked

        ask = ray.remote(supports_bf16).options(num_gpus=min(1, self.experiment.resources.gpus_per_worker))
        return "bf16" if ray.get(ask.remote(torch.device("cuda"))) else "fp32"

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
