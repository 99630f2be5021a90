import math
import stat

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raysweep.errors import TrialError
from raysweep.training import checkpoint
from raysweep.training.checkpoint import (
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "step": torch.tensor(3, dtype=torch.int64)}


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folders" / "last.safetensors"
    tensors = {
        **TENSORS,
        "transposed": TENSORS["weight"].T,
        "half": torch.ones(2, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.ones(1)),
    }
    metadata = {"history": [{"val/loss": 0.1 + 0.2}], "best": None, "näme": "bean 🫘"}
    save_checkpoint(path, tensors, metadata)
    loaded, found = load_checkpoint(path)
    assert found == metadata
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_numbers_that_are_not_finite_survive(tmp_path):
    save_checkpoint(tmp_path / "a", TENSORS, {"loss": math.nan, "other": -math.inf})
    _, metadata = load_checkpoint(tmp_path / "a")
    assert math.isnan(metadata["loss"])
    assert metadata["other"] == -math.inf


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_half_way_leaves_the_old_file(tmp_path, monkeypatch, error):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, TENSORS, {"epoch": 1})

    def fail(tensors, temporary, metadata):
        save_file(tensors, temporary, metadata)
        with open(temporary, "r+b") as file:
            file.truncate(20)
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(type(error)):
        save_checkpoint(path, {"weight": torch.zeros(2, 3)}, {"epoch": 2})
    tensors, metadata = load_checkpoint(path)
    assert metadata == {"epoch": 1}
    assert torch.equal(tensors["weight"], TENSORS["weight"])
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_that_is_no_json_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "a", TENSORS, {"path": tmp_path})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(b"\xff" * 200),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: save_file(TENSORS, path),
        lambda path: save_file(TENSORS, path, metadata={"format": "pt"}),
        lambda path: save_file(TENSORS, path, metadata={"raysweep": "{half"}),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["truncated", "garbage", "empty", "missing", "no metadata", "not ours", "broken metadata", "folder"],
)
def test_a_damaged_file_is_a_trial_error_that_names_it(tmp_path, damage):
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, TENSORS, {})
    damage(path)
    with pytest.raises(TrialError, match=r"last\.safetensors: not a readable raysweep checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize("place", [-1, -20, -64])
def test_a_byte_that_changed_on_the_disk_is_noticed(tmp_path, place):
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, {**TENSORS, "half": torch.ones(20, dtype=torch.bfloat16)}, {})
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(TrialError, match=r"best\.safetensors: .*it has changed since it was written"):
        load_checkpoint(path)


def test_a_file_of_an_earlier_version_has_no_checksum(tmp_path):
    path = tmp_path / "best.safetensors"
    save_file(TENSORS, path, metadata={"raysweep": '{"epoch": 1}'})
    tensors, metadata = load_checkpoint(path)
    assert metadata == {"epoch": 1}
    assert torch.equal(tensors["weight"], TENSORS["weight"])


def steps(layer, optimizer, num_steps, seed):
    for inputs in torch.randn(num_steps, 5, 3, generator=torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        layer(inputs).square().sum().backward()
        optimizer.step()


def make(seed):
    torch.manual_seed(seed)
    layer = nn.Linear(3, 2)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "lr": 0.3}]
    return layer, torch.optim.AdamW(groups, lr=0.01)


def test_an_optimiser_goes_on_where_it_was(tmp_path):
    layer, optimizer = make(0)
    steps(layer, optimizer, 3, seed=1)
    save_checkpoint(tmp_path / "last", layer.state_dict() | optimizer_tensors(optimizer), {})
    steps(layer, optimizer, 3, seed=2)
    other, restored = make(5)
    tensors, _ = load_checkpoint(tmp_path / "last")
    load_optimizer_tensors(restored, tensors)
    other.load_state_dict({name: tensors[name] for name in ("weight", "bias")})
    steps(other, restored, 3, seed=2)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    assert [group["lr"] for group in restored.param_groups] == [0.01, 0.3]
