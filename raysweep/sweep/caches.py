"""Finds the caches that the studies of a sweep train on, and makes missing ones in one pass over the images."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from raysweep.cluster.address import joins_cluster
from raysweep.cluster.resources import check_resources, local_resources, uses_gpu
from raysweep.cluster.session import cpus_and_memory_by_node
from raysweep.encoders.precision import faster_precision, supports_bf16
from raysweep.errors import DataError, ResourceError
from raysweep.experiment.studies import RowConfig, StudyConfig
from raysweep.images.cache import MANIFEST, Cache, damage_of_manifest, has_cache, num_leftover_bytes, open_cache
from raysweep.images.cache_files import add_checksums, what_is_lacking
from raysweep.images.features import FeatureRequest, feature_bytes, feature_signature
from raysweep.images.pass_processes import PassProcesses, bytes_of_process, choose_processes
from raysweep.images.pass_timing import fastest_processes
from raysweep.images.passes import build_caches
from raysweep.images.pixels import PixelRequest, pixel_bytes, pixel_signature
from raysweep.images.streaming import DECODING_CPUS
from raysweep.storage.copies import fetch, is_bucket, remove
from raysweep.storage.paths import read_json, write_json
from raysweep.sweep.encoder_card import LazyEncoder
from raysweep.sweep.state import SweepState

FREE_DISK_SHARE = 0.8  # for pixel caches, unless the experiment sets a limit
TIMED_IMAGES = 2  # per forward pass, when precisions are compared on a CPU


def find_or_make_caches(state: SweepState, configs: Sequence[StudyConfig]) -> dict[str, Cache]:
    """Returns the cache of each study, by study name. Makes missing caches in one pass.

    Caches that exist are compared with their checksums. What is damaged is made again, with a word.

    Raises:
        ResourceError: the pixels do not fit on the disk, and no CPU is left to decode them in every epoch; or the
            features do not fit on the disk.
    """
    folders = {config.name: _cache_folder(state, config) for config in configs}
    wanted: dict[Path, StudyConfig] = {}
    for config in configs:
        wanted.setdefault(folders[config.name], config)
    for folder, config in wanted.items():
        _check_manifest(state, folder, config)
    streamed = _streamed(state, wanted)
    missing = {f: config for f, config in wanted.items() if not _is_whole(state, f, config, f in streamed)}
    if streamed:
        check_resources(state.experiment.resources, state.present, DECODING_CPUS)
    made = _make_caches(state, missing, streamed) if missing else {}
    for config in configs:
        if config.reads_features and folders[config.name] not in made:
            state.progress.say(f"{config.encoder_name}: encoder pass: none needed, its features are cached")
    found = {name: made.get(folder) or open_cache(folder) for name, folder in folders.items()}
    caches = {name: cache for name, cache in found.items() if cache is not None}
    state.set_aside([row for cache in caches.values() for row in cache.bad_rows])
    _check_blank_images(state, {row_id for cache in caches.values() for row_id in cache.blank_rows})
    return caches


def _check_blank_images(state: SweepState, blank_rows: Collection[int]) -> None:
    """Tells of images that have one colour only.

    Raises:
        DataError: all usable images of a split are such images.
    """
    if not blank_rows:
        return
    row_ids, splits = state.index.table["row_id"].to_numpy(), np.array(state.index.table["split"].to_pylist())
    is_blank, is_usable = np.isin(row_ids, list(blank_rows)), ~np.isin(row_ids, list(state.bad_rows))
    first = state.index.table["path"][int(np.flatnonzero(is_blank)[0])].as_py()
    for split in np.unique(splits):
        usable = (splits == split) & is_usable
        if usable.any() and is_blank[usable].all():
            raise DataError(
                f"data: each of the {usable.sum()} usable {split} images has one colour only, black for example (the "
                f"first: {first}); check how they were written or exported"
            )
    count = f"{is_blank.sum()} of {len(row_ids)} images"
    state.progress.say(f"warning: {count} have one colour only, black for example (the first: {first})")


def _check_space(state: SweepState, requests: Sequence[FeatureRequest | PixelRequest]) -> None:
    """Checks that features fit on the disk. Pixels that do not fit are decoded in every epoch instead.

    Raises:
        ResourceError: they do not fit.
    """
    if is_bucket(state.experiment.storage):
        return
    features = [
        request for request in requests if isinstance(request, FeatureRequest) and not has_cache(request.folder)
    ]
    num_bytes = sum(feature_bytes(state.index, request.encoder) for request in features)
    free = shutil.disk_usage(state.paths.caches).free + sum(num_leftover_bytes(request.folder) for request in features)
    if num_bytes > free:
        raise ResourceError(
            f"storage: the features take {num_bytes / 1e9:,.3f} GB in {state.paths.caches}, {free / 1e9:,.3f} GB are "
            "free; free some space, or set storage to another disk"
        )


def _check_manifest(state: SweepState, folder: Path, config: StudyConfig) -> None:
    """Has a cache made again whose manifest is damaged, or that an earlier version made and that is damaged."""
    damage = damage_of_manifest(fetch(folder / MANIFEST).parent) or add_checksums(folder)
    if damage:
        state.progress.say(f"{config.encoder_name}: {damage}; this cache is made again")
        remove(folder / MANIFEST)


def _is_whole(state: SweepState, folder: Path, config: StudyConfig, streamed: bool) -> bool:
    """Whether a cache exists and is as it was written; says so if it exists and is not."""
    if not has_cache(folder, streamed=streamed):
        return False
    cache = open_cache(folder)
    assert cache is not None
    damaged, num_unread = what_is_lacking(cache)
    if damaged:
        files = f"{len(damaged)} of {len(cache.files or ())} files are damaged or missing (first: {damaged[0]})"
        state.progress.say(f"{config.encoder_name}: {cache.rows}: {files}; only these are made again")
    if num_unread:
        say = state.progress.say
        say(f"{config.encoder_name}: {num_unread} images that an earlier pass did not get are read again")
    return not damaged and not num_unread


def _cache_folder(state: SweepState, config: RowConfig) -> Path:
    encoder = state.encoder(config)
    if not config.reads_features:
        return state.paths.cache("pixels", pixel_signature(state.index, encoder.spec.preprocessing))
    return _feature_folder(state, encoder, precision_of(state, config))


def _feature_folder(state: SweepState, encoder: LazyEncoder, precision: str) -> Path:
    return state.paths.cache("features", feature_signature(state.index, encoder.spec, encoder.weights, precision))


def _streamed(state: SweepState, wanted: Mapping[Path, StudyConfig]) -> set[Path]:
    """Returns missing pixel caches that do not fit on the disk. Their studies decode images in every epoch."""
    needed = {
        folder: pixel_bytes(state.index, state.encoder(config).spec.preprocessing)
        for folder, config in wanted.items()
        if not config.reads_features and not has_cache(folder)
    }
    num_bytes, allowed = sum(needed.values()), _disk_budget(state, list(needed))
    if num_bytes <= allowed:
        return set()
    limit = state.experiment.resources.pixel_disk_gb
    key = f"resources.pixel_disk_gb{f': auto ({FREE_DISK_SHARE:g} of what is free)' if limit == 'auto' else ''}"
    sizes = f"a cache takes {num_bytes / 1e9:,.3f} GB, {key} allows {allowed / 1e9:,.3f} GB"
    state.progress.say(f"pixels are decoded anew in every epoch: {sizes}")
    return set(needed)


def _disk_budget(state: SweepState, folders: Sequence[Path]) -> float:
    """Returns how many bytes the pixel caches in these folders may take."""
    limit = state.experiment.resources.pixel_disk_gb
    if limit != "auto":
        return limit * 1e9
    # An interrupted pass left files, which the new pass replaces.
    replaced = sum(map(num_leftover_bytes, folders))
    return FREE_DISK_SHARE * (shutil.disk_usage(state.paths.caches).free + replaced)


def _make_caches(
    state: SweepState, missing: Mapping[Path, StudyConfig], streamed: Collection[Path]
) -> dict[Path, Cache]:
    present = state.resources
    requests: list[FeatureRequest | PixelRequest] = []
    for folder, config in missing.items():
        encoder = state.encoder(config)
        if config.reads_features:
            requests.append(FeatureRequest(folder, encoder.spec, encoder.put(), precision_of(state, config)))
        else:
            requests.append(PixelRequest(folder, encoder.spec.preprocessing, folder in streamed))
    _check_space(state, requests)
    encoded = [config for config in missing.values() if config.reads_features]
    names = ", ".join(config.encoder_name for config in encoded)
    label = f"encoder pass ({names})" if encoded else "decoding"
    stage = state.progress.stage(label, len(state.index.table))
    num_gpus = present.num_gpus if uses_gpu(state.experiment.resources, present) else 0
    processes = PassProcesses() if num_gpus else _processes(state, encoded, requests)
    caches = build_caches(
        requests,
        state.index,
        num_gpus=num_gpus,
        processes=processes,
        on_progress=lambda done, _total: stage.update(done),
        say=state.progress.say,
    )
    stage.finish()
    seconds = sum(cache.seconds for cache in caches if cache.made_now)
    if seconds:  # 0 if another sweep made all of them in the meantime
        num_images = len(state.index.table)
        speed = f"{seconds:.1f} s ({num_images / seconds:.0f} images/s)"
        # Of the processes that encode on CPUs: what a user may want to change if memory is short.
        on_cpus = f"; {processes} of {max(cache.peak_memory_bytes for cache in caches) / 1e9:.1f} GB"
        state.progress.say(f"{label}: {num_images:,} images in {speed}{on_cpus if encoded and not num_gpus else ''}")
    made = dict(zip(missing, caches, strict=True))
    state.num_encoder_passes += sum(
        made[folder].made_now for folder, config in missing.items() if config.reads_features
    )
    return made


def _processes(
    state: SweepState, encoded: Sequence[StudyConfig], requests: Sequence[FeatureRequest | PixelRequest]
) -> PassProcesses:
    """Returns the processes that encode on CPUs: on one machine with many of them, the fastest by measurement."""
    nodes = [(num_cpus, memory) for num_cpus, memory in cpus_and_memory_by_node() if num_cpus]
    cpus, memory = [num_cpus for num_cpus, _ in nodes], [free for _, free in nodes]
    on_cluster = joins_cluster()
    if not on_cluster:
        cpus = [local_resources().num_cpus]  # Ray has more than there are on a machine with one
    num_bytes = bytes_of_process([state.encoder(config).model for config in encoded])
    fitting = choose_processes(cpus, memory, num_bytes, on_cluster)
    if on_cluster:
        return fitting
    features = [request for request in requests if isinstance(request, FeatureRequest)]
    return fastest_processes(features, fitting, cpus[0], len(state.index.table), state.progress.say)


def precision_of(state: SweepState, config: RowConfig) -> str:
    """Returns the precision of a study, `fp32` or `bf16`: as configured; for `auto`, bf16 where it is faster.

    A GPU that supports bf16 is always faster with it. On a CPU the encoder pass is timed in both, unless features in
    one of them are cached. The choice is kept with the sweep, because its studies depend on it. Fine-tuning on a CPU
    uses the precision of this sweep's features; without them, and from scratch, training on a CPU uses fp32.
    """
    wanted = state.experiment.train.precision
    if wanted != "auto":
        return wanted
    on_gpu = uses_gpu(state.experiment.resources, state.present)
    if not config.reads_features and on_gpu:
        return _gpu_precision(state)
    encoder = state.encoder(config)
    if not config.reads_features:
        starts_from_head = isinstance(config, StudyConfig) and config.mode.starts_from == "best_head"
        return (starts_from_head and encoder.precision) or "fp32"
    if not encoder.precision:
        key = _feature_folder(state, encoder, "auto").name
        kept = read_json(state.paths.precisions) if state.paths.precisions.exists() else {}
        if key not in kept:
            kept[key] = _choose_precision(state, encoder, on_gpu)
            write_json(state.paths.precisions, kept)
        encoder.precision = str(kept[key])
    return encoder.precision


def _choose_precision(state: SweepState, encoder: LazyEncoder, on_gpu: bool) -> str:
    if found := _precision_of_cache(state, encoder):
        return found
    return _gpu_precision(state) if on_gpu else faster_precision(encoder.model, torch.device("cpu"), TIMED_IMAGES)


def _precision_of_cache(state: SweepState, encoder: LazyEncoder) -> str:
    for precision in ("bf16", "fp32"):
        if open_cache(_feature_folder(state, encoder, precision)):
            return precision
    return ""


def _gpu_precision(state: SweepState) -> str:
    if state.gpu_precision is None:
        state.gpu_precision = "bf16" if _gpus_support_bf16(state) else "fp32"
    return state.gpu_precision


def _gpus_support_bf16(state: SweepState) -> bool:
    cuda = torch.device("cuda")
    if torch.cuda.is_available():
        return supports_bf16(cuda)
    import ray  # this process has no GPU: a process on a node with a GPU checks

    check = ray.remote(supports_bf16).options(num_gpus=min(1, state.experiment.resources.gpus_per_worker))
    return bool(ray.get(check.remote(cuda)))
