"""Which encoders an experiment compares, and the studies and baselines that follow from its modes and shots."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, JsonValue, ValidationInfo, field_validator

from raysweep.encoders.families import FAMILIES
from raysweep.experiment.modes import MODES, Mode, ModeName
from raysweep.experiment.sections import Count, Section, Shots, Text, without_credentials
from raysweep.storage.paths import file_name

Baseline = Literal["knn", "ridge", "logistic"]

BASELINES: tuple[Baseline, ...] = get_args(Baseline)

# mypy wants the values of a Literal written out; pydantic takes them from the table.
if TYPE_CHECKING:
    EncoderType = str
else:
    EncoderType = Literal[tuple(FAMILIES)]


def _has_weights(given: dict[str, Any]) -> bool:
    return FAMILIES[given["type"]].has_weights


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
        if value:
            _check_has_weights(info.data.get("type"))
        return value

    _check_weights = field_validator("pretrained_model_name_or_path")(without_credentials)

    @field_validator("pretrained_model_name_or_path")
    @classmethod
    def _fill_weights(cls, value: str | None, info: ValidationInfo) -> str | None:
        family = info.data.get("type")
        if value is not None:
            _check_has_weights(family)
            if "://" in value and "?" in value:
                raise ValueError(f"holds no options: they belong into the environment; found {value}")
            return value
        if family is None:  # it has an error of its own
            return None
        if _must_name_weights(family):
            raise ValueError(f"type {family} needs a hub id or a local folder here")
        return FAMILIES[family].default_weights

    @field_validator("config")
    @classmethod
    def _only_without_weights(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if value and info.data.get("use_pretrained", False):
            raise ValueError("pretrained weights fix the architecture: set use_pretrained: false, or leave config out")
        return value

    @field_validator("trainable")
    @classmethod
    def _can_be_frozen(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        family = info.data.get("type")
        if value is False and family is not None and not FAMILIES[family].has_weights:
            raise ValueError(f"a {family} starts from random weights and cannot be frozen; leave the key out")
        return value

    def modes(self, listed: Sequence[ModeName] | None) -> tuple[Mode, ...]:
        """Returns the modes to study, in the order in which they run; none when none of `listed` suits the encoder."""
        return tuple(mode for mode in MODES.values() if self._is_studied_in(mode, listed))

    def _is_studied_in(self, mode: Mode, listed: Sequence[ModeName] | None) -> bool:
        if not FAMILIES[self.type].has_weights:
            return mode.starts_from_random
        suits_weights = mode.starts_from_random != self.use_pretrained
        if self.trainable is not None:
            return mode.trains == "all" and suits_weights if self.trainable else mode.trains == "head"
        if listed is None:
            return suits_weights
        # Every mode accepts random weights, but a mode that usually starts from pretrained ones must be listed.
        return mode.name in listed and (suits_weights or not self.use_pretrained)

    def same_weights(self, other: "EncoderConfig") -> bool:
        """Tells whether both entries are the same encoder, however it is trained."""
        how_trained = {"trainable", "saved_weights_in_checkpoint"}
        return self.model_dump(exclude=how_trained) == other.model_dump(exclude=how_trained)


def _check_has_weights(family: str | None) -> None:
    if family is not None and not FAMILIES[family].has_weights:
        raise ValueError(f"{family} has no pretrained weights; leave the key out, or pick another type")


def _must_name_weights(family: str) -> bool:
    """Tells whether a family has pretrained weights, but no default ones."""
    return FAMILIES[family].has_weights and FAMILIES[family].default_weights is None


@dataclass(frozen=True, slots=True)
class RowConfig(ABC):
    """What one row of the leaderboard is about: an encoder, a kind of classifier, and the training images per class."""

    encoder_name: str
    encoder: EncoderConfig
    shots: Shots

    @property
    @abstractmethod
    def kind(self) -> str:
        """How the classifier is made: what the leaderboard shows as its mode."""

    @property
    @abstractmethod
    def reads_features(self) -> bool:
        """Whether the classifier is made from cached features; otherwise it is trained on images."""

    @property
    @abstractmethod
    def uses_every_draw(self) -> bool:
        """Whether a classifier is made from every random draw of few-shot images; otherwise only from the first."""

    @property
    def name(self) -> str:
        """The name of the row, and of its folder, model and MLflow run."""
        return f"{self.encoder_name}-{self.kind}" + ("" if self.shots == "all" else f"-{self.shots}shot")


@dataclass(frozen=True, slots=True)
class StudyConfig(RowConfig):
    """One search to run: an encoder in a mode."""

    mode: Mode

    @property
    def kind(self) -> str:
        """The name of the mode."""
        return self.mode.name

    @property
    def reads_features(self) -> bool:
        """Whether the mode reads cached features."""
        return self.mode.reads == "features"

    @property
    def uses_every_draw(self) -> bool:
        """Whether the mode trains on every draw."""
        return self.mode.trains_every_draw


@dataclass(frozen=True, slots=True)
class BaselineConfig(RowConfig):
    """One classifier that needs no trials, on the features of an encoder.

    Attributes:
        baseline: Its name.
        refit: Whether it is fitted to train and validation together before the test, once its setting is chosen.
        folds: Number of folds of all images that judge it as well; None for none, and for few-shot ones.
    """

    baseline: Baseline
    refit: bool
    folds: int | None = None

    @property
    def kind(self) -> str:
        """The name of the baseline."""
        return self.baseline

    @property
    def reads_features(self) -> bool:
        """Every baseline is fitted to features."""
        return True

    @property
    def uses_every_draw(self) -> bool:
        """A baseline costs so little that every draw is used."""
        return True


def list_studies(
    encoders: Sequence[EncoderConfig], listed: Sequence[ModeName] | None, shots: Sequence[Shots]
) -> tuple[StudyConfig, ...]:
    """Lists the studies by shots, then encoder, then mode: a probe runs before the fine-tuning that starts from it."""
    names, modes = _encoder_names(encoders), list(MODES)
    found = [
        StudyConfig(name, encoder, number, mode)
        for number in shots
        for name, encoder in zip(names, encoders, strict=True)
        for mode in encoder.modes(listed)
    ]

    def place(study: StudyConfig) -> tuple[int, int, int]:
        return shots.index(study.shots), names.index(study.encoder_name), modes.index(study.mode.name)

    return tuple(sorted(found, key=place))


def list_baselines(
    study: StudyConfig, baselines: Sequence[Baseline], *, refit: bool, folds: int | None = None
) -> tuple[BaselineConfig, ...]:
    """Lists the baselines on the features of a study; none when the study reads no features."""
    if not study.reads_features:
        return ()
    folds = folds if study.shots == "all" else None
    return tuple(BaselineConfig(study.encoder_name, study.encoder, study.shots, one, refit, folds) for one in baselines)


def _encoder_names(encoders: Sequence[EncoderConfig]) -> list[str]:
    """Names each entry; entries that differ only in how the encoder is trained get the same name."""
    distinct = [e for i, e in enumerate(encoders) if not any(e.same_weights(other) for other in encoders[:i])]
    types = [encoder.type for encoder in distinct]
    taken: list[str] = []
    for encoder in distinct:
        base = encoder.type
        if _must_name_weights(encoder.type) or (encoder.use_pretrained and types.count(encoder.type) > 1):
            base = file_name(str(encoder.pretrained_model_name_or_path).rstrip("/").split("/")[-1])
        candidates = [base, *(f"{base}-{number}" for number in range(2, len(distinct) + 2))]
        taken.append(next(name for name in candidates if name not in taken))
    return [next(n for n, other in zip(taken, distinct, strict=True) if e.same_weights(other)) for e in encoders]


def mode_problems(encoders: Sequence[EncoderConfig], listed: Sequence[ModeName] | None) -> list[tuple[tuple[int], str]]:
    """Returns `(path, message)` for every encoder that has no mode left, or that would be studied twice."""
    found: list[tuple[tuple[int], str]] = []
    for index, encoder in enumerate(encoders):
        modes = _names(encoder.modes(listed))
        if not modes:
            possible, random = _names(encoder.modes(None)), _names(m for m in MODES.values() if m.starts_from_random)
            text = f"no mode left: modes lists {', '.join(listed or ())}"
            text = f"{text}; a pretrained {encoder.type} takes {', '.join(possible)}"
            found.append(((index,), f"{text} ({', '.join(random)} needs use_pretrained: false)"))
        for earlier in range(index):
            shared = set(modes) & set(_names(encoders[earlier].modes(listed)))
            if shared and encoder.same_weights(encoders[earlier]):
                found.append(((index,), f"same encoder and mode ({sorted(shared)[0]}) as encoders.{earlier}"))
                break
    return found


def _names(modes: Iterable[Mode]) -> list[ModeName]:
    return [mode.name for mode in modes]
