from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from jobs import SMALL_CNN, make_job

from raysweep.encoders.build import build_encoder
from raysweep.encoders.head import Head
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import TrialError
from raysweep.images.cache_files import write_rows
from raysweep.images.disk_rows import DiskRows
from raysweep.images.features import feature_table
from raysweep.images.pass_tasks import IndexReference
from raysweep.images.pixels import PixelFiles, write_pixels
from raysweep.images.rows import Draws, SplitRows
from raysweep.images.streaming import StreamedPixels
from raysweep.training.checkpoint import save_checkpoint
from raysweep.training.pixel_rows import ResidentPixels
from raysweep.worker import inputs as loading
from raysweep.worker.inputs import (
    build_classifier,
    feature_set,
    fits_on_device,
    load_heads,
    pixel_set,
    save_heads,
    subsets_of,
)
from raysweep.worker.job import StudySpec

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 4, 5, 3), np.uint8)
ROWS = {
    "train": SplitRows(np.arange(299, 9, -1), np.arange(290) % 7),
    "validation": SplitRows(np.arange(10), np.arange(10) % 7),
}
PREPROCESSING = Preprocessing("exact", (4, 5), None, 3, rescale_factor=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {})
    write_pixels(str(tmp_path), np.arange(200), PIXELS[:200])
    write_pixels(str(tmp_path), np.arange(200, 300), PIXELS[200:])
    encoder = replace(build_encoder(SMALL_CNN, seed=0).spec, preprocessing=PREPROCESSING)
    return make_job("from_scratch", cache=str(tmp_path), data_key="study", rows=ROWS, encoder=encoder)


def read_all(found):
    return torch.cat(list(found.pixels.read(torch.arange(len(found.labels)).split(64))))


@pytest.mark.parametrize(
    ("num_bytes", "gpus_per_worker", "expected"),
    [
        (30, 1, True),
        (31, 1, False),
        (31, 2, False),
        (15, 0.5, True),
        (16, 0.5, False),
        (0, 0.25, True),
    ],
)
def test_pixels_leave_most_of_a_workers_share_of_the_gpu_to_training(num_bytes, gpus_per_worker, expected):
    assert fits_on_device(num_bytes, 100, gpus_per_worker) is expected


def test_on_a_cpu_pixels_are_read_from_the_cache(job):
    found = pixel_set(job, "train", torch.device("cpu"))
    assert isinstance(found.pixels, PixelFiles)
    assert torch.equal(read_all(found), torch.from_numpy(PIXELS[ROWS["train"].ids]))
    assert found.labels.tolist() == ROWS["train"].labels.tolist()


class Gpu:
    """Stands for a GPU: tensors "on" it lie in host memory."""

    type = "cuda"


@pytest.mark.parametrize(("total_memory", "kind"), [(60_000, ResidentPixels), (59_999, PixelFiles)])
def test_on_a_gpu_pixels_are_loaded_where_all_splits_together_fit(job, monkeypatch, total_memory, kind):
    monkeypatch.setattr(loading, "total_memory_of", lambda _device: total_memory)  # 300 images of 60 bytes
    empty = torch.empty

    def on_host(shape, dtype, device=None):
        return empty(shape, dtype=dtype)

    monkeypatch.setattr(torch, "empty", on_host)
    found = pixel_set(job, "train", Gpu())
    assert isinstance(found.pixels, kind)
    assert torch.equal(read_all(found), torch.from_numpy(PIXELS[ROWS["train"].ids]))


def test_later_trials_of_a_study_find_what_the_first_has_opened(job):
    device = torch.device("cpu")
    first = {split: pixel_set(job, split, device).pixels for split in ROWS}
    assert all(pixel_set(job, split, device).pixels is pixels for split, pixels in first.items())
    assert pixel_set(replace(job, data_key="another"), "train", device).pixels is not first["train"]
    assert pixel_set(job, "train", device).pixels is not first["train"], "only one study's are kept"


def test_without_a_cache_pixels_are_streamed(job):
    index = IndexReference("reference", None)
    found = pixel_set(replace(job, index=index, cache="nothing"), "validation", torch.device("cpu")).pixels
    assert isinstance(found, StreamedPixels)
    assert found.index is index
    assert found.geometry.shape == (4, 5, 3)
    assert found.row_ids is ROWS["validation"].ids


