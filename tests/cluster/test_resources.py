import glob
import os
import subprocess
import sys

import pytest

from raysweep.cluster.resources import (
    Resources,
    check_resources,
    local_resources,
    num_concurrent_trials,
    uses_gpu,
)
from raysweep.errors import ResourceError
from raysweep.experiment.config import ResourcesConfig


def resources(**keys):
    return ResourcesConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("use_gpu", "num_gpus", "expected"), [("auto", 0, False), ("auto", 2, True), (False, 2, False), (True, 0, True)]
)
def test_auto_uses_what_gpus_there_are(use_gpu, num_gpus, expected):
    assert uses_gpu(resources(use_gpu=use_gpu), Resources(4, num_gpus)) is expected


@pytest.mark.parametrize(
    ("keys", "present"),
    [
        ({}, Resources(1, 0)),
        ({"num_workers": 4}, Resources(4, 4)),
        ({"cpus_per_worker": 4}, Resources(4, 1)),
        ({"gpus_per_worker": 0.5}, Resources(1, 1)),
        ({"use_gpu": False, "num_workers": 2, "gpus_per_worker": 0.5}, Resources(2, 1)),
    ],
)
def test_what_just_fits_is_accepted(keys, present):
    check_resources(resources(**keys), present)
    with pytest.raises(ResourceError, match=f"there are {present.num_cpus - 1}"):
        check_resources(resources(**keys), Resources(present.num_cpus - 1, present.num_gpus))


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"num_workers": 3, "cpus_per_worker": 2}, r"6 CPUs \(3 workers x 2 CPUs\), there are 4;"),
        ({"use_gpu": True}, r"1 GPUs \(1 workers x 1 GPUs\), there are 0;"),
        ({"use_gpu": True, "cpus_per_worker": 5, "gpus_per_worker": 0.5}, r"5 CPUs .* and 0\.5 GPUs .*there are 0;"),
    ],
)
def test_what_can_never_be_scheduled_is_refused(keys, found):
    with pytest.raises(ResourceError, match=found) as error:
        check_resources(resources(**keys), Resources(4, 0))
    assert "lower resources.num_workers" in str(error.value)


@pytest.mark.parametrize(
    ("keys", "present", "expected"),
    [
        ({}, Resources(4, 0), 4),
        ({"cpus_per_worker": 3}, Resources(4, 0), 1),
        ({"num_workers": 2}, Resources(5, 0), 2),
        ({}, Resources(16, 2), 2),
        ({"gpus_per_worker": 0.2}, Resources(16, 1), 5),
        ({"gpus_per_worker": 0.3}, Resources(16, 1), 3),
        ({"gpus_per_worker": 0.1, "use_gpu": False}, Resources(3, 1), 3),
        ({"max_concurrent_trials": 2}, Resources(4, 0), 2),
        ({"max_concurrent_trials": 9}, Resources(4, 0), 4),
        ({"cpus_per_worker": 8}, Resources(4, 0), 1),
    ],
)
def test_training_runs_side_by_side(keys, present, expected):
    assert num_concurrent_trials(resources(**keys), present) == expected


TWO_NODES = Resources(8, 4, ((4, 2), (4, 2)))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"use_gpu": False, "cpus_per_worker": 3}, 2),  # 8 // 3, but the rest of one node is of no use to the other
        ({"use_gpu": False, "cpus_per_worker": 3, "num_workers": 2}, 1),
        ({"gpus_per_worker": 0.4}, 8),  # two on each GPU
        ({"gpus_per_worker": 0.6}, 4),
        ({"gpus_per_worker": 1.0, "num_workers": 3}, 1),
    ],
)
def test_each_worker_lies_on_one_node_and_each_share_on_one_gpu(keys, expected):
    check_resources(resources(**keys), TWO_NODES)
    assert num_concurrent_trials(resources(**keys), TWO_NODES) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"cpus_per_worker": 6, "use_gpu": False},
            "1 workers, each whole on one node; 0 fit into 4 CPUs with 2 GPUs, 4",
        ),
        ({"gpus_per_worker": 0.5, "num_workers": 2}, "needs a whole GPU for each of its workers"),
    ],
)
def test_what_fits_on_no_node_is_refused_though_the_cluster_has_enough(keys, message):
    with pytest.raises(ResourceError, match=message):
        check_resources(resources(**keys), TWO_NODES)


@pytest.mark.parametrize(
    ("keys", "num_cpus", "expected"), [({}, 4, 3), ({}, 2, 1), ({"num_workers": 2}, 4, 1), ({"num_workers": 2}, 5, 2)]
)
def test_a_cpu_stays_free_where_one_is_reserved(keys, num_cpus, expected):
    check_resources(resources(**keys), Resources(num_cpus, 0), reserved_cpus=1)
    assert num_concurrent_trials(resources(**keys), Resources(num_cpus, 0), reserved_cpus=1) == expected


def test_training_on_every_cpu_leaves_none_for_decoding():
    config = resources(num_workers=2, cpus_per_worker=2)
    check_resources(config, Resources(4, 0))
    found = r"5 CPUs \(2 workers x 2 CPUs and 1 for decoding\), there are 4; .*or raise pixel_disk_gb"
    with pytest.raises(ResourceError, match=found):
        check_resources(config, Resources(4, 0), reserved_cpus=1)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, 3), ("0,2", 2), ("", 0), ("-1", 0), ("GPU-1a, GPU-2b", 2), ("0,1,2,3,4", 3)]
)
def test_gpus_are_counted_as_cuda_would_see_them(monkeypatch, visible, expected):
    monkeypatch.setattr(glob, "glob", lambda pattern: [f"/dev/nvidia{number}" for number in range(3)])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert local_resources().num_gpus == expected


def test_cpus_are_those_this_process_may_use(monkeypatch):
    assert local_resources().num_cpus == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert local_resources().num_cpus == os.cpu_count()


def test_counting_resources_imports_neither_ray_nor_torch():
    code = "import sys; from raysweep.cluster.resources import local_resources; local_resources(); " \
           "sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
