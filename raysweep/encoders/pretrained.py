"""Finds the files of pretrained weights: in a folder, a bucket, the Hugging Face cache, or on the hub."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

from raysweep.encoders.model_config import checked_config
from raysweep.encoders.preprocess import Preprocessing, from_processor_config
from raysweep.errors import EncoderError, one_line
from raysweep.storage.copies import fetch_folder, is_bucket, local_path

PROCESSOR = "preprocessor_config.json"
# Seconds that the hub may take to answer. Downloads are not limited.
HUB_TIMEOUT_S = 8.0
MAX_MESSAGE = 2_000  # characters of another library's error; some list every weight
MAX_JSON_BYTES = 50_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
# Height and width of the test images. Two shapes, so that a wrong crop is seen on both axes.
_PARITY_SHAPES = ((90, 140), (150, 100))


@dataclass(frozen=True, slots=True)
class PretrainedFiles:
    """The files of a pretrained model on the local disk, as transformers saves them.

    Attributes:
        name: Hub id, folder or bucket, as the user wrote it.
        revision: The commit of the hub repository; None where the files are not from the hub.
        folder: The local folder of the files.
        config: The content of config.json.
    """

    name: str
    revision: str | None
    folder: Path
    config: Mapping[str, Any]

    @property
    def num_stored(self) -> int:
        """How many numbers the files of weights hold.

        Raises:
            EncoderError: a file is not safetensors.
        """
        total = 0
        for path in self.folder.glob("*.safetensors"):
            try:
                with safe_open(path, "pt") as file:
                    total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
            except Exception as error:
                raise EncoderError(
                    f"{self.name}: its weights cannot be loaded: {path.name}: {describe_error(error)}"
                ) from error
        return total

    def preprocessing(self) -> Preprocessing | None:
        """Reads the model's own image processor. Returns None where it has none.

        Raises:
            EncoderError: the processor cannot be loaded, or changes the pixels in an unknown way.
        """
        if not self._has_processor():
            return None
        import transformers

        loader: Any = transformers.AutoImageProcessor
        try:
            processor = loader.from_pretrained(
                str(self.folder), backend="pil", trust_remote_code=False, local_files_only=True
            )
        except Exception as error:
            remedy = ""
            if "torchvision" in str(error).lower():
                remedy = (
                    "; install torchvision, or have Pillow do the same within one grey level: set image_processor_type "
                    f"to ViTImageProcessor in {self.folder / PROCESSOR}"
                )
            raise EncoderError(
                f"{self.name}: its image processor cannot be loaded: {describe_error(error)}{remedy}"
            ) from error
        try:
            preprocessing = from_processor_config(processor.to_dict())
        except EncoderError as error:
            raise EncoderError(f"{self.name}: {error}") from None
        _check_parity(self.name, processor, preprocessing)
        return preprocessing

    def _has_processor(self) -> bool:
        if (self.folder / PROCESSOR).is_file():
            _read_json(self.folder / PROCESSOR, self.name)
            return True
        # transformers 5 writes the image processor of a text-and-image model into the file of the combined processor.
        combined = self.folder / "processor_config.json"
        return combined.is_file() and "image_processor" in _read_json(combined, self.name)


def find_pretrained(name: str, revision: str | None = None, with_weights: bool = True) -> PretrainedFiles:
    """Finds the files of a pretrained model. Downloads them from a bucket or the hub if they are not on this machine.

    Args:
        name: Hub id, folder or bucket.
        revision: Branch, tag or commit of the hub repository; `main` if None.
        with_weights: Whether the weights are needed too, not only the JSON files.

    Raises:
        EncoderError: there are no usable files. The message says what was tried and what the user can do.
    """
    folder = local_path(name)
    commit = None
    if is_bucket(name):
        suffixes = (".json", ".safetensors") if with_weights else ".json"
        if not fetch_folder(folder, lambda file: file.endswith(suffixes)):
            raise EncoderError(f"pretrained_model_name_or_path: {name}: nothing is there")
    elif not folder.is_dir():
        if _is_path(name):
            raise EncoderError(
                f"pretrained_model_name_or_path: {name}: no such folder; accepted: a folder with config.json and "
                "*.safetensors, also in a bucket (s3://, gs://), or a Hugging Face id such as facebook/dinov2-base"
            )
        folder = _download(name, revision or "main", with_weights)
        commit = folder.name
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise EncoderError(f"{name}: no config.json in {folder}; a checkpoint that transformers saved has one")
    config = _read_json(config_file, name)
    if not config.get("model_type") or not isinstance(config["model_type"], str):
        raise EncoderError(f"{name}: config.json names no model_type, so that transformers cannot tell what it is")
    try:
        config = checked_config(config)
    except EncoderError as error:
        raise EncoderError(f"{name}: {error}") from None
    if with_weights:
        _check_weights(folder, name)
    return PretrainedFiles(name=name, revision=commit, folder=folder, config=config)


def _check_weights(folder: Path, name: str) -> None:
    """Checks that a folder has weights as safetensors, and that nothing there leads to other files."""
    if (folder / "adapter_config.json").exists():
        raise EncoderError(f"{name}: {folder} has an adapter (adapter_config.json); merge it into its base model first")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise EncoderError(
                f"{name}: its weights are pickled ({', '.join(pickles[:3])}), and a pickle can run any code; accepted: "
                '*.safetensors. Where you trust the file, convert it: python -c "from transformers import AutoModel; '
                f"AutoModel.from_pretrained({str(folder)!r}).save_pretrained('NEW_FOLDER')\", and copy {PROCESSOR}"
            )
        raise EncoderError(
            f"{name}: no weights in {folder}; looked for *.safetensors ({', '.join(PICKLES[:3])}: pickled, never read)"
        )
    for index in folder.glob("*.safetensors.index.json"):
        files = _read_json(index, name).get("weight_map")
        for file in files.values() if isinstance(files, dict) else [files]:
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise EncoderError(f"{name}: {index.name}: weight_map: {file!r}; accepted: names of *.safetensors")


def describe_error(error: BaseException) -> str:
    """Returns the type and the message of another library's error, in one line, for use in our messages."""
    message = one_line(error)
    if len(message) > MAX_MESSAGE:
        message = f"{message[:MAX_MESSAGE]} ... ({len(message):,} characters)"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _is_path(name: str) -> bool:
    """Whether a name must be a folder and cannot be a hub id: those are `name` or `organisation/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def _download(name: str, revision: str, with_weights: bool) -> Path:
    wanted = ["*.json", "*.safetensors"] if with_weights else ["*.json"]
    folder = _snapshot(name, revision, wanted)
    if with_weights and not any(folder.glob("*.safetensors")):
        # Some early repositories have only pickled weights; openai/clip-vit-base-patch32 is one of them.
        converted = _converted(name) if revision == "main" else None
        folder = _snapshot(name, converted, wanted) if converted else folder
    return folder


def _converted(name: str) -> str | None:
    """Returns the revision in which the hub's own bot offers the weights of a repository as safetensors."""
    from huggingface_hub import HfApi

    try:
        for request in HfApi().get_repo_discussions(name, author="SFconvertbot", discussion_type="pull_request"):
            if request.author == "SFconvertbot" and request.status == "open":
                return request.git_reference
    except Exception:  # without a network, what is in the cache decides
        return None
    return None


