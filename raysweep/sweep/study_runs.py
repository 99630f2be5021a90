"""The MLflow runs of studies and trials: names, parameters, and tags to filter by."""

from __future__ import annotations

from typing import Any

from raysweep.experiment.space import Setting
from raysweep.experiment.studies import RowConfig
from raysweep.images.rows import Draws
from raysweep.results.leaderboard import describe_setting
from raysweep.results.tracking import Tracker
from raysweep.sweep.state import SweepState

SEPARATOR = " · "


def run_name(config: RowConfig, setting: Setting | None = None) -> str:
    """Returns the name of a study's run, or of a trial's: `dinov2 · fine_tune · lr 3.1e-05 · 8 epochs`.

    Few-shot studies begin with the number of shots, since the UI cuts long names.
    """
    shots = [] if config.shots == "all" else [f"{config.shots} shots"]
    parts = describe_setting(setting).split(", ") if setting else []
    return SEPARATOR.join([*shots, config.encoder_name, config.kind, *filter(None, parts)])


def run_params(state: SweepState, config: RowConfig) -> dict[str, Any]:
    """Returns the parameters that runs of studies and of trials share, so that one filter finds both."""
    return {
        "encoder": config.encoder_name,
        "mode": config.kind,
        "shots": config.shots,
        "weights": state.encoder(config).spec.origin.name,
    }


def start_run(state: SweepState, config: RowConfig, key: str, draws: Draws | None) -> str:
    """Starts or finds the MLflow run of a study or baseline; returns its id."""
    spec = state.encoder(config).spec
    num_rows = {split: len(rows) for split, rows in state.rows.items()}
    if draws:  # rows of one model
        num_rows |= {"train": draws.train.shape[1], "validation": draws.validation.shape[1]}
    params = {
        **run_params(state, config),
        "revision": spec.origin.revision,
        "image_size": spec.preprocessing.output_size[0],
        "metric": state.experiment.metric,
        "seed": state.experiment.seed,
        **{f"num_{split}": count for split, count in num_rows.items()},
    }
    tags = {
        "raysweep.encoder": config.encoder_name,
        "raysweep.mode": config.kind,
        "raysweep.shots": str(config.shots),
        "raysweep.sweep": state.experiment.name,
    }
    name = run_name(config)
    return state.recorder.call(Tracker.start_run, key, name, "study", state.run_id, tags, params)[0]
