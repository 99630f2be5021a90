"""The view of an MLflow experiment that shows studies only, as the UI itself stores a view that a person shares.

The state of the page is the JSON of an experiment tag. The link to it also chooses the UI's pages for machine learning;
without `workflowType`, the UI opens those for language models (MLflow 3.17).
"""

from __future__ import annotations

import json

VIEW_KEY = "leaderboard"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
STUDIES = "tags.`raysweep.level` = 'study'"
COLUMNS = (
    "params.`encoder`", "params.`mode`", "params.`shots`", "metrics.`test/accuracy`", "metrics.`test/accuracy_low`",
    "metrics.`test/accuracy_high`", "metrics.`val/accuracy`", "metrics.`test/macro_f1`", "params.`learning_rate`",
    "params.`epochs`", "metrics.`time/train_s`", "tags.`raysweep.sweep`",
)  # fmt: skip


def view_state() -> str:
    """Returns the state of the runs page: studies only, the best test accuracy first, the columns that matter."""
    state = {
        "searchFilter": STUDIES,
        "orderByKey": "metrics.`test/accuracy`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "viewMaximized": True,
    }
    return json.dumps(state)


def view_path(experiment_id: str) -> str:
    """Returns the part of the link behind the address of an MLflow server."""
    return f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={VIEW_KEY}"
