"""The table of baselines: classifiers that cost almost nothing once features exist, each a row beside the probe's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from raysweep.training.baseline_task import BaselineResult, BaselineTask
from raysweep.training.knn import run_knn
from raysweep.training.logistic import run_logistic
from raysweep.training.ridge import run_ridge

if TYPE_CHECKING:
    from raysweep.experiment.studies import Baseline

RUN_BASELINE: Mapping[Baseline, Callable[[BaselineTask], BaselineResult]] = {
    "knn": run_knn,
    "ridge": run_ridge,
    "logistic": run_logistic,
}
