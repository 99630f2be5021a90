"""The metrics that raysweep computes on every split, and which way each of them gets better."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

Direction = Literal["maximize", "minimize"]

METRICS: Mapping[str, Direction] = {"accuracy": "maximize", "macro_f1": "maximize", "loss": "minimize"}


def validation_key(name: str) -> str:
    """Returns the key under which a metric of the validation split is logged."""
    return f"val/{name}"


VALIDATION_METRICS: Mapping[str, Direction] = {validation_key(name): METRICS[name] for name in METRICS}

# mypy wants the values of a Literal written out; pydantic takes them from the table.
if TYPE_CHECKING:
    ValidationMetric = str
else:
    ValidationMetric = Literal[tuple(VALIDATION_METRICS)]
