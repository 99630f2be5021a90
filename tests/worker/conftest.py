import pytest
import ray
import torch

from raysweep.worker import inputs


@pytest.fixture
def own_process(monkeypatch):
    """What a worker leaves in its process: loaded rows, and the number of threads."""
    monkeypatch.setattr(inputs, "_loaded", {})
    monkeypatch.setattr(ray, "get", lambda reference: reference)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
