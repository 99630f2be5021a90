from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from raysweep.cluster.resources import Resources, local_resources
from raysweep.encoders.build import build_encoder
from raysweep.errors import DataError, ResourceError
from raysweep.experiment.config import Experiment
from raysweep.experiment.modes import MODES
from raysweep.experiment.sections import DataConfig
from raysweep.images.index import load_index
from raysweep.images.pass_tasks import IndexReference
from raysweep.sweep import estimate
from raysweep.sweep.estimate import SampleJob, Speeds, estimate_lines, time_study
from raysweep.sweep.plan import cluster_lines, plan_lines

TINY = {"type": "dinov2", "use_pretrained": False, "image_size": 32,
        "config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}}  # fmt: skip
SPEEDS = Speeds(decode=0.001, encode=0.1, train=0.2, head_epoch=0.01)


@pytest.fixture(scope="module")
def index():
    return load_index(DataConfig(source="sklearn://digits"), 0)


def experiment(**keys):
    space = {"epochs": {"choices": [10]}}
    return Experiment.model_validate(
        {"name": "x", "data": {"source": "sklearn://digits"}, "encoders": [TINY],
         "modes": ["linear_probe", "fine_tune"],
         "search": {"linear_probe": {"num_trials": 20, "space": space}, "fine_tune": {"num_trials": 4, "space": space}},
         **keys}, strict=False,
    )  # fmt: skip


@pytest.fixture
def lines(monkeypatch, index):
    monkeypatch.setattr(estimate, "_speeds", lambda *_: SPEEDS)
    monkeypatch.setattr(estimate, "_has_free_device", lambda _on_gpu: True)

    def estimated(present, **keys):
        return estimate_lines(experiment(**keys), index, present)

    return estimated


def test_a_plan_takes_what_its_images_epochs_and_trials_take(lines):
    _, probe, fine_tune, total = lines(Resources(2, 0))
    # 1,797 images at 10 images/s on one node, and 20 trials of 10 epochs of 10 ms, after the pass's start
    assert "pass at 10 images/s, then 20 trials of 10 epochs: about 3 min 10 s" in probe
    # two at a time: 2 rounds of 10 epochs of 1,259 + 179 / 3 images at 5 images/s, and their decoding
    assert "dinov2-fine_tune: 4 trials of 10 epochs: about 1 h 28 min" in fine_tune
    assert total.startswith("  all: about 1 h 31 min")


def test_nodes_share_the_work(lines):
    one, four = (lines(Resources(2 * n, 0, ((2, 0),) * n)) for n in (1, 4))
    assert "pass at 10 images/s" in one[1]
    assert "pass at 40 images/s" in four[1]
    assert "about 43 min" in four[2], "all four trials at once"


def test_gpus_decode_and_encode_at_once(lines, monkeypatch):
    monkeypatch.setattr(estimate, "_speeds", lambda *_: replace(SPEEDS, decode=0.4))
    slow_decoding = lines(Resources(8, 2, ((0, 0), (8, 2))))
    assert "pass at 20 images/s" in slow_decoding[1], "two GPUs at 10 images/s; 8 CPUs decode 20"
    assert "pass at 10 images/s" in lines(Resources(4, 2, ((4, 2),)))[1]


@pytest.mark.parametrize(("num_gpus", "what"), [(0, "CPU"), (1, "GPU")])
def test_a_busy_cluster_keeps_nobody_waiting(index, monkeypatch, num_gpus, what):
    ready, held, cancelled = [], [], []
    task = SimpleNamespace(options=lambda **options: held.append(options) or SimpleNamespace(remote=lambda: "look"))
    monkeypatch.setattr("ray.remote", lambda function: task)
    monkeypatch.setattr("ray.wait", lambda looks, timeout: (ready, looks))
    monkeypatch.setattr("ray.cancel", cancelled.append)
    assert estimate_lines(experiment(), index, Resources(8, num_gpus)) == [
        f"time there: no estimate, since no {what} of the cluster is free"
    ]
    assert (held, cancelled) == ([{f"num_{what.lower()}s": 1}], ["look"])
    ready.append("look")
    assert estimate._has_free_device(bool(num_gpus))
    assert cancelled == ["look"]


def test_a_time_budget_is_a_limit(lines):
    found = lines(Resources(2, 0), search={"fine_tune": {"time_budget_s": 60, "num_trials": 4}})
    assert "dinov2-fine_tune" in found[2]
    assert found[2].endswith("about 1 min 00 s")


def sample_job(rows, mode, monkeypatch):
    """The job of one node, with what Ray would find for its references."""
    monkeypatch.setattr("ray.get", lambda value: value)
    monkeypatch.setattr(estimate, "MAX_ROWS", 200)
    encoder = build_encoder(experiment().encoders[0].model_dump(), 0)
    return SampleJob(
        mode=MODES[mode],
        encoder=encoder.spec,
        weights={name: tensor.numpy() for name, tensor in encoder.state_dict().items()},
        index=IndexReference(rows.select(["row_id", "path", "position", "image", "content_hash"]), None),
        num_classes=10,
        num_train=400,
        num_heads=4,
        batch_size=64,
        num_threads=local_resources().num_cpus,
        on_gpu=False,
    )


@pytest.mark.parametrize(("mode", "parts"), [("linear_probe", {"decode", "encode", "head_epoch"}),
                                             ("fine_tune", {"decode", "train"})])  # fmt: skip
def test_a_sample_is_worked_on_for_real(index, mode, parts, monkeypatch):
    speeds = asdict(time_study(sample_job(index.table, mode, monkeypatch)))
    assert {part for part, seconds in speeds.items() if seconds != 0} == parts
    assert all(0 < speeds[part] < 10 for part in parts)


def test_images_that_cannot_be_decoded_are_said(monkeypatch):
    rows = pa.table({"row_id": [0, 1], "path": ["a", "b"], "position": [-1, -1], "content_hash": ["0", "1"],
                     "image": pa.array([b"no", b"image"], pa.large_binary())})  # fmt: skip
    with pytest.raises(DataError, match="none of 2 images can be decoded, such as a"):
        time_study(sample_job(rows, "linear_probe", monkeypatch))


def test_the_sample_is_from_all_over():
    rows = estimate._sample(pa.table({"row_id": np.arange(1000)}))["row_id"].to_pylist()
    assert (len(rows), rows[0], rows[-1]) == (16, 0, 999)
    assert estimate._sample(pa.table({"row_id": [7]}))["row_id"].to_pylist() == [7]


def test_a_plan_for_nodes_that_are_still_to_come(index):
    head = Resources(0, 0, ((0, 0),))
    with pytest.raises(ResourceError, match="one training run needs 1 CPUs"):
        plan_lines(experiment(), index, head)
    last = plan_lines(experiment(resources={"wait_for_nodes_s": 900.0}), index, head, may_grow=True)[-1]
    assert last.startswith("  not there yet, and waited for, at most 900 s: resources: one training run needs 1 CPUs")


def test_nodes_that_are_alike_are_counted_together():
    present = Resources(12, 2, ((0, 0), (4, 1), (4, 1), (4, 0)))
    assert cluster_lines(present) == [
        "cluster: 4 nodes, 12 CPUs, 2 GPUs",
        "  2 with 4 CPUs and 1 GPUs",
        "  1 with 4 CPUs and 0 GPUs",
        "  1 with 0 CPUs and 0 GPUs",
    ]
