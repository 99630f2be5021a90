"""Exported models: folders with safetensors and JSON, which raysweep loads without network access."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from raysweep.encoders.build import encoder_from_spec
from raysweep.encoders.head import Classifier, Head
from raysweep.errors import DataError, RaysweepError
from raysweep.images.decode import DEFAULT_OPTIONS, DecodeOptions, decode_image
from raysweep.results.model_description import FORMAT, ModelDescription, check_sizes, read_description
from raysweep.storage.checksums import checksum_of
from raysweep.storage.copies import exists, is_bucket, location, publish
from raysweep.training.loop import predict_logits

if TYPE_CHECKING:
    import pandas as pd

DESCRIPTION, WEIGHTS = "model.json", "model.safetensors"
BATCH = 32


def export_model(
    folder: Path,
    classifier: Classifier,
    classes: Sequence[str],
    about: dict[str, Any],
    options: DecodeOptions = DEFAULT_OPTIONS,
    temperature: float = 1.0,
) -> None:
    """Writes a model folder, and replaces an older one completely.

    Args:
        folder: folder for `model.json` (encoder architecture, preprocessing, head, labels, `about`) and
            `model.safetensors` (all weights of encoder and head).
        classifier: the trained model.
        classes: class names, in the order of the logits.
        about: origin of the model, JSON-able.
        options: how its images were decoded.
        temperature: divides the logits before the softmax.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()  # the user's umask says who may read the model
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS)
        description = {
            "format": FORMAT,
            "labels": list(classes),
            "encoder": classifier.encoder.spec.to_dict(),
            "head": classifier.head.spec(),
            "features": classifier.source,
            "temperature": temperature,
            "checksum": checksum_of(temporary / WEIGHTS),
            "about": about,
        }
        if options != DEFAULT_OPTIONS:
            description["images"] = asdict(options)
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
        # safetensors makes a file that only its owner can read, but other users may serve the model.
        (temporary / WEIGHTS).chmod((temporary / DESCRIPTION).stat().st_mode & 0o777)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        publish(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Model:
    """A loaded model: predicts class probabilities of encoded images.

    Attributes:
        classifier: the encoder and the head.
        labels: the class names.
        decode_options: how images are decoded, as those that the model was trained on.
        temperature: divides the logits before the softmax; models of earlier versions have 1.
    """

    classifier: Classifier
    labels: tuple[str, ...]
    decode_options: DecodeOptions = DEFAULT_OPTIONS
    temperature: float = 1.0

    def preprocess(self, image: bytes) -> np.ndarray:
        """Decodes and resizes an encoded image to uint8 `(height, width, 3)`.

        Raises:
            DataError: the image cannot be decoded.
        """
        preprocessing = self.classifier.encoder.preprocessing
        return preprocessing.resize_for_training(decode_image(image, preprocessing.min_side, self.decode_options))

    def logits(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """Returns float32 logits `(len(pixels), num_classes)` of images from `preprocess`."""
        batches = [np.stack(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)]
        results = [predict_logits(self.classifier, torch.from_numpy(batch)).cpu() for batch in batches]
        return torch.cat(results) if results else torch.empty(0, len(self.labels))

    def probabilities(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Returns float64 probabilities `(len(pixels), num_classes)` of images from `preprocess`."""
        # In float32, probabilities of classes with almost equal logits could become equal, and argmax another class.
        return (self.logits(pixels).double() / self.temperature).softmax(-1).numpy()


def load_model(folder: Path) -> Model:
    """Loads a model folder from `export_model`.

    Raises:
        RaysweepError: the folder is not an exported model, or is damaged.
    """
    try:
        description = read_description(folder / DESCRIPTION)
        check_sizes(description, folder / WEIGHTS)
        if not _fits(description, folder / WEIGHTS):
            raise ValueError(f"{WEIGHTS} has changed since it was written")
        encoder, head = encoder_from_spec(description.encoder.spec), Head(**description.head.model_dump())
        classifier = Classifier(encoder, head, description.features)
        if encoder.num_features(description.features) != description.head.num_features:
            raise ValueError(f"features: '{description.features}' has another number of features than the head")
        classifier.load_state_dict(load_file(folder / WEIGHTS))
        options = DecodeOptions.from_dict(description.images) if description.images else DEFAULT_OPTIONS
    except (FileNotFoundError, NotADirectoryError) as error:
        wanted = f"{DESCRIPTION} and {WEIGHTS}"
        raise RaysweepError(f"{folder}: not an exported model; expected a folder with {wanted} ({error})") from error
    except RaysweepError as error:
        raise type(error)(f"{folder}: {error}") from error
    except Exception as error:  # json, safetensors and torch raise many types for missing or changed parts
        reason = f"no {error}" if isinstance(error, KeyError) else error
        ways = "the sweep that made it exports it again"
        raise RaysweepError(f"{folder}: the exported model is damaged ({reason}); {ways}") from error
    classifier.eval().requires_grad_(False)
    return Model(classifier, description.labels, options, description.temperature)


def is_intact(folder: Path) -> bool:
    """Whether a folder holds a complete model whose weights are as they were written."""
    try:
        description = read_description(folder / DESCRIPTION)
        if is_bucket(location(folder)):  # objects are complete, and the weights need not be on this node
            return exists(folder / WEIGHTS)
        return _fits(description, folder / WEIGHTS)
    except (RaysweepError, ValueError, OSError):
        return False


def _fits(description: ModelDescription, weights: Path) -> bool:
    """Whether the weights have the checksum of a description; one of an earlier version has none."""
    return description.checksum in (None, checksum_of(weights)) and weights.is_file()


def remove_unfinished(models: Path) -> None:
    """Removes what killed exports left in a folder of models; the caller holds the sweep's lock."""
    for folder in models.glob(".*.*"):
        shutil.rmtree(folder, ignore_errors=True)


class PyfuncModel:
    """The MLflow pyfunc: predicts labels and probabilities of a DataFrame with encoded bytes in a column `image`."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, images: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        """Returns columns `label`, `probability` and `probability_<class>` per class.

        Raises:
            DataError: an image cannot be decoded; the message names the row.
        """
        import pandas as pd

        pixels = []
        for row, image in enumerate(images["image"]):
            try:
                pixels.append(self.model.preprocess(bytes(image)))
            except DataError as error:
                raise DataError(f"row {row}: {error}") from error
        probabilities = self.model.probabilities(pixels)
        columns = {f"probability_{name}": probabilities[:, i] for i, name in enumerate(self.model.labels)}
        labels = [self.model.labels[i] for i in probabilities.argmax(1)]
        return pd.DataFrame({"label": labels, "probability": probabilities.max(1), **columns})


def _load_pyfunc(data_path: str) -> PyfuncModel:
    """MLflow's hook for models logged with this module as their loader."""
    return PyfuncModel(load_model(Path(data_path)))
