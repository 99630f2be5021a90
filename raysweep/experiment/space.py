"""What a search may vary in each mode: the dimensions, their defaults, and the published recommendation.

A dimension is written in YAML as a bare value (fixed), `{low, high, log}` (a range) or `{choices: [...]}`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from raysweep.errors import did_you_mean

Mode = Literal["linear_probe", "fine_tune", "from_scratch"]
Sampler = Literal["tpe", "random", "grid"]
Scheduler = Literal["none", "asha", "median"]
Scalar = int | float | str
Setting = dict[str, Scalar]

MODES: tuple[Mode, ...] = get_args(Mode)
FEATURE_SOURCES = ("cls", "mean", "cls+mean", "projected", "pooler")
NORMALIZATIONS = ("none", "l2", "standardize")


def problems_at(*found: tuple[tuple[str | int, ...], str]) -> ValidationError:
    """Returns one pydantic error carrying several `(path below the current value, message)` problems."""
    details = [
        InitErrorDetails(type=PydanticCustomError("problem", "{message}", {"message": text}), loc=path, input=None)
        for path, text in found
    ]
    return ValidationError.from_exception_data("experiment", details)


def _check_scalar(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise PydanticCustomError("scalar_type", "expected a number or text")
    return value


class _Range(BaseModel):
    """What both ranges share: `low` below `high`, and a logarithm that exists."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    low: float
    high: float
    log: bool = False

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.low == self.high:
            raise ValueError(f"low and high are both {self.low:g}: for one fixed value write just {self.low:g}")
        if self.low > self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.log and self.low <= 0:
            raise ValueError(f"log: true needs low above 0, found {self.low:g}")
        return self


class FloatRange(_Range):
    """Any number from `low` to `high`, both included; sampled by its logarithm when `log`."""


class IntRange(_Range):
    """Any whole number from `low` to `high`, both included; sampled by its logarithm when `log`."""

    low: int
    high: int


