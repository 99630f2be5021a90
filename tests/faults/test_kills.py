"""A process of a sweep is killed; the same command then ends as if nothing had happened: same rows, each thing once."""

import psutil
import pytest

from benchmarks.soak import VICTIMS

pytestmark = pytest.mark.slow

# What the driver has said, and the seconds that it goes on; benchmarks/soak.py tries random moments.
MOMENTS = [("reading", 1.5), ("encoder pass", 0), ("linear_probe: test accuracy", 0), ("fine_tune: test accuracy", 0)]


@pytest.mark.parametrize(("says", "seconds"), MOMENTS)
def test_a_killed_driver(sweep, uninterrupted, says, seconds):
    running = sweep.start()
    if running.wait_until(says=says, seconds=seconds):
        running.kill()
    ended = sweep.run()
    assert ended.status == 0, ended.stderr
    assert sweep.problems(uninterrupted.rows()) == []


def test_a_driver_killed_again_and_again(sweep, uninterrupted):
    for says in ("Ray is up", "encoder pass", "linear_probe: test accuracy", "from_scratch: test accuracy"):
        running = sweep.start()
        if running.wait_until(says=says):
            running.kill()
    ended = sweep.run()
    assert ended.status == 0, ended.stderr
    assert sweep.problems(uninterrupted.rows()) == []


@pytest.mark.parametrize("victim", [name for name, title in VICTIMS.items() if title])
def test_another_process_killed(sweep, uninterrupted, victim):
    running = sweep.start()
    if victim in ("raylet", "GCS"):
        running.wait_until(says="Ray is up")
    running.wait_for(VICTIMS[victim]).kill()
    ended = running.wait(timeout=200)
    assert "Traceback" not in ended.stderr
    if ended.status != 0:
        assert "error: " in ended.stderr, "it says why"
        ended = sweep.run()
    assert ended.status == 0, ended.stderr
    assert sweep.problems(uninterrupted.rows()) == []


def test_nothing_of_a_killed_sweep_runs_on(sweep):
    running = sweep.start()
    running.wait_until(says="Ray is up")
    started = running.process.children(recursive=True)
    running.kill()
    gone, alive = psutil.wait_procs(started, timeout=120)  # Ray's agents wait for its GCS
    assert gone
    assert alive == []
