"""The experiment file: one YAML in, one frozen `Experiment` out, with every default filled in."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from raysweep.experiment.explain import explain
from raysweep.experiment.search_blocks import (
    FineTuneSearch,
    FromScratchSearch,
    LinearProbeSearch,
    SearchBlock,
    SearchConfig,
)
from raysweep.experiment.space import Mode, problems_at
from raysweep.experiment.studies import (
    Count,
    EncoderConfig,
    Fraction,
    Section,
    Shots,
    StudyConfig,
    Text,
    list_of,
    list_studies,
    mode_problems,
    without_credentials,
    without_repeats,
)
from raysweep.experiment.yaml_file import config_error, dump_yaml, read_yaml, with_defaults, with_overrides
from raysweep.filesystems import BUCKETS
from raysweep.paths import file_name

__all__ = [
    "AugmentationConfig",
    "DataConfig",
    "EncoderConfig",
    "Experiment",
    "FineTuneSearch",
    "FromScratchSearch",
    "LinearProbeSearch",
    "ResourcesConfig",
    "SearchBlock",
    "SearchConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
    "experiment_schema",
    "load_experiment",
    "resolved_yaml",
]


# Where a key that the file leaves open is looked for, and what is read there: these say what a machine or cluster is.
ENVIRONMENT: dict[str, tuple[str, type[str] | type[float]]] = {
    "storage": ("RAYSWEEP_STORAGE", str),
    "tracking.uri": ("MLFLOW_TRACKING_URI", str),
    "tracking.optuna_uri": ("RAYSWEEP_OPTUNA_URI", str),
    "resources.wait_for_nodes_s": ("RAYSWEEP_WAIT_FOR_NODES_S", float),
}
PASSWORDS = "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD"


class DataConfig(Section):
    """Where the images are, and how they are split."""

    source: Text = Field(
        description="Folder (split/class/*.jpg or class/*.jpg), .csv .tsv .parquet .jsonl, s3:// gs:// hf:// URI, or "
        "sklearn://digits. A local path is relative to the working directory."
    )
    image: Text | None = Field(
        default=None, description="Tables: column with a path, bytes or {bytes, path} (default: found)."
    )
    label: Text | None = Field(
        default=None, description="Tables: column with the class, text or integer (default: found)."
    )
    split: Text | None = Field(
        default="split", description="Tables: column with train/validation/test, used where present."
    )
    validation_fraction: Fraction = Field(
        default=0.1, description="Taken from train, stratified, when there is no validation."
    )
    test_fraction: Fraction = Field(
        default=0.2, description="Taken from train, stratified, when there is no test split."
    )
    max_bad_fraction: float = Field(
        default=0.01, ge=0, le=1, description="Share of unreadable images that stops the sweep."
    )
    shots: tuple[Shots, ...] = list_of(
        ("all",), description="Training images per class, numbers or all; each value is a study of its own."
    )
    few_shot_seeds: Count = Field(
        default=5, description="Random draws of each few-shot training set; figures are means over them."
    )

    _check_shots = field_validator("shots")(without_repeats)

    _check_source = field_validator("source")(without_credentials)

    @field_validator("test_fraction")
    @classmethod
    def _leave_something_to_train_on(cls, value: float, info: ValidationInfo) -> float:
        validation = info.data.get("validation_fraction", 0)
        if validation + value >= 1:
            raise ValueError(f"with validation_fraction ({validation:g}) it must stay below 1, found {value:g}")
        return value


class AugmentationConfig(Section):
    """Random changes to training images; linear probes see none."""

    min_crop_scale: float = Field(default=0.7, gt=0, le=1, description="Smallest share of the image that a crop keeps.")
    horizontal_flip: bool = Field(default=True, description="Mirror half of the images.")
    mixup: float = Field(default=0, ge=0, description="Alpha of mixup, blends of two images and their labels; 0: off.")
    cutmix: float = Field(
        default=0, ge=0, description="Alpha of CutMix, a box out of another image; with mixup half of the images each."
    )


class TrainConfig(Section):
    """What every training loop shares."""

    batch_size: Count = Field(default=64, description="Images a step, over all workers together.")
    micro_batch_size: Count | None = Field(
        default=None,
        description="Images that a worker trains on at once, accumulating gradients over its share of a step (default: "
        "the whole share; halved when a GPU runs out of memory).",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 where that is faster; training on CPUs stays fp32."
    )
    early_stopping_patience: Count = Field(
        default=5, description="Epochs without a better validation score before stopping."
    )
    augmentation: AugmentationConfig | None = Field(
        default_factory=AugmentationConfig, description="null switches it off."
    )
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    label_smoothing: float = Field(default=0, ge=0, lt=1, description="Share of a label given to all classes alike.")
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Keep a moving average of the weights over the steps, with this decay (0.999).",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute activations twice instead of keeping them: less memory, slower; for encoders that can.",
    )
    compile: bool = Field(default=False, description="Compile the model with torch.compile: worth it for long trials.")


class ResourcesConfig(Section):
    """What one training run takes of the machine or cluster."""

    num_workers: Count = Field(default=1, description="Data-parallel workers of one training run.")
    use_gpu: bool | Literal["auto"] = Field(default="auto", description="auto: when the cluster has one.")
    cpus_per_worker: Count = Field(default=1, description="CPUs that a worker holds.")
    gpus_per_worker: float = Field(
        default=1,
        gt=0,
        le=1,
        description="Share of a GPU that a worker holds when GPUs are used: 1, or 0.25 for four trials on one GPU.",
    )
    placement: Literal["PACK", "SPREAD"] = Field(
        default="PACK", description="Workers of one training run on as few nodes as may be, or on as many."
    )
    wait_for_nodes_s: float = Field(
        default=0,
        ge=0,
        description="Seconds to wait for a cluster's autoscaler to bring what a training run lacks (or the "
        "environment's RAYSWEEP_WAIT_FOR_NODES_S); 0: what is there must do.",
    )
    max_concurrent_trials: Count | Literal["auto"] = Field(default="auto", description="auto: as many as fit.")
    max_concurrent_studies: Count | Literal["auto"] = Field(
        default="auto", description="Studies side by side; auto: as many as fit."
    )
    feature_memory_gb: float = Field(
        default=4, gt=0, description="Cached features a worker keeps in memory, in GB; more are read as needed."
    )
    pixel_disk_gb: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="Disk for cached pixels, in GB; more are decoded anew in every epoch (auto: 0.8 of what is free).",
    )


class TrackingConfig(Section):
    """Where MLflow keeps the runs."""

    uri: Text = Field(
        default="sqlite:///mlflow.db", description="MLflow tracking URI (or the environment's MLFLOW_TRACKING_URI)."
    )
    experiment: Text | None = Field(default=None, description="MLflow experiment (default: the experiment's name).")
    register_model: Text | None = Field(
        default=None, description="Name under which the best model by validation is registered."
    )

    optuna_uri: Text | None = Field(
        default=None,
        description="PostgreSQL database of Optuna's studies, postgresql://user@host/name, its password in PGPASSWORD "
        "(default: the environment's RAYSWEEP_OPTUNA_URI, or a journal in the storage).",
    )

    @field_validator("uri", "optuna_uri")
    @classmethod
    def _holds_no_password(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (urlsplit(value).password is not None or "password" in urlsplit(value).query):
            variables = "PGPASSWORD" if info.field_name == "optuna_uri" else PASSWORDS
            raise ValueError(f"holds a password, and is logged; put it into the environment: {variables}")
        return value

    @field_validator("optuna_uri")
    @classmethod
    def _is_postgresql(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("postgresql://"):
            raise ValueError(f"accepted: postgresql://user@host:port/name, or nothing for a journal; found {value}")
        return value

    @field_validator("register_model")
    @classmethod
    def _can_be_registered(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or set(value) & set("/:")):
            raise ValueError(f"a registered model's name holds no '/' and no ':', found {value}")
        return value


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
    modes: tuple[Mode, ...] | None = list_of(None, description="Modes to study (default: what suits each encoder).")
    encoders: tuple[EncoderConfig, ...] = list_of(description="The encoders to compare.")
    search: SearchConfig = Field(default_factory=SearchConfig, description="What to search in each mode.")
    metric: Literal["val/accuracy", "val/macro_f1", "val/loss"] = Field(
        default="val/accuracy", description="What trials are ranked by."
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
            raise ValueError(f"holds no options and no credentials: they belong into the environment; found {value}")
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
        for mode in ("fine_tune", "from_scratch") if value.augmentation is None and "search" in info.data else ():
            if "augmentation_strength" in info.data["search"].block(mode).space:
                searched = f"search.{mode}.space.augmentation_strength scales it; leave one of them out"
                raise problems_at((("augmentation",), f"is null, and {searched}"))
        return value

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Which way the metric gets better."""
        return "minimize" if self.metric == "val/loss" else "maximize"

    def studies(self) -> tuple[StudyConfig, ...]:
        """Lists the studies by shots, then encoder, a probe before its fine-tuning."""
        return list_studies(self.encoders, self.modes, self.data.shots)


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads and checks an experiment file.

    Args:
        path: the YAML file.
        overrides: `a.b.c=value` settings that replace what the file says; entries of lists by index.

    Raises:
        ConfigError: everything that is wrong with the file, one line each.
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
    """What the environment answers: by key a value, and the name of its variable."""
    found = {}
    for key, (name, kind) in ENVIRONMENT.items():
        if text := os.environ.get(name, "").strip():
            value: str | float = text
            with suppress(ValueError):  # the schema says better what is wrong
                value = kind(text)
            found[key] = value, f"{name} of the environment"
    return found


def experiment_schema() -> dict[str, Any]:
    """Returns the JSON schema of an experiment file, for editors."""
    schema = _without_noise(Experiment.model_json_schema())
    schema["required"].remove("name")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "raysweep experiment", **schema}


def _without_noise(node: Any) -> Any:
    # Pydantic titles every key with the key itself; an editor would show that above the description.
    if isinstance(node, list):
        return [_without_noise(child) for child in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_noise(child) for key, child in node.items() if key != "title"}


def resolved_yaml(experiment: Experiment) -> str:
    """Writes an experiment with every default filled in; loading it gives an equal experiment."""
    return dump_yaml(json.loads(experiment.model_dump_json()))