class Choices(BaseModel):
    """One of a few values; a single choice is a fixed value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    choices: tuple[Annotated[Scalar, BeforeValidator(_check_scalar)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_repeats(self) -> Self:
        repeated = [value for value in dict.fromkeys(self.choices) if self.choices.count(value) > 1]
        if repeated:
            raise problems_at((("choices",), f"each choice may stand once, found {repeated[0]!r} again"))
        return self


Dimension = FloatRange | IntRange | Choices


@dataclass(frozen=True)
class _Rule:
    """What one dimension accepts: the words listed, or else numbers of a kind within bounds."""

    description: str
    words: tuple[str, ...] = ()
    whole: bool = False
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def complaint(self, value: Scalar) -> str | None:
        """Returns what is wrong with one value, None when nothing is."""
        if self.words:
            return None if value in self.words else f"unknown value {value!r}; {did_you_mean(str(value), self.words)}"
        if isinstance(value, str) or (self.whole and not isinstance(value, int)):
            return f"expected a {'whole ' * self.whole}number, found {value!r}"
        if value <= self.above:
            return f"must be above {self.above:g}, found {value:g}"
        if value < self.at_least:
            return f"must be {self.at_least:g} or more, found {value:g}"
        return f"must be {self.at_most:g} or less, found {value:g}" if value > self.at_most else None

    def json_schema(self) -> dict[str, Any]:
        """Returns the JSON schema of the dimension: bare value, range or choices."""
        value: dict[str, Any] = {"type": "integer" if self.whole else "number"}
        bounds = {"exclusiveMinimum": self.above, "minimum": self.at_least, "maximum": self.at_most}
        value.update({key: bound for key, bound in bounds.items() if math.isfinite(bound)})
        if self.words:
            value = {"enum": list(self.words)}
        forms = [value, _object_schema({"choices": {"type": "array", "items": value, "minItems": 1}}, ["choices"])]
        if not self.words:
            range_keys = {"low": value, "high": value, "log": {"type": "boolean", "default": False}}
            forms.append(_object_schema(range_keys, ["low", "high"]))
        return {"description": self.description, "anyOf": forms}


def _object_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_RULES = {
    "learning_rate": _Rule("Peak learning rate; above 0.", above=0),
    "epochs": _Rule("Passes over the training images, the length of the schedule; 1 or more.", whole=True, at_least=1),
    "weight_decay": _Rule("Decoupled weight decay (AdamW); 0 or more.", at_least=0),
    "layer_decay": _Rule("Learning rate of a block over that of the block above it; in (0, 1].", above=0, at_most=1),
    "augmentation_strength": _Rule(
        "Scales train.augmentation, from 0 (crops of the whole image, no mixing) to 1 (as configured).",
        at_least=0,
        at_most=1,
    ),
    "features": _Rule("Which encoder output the head reads (default: all it has).", words=FEATURE_SOURCES),
    "normalize": _Rule("How features are normalised before the head.", words=NORMALIZATIONS),
}
DIMENSIONS: dict[Mode, tuple[str, ...]] = {
    "linear_probe": ("learning_rate", "epochs", "weight_decay", "features", "normalize"),
    "fine_tune": ("learning_rate", "epochs", "weight_decay", "layer_decay", "augmentation_strength"),
    "from_scratch": ("learning_rate", "epochs", "weight_decay", "layer_decay", "augmentation_strength"),
}


def read_dimension(name: str, value: Any) -> Dimension:
    """Turns what stands in the YAML under one dimension into that dimension.

    Raises:
        ValidationError: every problem with the value, at its path below the dimension.
    """
    rule = _RULES[name]
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if value is None or isinstance(value, list | tuple):
        forms = "a value or {choices: [...]}" if rule.words else "a value, {low, high} or {choices: [...]}"
        hint = f"a list; write {{choices: [{', '.join(map(str, value))}]}}" if value else "nothing"
        raise ValueError(f"expected {forms}, found {hint}")
    if not isinstance(value, Mapping):
        value = {"choices": (value,)}
    if "choices" in value:
        if {"low", "high", "log"} & set(value):
            raise ValueError("give either low and high, or choices, not both")
        return _checked_choices(rule, Choices.model_validate(value))
    if rule.words:
        raise ValueError(f"expected one of {', '.join(rule.words)}, or {{choices: [...]}} with some of them")
    span = (IntRange if rule.whole else FloatRange).model_validate(value)
    found = [((end,), rule.complaint(bound)) for end, bound in (("low", span.low), ("high", span.high))]
    _raise_complaints(found)
    return span


def _checked_choices(rule: _Rule, given: Choices) -> Choices:
    _raise_complaints([(("choices", i), rule.complaint(value)) for i, value in enumerate(given.choices)])
    if rule.words or rule.whole:
        return given
    # 1 and 1.0 must be the same learning rate to the sampler, the cache key and the resolved YAML
    return Choices(choices=tuple(float(value) for value in given.choices))


def _raise_complaints(found: list[tuple[Any, str | None]]) -> None:
    bad = [(path, text) for path, text in found if text]
    if bad:
        raise problems_at(*bad)


@dataclass(frozen=True)
class SpaceOf:
    """Annotates a `dict[str, Dimension]` field so that pydantic reads it by the dimensions of one mode."""

    mode: Mode

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Returns a mapping of optional dimensions, closed to other names."""
        return core_schema.typed_dict_schema(
            {name: core_schema.typed_dict_field(self._reader(name), required=False) for name in _RULES},
            extra_behavior="forbid",
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        """Returns the JSON schema of the mapping."""
        return _object_schema({name: _RULES[name].json_schema() for name in DIMENSIONS[self.mode]}, [])

    def _reader(self, name: str) -> core_schema.CoreSchema:
        def read(value: Any) -> Dimension:
            if name not in DIMENSIONS[self.mode]:
                owner = next(mode for mode in MODES if name in DIMENSIONS[mode])
                raise ValueError(f"{self.mode} has no such dimension; it belongs to {owner}")
            return read_dimension(name, value)

        return core_schema.no_info_plain_validator_function(read)


def default_space(mode: Mode) -> dict[str, Dimension]:
    """Returns what is searched when the experiment names no dimension.

    The probe's `features` is absent: it stands for every source that the encoder has.
    """
    if mode == "linear_probe":
        return {
            "learning_rate": FloatRange(low=1e-4, high=1e-1, log=True),
            "epochs": IntRange(low=5, high=50),
            "weight_decay": FloatRange(low=1e-6, high=1e-1, log=True),
            "normalize": Choices(choices=("none", "standardize")),
        }
    if mode == "fine_tune":
        return {
            "learning_rate": FloatRange(low=1e-6, high=1e-3, log=True),
            "epochs": IntRange(low=3, high=20),
            "weight_decay": Choices(choices=(0.05,)),
            "layer_decay": FloatRange(low=0.65, high=0.95),
        }
    return {
        "learning_rate": FloatRange(low=1e-4, high=1e-2, log=True),
        "epochs": IntRange(low=10, high=60),
        "weight_decay": Choices(choices=(0.05,)),
    }


def recommended(mode: Mode) -> list[Setting]:
    """Returns the published recommendation as concrete settings, the first to be tried first.

    Published: probe 1e-3 to 1e-2 with 10 to 20 epochs; fine-tune 5e-5 to 1e-4 with 3 to 10 epochs.
    """
    if mode == "linear_probe":
        return [
            {"learning_rate": 3e-3, "epochs": 15, "weight_decay": 1e-4, "normalize": "standardize"},
            {"learning_rate": 1e-2, "epochs": 20, "weight_decay": 1e-4, "normalize": "none"},
        ]
    if mode == "fine_tune":
        return [
            {"learning_rate": 1e-4, "epochs": 5, "weight_decay": 0.05, "layer_decay": 0.75},
            {"learning_rate": 5e-5, "epochs": 10, "weight_decay": 0.05, "layer_decay": 0.9},
        ]
    return [{"learning_rate": 1e-3, "epochs": 30, "weight_decay": 0.05}]


def complete_space(
    mode: Mode, given: Mapping[str, Dimension], sampler: Sampler, scheduler: Scheduler = "none"
) -> dict[str, Dimension]:
    """Fills the dimensions that the experiment does not name; a grid gets values instead of ranges of numbers.

    A scheduler gets one number of epochs, the largest that is searched by default.

    Raises:
        ValidationError: a grid is asked for and a dimension given is a range of real numbers, or a scheduler and
            several numbers of epochs.
    """
    space = {**default_space(mode), **given}
    if scheduler != "none":
        space["epochs"] = _one_number_of_epochs(space["epochs"], scheduler, is_given="epochs" in given)
    if sampler == "grid":
        hint = "a grid needs values: write {choices: [...]}"
        _raise_complaints([((name,), hint) for name, dimension in given.items() if isinstance(dimension, FloatRange)])
        middle = recommended(mode)[0]
        for name in space.keys() - given.keys():
            if not isinstance(space[name], Choices):
                space[name] = Choices(choices=(middle[name],))
    return {name: space[name] for name in DIMENSIONS[mode] if name in space}


def _one_number_of_epochs(epochs: Dimension, scheduler: Scheduler, *, is_given: bool) -> Choices:
    # With schedules of several lengths, the learning rates at one epoch could not be compared.
    if isinstance(epochs, Choices) and len(epochs.choices) == 1:
        return epochs
    top = max(epochs.choices, key=float) if isinstance(epochs, Choices) else epochs.high
    if is_given:
        hint = f"write the one number that every trial would train for, as in epochs: {top:g}"
        raise problems_at((("epochs",), f"scheduler: {scheduler} compares trials epoch by epoch; {hint}"))
    return Choices(choices=(top,))


def fit_to_space(setting: Mapping[str, Scalar], space: Mapping[str, Dimension]) -> Setting:
    """Moves a setting into a space, so that the search can be started from it.

    Numbers go to the nearest value allowed, words not offered and choices not set to the first choice. Ranges that
    the setting does not name are left out, for the sampler to draw; names that the space lacks are dropped.
    """
    fitted = {name: _nearest(setting.get(name), dimension) for name, dimension in space.items()}
    return {name: value for name, value in fitted.items() if value is not None}


def _nearest(value: Scalar | None, dimension: Dimension) -> Scalar | None:
    if isinstance(dimension, Choices):
        numbers = [choice for choice in dimension.choices if not isinstance(choice, str)]
        if numbers and isinstance(value, int | float):
            return min(numbers, key=lambda choice: abs(choice - value))
        return value if value is not None and value in dimension.choices else dimension.choices[0]
    if value is None or isinstance(value, str):
        return None
    within = min(max(value, dimension.low), dimension.high)
    return round(within) if isinstance(dimension, IntRange) else within


def _grid_values(dimension: Dimension) -> Sequence[Scalar]:
    if isinstance(dimension, Choices):
        return dimension.choices
    assert isinstance(dimension, IntRange), "complete_space leaves no range of real numbers in a grid"
    return range(dimension.low, dimension.high + 1)


def num_grid_points(space: Mapping[str, Dimension]) -> int:
    """Returns how many settings `grid` would list."""
    return math.prod(len(_grid_values(dimension)) for dimension in space.values())


def grid(space: Mapping[str, Dimension]) -> list[Setting]:
    """Lists every setting of a space completed for the grid sampler, the last dimension varying fastest."""
    values = [_grid_values(dimension) for dimension in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]
