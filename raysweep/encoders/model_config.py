"""Checks a config.json that others wrote, before transformers builds a model from it."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from raysweep.errors import EncoderError

# They name code, kernels or layouts that transformers would load, and change nothing about the architecture.
STRIPPED = {
    "auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "_attn_implementation_autoset", "experts_implementation", "_experts_implementation",
    "_experts_implementation_internal", "use_kernels", "kernel_config", "use_pretrained_backbone",
    "device_map", "_commit_hash",
}  # fmt: skip
QUANTIZED = ("quantization_config", "compression_config")
_LEFT_OUT = STRIPPED.union(QUANTIZED)
LABELS = {"id2label", "label2id"}  # may be long, and build nothing
MAX_DEPTH, MAX_VALUES = 8, 10_000
MAX_LAYERS, MAX_NUMBER = 500, 20_000_000
MAX_PARAMETERS = 20_000_000_000
_LAYERS = re.compile(r"(layer|depth|block|stage|repeat)s?$", re.IGNORECASE)


def checked_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json without what names code.

    Raises:
        EncoderError: the checkpoint is quantised, or a number is larger than any published model has.
    """
    found = list(_walk(values, "", 0))
    if len(found) > MAX_VALUES:
        raise EncoderError(f"config: {len(found):,} values; accepted: at most {MAX_VALUES:,}")
    for path, value in found:
        key = re.sub(r"\.\d+", "", path).rpartition(".")[2]
        if key in QUANTIZED and value:
            raise EncoderError(f"config: {path}: quantised weights are not read; choose the checkpoint they came from")
        limit = MAX_LAYERS if _LAYERS.search(key) else MAX_NUMBER
        if isinstance(value, int) and abs(value) > limit:
            raise EncoderError(f"config: {path}: {value}; accepted: at most {limit:,}")
    return {key: _stripped(item) for key, item in values.items() if key not in _LEFT_OUT}


def check_num_parameters(num_parameters: int, num_stored: int | None = None) -> None:
    """Checks the size of a model before its memory is allocated.

    Args:
        num_parameters: What the config describes.
        num_stored: How many numbers the files of weights hold; None where there are no files.

    Raises:
        EncoderError: the model is larger than its weights by more than a text tower or a head, or than the memory.
    """
    if num_stored is not None and num_parameters > 2 * num_stored + 50_000_000:
        raise EncoderError(f"config: it describes {num_parameters:,} parameters, the weights have {num_stored:,}")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = min(MAX_PARAMETERS, memory // 4)
    if num_parameters > limit:
        raise EncoderError(
            f"config: it describes {num_parameters:,} parameters, {num_parameters * 4 / 1e9:,.0f} GB; "
            f"this machine has {memory / 1e9:,.0f} GB"
        )


def _walk(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Yields every value with its path, also objects and lists."""
    if depth > MAX_DEPTH:
        raise EncoderError(f"config: {path}: more than {MAX_DEPTH} objects or lists in one another")
    yield path, value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in inner:
        if key not in LABELS:
            yield from _walk(item, f"{path}.{key}" if path else str(key), depth + 1)


def _stripped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _stripped(item) for key, item in value.items() if key not in _LEFT_OUT}
    return [_stripped(item) for item in value] if isinstance(value, list) else value
