"""What every test finds: an environment that answers nothing, and that is as it was when the test has ended."""

import os

import pytest

from raysweep.experiment.config import ENVIRONMENT


@pytest.fixture(autouse=True, scope="session")
def silent_environment():
    """Whatever a developer's shell says of storage, MLflow and clusters."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*(name for name, _ in ENVIRONMENT.values()), "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(autouse=True)
def same_environment():
    """MLflow writes its URI into the environment, where the sweeps that later tests start would find it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
