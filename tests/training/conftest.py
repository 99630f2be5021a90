import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small are the tensors that sharing them among threads takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