def _snapshot(name: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                etag_timeout=HUB_TIMEOUT_S,
            )
        )
    except Exception as error:
        raise EncoderError(
            f"{name} (revision {revision}): the pretrained weights cannot be loaded.\n"
            f"  Tried: a local folder of that name (there is none); the cache {constants.HF_HUB_CACHE} and the hub "
            f"{constants.ENDPOINT} ({describe_error(error)}).\n"
            "  Ways out: (1) set pretrained_model_name_or_path to a local folder with config.json and *.safetensors; "
            f"(2) fill the cache where there is a network (`hf download {name}`) and point HF_HOME at it; "
            "(3) set use_pretrained: false to train from random weights."
        ) from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"{name}: {path} cannot be read as JSON: {describe_error(error)}") from error
    if not isinstance(value, dict):
        raise EncoderError(f"{name}: {path} holds {type(value).__name__}, not an object")
    return value


def _check_parity(name: str, processor: Any, preprocessing: Preprocessing) -> None:
    """Compares both on two small images. Some processors do more than their config says, such as LeViT's resize."""
    noise = np.random.default_rng(0)
    for height, width in _PARITY_SHAPES:
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        try:
            theirs = np.asarray(processor(images=[image], return_tensors="np")["pixel_values"][0])
        except Exception as error:
            raise EncoderError(f"{name}: {PROCESSOR}: the processor fails: {describe_error(error)}") from error
        ours = preprocessing.normalize(torch.from_numpy(preprocessing.resize_and_crop(image))[None])[0].numpy()
        # One grey level, in normalised units, and 1% for rounding.
        tolerance = 1.01 * preprocessing.rescale_factor / min(preprocessing.std)
        if theirs.shape != ours.shape or np.abs(theirs - ours).max() > tolerance:
            raise EncoderError(
                f"{name}: {type(processor).__name__} does something to the pixels that its config does not say, "
                "and that is not understood here; choose another checkpoint"
            )