# Features


FEATURES = np.random.default_rng(0).normal(size=(36, 4)).astype(np.float16)
CPU = torch.device("cpu")


@pytest.fixture
def probe_job(tmp_path, monkeypatch):
    """Reads features: 36 rows of 4 half floats, 12 rows and 96 bytes a split."""
    monkeypatch.setattr(loading, "_loaded", {})
    write_rows(str(tmp_path), feature_table(np.arange(20), {"pooled": FEATURES[:20]}))
    write_rows(str(tmp_path), feature_table(np.arange(20, 36), {"pooled": FEATURES[20:]}))
    return make_job(cache=str(tmp_path))


def test_features_are_those_of_the_splits_rows(probe_job):
    for split, rows in probe_job.rows.items():
        found = feature_set(probe_job, split, CPU)
        assert torch.equal(found.source(("pooled",), torch.arange(12)), torch.from_numpy(FEATURES[rows.ids]).float())
        assert found.labels.tolist() == rows.labels.tolist()
        assert feature_set(probe_job, split, CPU).parts["pooled"] is found.parts["pooled"], "they are loaded once"


def test_features_know_which_rows_belong_together(probe_job):
    assert feature_set(probe_job, "train", CPU).groups is None
    rows = {split: replace(some, groups=some.ids.astype(np.int32) // 3) for split, some in probe_job.rows.items()}
    found = feature_set(replace(probe_job, rows=rows), "train", CPU)
    assert found.groups.tolist() == rows["train"].groups.tolist()


@pytest.mark.parametrize(("num_bytes", "kind"), [(288, torch.Tensor), (287, DiskRows)])
def test_all_splits_share_the_memory_for_features(probe_job, num_bytes, kind):
    resources = probe_job.resources.model_copy(update={"feature_memory_gb": num_bytes / 1e9})
    part = feature_set(replace(probe_job, resources=resources), "test", CPU).parts["pooled"]
    assert isinstance(part, kind)
    assert torch.equal(part[torch.arange(12)], torch.from_numpy(FEATURES[24:]))


def test_a_studys_draws_become_subsets():
    assert subsets_of(StudySpec("study", "folder", None), CPU) is None
    draws = Draws(np.array([[0, 3], [1, 2]]), np.array([[4], [5]]))
    found = subsets_of(StudySpec("study", "folder", draws), CPU)
    assert (found.train.tolist(), found.validation.tolist()) == ([[0, 3], [1, 2]], [[4], [5]])


# Heads and the model


def make_head(number, num_features=4):
    head = Head(num_features, 3, "standardize")
    generator = torch.Generator().manual_seed(number)
    for tensor in head.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=generator))
    return head


def assert_same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_heads_are_read_as_they_were_written(tmp_path):
    heads = [make_head(number) for number in range(3)]
    save_heads(tmp_path / "best.safetensors", heads, "pooled", {"trial": 7})
    found, source = load_heads(tmp_path / "best.safetensors")
    assert (len(found), source) == (3, "pooled")
    for one, other in zip(found, heads, strict=True):
        assert one.spec() == other.spec()
        assert_same_weights(one, other)


def test_a_checkpoint_of_another_kind_has_no_heads(tmp_path):
    save_checkpoint(tmp_path / "best.safetensors", make_head(0).state_dict(), {"epoch": 3})
    with pytest.raises(TrialError, match=r"best\.safetensors: not the checkpoint of a linear probe"):
        load_heads(tmp_path / "best.safetensors")


@pytest.mark.parametrize("has_probe", [True, False])
def test_the_model_is_the_encoder_with_a_probes_first_head_or_a_new_one(tmp_path, monkeypatch, has_probe):
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    encoder, heads = build_encoder(SMALL_CNN, seed=5), [make_head(0), make_head(1)]
    save_heads(tmp_path / "best.safetensors", heads, "pooled", {})
    weights = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    head = str(tmp_path / "best.safetensors") if has_probe else None
    model = build_classifier(make_job("fine_tune", encoder=encoder.spec, weights=weights, head=head))
    assert_same_weights(model.encoder, encoder)
    assert_same_weights(model.head, heads[0] if has_probe else Head(4, 3))
    assert model.source == "pooled"
