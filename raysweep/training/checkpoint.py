"""Checkpoints: safetensors files with JSON metadata and a checksum, written atomically."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from raysweep.errors import TrialError
from raysweep.storage.copies import fetch, publish, replacing

CHECKSUM = "checksum"  # CRC-32 of the tensors, in the metadata


def save_checkpoint(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON-able metadata to one safetensors file, atomically."""
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    about = {"raysweep": json.dumps(metadata), CHECKSUM: str(_checksum(contiguous))}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata=about)
    publish(path)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and metadata of a file from `save_checkpoint`.

    Raises:
        TrialError: the file is missing, damaged, or not from `save_checkpoint`.
    """
    try:
        with safe_open(fetch(path), framework="pt") as file:
            names = file.keys()
            tensors, about = {name: file.get_tensor(name) for name in names}, file.metadata()
            if CHECKSUM in about and about[CHECKSUM] != str(_checksum(tensors)):  # earlier versions wrote none
                raise ValueError("it has changed since it was written")
            return tensors, json.loads(about["raysweep"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise TrialError(f"{path}: not a readable raysweep checkpoint ({error})") from error


def _checksum(tensors: dict[str, Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        checksum = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, checksum)
    return checksum


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flattens an optimiser's per-parameter state into named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": value for i, values in state.items() for name, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restores the state from `optimizer_tensors`. The parameter groups must be the same as there."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            parameter = parameters[int(index)]
            # Fused kernels need the parameter's own memory layout.
            is_like = value.shape == parameter.shape
            state.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(value) if is_like else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
