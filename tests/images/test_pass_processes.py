"""How many processes encode on CPUs, and what one of them needs."""

import pytest
import torch

from raysweep.encoders.build import build_encoder
from raysweep.images.pass_processes import (
    LAYERS_HELD,
    PROCESS_BYTES,
    PassProcesses,
    activation_bytes,
    bytes_of_process,
    choose_processes,
)

TINY = {
    "type": "dinov2",
    "use_pretrained": False,
    "image_size": 28,
    "config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}


@pytest.mark.parametrize(
    ("cpus", "memory", "expected"),
    [
        ([2], [16], (2, 1)),
        ([1], [16], (1, 1)),
        ([64], [1000], (64, 1)),
        ([64], [8], (8, 8)),  # 8 processes fit
        ([2], [1], (1, 2)),
        ([2], [0.1], (1, 2)),  # one always runs
        ([4, 2], [16, 16], (6, 1)),
        ([4, 2], [2, 16], (3, 2)),  # the first node has room for two of its four
        ([8, 2], [2, 16], (2, 4)),
        ([3], [2], (1, 2)),
    ],
)
def test_a_process_for_each_cpu_if_they_fit_into_memory(cpus, memory, expected):
    chosen = choose_processes(cpus, memory, 1, on_cluster=len(cpus) > 1)
    assert (chosen.num_processes, chosen.num_threads) == expected
    assert chosen.on_cluster is (len(cpus) > 1)
    assert all(num_cpus // chosen.num_threads <= max(1, free) for num_cpus, free in zip(cpus, memory, strict=True)), (
        "no node has more than fit"
    )


def test_the_numbers_are_said():
    assert str(PassProcesses(2)) == "2 processes x 1 thread"
    assert str(PassProcesses(1, 8)) == "1 process x 8 threads"


def test_activations_grow_with_the_image_and_need_no_weights():
    small, large = (activation_bytes(build_encoder({**TINY, "image_size": size}, 0)) for size in (28, 56))
    # The largest output is that of the first layer of an MLP: 4 x 32 floats for each patch of 14 pixels and CLS.
    assert small == LAYERS_HELD * (4 + 1) * 4 * 32 * 4
    assert large == LAYERS_HELD * (16 + 1) * 4 * 32 * 4


def test_the_memory_of_a_process_is_that_of_its_largest_encoder():
    encoders = [build_encoder({**TINY, "image_size": size}, 0) for size in (28, 56)]
    assert bytes_of_process([]) == PROCESS_BYTES
    assert bytes_of_process(encoders) == bytes_of_process(encoders[1:]) > bytes_of_process(encoders[:1])
    assert not any(module._forward_hooks for encoder in encoders for module in encoder.modules())
    assert torch.is_grad_enabled()
