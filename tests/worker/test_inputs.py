import numpy as np
import pytest
import torch

from raysweep.worker import inputs as loading
from raysweep.images.pixels import PixelFiles, write_pixels
from raysweep.images.streaming import StreamedPixels
from raysweep.worker.inputs import fits_on_device, pixel_set
from raysweep.training.pixel_rows import ResidentPixels

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 4, 5, 3), np.uint8)
ROWS = {
    "train": (np.arange(299, 9, -1), np.arange(290) % 7),
    "validation": (np.arange(10), np.arange(10) % 7),
}
PREPROCESSING = {"resize": "exact", "resize_size": [4, 5], "crop_size": None, "resample": 3, "rescale_factor": 1.0,
                 "mean": [0, 0, 0], "std": [1, 1, 1]}  # fmt: skip


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_loaded", {})
    write_pixels(str(tmp_path), np.arange(200), PIXELS[:200])
    write_pixels(str(tmp_path), np.arange(200, 300), PIXELS[200:])
    return {"cache": str(tmp_path), "stream": None, "data_key": "study", "shape": [4, 5], "rows": ROWS,
            "gpus_per_worker": 1.0, "encoder": {"preprocessing": PREPROCESSING}}  # fmt: skip


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
    assert torch.equal(read_all(found), torch.from_numpy(PIXELS[ROWS["train"][0]]))
    assert found.labels.tolist() == ROWS["train"][1].tolist()


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
    assert torch.equal(read_all(found), torch.from_numpy(PIXELS[ROWS["train"][0]]))


def test_later_trials_of_a_study_find_what_the_first_has_opened(job):
    device = torch.device("cpu")
    first = {split: pixel_set(job, split, device).pixels for split in ROWS}
    assert all(pixel_set(job, split, device).pixels is pixels for split, pixels in first.items())
    assert pixel_set(job | {"data_key": "another"}, "train", device).pixels is not first["train"]
    assert pixel_set(job, "train", device).pixels is not first["train"], "only one study's are kept"


def test_without_a_cache_pixels_are_streamed(job):
    stream = {"rows": "reference", "image_column": None}
    found = pixel_set(job | {"stream": stream, "cache": "nothing"}, "validation", torch.device("cpu")).pixels
    assert isinstance(found, StreamedPixels)
    assert found.stream is stream
    assert found.geometry.shape == (4, 5, 3)
    assert found.row_ids is ROWS["validation"][0]
