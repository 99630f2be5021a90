"""The modes: how a classifier comes from an encoder. Everything that differs between modes is a field of `Mode`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raysweep.experiment.space import Choices, Dimension, FloatRange, IntRange, Setting

ModeName = Literal["linear_probe", "fine_tune", "from_scratch"]

_HEAD_DIMENSIONS = ("learning_rate", "epochs", "weight_decay", "features", "normalize")
_ALL_DIMENSIONS = ("learning_rate", "epochs", "weight_decay", "layer_decay", "augmentation_strength")


@dataclass(frozen=True, slots=True)
class Mode:
    """What is known of one mode.

    Attributes:
        name: As the experiment file spells it.
        reads: What training reads: cached outputs of the frozen encoder, or decoded images.
        trains: Which weights are trained: the head's, or all.
        trains_together: Whether trials share one Train run as a Population; otherwise each trial has its own run.
        trains_every_draw: Whether a few-shot study trains on every random draw of its images, or on the first only.
        starts_from: The weights before the first step. `best_head` is the pretrained encoder with the best head of its
            linear probe and baselines, or with a new head where none of them ran.
        dimensions: What a search may vary, in the order of the resolved YAML.
        default_space: What is searched when the experiment names no dimension. `features` stands in none of them: it
            defaults to every feature source that the encoder has.
        recommendations: Settings that are tried first, in this order.
        num_trials: How many settings are tried when the experiment does not say.
    """

    name: ModeName
    reads: Literal["features", "pixels"]
    trains: Literal["head", "all"]
    trains_together: bool
    trains_every_draw: bool
    starts_from: Literal["pretrained", "best_head", "random"]
    dimensions: tuple[str, ...]
    default_space: Mapping[str, Dimension]
    recommendations: tuple[Setting, ...]
    num_trials: int

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def starts_from_random(self) -> bool:
        """Whether the mode trains random weights; every other mode starts from the encoder's own weights."""
        return self.starts_from == "random"


# In the order in which they run.
MODES: Mapping[ModeName, Mode] = {
    mode.name: mode
    for mode in (
        Mode(
            name="linear_probe",
            reads="features",
            trains="head",
            trains_together=True,
            trains_every_draw=True,
            starts_from="pretrained",
            dimensions=_HEAD_DIMENSIONS,
            default_space={
                "learning_rate": FloatRange(low=1e-4, high=1e-1, log=True),
                "epochs": IntRange(low=5, high=50),
                "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
                "normalize": Choices(choices=("none", "standardize")),
            },
            # Published: learning rates of 1e-3 to 1e-2, 10 to 20 epochs.
            recommendations=(
                {"learning_rate": 3e-3, "epochs": 15, "weight_decay": 1e-4, "normalize": "standardize"},
                {"learning_rate": 1e-2, "epochs": 20, "weight_decay": 1e-4, "normalize": "none"},
            ),
            num_trials=64,
        ),
        Mode(
            name="fine_tune",
            reads="pixels",
            trains="all",
            trains_together=False,
            trains_every_draw=False,
            starts_from="best_head",
            dimensions=_ALL_DIMENSIONS,
            default_space={
                "learning_rate": FloatRange(low=1e-6, high=1e-3, log=True),
                "epochs": IntRange(low=3, high=20),
                "weight_decay": Choices(choices=(0.05,)),
                "layer_decay": FloatRange(low=0.65, high=0.95),
                "augmentation_strength": FloatRange(low=0, high=1),
            },
            # Published rates are 5e-5 to 1e-4, with crops, for thousands of images. With fewer, these leave the start
            # of a good probe less (docs/decisions/0032).
            recommendations=(
                {
                    "learning_rate": 3e-6,
                    "epochs": 10,
                    "weight_decay": 0.05,
                    "layer_decay": 0.9,
                    "augmentation_strength": 0.0,
                },
                {
                    "learning_rate": 3e-5,
                    "epochs": 10,
                    "weight_decay": 0.05,
                    "layer_decay": 0.75,
                    "augmentation_strength": 0.0,
                },
            ),
            num_trials=8,
        ),
        Mode(
            name="from_scratch",
            reads="pixels",
            trains="all",
            trains_together=False,
            trains_every_draw=False,
            starts_from="random",
            dimensions=_ALL_DIMENSIONS,
            default_space={
                "learning_rate": FloatRange(low=1e-4, high=1e-2, log=True),
                "epochs": IntRange(low=10, high=60),
                "weight_decay": Choices(choices=(0.05,)),
            },
            recommendations=({"learning_rate": 1e-3, "epochs": 30, "weight_decay": 0.05},),
            num_trials=12,
        ),
    )
}
