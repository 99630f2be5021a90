import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from raysweep.sweep.state import SweepContext, draw_subsets, select_rows, write_quarantine
from raysweep.encoders.preprocess import Preprocessing
from raysweep.errors import DataError
from raysweep.experiment.config import Experiment
from raysweep.images.sources import BadRow, ImageIndex
from raysweep.images.splits import few_shot
from raysweep.paths import SweepPaths, write_json


def index_of(num_per_class: int = 40, num_classes: int = 3) -> ImageIndex:
    """Row ids start at 100; of each class's rows half are train, a quarter validation, a quarter test."""
    labels = np.repeat(np.arange(num_classes, dtype=np.int32), num_per_class)
    quarter = num_per_class // 4
    splits = (["train"] * 2 * quarter + ["validation"] * quarter + ["test"] * quarter) * num_classes
    table = pa.table({"row_id": np.arange(100, 100 + len(labels)), "label": labels, "split": splits})
    return ImageIndex(table, tuple("abc"[:num_classes]), (), (), len(labels), "fingerprint")


def by_split(rows):
    return {split: set(ids.tolist()) for split, (ids, _) in rows.items()}


def test_every_usable_row_goes_to_its_split():
    rows = select_rows(index_of(), [BadRow(100, "a.jpg", "truncated")])
    assert {split: len(labels) for split, (_, labels) in rows.items()} == {"train": 59, "validation": 30, "test": 30}
    assert 100 not in by_split(rows)["train"]


def test_a_split_that_lost_all_its_rows_is_named():
    index = index_of()
    test = index.table.filter(pc.equal(index.table["split"], "test"))["row_id"].to_pylist()
    with pytest.raises(DataError, match=r"no test images left of 30: see quarantine\.csv"):
        select_rows(index, [BadRow(row_id, "x.jpg", "truncated") for row_id in test])


# Few-shot draws


def test_all_images_need_no_draw():
    assert draw_subsets(select_rows(index_of(), []), "all", 5, 1) is None


def test_each_draw_takes_shots_per_class_and_caps_validation():
    rows = select_rows(index_of(160), [])
    subsets = draw_subsets(rows, 5, 3, 1)
    assert subsets.keys() == {"train", "validation"}, "the test split stays whole"
    assert {split: (places.shape, places.dtype) for split, places in subsets.items()} == {
        "train": ((3, 15), np.int64),
        "validation": ((3, 48), np.int64),
    }
    for split, expected in (("train", 5), ("validation", 16)):
        for places in subsets[split]:
            assert len(set(places.tolist())) == len(places)
            assert np.bincount(rows[split][1][places]).tolist() == [expected] * 3


def test_a_class_with_fewer_images_gives_all_in_every_draw():
    rows = select_rows(index_of(), [BadRow(row_id, "x.jpg", "truncated") for row_id in range(100, 117)])
    subsets = draw_subsets(rows, 5, 4, 1)
    assert [np.bincount(rows["train"][1][places]).tolist() for places in subsets["train"]] == [[3, 5, 5]] * 4


def test_draws_are_nested_over_shots_and_differ_from_each_other():
    rows = select_rows(index_of(), [])
    one, five, ten = (draw_subsets(rows, shots, 4, 1)["train"] for shots in (1, 5, 10))
    for draw in range(4):
        assert set(one[draw]) < set(five[draw]) < set(ten[draw])
    assert len({tuple(places) for places in five}) == 4


def test_the_first_draw_is_that_of_the_seed_alone():
    rows = select_rows(index_of(), [])
    many, single, other = (draw_subsets(rows, 5, draws, seed) for draws, seed in ((3, 7), (1, 7), (1, 8)))
    for split, limit in (("train", 5), ("validation", 16)):
        expected = few_shot(rows[split][1], limit, 7)
        assert many[split][0].tolist() == single[split][0].tolist() == expected.tolist()
    assert other["train"].tolist() != single["train"].tolist()


# The quarantine


def test_a_few_more_bad_rows_than_allowed_stop_the_sweep(tmp_path):
    experiment = Experiment.model_validate(
        {"name": "x", "data": {"source": "s", "max_bad_fraction": 0.02}, "encoders": ({"type": "stacked_cnn"},)},
        strict=False,
    )
    paths = SweepPaths(str(tmp_path), "x")
    context = SweepContext(experiment, paths, index_of(), None, None, None)
    context.set_aside([BadRow(100, "a.jpg", "truncated"), BadRow(101, "b.jpg", "empty file")])
    with pytest.raises(DataError, match=r"3 of 120 images \(2.5%\).*max_bad_fraction.*2.0%.*truncated"):
        context.set_aside([BadRow(102, "c.jpg", "empty file")])
    with paths.quarantine.open() as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_an_empty_quarantine_has_its_header(tmp_path):
    write_quarantine(tmp_path / "quarantine.csv", [])
    assert (tmp_path / "quarantine.csv").read_text() == "row_id,source,reason\n"


# Room for pixels


CACHE_BYTES = 120 * 10 * 10 * 3  # of one geometry, for the images of `index_of`


@pytest.fixture
def pixel_sweep(tmp_path, monkeypatch):
    """A function that tells which pixel caches are not made, and what was said; b crops from larger images than a."""
    preprocessing = {"a": Preprocessing("exact", (10, 10), None, 3, (0,) * 3, (1,) * 3)}
    preprocessing["b"] = preprocessing["a"].with_image_size(20)
    said = []

    def streamed(limit, free=10**9, configs=("a", "b")):
        experiment = Experiment.model_validate(
            {"name": "x", "data": {"source": "s"}, "encoders": ({"type": "stacked_cnn"},),
             "resources": {"pixel_disk_gb": limit}},
        )  # fmt: skip
        monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
        context = SweepContext(
            experiment, SweepPaths(str(tmp_path), "x"), index_of(), None, SimpleNamespace(say=said.append), None
        )
        modes = {"a": "fine_tune", "b": "from_scratch", "features": "linear_probe"}
        context.encoder = lambda config: SimpleNamespace(
            description=SimpleNamespace(preprocessing=preprocessing[config.encoder])
        )
        wanted = {tmp_path / name: SimpleNamespace(encoder=name, mode=modes[name]) for name in (*configs, "features")}
        found = context._streamed(wanted)
        return sorted(folder.name for folder in found)

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
