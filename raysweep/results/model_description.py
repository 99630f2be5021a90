"""The content of `model.json`, checked before anything is built from it: it may come from someone else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from safetensors import safe_open

from raysweep.encoders.base import EncoderSpec
from raysweep.encoders.model_config import checked_config
from raysweep.errors import RaysweepError

FORMAT = 1
MAX_BYTES = 64 << 20  # of model.json
MAX_PIXELS = 8192  # a side of an image

Count = Annotated[int, Field(ge=1, strict=True)]
Side = Annotated[int, Field(ge=1, le=MAX_PIXELS, strict=True)]
Channels = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


def _check_text(text: str) -> str:
    text.encode()  # a lone surrogate cannot be printed
    return text


Label = Annotated[str, AfterValidator(_check_text)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PreprocessingPart(_Part):
    """See `encoders.preprocess.Preprocessing`."""

    resize: Literal["shortest_edge", "exact"]
    resize_size: Side | tuple[Side, Side]
    crop_size: Side | None
    resample: Annotated[int, Field(ge=0, le=5)]
    mean: Channels
    std: tuple[
        Annotated[FiniteFloat, Field(gt=0)], Annotated[FiniteFloat, Field(gt=0)], Annotated[FiniteFloat, Field(gt=0)]
    ]
    rescale_factor: Annotated[FiniteFloat, Field(gt=0)] = 1 / 255


class OriginPart(_Part):
    """See `encoders.base.Origin`."""

    name: str | None = None
    revision: str | None = None


class EncoderPart(_Part):
    """See `encoders.base.EncoderSpec`."""

    type: str
    family: str
    config: dict[str, Any]
    preprocessing: PreprocessingPart
    parts: dict[str, Count]
    sources: dict[str, Annotated[list[str], Field(min_length=1)]]
    origin: OriginPart

    @property
    def spec(self) -> EncoderSpec:
        """The specification that an encoder is rebuilt from."""
        return EncoderSpec.from_dict({**self.model_dump(), "config": checked_config(self.config)})


class HeadPart(_Part):
    """The arguments of `encoders.head.Head`."""

    num_features: Count
    num_classes: Count
    normalize: Literal["none", "l2", "standardize"] = "none"


class ModelDescription(BaseModel):
    """The content of `model.json`. Keys of later versions are ignored.

    Attributes:
        format: version of the folder's layout.
        labels: class names, in the order of the logits.
        encoder: architecture and preprocessing.
        head: shape and normalisation of the head.
        features: the feature source that the head reads.
        images: how images are decoded; None for the default.
        temperature: divides the logits before the softmax.
        checksum: CRC-32 of `model.safetensors`; None in models of earlier versions.
        about: origin of the model.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1]
    labels: Annotated[tuple[Label, ...], Field(min_length=1)]
    encoder: EncoderPart
    head: HeadPart
    features: str
    images: dict[str, Any] | None = None
    temperature: Annotated[FiniteFloat, Field(gt=0)] = 1.0
    checksum: int | None = None
    about: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if len(self.labels) != self.head.num_classes:
            raise ValueError(f"{len(self.labels)} labels, {self.head.num_classes} logits")
        unknown = {part for parts in self.encoder.sources.values() for part in parts} - self.encoder.parts.keys()
        if unknown:
            raise ValueError(f"encoder.sources: no part {', '.join(sorted(unknown))}")
        return self


def read_description(path: Path) -> ModelDescription:
    """Reads and checks `model.json`.

    Raises:
        FileNotFoundError: there is no such regular file.
        RaysweepError: its format is unknown.
        ValueError: it is not a description, or one whose parts do not fit together.
    """
    _check_is_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path.name}: larger than {MAX_BYTES >> 20} MB")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not JSON ({error})") from error
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        found = values["format"]
        raise RaysweepError(f"{path.name}: format {found!r} is not one this raysweep reads; accepted: {FORMAT}")
    try:
        return ModelDescription.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path.name}: {where + ': ' if where else ''}{first['msg']}") from error


def check_sizes(description: ModelDescription, weights: Path) -> None:
    """Compares the sizes in a description with those of the weights, before memory is allocated for them.

    Raises:
        FileNotFoundError: there is no such regular file.
        ValueError: they differ.
    """
    _check_is_file(weights)
    with safe_open(weights, framework="pt") as file:
        names = file.keys()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    expected = (description.head.num_classes, description.head.num_features)
    if shapes.get("head.weight") != expected:
        raise ValueError(f"a head of {expected}, weights of {shapes.get('head.weight')}")
    channels: Any = description.encoder.config.get("channels")
    if description.encoder.family == "stacked_cnn":
        largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
        is_list = isinstance(channels, list) and 0 < len(channels) <= len(shapes)
        if not is_list or not all(type(number) is int and 0 < number <= largest for number in channels):
            raise ValueError(f"encoder.config.channels: {str(channels)[:80]} are not those of the weights")


def _check_is_file(path: Path) -> None:
    if path.exists() and not path.is_file():  # a pipe would block
        raise FileNotFoundError(f"{path.name} is not a regular file")
