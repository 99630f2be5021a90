"""Warns about images of validation and test that have a near copy in train by their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raysweep.errors import DataError
from raysweep.experiment.studies import StudyConfig
from raysweep.images.cache import Cache
from raysweep.images.cache_files import fetched
from raysweep.images.feature_copies import (
    MAX_CHECKED,
    MAX_TRAIN_BYTES,
    describe_feature_copies,
    find_feature_copies,
    spread,
)
from raysweep.images.features import HALF_BYTES, load_features
from raysweep.images.listed_rows import image_name
from raysweep.images.splits import Split
from raysweep.storage.paths import read_json, signature, write_json
from raysweep.sweep.state import SweepState

CHECKED: tuple[Split, ...] = ("test", "validation")
METHOD = 2  # a new value has every sweep checked again


def warn_of_feature_copies(state: SweepState, configs: Sequence[StudyConfig], caches: Mapping[str, Cache]) -> None:
    """Checks the features of the first study that reads some, and writes what it finds to `feature_copies.json`.

    The file also tells later invocations, which do not check again.
    """
    config = next((config for config in configs if config.reads_features and config.name in caches), None)
    if config is None:
        return
    cache = caches[config.name]
    key = signature(
        [METHOD, state.index.fingerprint, Path(cache.folder).name, sorted(state.bad_rows), state.near_copies]
    )
    found = _stored(state.paths.feature_copies, key)
    if found is None:
        found = {"signature": key, "encoder": config.encoder_name, "splits": _check(state, config, cache)}
        write_json(state.paths.feature_copies, found)
    for split, checked in found["splits"].items():
        pairs = [(pair["image"], pair["train_image"]) for pair in checked["pairs"]]
        if pairs:
            state.progress.warn(describe_feature_copies(split, checked["num_checked"], checked["num_images"], pairs))


def _stored(path: Path, key: str) -> dict[str, Any] | None:
    try:
        found = read_json(path)
    except DataError:
        return None
    return found if isinstance(found, dict) and found.get("signature") == key else None


def _check(state: SweepState, config: StudyConfig, cache: Cache) -> dict[str, Any]:
    encoder, folder = state.encoder(config), fetched(cache.rows)
    part, width = next(iter(encoder.spec.parts.items()))

    def features_of(ids: np.ndarray) -> np.ndarray:
        return np.asarray(load_features(folder, ids, [part])[part])

    everything = state.rows["train"]
    train = everything.take(spread(len(everything), MAX_TRAIN_BYTES // (width * HALF_BYTES)))
    train_features = features_of(train.ids)
    table = state.index.table
    row_ids = table["row_id"].to_numpy()
    hashes, paths = table["content_hash"].to_numpy(zero_copy_only=False), table["path"].to_pylist()
    positions = table["position"].to_pylist()
    in_groups = [row_id for group in state.near_copies for row_id in group]
    train_places = np.searchsorted(row_ids, everything.ids)

    def name_of(row_id: int) -> str:
        place = int(np.searchsorted(row_ids, row_id))
        return image_name(paths[place], positions[place])

    splits: dict[str, Any] = {}
    for split in CHECKED:
        ids = state.rows[split].ids
        # Exact copies and those that look the same have their own warnings.
        is_exact = np.isin(hashes[np.searchsorted(row_ids, ids)], hashes[train_places])
        others = ids[~is_exact & ~np.isin(ids, in_groups)]
        checked = others[spread(len(others), MAX_CHECKED)]
        copies = find_feature_copies(features_of(checked), train_features, train.labels) if len(checked) else []
        pairs = [
            {
                "image": name_of(int(checked[copy.row])),
                "train_image": name_of(int(train.ids[copy.train_row])),
                "similarity": round(copy.similarity, 4),
            }
            for copy in copies
        ]
        splits[split] = {"num_images": len(others), "num_checked": len(checked), "pairs": pairs}
    return splits
