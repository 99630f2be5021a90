"""An index that the tasks of several real nodes make, of which one is lost."""

import textwrap
import time

import pytest
from nodes import running_nodes
from published import write_images

pytestmark = pytest.mark.ray

NUM_IMAGES, ROWS_PER_TASK = 120, 4

INDEX = """
    import sys, time
    import ray
    from raysweep.experiment.sections import DataConfig
    from raysweep.images import index_tasks
    from raysweep.images.index import load_index

    images, marks, rows_per_task = sys.argv[1], sys.argv[2], int(sys.argv[3])
    check = index_tasks.check_in_task

    def slowly(*arguments):
        time.sleep(0.5)
        with open(f"{marks}/{ray.get_runtime_context().get_node_id()}", "a") as mark:
            mark.write("x")
        return check(*arguments)

    ray.init(log_to_driver=False, logging_level="ERROR")
    alone = load_index(DataConfig(source=images), seed=0)
    index_tasks.MIN_ROWS_FOR_TASKS, index_tasks.ROWS_PER_TASK = 1, rows_per_task
    index_tasks.check_in_task = slowly
    found = load_index(DataConfig(source=images), seed=0, start_ray=lambda: None)
    print("result", found.table.equals(alone.table), found.fingerprint == alone.fingerprint, found.bad_rows)
"""


def test_an_index_survives_the_loss_of_a_node(tmp_path):
    write_images(tmp_path / "images", [f"{'ab'[number % 2]}/{number}.png" for number in range(NUM_IMAGES)])
    marks = tmp_path / "marks"
    marks.mkdir()
    with running_nodes(1) as nodes:
        arguments = str(tmp_path / "images"), str(marks), str(ROWS_PER_TASK)
        process = nodes.start_driver(textwrap.dedent(INDEX), *arguments)
        try:
            deadline = time.monotonic() + 60
            while len(list(marks.iterdir())) < 2:
                assert time.monotonic() < deadline, "the second node never began"
                time.sleep(0.1)
            nodes.kill(1)
            said = process.communicate(timeout=120)[0]
        finally:
            process.kill()
            process.wait()
    assert "result True True ()" in said, said[-3000:]
    assert sum(len(mark.read_text()) for mark in marks.iterdir()) >= NUM_IMAGES // ROWS_PER_TASK
