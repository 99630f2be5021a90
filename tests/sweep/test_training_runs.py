import pytest
import torch
from jobs import SMALL_CNN

from benchmarks.sweeps import TINY_DINOV2
from raysweep.cluster.resources import Resources
from raysweep.encoders.build import build_encoder
from raysweep.experiment.sections import ResourcesConfig
from raysweep.sweep.training_runs import bytes_of_trial, choose_runs, trained_activation_bytes


@pytest.mark.parametrize(
    ("nodes", "memory", "num_wanted", "resources", "expected"),
    [
        ((8,), [80], 8, {}, (8, 8, 1)),
        ((8,), [80], 3, {}, (8, 3, 2)),
        ((8,), [80], 1, {}, (8, 1, 8)),
        ((8,), [40], 8, {}, (4, 4, 2)),
        ((8,), [39], 8, {}, (3, 3, 2)),
        ((8,), [1], 8, {}, (1, 1, 8)),
        ((8,), [], 8, {}, (8, 8, 1)),
        ((4, 4), [40, 40], 9, {}, (8, 8, 1)),
        ((4, 4), [20, 19], 9, {}, (3, 3, 2)),
        ((4, 4), [40, 40], 1, {}, (8, 1, 4)),
        ((4, 4), [640, 10], 8, {}, (5, 5, 1)),
        ((1, 16), [640, 40], 17, {}, (5, 5, 1)),
        ((2, 16), [640, 640], 1, {}, (18, 1, 2)),
        ((8,), [80], 8, {"num_workers": 2}, (4, 4, 1)),
        ((8,), [50], 8, {"num_workers": 2}, (2, 2, 2)),
        ((8,), [80], 8, {"max_concurrent_trials": 2}, (2, 2, 4)),
        ((8,), [80], 8, {"cpus_per_worker": 4}, (2, 2, 4)),
    ],
)
def test_a_run_takes_one_thread_unless_there_are_few_runs_or_memory_is_short(
    nodes, memory, num_wanted, resources, expected
):
    present = Resources(sum(nodes), 0, tuple((num_cpus, 0) for num_cpus in nodes))
    config = ResourcesConfig(**resources)
    pairs = list(zip(nodes, memory, strict=True)) if memory else []
    runs = choose_runs(config, present, pairs, 10, num_wanted)
    assert (runs.num_fitting, runs.num_expected, runs.num_threads) == expected
    limit = choose_runs(config, present, [], 10, num_wanted)
    assert runs.is_memory_short is (runs.num_fitting < limit.num_fitting)
    assert choose_runs(config, present, pairs, 10, num_wanted, 1).num_fitting <= runs.num_fitting


def test_a_trial_needs_memory_for_its_process_its_weights_and_the_activations_of_its_images():
    encoder = build_encoder(SMALL_CNN, seed=0)
    one, three = bytes_of_trial(encoder, 1), bytes_of_trial(encoder, 3)
    assert three - one == 2 * trained_activation_bytes(encoder)
    wide = build_encoder(SMALL_CNN | {"config": {"channels": [64, 64]}}, seed=0)
    num_weights = [sum(weight.numel() for weight in one.parameters()) for one in (encoder, wide)]
    growth = bytes_of_trial(wide, 0) - bytes_of_trial(encoder, 0)
    assert growth == 20 * (num_weights[1] - num_weights[0])


@pytest.mark.parametrize("block", [TINY_DINOV2, SMALL_CNN])
def test_the_activations_are_about_what_the_backward_pass_keeps(block):
    encoder = build_encoder(block, seed=0).train()
    images = torch.zeros(4, *encoder.preprocessing.output_size, 3, dtype=torch.uint8)
    weights = {weight.data_ptr() for weight in encoder.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = encoder(encoder.preprocessing.normalize(images))
    assert outputs
    assert 0.6 < 4 * trained_activation_bytes(encoder) / sum(kept.values()) < 2
