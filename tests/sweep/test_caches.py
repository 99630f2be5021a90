"""Which caches the studies of a sweep train on, and in what precision; passes themselves are in tests/images."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from raysweep.cluster.resources import Resources
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError, ResourceError
from raysweep.experiment.config import Experiment
from raysweep.experiment.modes import MODES
from raysweep.experiment.studies import StudyConfig
from raysweep.images.features import FeatureRequest
from raysweep.images.index import BadRow, ImageIndex
from raysweep.storage.paths import SweepPaths, write_json
from raysweep.sweep import caches
from raysweep.sweep.caches import precision_of
from raysweep.sweep.state import SweepState

NUM_IMAGES = 120


def state_of(tmp_path, say=None, **keys):
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s"}, "encoders": ({"type": "stacked_cnn"},), **keys}
    )
    index = ImageIndex(pa.table({"row_id": np.arange(NUM_IMAGES)}), ("a", "b"), (), (), NUM_IMAGES, "fingerprint")
    progress = SimpleNamespace(say=say)
    return SweepState(experiment, SweepPaths(str(tmp_path), "x"), index, None, progress, None)


# Room for pixels


CACHE_BYTES = NUM_IMAGES * 10 * 10 * 3  # of one geometry


@pytest.fixture
def pixel_sweep(tmp_path, monkeypatch):
    """A function that tells which pixel caches are not made, and what was said; b crops from larger images than a."""
    preprocessing = {"a": Preprocessing("exact", (10, 10), None, 3, (0,) * 3, (1,) * 3)}
    preprocessing["b"] = preprocessing["a"].with_image_size(20)
    said = []

    def streamed(limit, free=10**9, configs=("a", "b")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
        state = state_of(tmp_path, said.append, resources={"pixel_disk_gb": limit})
        state.encoder = lambda config: SimpleNamespace(
            spec=SimpleNamespace(preprocessing=preprocessing[config.encoder_name])
        )
        modes = {"a": "fine_tune", "b": "from_scratch", "features": "linear_probe"}
        wanted = {
            tmp_path / name: StudyConfig(name, None, "all", MODES[modes[name]]) for name in (*configs, "features")
        }
        return sorted(folder.name for folder in caches._streamed(state, wanted))

    return SimpleNamespace(streamed=streamed, said=said, folder=tmp_path)


def test_pixels_are_cached_where_all_missing_caches_together_have_room(pixel_sweep):
    both = 5 * CACHE_BYTES / 1e9
    assert pixel_sweep.streamed(both) == []
    assert pixel_sweep.streamed("auto", free=both * 1e9 / 0.8) == []
    assert pixel_sweep.said == []
    assert pixel_sweep.streamed(both * 0.99) == ["a", "b"]
    assert pixel_sweep.streamed(0, configs=()) == []
    assert pixel_sweep.streamed("auto", free=both * 1e9) == ["a", "b"]
    assert "auto (0.8 of what is free) allows" in pixel_sweep.said[-1]
    assert pixel_sweep.said[0] == (
        "pixels are decoded anew in every epoch: a cache takes 0.000 GB, resources.pixel_disk_gb allows 0.000 GB"
    )


MANIFEST = {
    "num_rows": 1, "bad_rows": [], "seconds": 1.0, "peak_memory_bytes": 1, "peak_gpu_memory_bytes": 0, "rows": "a-pass",
}  # fmt: skip


def test_a_cache_that_is_there_needs_no_room(pixel_sweep):
    write_json(pixel_sweep.folder / "b" / "manifest.json", MANIFEST)
    assert pixel_sweep.streamed(CACHE_BYTES / 1e9) == []
    assert pixel_sweep.streamed(0) == ["a"]
    write_json(pixel_sweep.folder / "b" / "manifest.json", MANIFEST | {"streamed": True})
    assert pixel_sweep.streamed(CACHE_BYTES / 1e9) == ["a", "b"], "what was streamed before may be cached now"


def test_what_a_pass_that_was_cut_short_has_left_counts_as_free(pixel_sweep):
    (pixel_sweep.folder / "a" / "a-pass").mkdir(parents=True)
    (pixel_sweep.folder / "a" / "a-pass" / "rows-000000000100.arrow").write_bytes(bytes(CACHE_BYTES))
    assert pixel_sweep.streamed("auto", free=0.3 * CACHE_BYTES, configs=("a",)) == []
    assert pixel_sweep.streamed("auto", free=0.2 * CACHE_BYTES, configs=("a",)) == ["a"]


def features_of(tmp_path, num_features):
    spec = SimpleNamespace(parts={"cls": num_features})
    return FeatureRequest(tmp_path / "features", spec, None, "fp32")


def test_features_that_do_not_fit_on_the_disk_are_told_before_the_pass(tmp_path, monkeypatch):
    state = state_of(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=120_960))
    caches._check_space(state, [features_of(tmp_path, 500)])
    with pytest.raises(ResourceError, match=r"storage: the features take 0\.000 GB in .*\.cache, 0\.000 GB are free"):
        caches._check_space(state, [features_of(tmp_path, 501)])
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "rows-1.parquet").write_bytes(bytes(1_000))  # an interrupted pass left it
    caches._check_space(state, [features_of(tmp_path, 501)])


def test_images_of_one_colour_are_told_and_a_split_of_them_is_refused(tmp_path):
    said = []
    state = state_of(tmp_path, said.append)
    splits = ["train"] * 100 + ["validation"] * 15 + ["test"] * 5
    table = state.index.table.append_column("split", pa.array(splits))
    state.index = replace(state.index, table=table.append_column("path", pa.array([f"{n}.png" for n in range(120)])))
    caches._check_blank_images(state, set())
    assert said == []
    caches._check_blank_images(state, {3, 116, 117, 118, 119})
    assert said == ["warning: 5 of 120 images have one colour only, black for example (the first: 3.png)"]
    state.bad_rows = {115: BadRow(115, "115.png", "truncated")}
    with pytest.raises(DataError, match=r"each of the 4 usable test images has one colour only.*first: 3\.png"):
        caches._check_blank_images(state, {3, 116, 117, 118, 119})


# What is damaged is made again


def test_a_damaged_manifest_or_old_cache_is_told_and_made_again(tmp_path):
    said = []
    state = state_of(tmp_path, said.append)
    folder, probe = tmp_path / "features", StudyConfig("a", None, "all", MODES["linear_probe"])
    folder.mkdir()
    for content, told in {"{": "not readable as JSON", json.dumps(MANIFEST): "0 rows, 1 were written"}.items():
        (folder / "manifest.json").write_text(content)
        caches._check_manifest(state, folder, probe)
        assert said[-1].startswith("a: ")
        assert told in said[-1]
        assert said[-1].endswith("; this cache is made again")
        assert not (folder / "manifest.json").exists()
    caches._check_manifest(state, folder, probe)
    assert len(said) == 2


def test_damaged_files_are_told_with_their_number(tmp_path):
    said = []
    state = state_of(tmp_path, said.append)
    folder, probe = tmp_path / "features", StudyConfig("a", None, "all", MODES["linear_probe"])
    write_json(folder / "manifest.json", MANIFEST | {"files": {"rows-1.parquet": 1, "rows-2.parquet": 2}})
    (folder / "a-pass").mkdir()
    (folder / "a-pass" / "rows-1.parquet").write_bytes(b"\x00")
    assert not caches._is_whole(state, folder, probe, False)
    files = "2 of 2 files are damaged or missing (first: rows-1.parquet); only these are made again"
    assert said == [f"a: {folder / 'a-pass'}: {files}"]


# Precision


PROBE, FINE_TUNE = (StudyConfig("a", None, "all", MODES[mode]) for mode in ("linear_probe", "fine_tune"))


@pytest.fixture
def precisions(tmp_path, monkeypatch):
    """A state with one encoder, on a machine with so many GPUs; which precisions were measured, and GPUs asked."""
    found = SimpleNamespace(measured=[], asked=[], folder=tmp_path / ".cache")

    def state_with(num_gpus, precision="auto"):
        monkeypatch.setattr("raysweep.sweep.state.local_resources", lambda: Resources(4, num_gpus))
        state = state_of(tmp_path, train={"precision": precision})
        state.encoders["a"] = SimpleNamespace(spec="spec", weights="weights", model="model", precision="")
        return state

    monkeypatch.setattr(caches, "faster_precision", lambda *asked: found.measured.append(asked) or "bf16")
    monkeypatch.setattr(caches, "supports_bf16", lambda device: found.asked.append(device) or True)
    monkeypatch.setattr(caches, "feature_signature", lambda index, spec, weights, precision: precision)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found.state_with = state_with
    return found


@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_that_is_named_is_taken(precisions, num_gpus, precision):
    state = precisions.state_with(num_gpus, precision)
    assert [precision_of(state, config) for config in (PROBE, FINE_TUNE)] == [precision] * 2
    assert (precisions.measured, precisions.asked) == ([], [])


def test_on_cpus_the_encoder_pass_is_measured_once_and_training_without_features_stays_in_fp32(precisions):
    state = precisions.state_with(0)
    assert [precision_of(state, config) for config in (FINE_TUNE, PROBE, PROBE)] == ["fp32", "bf16", "bf16"]
    assert precisions.measured == [("model", torch.device("cpu"), caches.TIMED_IMAGES)]
    assert precisions.asked == []


def test_a_gpu_is_asked_once_for_all(precisions):
    state = precisions.state_with(1)
    assert [precision_of(state, config) for config in (FINE_TUNE, PROBE, FINE_TUNE)] == ["bf16"] * 3
    assert (precisions.measured, precisions.asked) == ([], [torch.device("cuda")])


@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_features_that_are_there_settle_the_precision(precisions, num_gpus, precision):
    state = precisions.state_with(num_gpus)
    write_json(state.paths.cache("features", precision) / "manifest.json", MANIFEST)
    assert precision_of(state, PROBE) == precision
    assert (precisions.measured, precisions.asked) == ([], [])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_on_cpus_takes_the_precision_of_the_features_and_training_from_scratch_does_not(
    precisions, precision
):
    state = precisions.state_with(0)
    write_json(state.paths.cache("features", precision) / "manifest.json", MANIFEST)
    assert precision_of(state, FINE_TUNE) == "fp32"  # the features may be of another experiment in this storage
    assert precision_of(state, PROBE) == precision
    assert precision_of(state, FINE_TUNE) == precision
    assert precision_of(state, replace(FINE_TUNE, mode=MODES["from_scratch"])) == "fp32"
    assert precisions.measured == []


def test_features_of_another_sweep_do_not_change_the_precision_of_this_one(precisions):
    state = precisions.state_with(0)
    write_json(state.paths.cache("features", "fp32") / "manifest.json", MANIFEST)
    assert precision_of(state, PROBE) == "fp32"
    write_json(state.paths.cache("features", "bf16") / "manifest.json", MANIFEST)
    again = precisions.state_with(0)
    assert [precision_of(again, config) for config in (PROBE, FINE_TUNE)] == ["fp32", "fp32"]
    other = replace(precisions.state_with(0), paths=SweepPaths(again.paths.storage, "other"))
    assert precision_of(other, PROBE) == "bf16"
