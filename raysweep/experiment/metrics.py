"""The metrics that raysweep computes, and which way each of them gets better."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

Direction = Literal["maximize", "minimize"]

# On the validation split after each epoch, and on the test split.
METRICS: Mapping[str, Direction] = {
    "accuracy": "maximize",
    "macro_f1": "maximize",
    "balanced_accuracy": "maximize",
    "top_k_accuracy": "maximize",
    "brier": "minimize",
    "loss": "minimize",
}

# On the test split: those too that need the scores of all its rows at once, or the fitted temperature.
TEST_METRICS: Mapping[str, Direction] = {
    **METRICS,
    "auroc": "maximize",
    "ece": "minimize",
    "calibrated_ece": "minimize",
}


def validation_key(name: str) -> str:
    """Returns the key under which a metric of the validation split is logged."""
    return f"val/{name}"


VALIDATION_METRICS: Mapping[str, Direction] = {validation_key(name): METRICS[name] for name in METRICS}

# mypy wants the values of a Literal written out; pydantic takes them from the table.
if TYPE_CHECKING:
    ValidationMetric = str
else:
    ValidationMetric = Literal[tuple(VALIDATION_METRICS)]
