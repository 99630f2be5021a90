"""A small data set with cached features: a sweep on it does only the search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.figures import Options
from benchmarks.images import shared_folder
from benchmarks.sweeps import SEED, TINY_DINOV2, Finished, make_experiment, run_sweep
from raysweep.encoders.build import build_encoder
from raysweep.experiment.sections import DataConfig
from raysweep.images.cache import open_cache
from raysweep.images.features import load_features
from raysweep.images.index import load_index
from raysweep.training.population import FeatureSet


@dataclass(frozen=True)
class CachedData:
    """A folder whose caches hold all features of a sweep."""

    folder: Path
    source: str
    encoder: dict[str, Any]

    def experiment(self, name: str, num_trials: int) -> dict[str, Any]:
        """Returns an experiment on the cached features."""
        return make_experiment(name, self.source, [self.encoder], num_trials)

    def sweep(self, name: str, num_trials: int, *arguments: str) -> Finished:
        """Runs a sweep of that name, with an MLflow store of its own."""
        return run_sweep(self.folder, self.experiment(name, num_trials), *arguments)

    def feature_sets(self) -> tuple[FeatureSet, FeatureSet, Mapping[str, tuple[str, ...]], int]:
        """Returns train and validation features, the encoder's feature sources, and the number of classes."""
        encoder = build_encoder(self.encoder, SEED)
        index = load_index(DataConfig(source=self.source), SEED)
        found = (open_cache(path) for path in (self.folder / "runs" / ".cache").iterdir())
        cache = next(cache.rows for cache in found if cache and _has(Path(cache.rows), encoder.parts))
        splits = np.array(index.table["split"].to_pylist())

        def features_of(split: str) -> FeatureSet:
            row_ids, labels = (index.table[name].to_numpy()[splits == split] for name in ("row_id", "label"))
            parts = load_features(cache, row_ids.astype(np.int64), list(encoder.parts))
            return FeatureSet(parts, torch.from_numpy(labels.astype(np.int64)))

        return features_of("train"), features_of("validation"), encoder.sources, len(index.classes)


def _has(cache: Path, parts: Iterable[str]) -> bool:
    files = sorted(cache.glob("rows-*.parquet"))
    return bool(files) and set(parts) <= set(pq.read_schema(files[0]).names)


def prepare(options: Options) -> CachedData:
    """Makes the cache with a small sweep: beans and MobileNetV2 if both are there, else digits and a tiny ViT."""
    images, weights = shared_folder("data/beans"), shared_folder("weights/mobilenet_v2")
    if options.quick or images is None or weights is None:
        data = CachedData(options.scratch / "cached", "sklearn://digits", TINY_DINOV2)
    else:
        encoder = {"type": "auto", "pretrained_model_name_or_path": str(weights)}
        data = CachedData(options.scratch / "cached", str(images), encoder)
    data.sweep("first", 4)
    return data
