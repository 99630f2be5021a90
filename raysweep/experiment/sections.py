"""What all sections of the experiment file share, and the sections about data, training, resources and tracking."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from raysweep.errors import DataError, has_secrets
from raysweep.experiment.explain import problems_at
from raysweep.storage.filesystems import REMOTE_SCHEMES, split_uri

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
Shots = Count | Literal["all"]

_MLFLOW_SECRETS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"


class Section(BaseModel):
    """The base of every section: frozen, strictly typed, and without keys that it does not declare."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def list_of(default: Any = ..., *, min_length: int | None = 1, **described: Any) -> Any:
    """Returns a field that is a list in YAML and a tuple in the model; only here is the type not strict."""
    return Field(default=default, strict=False, min_length=min_length, **described)


def without_repeats(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Refuses a list that has an entry twice; a field validator."""
    for index, value in enumerate(values or ()):
        if value in (values or ())[:index]:
            raise problems_at(((index,), f"{value} is listed twice"))
    return values


def without_credentials(value: str | None) -> str | None:
    """Refuses a URI that holds credentials, because URIs are logged; a field validator."""
    if value and "://" in value:
        try:
            split_uri(value)
        except DataError as error:
            raise ValueError(str(error)) from None
        if has_secrets(value):
            raise ValueError("holds credentials, and is logged; they belong into the environment")
    return value


class GroupPattern(Section):
    """How the paths of images name their groups."""

    pattern: Text = Field(
        description="Regular expression that is searched in each image's path below the source; its group in brackets, "
        "or all that it matches, names the group, as in patient_([0-9]+)."
    )

    @field_validator("pattern")
    @classmethod
    def _is_an_expression(cls, value: str) -> str:
        try:
            num_groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"no regular expression: {error}; found {value}") from None
        if num_groups > 1:
            raise ValueError(f"one group in brackets or none is accepted, or (?:...); found {num_groups} in {value}")
        return value


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
    image_folder: Text | None = Field(
        default=None,
        description="Tables: folder of the images, relative to the table's folder, or absolute, or a URI (default: the "
        "table's folder).",
    )
    image_suffix: Text | None = Field(
        default=None,
        description="Tables: suffix of the images, such as .png, where the rows have none or another; several as "
        ".jpg, .png.",
    )
    image_prefix: Text | None = Field(
        default=None, description="Tables: start of the rows' paths that is cut off, such as /kaggle/input/leaves/."
    )
    allow_images_from: tuple[Text, ...] = list_of(
        (),
        min_length=0,
        description="Tables: other buckets, hub datasets or folders that rows may name, such as s3://bucket.",
    )
    group: Text | GroupPattern | None = Field(
        default=None,
        description="Images that belong together, such as those of one patient, and stay in one split: column of a "
        "table, or {pattern: regular expression} for the paths of the images.",
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
    max_megapixels: float = Field(
        default=50, gt=0, le=178, description="Pixels of the largest image, in millions; larger ones are set aside."
    )
    bit_depth: int | None = Field(
        default=None,
        ge=8,
        le=32,
        description="Bits of images that store more than 8 bits a channel: 12 if 4095 is white (default: judged by the "
        "largest value in a sample).",
    )
    shots: tuple[Shots, ...] = list_of(
        ("all",), description="Training images per class, numbers or all; each value is a study of its own."
    )
    few_shot_seeds: Count = Field(
        default=5, description="Random draws of each few-shot training set; figures are means over them."
    )

    folds: Annotated[int, Field(ge=2, le=20)] | None = Field(
        default=None,
        description="Folds of all images, whatever their split, that also judge knn, ridge and logistic by nested "
        "cross-validation: for small data. Studies with trials are not judged by folds (default: none).",
    )

    _check_shots = field_validator("shots")(without_repeats)

    _check_source = field_validator("source", "image_folder")(without_credentials)

    @field_validator("image_suffix")
    @classmethod
    def _is_a_suffix(cls, value: str | None) -> str | None:
        for suffix in [] if value is None else value.split(","):
            if "." not in suffix or set(suffix.strip()) & set("/\\ "):
                raise ValueError(f"accepted: the end of the files' names, such as .png or .jpg, .png; found {value}")
        return value

    @field_validator("allow_images_from")
    @classmethod
    def _are_places(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        accepted = "s3://bucket, gs://bucket, hf://datasets/<organisation>/<name>, or a local folder"
        for index, value in enumerate(values):
            try:
                scheme, path, _ = split_uri(value) if "://" in value else ("", value, "")
            except DataError as error:
                raise problems_at(((index,), str(error))) from None
            if scheme not in ("", *REMOTE_SCHEMES) or not path.strip("/"):
                raise problems_at(((index,), f"accepted: {accepted}; found {value}"))
        return values

    @field_validator("folds")
    @classmethod
    def _are_of_all_images(cls, value: int | None, info: ValidationInfo) -> int | None:
        shots = info.data.get("shots", ("all",))
        if value is not None and "all" not in shots:
            raise ValueError(
                f"folds are of all images, and shots lists {', '.join(map(str, shots))}; add all, or leave folds out"
            )
        return value

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
        default="auto",
        description="auto: bf16 where that is faster; on CPUs, fine_tune takes the precision of its features, and "
        "from_scratch stays fp32.",
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="Epochs without a better validation score before a trial ends (default: none, since the learning "
        "rate gets small only at the end of its schedule).",
    )
    augmentation: AugmentationConfig | None = Field(
        default_factory=AugmentationConfig, description="null switches it off."
    )
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    gradient_clip: float = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    label_smoothing: float = Field(default=0, ge=0, lt=1, description="Share of a label given to all classes alike.")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | Literal["auto"] | None = Field(
        default="auto",
        description="Evaluate and keep a moving average of the weights over the steps, with this decay (auto: 0.98 to "
        "0.999 by number of steps in fine_tune, none in from_scratch); null: none.",
    )
    freeze_batch_norm: bool = Field(
        default=True,
        description="fine_tune: keep the batch-norm statistics of pretraining, which the head was fitted to.",
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
    max_failures: int = Field(
        default=3,
        ge=0,
        description="Times that trials run again, with the same settings, after their process or node was lost.",
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
        if value is not None and has_secrets(value):
            variables = "PGPASSWORD" if info.field_name == "optuna_uri" else _MLFLOW_SECRETS
            raise ValueError(f"holds a password or token, and is logged; put it into the environment: {variables}")
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
