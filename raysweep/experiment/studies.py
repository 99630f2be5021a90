"""Which encoders an experiment compares, in which modes, and the studies that follow."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from raysweep.errors import DataError
from raysweep.experiment.space import MODES, Mode, problems_at
from raysweep.filesystems import split_uri
from raysweep.paths import file_name

EncoderType = Literal["stacked_cnn", "dinov2", "clip", "siglip", "auto"]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Shots = Count | Literal["all"]

# The ImageNet-scale base variants that the published comparison used.
DEFAULT_WEIGHTS = {
    "dinov2": "facebook/dinov2-base",
    "clip": "openai/clip-vit-base-patch32",
    "siglip": "google/siglip-base-patch16-224",
}
_NO_WEIGHTS = "stacked_cnn has no pretrained weights; leave the key out, or pick another type"


class Section(BaseModel):
    """What every part of the experiment file has in common: frozen, closed, strictly typed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def list_of(default: Any = ..., *, min_length: int | None = 1, **described: Any) -> Any:
    """Returns a field whose value is a list in YAML and a tuple in the model: the one place that is not strict."""
    return Field(default=default, strict=False, min_length=min_length, **described)


def without_repeats(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Checks that no entry of a list stands twice, as a field validator."""
    for index, value in enumerate(values or ()):
        if value in (values or ())[:index]:
            raise problems_at(((index,), f"{value} is listed twice"))
    return values


def without_credentials(value: str | None) -> str | None:
    """Checks that a URI names nobody's keys, as a field validator: it is logged, and copied with every path."""
    if value and "://" in value:
        try:
            split_uri(value)
        except DataError as error:
            raise ValueError(str(error)) from None
    return value


def _has_weights(given: dict[str, Any]) -> bool:
    return bool(given["type"] != "stacked_cnn")


class EncoderConfig(Section):
    """An image encoder and its weights; the keys are Ludwig's."""

    type: EncoderType = Field(description="Encoder family; auto takes any transformers vision model.")
    use_pretrained: bool = Field(
        default_factory=_has_weights, description="Load published weights (default: true; stacked_cnn has none)."
    )
    pretrained_model_name_or_path: Text | None = Field(
        default=None,
        description="Hub id, folder, or folder in a bucket: s3://, gs:// (default: the family's base model; required "
        "for auto).",
    )
    revision: Text = Field(default="main", description="Branch, tag or commit of the hub repository.")
    image_size: Count | None = Field(default=None, description="Pixels a side (default: the encoder's own).")
    config: dict[str, JsonValue] = Field(
        default={},
        description="Overrides of the model's configuration (hidden_size, ...); needs use_pretrained: false.",
    )
    trainable: bool | None = Field(
        default=None,
        description="false: linear_probe; true: fine_tune (from_scratch without weights). Wins over modes.",
    )
    saved_weights_in_checkpoint: bool = Field(
        default=False, description="Keep frozen encoder weights in a probe's training checkpoints too."
    )

    @field_validator("use_pretrained")
    @classmethod
    def _check_weights_exist(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("type") == "stacked_cnn":
            raise ValueError(_NO_WEIGHTS)
        return value

    _check_weights = field_validator("pretrained_model_name_or_path")(without_credentials)

    @field_validator("pretrained_model_name_or_path")
    @classmethod
    def _fill_weights(cls, value: str | None, info: ValidationInfo) -> str | None:
        family = info.data.get("type")
        if family == "stacked_cnn" and value is not None:
            raise ValueError(_NO_WEIGHTS)
        if value and "://" in value and "?" in value:
            raise ValueError(f"holds no options: they belong into the environment; found {value}")
        if family == "auto" and value is None:
            raise ValueError("type auto needs a hub id or a local folder here")
        return value or DEFAULT_WEIGHTS.get(str(family))

    @field_validator("config")
    @classmethod
    def _only_without_weights(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("use_pretrained", False):
            raise ValueError("pretrained weights fix the architecture: set use_pretrained: false, or leave config out")
        return value

    @field_validator("trainable")
    @classmethod
    def _can_be_frozen(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value is False and info.data.get("type") == "stacked_cnn":
            raise ValueError("a stacked_cnn starts from random weights and cannot be frozen; leave the key out")
        return value

    def modes(self, listed: Sequence[Mode] | None) -> tuple[Mode, ...]:
        """Returns the modes to study, in the order in which they must run; empty when none of `listed` applies."""
        if self.type == "stacked_cnn":
            return ("from_scratch",)
        if self.trainable is not None:
            return (("fine_tune" if self.use_pretrained else "from_scratch") if self.trainable else "linear_probe",)
        if not self.use_pretrained and listed is None:
            return ("from_scratch",)
        possible: tuple[Mode, ...] = ("linear_probe", "fine_tune")
        if not self.use_pretrained:
            possible = (*possible, "from_scratch")
        return tuple(mode for mode in possible if listed is None or mode in listed)

    def same_weights(self, other: "EncoderConfig") -> bool:
        """Tells whether both entries are the same encoder, however it is trained."""
        how_trained = {"trainable", "saved_weights_in_checkpoint"}
        return self.model_dump(exclude=how_trained) == other.model_dump(exclude=how_trained)


class StudyConfig(Section):
    """One search to run: an encoder in a mode, on so many images a class."""

    name: str
    encoder_name: str
    encoder: EncoderConfig
    mode: Mode
    shots: Shots


def list_studies(
    encoders: Sequence[EncoderConfig], listed: Sequence[Mode] | None, shots: Sequence[Shots]
) -> tuple[StudyConfig, ...]:
    """Lists the studies by shots, then encoder, then mode, so that a probe runs before the fine-tuning it starts."""
    names = _encoder_names(encoders)
    found = [
        (list(shots).index(number), names.index(name), MODES.index(mode), _study(name, encoder, mode, number))
        for number in shots
        for name, encoder in zip(names, encoders, strict=True)
        for mode in encoder.modes(listed)
    ]
    return tuple(study for *_, study in sorted(found, key=lambda entry: entry[:3]))


def _study(encoder_name: str, encoder: EncoderConfig, mode: Mode, shots: Shots) -> StudyConfig:
    name = f"{encoder_name}-{mode}" + ("" if shots == "all" else f"-{shots}shot")
    return StudyConfig(name=name, encoder_name=encoder_name, encoder=encoder, mode=mode, shots=shots)


def _encoder_names(encoders: Sequence[EncoderConfig]) -> list[str]:
    """Names each entry, the same for entries that differ only in how the encoder is trained."""
    distinct = [e for i, e in enumerate(encoders) if not any(e.same_weights(other) for other in encoders[:i])]
    types = [encoder.type for encoder in distinct]
    taken: list[str] = []
    for encoder in distinct:
        base: str = encoder.type
        if encoder.type == "auto" or (encoder.use_pretrained and types.count(encoder.type) > 1):
            base = file_name(str(encoder.pretrained_model_name_or_path).rstrip("/").split("/")[-1])
        candidates = [base, *(f"{base}-{number}" for number in range(2, len(distinct) + 2))]
        taken.append(next(name for name in candidates if name not in taken))
    return [next(n for n, other in zip(taken, distinct, strict=True) if e.same_weights(other)) for e in encoders]


def mode_problems(encoders: Sequence[EncoderConfig], listed: Sequence[Mode] | None) -> list[tuple[tuple[int], str]]:
    """Returns `(path, message)` of every encoder that no mode is left for, or that would be studied twice."""
    found: list[tuple[tuple[int], str]] = []
    for index, encoder in enumerate(encoders):
        modes = encoder.modes(listed)
        if not modes:
            possible = ", ".join(encoder.modes(None))
            text = f"no mode left: modes lists {', '.join(listed or ())}; a pretrained {encoder.type} takes {possible}"
            found.append(((index,), f"{text} (from_scratch needs use_pretrained: false)"))
        for earlier in range(index):
            shared = set(modes) & set(encoders[earlier].modes(listed))
            if shared and encoder.same_weights(encoders[earlier]):
                found.append(((index,), f"same encoder and mode ({sorted(shared)[0]}) as encoders.{earlier}"))
                break
    return found
