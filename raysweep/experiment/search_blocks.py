"""The `search` section: per mode, what is searched, how settings are picked, how many trials train together."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import core_schema

from raysweep.errors import ConfigError, did_you_mean
from raysweep.experiment.explain import problems_at
from raysweep.experiment.modes import MODES, Mode
from raysweep.experiment.sections import Count, Section, list_of, without_repeats
from raysweep.experiment.space import (
    RULES,
    Choices,
    Dimension,
    FloatRange,
    Sampler,
    Scheduler,
    num_grid_points,
    object_schema,
    raise_complaints,
    read_dimension,
)
from raysweep.experiment.studies import BASELINES, Baseline

MAX_GRID_POINTS = 10_000

MAX_POPULATION = 64
MIN_POPULATION = 8
POPULATIONS_PER_STUDY = 4


@dataclass(frozen=True, slots=True)
class SpaceOf:
    """Annotates a `dict[str, Dimension]` field; pydantic then accepts the dimensions of one mode."""

    mode: Mode

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Returns a mapping in which every dimension is optional and no other name is accepted."""
        return core_schema.typed_dict_schema(
            {name: core_schema.typed_dict_field(self._reader(name), required=False) for name in RULES},
            extra_behavior="forbid",
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the JSON schema of the mapping."""
        return object_schema({name: RULES[name].json_schema() for name in self.mode.dimensions}, [])

    def _reader(self, name: str) -> core_schema.CoreSchema:
        def read(value: Any) -> Dimension:
            if name not in self.mode.dimensions:
                owner = next(mode.name for mode in MODES.values() if name in mode.dimensions)
                raise ValueError(f"{self.mode.name} has no such dimension; it belongs to {owner}")
            return read_dimension(name, value)

        return core_schema.no_info_plain_validator_function(read)


def complete_space(
    mode: Mode, given: Mapping[str, Dimension], sampler: Sampler, scheduler: Scheduler = "none"
) -> dict[str, Dimension]:
    """Adds the default of every dimension that the experiment does not name.

    For a grid, a default range becomes one value, the recommended one. For a scheduler, a default range of epochs
    becomes its largest number.

    Raises:
        ValidationError: a given dimension is a range of real numbers and the sampler is a grid, or several numbers of
            epochs are given and there is a scheduler.
    """
    space = {**mode.default_space, **given}
    if scheduler != "none":
        space["epochs"] = _one_number_of_epochs(space["epochs"], scheduler, is_given="epochs" in given)
    if sampler == "grid":
        hint = "a grid needs values: write {choices: [...]}"
        raise_complaints(*(((name,), hint) for name, dimension in given.items() if isinstance(dimension, FloatRange)))
        for name in space.keys() - given.keys():
            if not isinstance(space[name], Choices):
                space[name] = Choices(choices=(mode.recommendations[0][name],))
    return {name: space[name] for name in mode.dimensions if name in space}


def _one_number_of_epochs(epochs: Dimension, scheduler: Scheduler, *, is_given: bool) -> Choices:
    # If schedules had several lengths, the learning rates after one epoch could not be compared.
    if isinstance(epochs, Choices) and len(epochs.choices) == 1:
        return epochs
    top = max(epochs.choices, key=float) if isinstance(epochs, Choices) else epochs.high
    if is_given:
        hint = f"write the one number that every trial would train for, as in epochs: {top:g}"
        raise problems_at((("epochs",), f"scheduler: {scheduler} compares trials epoch by epoch; {hint}"))
    return Choices(choices=(top,))


def _by_mode() -> Any:
    # Means "not given"; SearchBlock replaces it by the default of the mode or by the size of the grid.
    return None


def _space_field() -> Any:
    return Field(default={}, description="Dimensions searched; those not named keep their default.")


class SearchBlock(Section):
    """The search of one mode."""

    mode: ClassVar[Mode]

    sampler: Sampler = Field(
        default="tpe", description="How settings are picked; grid tries every combination of values."
    )
    scheduler: Scheduler = Field(
        default="none", description="Stops bad trials early, comparing them after the same epochs: asha or median."
    )
    space: dict[str, Dimension] = _space_field()
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
            return cls.mode.num_trials if value is None else value
        size = num_grid_points(info.data["space"])
        if value is None and size > MAX_GRID_POINTS:
            raise ValueError(f"the grid has {size:,} points: offer fewer values, or say here how many to try")
        return size if value is None else min(value, size) if type(value) is int else value

    @field_validator("population")
    @classmethod
    def _one_unless_together(cls, value: int | str) -> int | str:
        if not cls.mode.trains_together and value not in ("auto", 1):
            together = ", ".join(mode.name for mode in MODES.values() if mode.trains_together)
            raise ValueError(f"only heads of {together} train together, found {value}; leave it out")
        return value


def _none_stopped_alone(value: Any) -> Any:
    if value != "none":
        raise ValueError(f"the heads train together, so that none is stopped alone, found {value}; leave it out")
    return value


class LinearProbeSearch(SearchBlock):
    """The search of linear_probe: a head on frozen features."""

    mode = MODES["linear_probe"]
    scheduler: Literal["none"] = Field(default="none", description="Heads train together: none is stopped alone.")
    _check_scheduler = field_validator("scheduler", mode="before")(_none_stopped_alone)
    space: Annotated[dict[str, Dimension], SpaceOf(mode)] = _space_field()
    baselines: tuple[Baseline, ...] = list_of(
        BASELINES,
        min_length=None,
        description="Classifiers fitted to the same features without training, a row each beside the probe; may be [].",
    )

    refit: bool = Field(
        default=True,
        description="Fit the chosen head, and baselines, to train and validation images together before the test; "
        "few-shot ones never.",
    )

    _check_baselines = field_validator("baselines")(without_repeats)


class FineTuneSearch(SearchBlock):
    """The search of fine_tune: every weight, starting from pretrained ones."""

    mode = MODES["fine_tune"]
    space: Annotated[dict[str, Dimension], SpaceOf(mode)] = _space_field()


class FromScratchSearch(SearchBlock):
    """The search of from_scratch: every weight, starting from random ones."""

    mode = MODES["from_scratch"]
    space: Annotated[dict[str, Dimension], SpaceOf(mode)] = _space_field()


class SearchConfig(Section):
    """One search block a mode."""

    linear_probe: LinearProbeSearch = Field(default_factory=LinearProbeSearch, description="Search of the probes.")
    fine_tune: FineTuneSearch = Field(default_factory=FineTuneSearch, description="Search of fine-tuning.")
    from_scratch: FromScratchSearch = Field(
        default_factory=FromScratchSearch, description="Search of training from scratch."
    )

    def block(self, mode: Mode) -> SearchBlock:
        """Returns the block of one mode, which has the mode's name as its key."""
        block = getattr(self, mode.name)
        assert isinstance(block, SearchBlock)
        return block


def study_space(
    block: SearchBlock, sources: Sequence[str], encoder_name: str, augments: bool = True
) -> dict[str, Dimension]:
    """Returns the search space of a study: the block's, with `features` limited to what the encoder has.

    Args:
        block: The search of the study's mode.
        sources: The encoder's feature sources, its default first.
        encoder_name: The encoder's name, for the error message.
        augments: Whether training images are augmented at all, so that the strength has an effect.

    Raises:
        ConfigError: the encoder has none of the feature sources asked for.
    """
    space = {name: one for name, one in block.space.items() if augments or name != "augmentation_strength"}
    if "features" not in block.mode.dimensions:
        return space
    if "features" not in space:
        # A grid tries only the default source, so that its size is the one that the experiment file says.
        space["features"] = Choices(choices=tuple(sources[:1] if block.sampler == "grid" else sources))
        return space
    wanted = space["features"]
    assert isinstance(wanted, Choices)
    offered = tuple(source for source in wanted.choices if source in sources)
    if not offered:
        asked, hint = ", ".join(map(str, wanted.choices)), did_you_mean(str(wanted.choices[0]), sources)
        raise ConfigError(f"search.{block.mode.name}.space.features: {encoder_name} has no {asked}; {hint}")
    return space | {"features": Choices(choices=offered)}


def population_size(block: SearchBlock) -> int:
    """Returns how many trials train together.

    `auto` splits the trials of a study into several Populations, so that later ones learn from earlier ones.
    """
    if not block.mode.trains_together:
        return 1
    if block.population != "auto":
        return min(block.population, block.num_trials)
    wanted = math.ceil(block.num_trials / POPULATIONS_PER_STUDY)
    return min(max(wanted, MIN_POPULATION), MAX_POPULATION, block.num_trials)
