"""The `search` section: how the settings of each mode are picked, and what runs beside them."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from raysweep.experiment.space import Dimension, Mode, Sampler, Scheduler, SpaceOf, complete_space, num_grid_points
from raysweep.experiment.studies import Count, Section, list_of, without_repeats

Baseline = Literal["knn", "ridge"]

MAX_GRID_POINTS = 10_000


def _by_mode() -> Any:
    # Stands for "not given" until SearchBlock puts the mode's own number, or the size of the grid, in its place.
    return None


def _space() -> Any:
    return Field(default_factory=dict, description="Dimensions searched; those not named keep their default.")


class SearchBlock(Section):
    """The search of one mode."""

    mode: ClassVar[Mode]
    default_num_trials: ClassVar[int]

    sampler: Sampler = Field(
        default="tpe", description="How settings are picked; grid tries every combination of values."
    )
    scheduler: Scheduler = Field(
        default="none", description="Stops bad trials early, comparing them after the same epochs: asha or median."
    )
    space: dict[str, Dimension] = _space()
    num_trials: Count = Field(
        default_factory=_by_mode, description="Settings to try (default: by mode; grid: all of them)."
    )
    time_budget_s: float | None = Field(default=None, gt=0, description="Seconds after which no new trial starts.")
    population: Count | Literal["auto"] = Field(default="auto", description="Heads trained together in one Train run.")

    @field_validator("space")
    @classmethod
    def _complete(cls, value: dict[str, Dimension], info: ValidationInfo) -> dict[str, Dimension]:
        return complete_space(cls.mode, value, info.data.get("sampler", "tpe"), info.data.get("scheduler", "none"))

    @field_validator("num_trials", mode="before")
    @classmethod
    def _count(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("sampler") != "grid" or "space" not in info.data:
            return cls.default_num_trials if value is None else value
        size = num_grid_points(info.data["space"])
        if value is None and size > MAX_GRID_POINTS:
            raise ValueError(f"the grid has {size:,} points: offer fewer values, or say here how many to try")
        return size if value is None else min(value, size) if type(value) is int else value


def _one_at_a_time(value: int | str) -> int | str:
    if value not in ("auto", 1):
        raise ValueError(f"only heads of linear_probe train together, found {value}; leave it out")
    return value


def _none_stopped_alone(value: Any) -> Any:
    if value != "none":
        raise ValueError(f"the heads train together, so that none is stopped alone, found {value}; leave it out")
    return value


class LinearProbeSearch(SearchBlock):
    """The search of linear_probe: a head on frozen features."""

    mode = "linear_probe"
    default_num_trials = 64
    scheduler: Literal["none"] = Field(default="none", description="Heads train together: none is stopped alone.")
    _check_scheduler = field_validator("scheduler", mode="before")(_none_stopped_alone)
    space: Annotated[dict[str, Dimension], SpaceOf("linear_probe")] = Field(
        default={}, description="Dimensions searched; those not named keep their default."
    )
    baselines: tuple[Baseline, ...] = list_of(
        ("knn", "ridge"),
        min_length=None,
        description="Classifiers fitted to the same features without training, a row each beside the probe; may be [].",
    )

    _check_baselines = field_validator("baselines")(without_repeats)


class FineTuneSearch(SearchBlock):
    """The search of fine_tune: every weight, starting from pretrained ones."""

    mode = "fine_tune"
    default_num_trials = 8
    _check_population = field_validator("population")(_one_at_a_time)
    space: Annotated[dict[str, Dimension], SpaceOf("fine_tune")] = Field(
        default={}, description="Dimensions searched; those not named keep their default."
    )


class FromScratchSearch(SearchBlock):
    """The search of from_scratch: every weight, starting from random ones."""

    mode = "from_scratch"
    default_num_trials = 12
    _check_population = field_validator("population")(_one_at_a_time)
    space: Annotated[dict[str, Dimension], SpaceOf("from_scratch")] = Field(
        default={}, description="Dimensions searched; those not named keep their default."
    )


class SearchConfig(Section):
    """One search block a mode."""

    linear_probe: LinearProbeSearch = Field(default_factory=LinearProbeSearch, description="Search of the probes.")
    fine_tune: FineTuneSearch = Field(default_factory=FineTuneSearch, description="Search of fine-tuning.")
    from_scratch: FromScratchSearch = Field(
        default_factory=FromScratchSearch, description="Search of training from scratch."
    )

    def block(self, mode: Mode) -> SearchBlock:
        """Returns the block of one mode."""
        blocks: dict[Mode, SearchBlock] = {
            "linear_probe": self.linear_probe,
            "fine_tune": self.fine_tune,
            "from_scratch": self.from_scratch,
        }
        return blocks[mode]
