"""The dimensions that a search may vary: how they are read, what each accepts, and how a grid lists them.

A dimension is written in YAML as a bare value (fixed), `{low, high, log}` (a range) or `{choices: [...]}`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from raysweep.encoders.families import FEATURE_SOURCES, NORMALIZATIONS
from raysweep.errors import did_you_mean
from raysweep.experiment.explain import problems_at

Sampler = Literal["tpe", "random", "grid"]
Scheduler = Literal["none", "asha", "median"]
Scalar = int | float | str
Setting = dict[str, Scalar]


def _check_scalar(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise PydanticCustomError("scalar_type", "expected a number or text")
    return value


class _Range(BaseModel):
    """What both ranges share: `low` is below `high`, and above 0 when `log` is set."""

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
    """Any number from `low` to `high`, both included; the logarithm is sampled when `log` is set."""


class IntRange(_Range):
    """Any whole number from `low` to `high`, both included; the logarithm is sampled when `log` is set."""

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


@dataclass(frozen=True, slots=True)
class Rule:
    """What one dimension accepts: one of `words` if there are any, otherwise a number within the bounds."""

    description: str
    words: tuple[str, ...] = ()
    whole: bool = False
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf

    def complaint(self, value: Scalar) -> str | None:
        """Returns what is wrong with one value, or None when it is accepted."""
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
        """Returns the JSON schema of the dimension: a bare value, a range or choices."""
        value: dict[str, Any] = {"type": "integer" if self.whole else "number"}
        bounds = {"exclusiveMinimum": self.above, "minimum": self.at_least, "maximum": self.at_most}
        value.update({key: bound for key, bound in bounds.items() if math.isfinite(bound)})
        if self.words:
            value = {"enum": list(self.words)}
        forms = [value, object_schema({"choices": {"type": "array", "items": value, "minItems": 1}}, ["choices"])]
        if not self.words:
            range_keys = {"low": value, "high": value, "log": {"type": "boolean", "default": False}}
            forms.append(object_schema(range_keys, ["low", "high"]))
        return {"description": self.description, "anyOf": forms}


def object_schema(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """Returns the JSON schema of a mapping that has no other keys than `properties`."""
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


RULES: Mapping[str, Rule] = {
    "learning_rate": Rule("Peak learning rate; above 0.", above=0),
    "epochs": Rule("Passes over the training images, the length of the schedule; 1 or more.", whole=True, at_least=1),
    "weight_decay": Rule("Decoupled weight decay (AdamW); 0 or more.", at_least=0),
    "layer_decay": Rule("Learning rate of a block over that of the block above it; in (0, 1].", above=0, at_most=1),
    "augmentation_strength": Rule(
        "Scales train.augmentation, from 0 (the centre crop of evaluation, no mixing) to 1 (as configured).",
        at_least=0,
        at_most=1,
    ),
    "features": Rule("Which encoder output the head reads (default: all it has).", words=FEATURE_SOURCES),
    "normalize": Rule("How features are normalised before the head.", words=NORMALIZATIONS),
}


def read_dimension(name: str, value: Any) -> Dimension:
    """Reads the value that the YAML gives to one dimension.

    Raises:
        ValidationError: the problems with the value, each with its path below the dimension.
        ValueError: the value has the wrong form.
    """
    rule = RULES[name]
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
    raise_complaints((("low",), rule.complaint(span.low)), (("high",), rule.complaint(span.high)))
    return span


def _checked_choices(rule: Rule, given: Choices) -> Choices:
    raise_complaints(*((("choices", i), rule.complaint(value)) for i, value in enumerate(given.choices)))
    if rule.words or rule.whole:
        return given
    # 1 and 1.0 must be the same learning rate for the sampler, the cache key and the resolved YAML.
    return Choices(choices=tuple(float(value) for value in given.choices))


def raise_complaints(*found: tuple[tuple[str | int, ...], str | None]) -> None:
    """Raises one error with every `(path, complaint)` whose complaint is not None."""
    bad = [(path, text) for path, text in found if text]
    if bad:
        raise problems_at(*bad)


def fit_to_space(setting: Mapping[str, Scalar], space: Mapping[str, Dimension]) -> Setting:
    """Moves a setting into a space, so that the search can start from it.

    A number becomes the nearest number of the space. A word that the space does not offer, and a choice that the
    setting does not name, becomes the first choice. A range that the setting does not name is left out: the sampler
    draws its value. Names that the space lacks are dropped.
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
    assert isinstance(dimension, IntRange), "a completed grid has no range of real numbers"
    return range(dimension.low, dimension.high + 1)


def num_grid_points(space: Mapping[str, Dimension]) -> int:
    """Returns how many settings `grid` lists, without listing them."""
    return math.prod(len(_grid_values(dimension)) for dimension in space.values())


def grid(space: Mapping[str, Dimension]) -> list[Setting]:
    """Lists every setting of a space that is completed for the grid sampler; the last dimension varies fastest."""
    values = [_grid_values(dimension) for dimension in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]
