"""The experiment file: `load_experiment` reads one YAML and returns a frozen `Experiment` with every default."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from raysweep.experiment.explain import explain, problems_at
from raysweep.experiment.metrics import VALIDATION_METRICS, Direction, ValidationMetric
from raysweep.experiment.modes import MODES, ModeName
from raysweep.experiment.search_blocks import (
    FineTuneSearch,
    FromScratchSearch,
    LinearProbeSearch,
    SearchBlock,
    SearchConfig,
)
from raysweep.experiment.sections import (
    AugmentationConfig,
    DataConfig,
    ResourcesConfig,
    Section,
    Text,
    TrackingConfig,
    TrainConfig,
    list_of,
    without_repeats,
)
from raysweep.experiment.studies import (
    BaselineConfig,
    EncoderConfig,
    RowConfig,
    StudyConfig,
    list_baselines,
    list_studies,
    mode_problems,
)
from raysweep.experiment.yaml_file import config_error, dump_yaml, read_yaml, with_defaults, with_overrides
from raysweep.storage.filesystems import BUCKETS
from raysweep.storage.paths import file_name

__all__ = [
    "AugmentationConfig",
    "BaselineConfig",
    "DataConfig",
    "EncoderConfig",
    "Experiment",
    "FineTuneSearch",
    "FromScratchSearch",
    "LinearProbeSearch",
    "ResourcesConfig",
    "RowConfig",
    "SearchBlock",
    "SearchConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
    "experiment_schema",
    "load_experiment",
    "resolved_yaml",
]

# Keys that describe the machine or cluster: the variable that holds the value when the file does not, and its type.
ENVIRONMENT: dict[str, tuple[str, type[str] | type[float]]] = {
    "storage": ("RAYSWEEP_STORAGE", str),
    "tracking.uri": ("MLFLOW_TRACKING_URI", str),
    "tracking.optuna_uri": ("RAYSWEEP_OPTUNA_URI", str),
    "resources.wait_for_nodes_s": ("RAYSWEEP_WAIT_FOR_NODES_S", float),
}


class Experiment(Section):
    """One experiment file."""

    name: str = Field(max_length=100, description="Names the folder of results (default: the file's stem).")
    seed: int = Field(default=42, ge=0, lt=2**32, description="Seed of splits, samplers, initial weights and shuffles.")
    storage: Text = Field(
        default="runs",
        description="Folder for results and caches, on a cluster one that every node sees; or s3://bucket/prefix, "
        "gs://bucket/prefix (default: the environment's RAYSWEEP_STORAGE, or runs).",
    )
    data: DataConfig = Field(description="The images.")
    modes: tuple[ModeName, ...] | None = list_of(None, description="Modes to study (default: what suits each encoder).")
    encoders: tuple[EncoderConfig, ...] = list_of(description="The encoders to compare.")
    search: SearchConfig = Field(default_factory=SearchConfig, description="What to search in each mode.")
    metric: ValidationMetric = Field(
        default="val/accuracy",
        description="What studies are ranked by; trials too, but by val/loss where this is val/accuracy, which many "
        "share.",
    )
    train: TrainConfig = Field(default_factory=TrainConfig, description="Training loop.")
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig, description="Workers, CPUs and GPUs.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="MLflow.")

    _check_modes = field_validator("modes")(without_repeats)

    @field_validator("storage")
    @classmethod
    def _is_a_folder_or_bucket(cls, value: str) -> str:
        scheme, separator, path = value.partition("://")
        if not separator:
            return value
        if scheme not in BUCKETS or not path.strip("/"):
            raise ValueError(f"accepted: a folder, s3://bucket/prefix or gs://bucket/prefix; found {value}")
        if set("?@") & set(path):
            raise ValueError("holds no options and no credentials: they belong into the environment")
        return f"{scheme}://{path.strip('/')}"

    @field_validator("name")
    @classmethod
    def _usable_as_file_name(cls, value: str) -> str:
        if file_name(value) != value:
            raise ValueError(f"becomes a file name: letters, digits and . _ + - only; write {file_name(value)}")
        return value

    @field_validator("encoders")
    @classmethod
    def _each_study_once(cls, value: tuple[EncoderConfig, ...], info: ValidationInfo) -> tuple[EncoderConfig, ...]:
        found = mode_problems(value, info.data["modes"]) if "modes" in info.data else []
        if found:
            raise problems_at(*found)
        return value

    @field_validator("train")
    @classmethod
    def _has_what_is_searched(cls, value: TrainConfig, info: ValidationInfo) -> TrainConfig:
        for mode in MODES.values() if value.augmentation is None and "search" in info.data else ():
            name = "augmentation_strength"
            given = info.data["search"].block(mode).space.get(name)
            if given is not None and given != mode.default_space.get(name):
                searched = f"search.{mode.name}.space.augmentation_strength scales it; leave one of them out"
                raise problems_at((("augmentation",), f"is null, and {searched}"))
        return value

    @property
    def direction(self) -> Direction:
        """Which way the metric gets better."""
        return VALIDATION_METRICS[self.metric]

    def studies(self) -> tuple[StudyConfig, ...]:
        """Lists the studies by shots, then encoder, a probe before its fine-tuning."""
        return list_studies(self.encoders, self.modes, self.data.shots)

    def baselines_of(self, study: StudyConfig) -> tuple[BaselineConfig, ...]:
        """Lists the baselines on the features of a study; none when the study reads no features."""
        block = self.search.block(study.mode)
        baselines = getattr(block, "baselines", ())
        return list_baselines(study, baselines, refit=self.refits(study), folds=self.data.folds)

    def refits(self, study: StudyConfig) -> bool:
        """Whether the chosen head of a study, and its baselines, are fitted to train and validation before the test.

        Few-shot ones never are: the number of their images is what they are about.
        """
        return study.shots == "all" and getattr(self.search.block(study.mode), "refit", False)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks an experiment file.

    Args:
        path: The YAML file.
        overrides: Settings `a.b.c=value` that replace what the file says; an index names an entry of a list.

    Raises:
        ConfigError: the file is wrong; the message has one line for each problem.
    """
    file = with_defaults(with_overrides(read_yaml(Path(path)), overrides), _environment())
    try:
        experiment = Experiment.model_validate({"name": file_name(Path(path).stem), **file.data})
    except ValidationError as error:
        raise config_error(file, [*file.problems, *explain(error, file, experiment_schema())]) from None
    if file.problems:
        raise config_error(file, file.problems)
    return experiment


def _environment() -> dict[str, tuple[Any, str]]:
    """Returns the keys that the environment sets, each with its value and the name of its variable."""
    found = {}
    for key, (name, kind) in ENVIRONMENT.items():
        if text := os.environ.get(name, "").strip():
            value: str | float = text
            with suppress(ValueError):  # the validation explains better what is wrong
                value = kind(text)
            found[key] = value, f"{name} of the environment"
    return found


def experiment_schema() -> dict[str, Any]:
    """Returns the JSON schema of an experiment file, for editors."""
    schema = _without_noise(Experiment.model_json_schema())
    schema["required"].remove("name")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "raysweep experiment", **schema}


def _without_noise(node: Any) -> Any:
    # Pydantic gives every key a title that repeats the key; an editor would show it above the description.
    if isinstance(node, list):
        return [_without_noise(child) for child in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_noise(child) for key, child in node.items() if key != "title"}


def resolved_yaml(experiment: Experiment) -> str:
    """Writes an experiment as YAML with every default; that YAML loads as an equal experiment."""
    return dump_yaml(json.loads(experiment.model_dump_json()))
