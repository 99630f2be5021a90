import pytest

from benchmarks.small_sweep import SmallSweep


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> SmallSweep:
    """A sweep that nothing has disturbed."""
    sweep = SmallSweep(tmp_path_factory.mktemp("uninterrupted") / "sweep")
    ended = sweep.run()
    assert ended.status == 0, ended.stderr
    assert sweep.problems(sweep.rows()) == []
    return sweep


@pytest.fixture
def sweep(tmp_path) -> SmallSweep:
    return SmallSweep(tmp_path / "sweep")
