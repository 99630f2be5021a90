import math
from pathlib import Path

import numpy as np
import pytest
from jobs import SMALL_CNN

from raysweep.cluster.session import ray_session
from raysweep.encoders.build import build_encoder
from raysweep.images import pass_timing as module
from raysweep.images.features import FeatureRequest
from raysweep.images.pass_processes import PassProcesses
from raysweep.images.pass_timing import fastest_processes, seconds_per_image

REQUESTS = [FeatureRequest(Path("features"), build_encoder(SMALL_CNN, seed=0).spec, None, "fp32")]


@pytest.fixture
def rates(monkeypatch):
    """Images/s of a node by threads of a process; what was measured, in order."""
    found, measured = {1: 100.0, 2: 130.0, 4: 160.0, 8: 161.0}, []

    def seconds(_requests, shape):
        measured.append((shape.num_processes, shape.num_threads))
        return 1 / found[shape.num_threads]

    monkeypatch.setattr(module, "seconds_per_image", seconds)
    return found, measured


def choose(num_cpus=64, num_images=100_000, first=None, requests=REQUESTS):
    said = []
    first = first or PassProcesses(num_cpus, 1)
    chosen = fastest_processes(requests, first, num_cpus, num_images, said.append)
    return (chosen.num_processes, chosen.num_threads), said


def test_the_fastest_shape_is_measured_on_many_cpus(rates):
    chosen, said = choose()
    assert (chosen, rates[1]) == ((16, 4), [(64, 1), (32, 2), (16, 4), (8, 8)])
    assert said == [
        "encoding, images/s: 64 processes x 1 thread 100, 32 processes x 2 threads 130, "
        "16 processes x 4 threads 160, 8 processes x 8 threads 161"
    ]


def test_one_thread_each_stays_unless_more_are_clearly_faster(rates):
    rates[0][2] = 105.0
    chosen, _ = choose()
    assert (chosen, rates[1]) == ((64, 1), [(64, 1), (32, 2)])


def test_memory_sets_the_least_number_of_threads(rates):
    rates[0][8] = 200.0
    chosen, _ = choose(first=PassProcesses(16, 4))
    assert (chosen, rates[1]) == ((8, 8), [(16, 4), (8, 8)])


@pytest.mark.parametrize("changes", [{"num_cpus": 4}, {"num_images": 6399}, {"requests": []}])
def test_nothing_is_measured_for_few_cpus_images_or_encoders(rates, changes):
    chosen, said = choose(**changes)
    assert (chosen, said, rates[1]) == ((changes.get("num_cpus", 64), 1), [], [])


def test_a_short_pass_does_not_repay_more_measurements(rates):
    rates[0][1] = 120.0
    chosen, said = choose(num_images=7_199)
    assert (chosen, said, rates[1]) == ((64, 1), [], [(64, 1)])
    assert len(choose(num_images=7_201)[1]) == 1


@pytest.mark.ray
def test_processes_encode_at_the_same_time(monkeypatch):
    import ray

    monkeypatch.setattr(module, "SECONDS", 0.2)
    encoder = build_encoder(SMALL_CNN, seed=0)
    with ray_session(verbose=False):
        weights = ray.put({name: np.asarray(tensor) for name, tensor in encoder.state_dict().items()})
        requests = [FeatureRequest(Path(name), encoder.spec, weights, "fp32") for name in "ab"]
        assert 0 < seconds_per_image(requests[:1], PassProcesses(2, 1)) < math.inf
        assert 0 < seconds_per_image(requests, PassProcesses(1, 2)) < math.inf
