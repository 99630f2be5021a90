import pytest
import torch
from ray.train import WorkerGroupError

from raysweep.worker.tune_trial import rows_to_begin_with, within_memory

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def trains_up_to(limit, tried, error=OUT_OF_MEMORY):
    def train(size):
        tried.append(size)
        if size is None or size > limit:
            raise error
        return [{"micro_batch_size": size}]

    return train


@pytest.mark.parametrize(
    ("limit", "begin", "expected"),
    [
        (100, 64, [64]),
        (20, None, [None, 32, 16]),
        (20, 16, [16]),
        (1, 5, [5, 3, 2, 1]),
        (3, None, [None, 32, 16, 8, 4, 2]),
    ],
)
def test_micro_batches_are_halved_until_they_fit(limit, begin, expected):
    tried = []
    assert within_memory(trains_up_to(limit, tried), begin, 64) == [{"micro_batch_size": expected[-1]}]
    assert tried == expected


def test_a_single_image_that_does_not_fit_fails_the_trial():
    tried = []
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(trains_up_to(0, tried), None, 4)
    assert tried == [None, 2, 1]


def test_the_error_of_one_of_several_workers_is_known():
    """Ray shortens each worker's text, and leaves out its middle."""
    tried, cause = [], torch.OutOfMemoryError("CUDA " + "had many things to say of its memory. " * 50)
    error = WorkerGroupError(f"[Rank 1] {str(cause)[-500:]}", {1: cause})
    within_memory(trains_up_to(2, tried, error), None, 4)
    assert tried == [None, 2]


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_cudas_libraries_say_it_in_their_own_ways(text):
    tried = []
    within_memory(trains_up_to(2, tried, RuntimeError(text)), None, 4)
    assert tried == [None, 2]


def test_other_errors_are_not_tried_again():
    tried = []
    with pytest.raises(ValueError, match="no such thing"):
        within_memory(trains_up_to(0, tried, ValueError("no such thing")), None, 64)
    assert tried == [None]


def test_nothing_of_a_failed_attempt_is_held_while_the_next_one_runs():
    class Model:
        alive = 0

        def __init__(self):
            Model.alive += 1

        def __del__(self):
            Model.alive -= 1

    def train(size):
        model = Model()
        assert Model.alive == 1, "its memory is what the next attempt needs"
        if size != 1:
            raise torch.OutOfMemoryError(f"{model}")
        return []

    within_memory(train, None, 8)


@pytest.mark.parametrize(
    ("use_gpu", "num_workers", "given", "expected"),
    [
        (True, 1, None, 64),
        (True, 3, None, 22),
        (True, 1, 8, 8),
        (True, 4, 50, 16),
        (False, 1, None, 16),
        (False, 8, None, 8),
    ],
)
def test_what_is_tried_first(use_gpu, num_workers, given, expected):
    loop = {"batch_size": 64, "micro_batch_size": given}
    assert rows_to_begin_with({"use_gpu": use_gpu, "num_workers": num_workers, "loop": loop}) == expected
