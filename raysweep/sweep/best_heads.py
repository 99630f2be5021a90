"""The best heads of linear probes, from which fine-tuning starts (LP-FT: Kumar et al. 2022)."""

from __future__ import annotations

from pathlib import Path

from raysweep.encoders.base import weights_signature
from raysweep.errors import TrialError
from raysweep.experiment.studies import StudyConfig
from raysweep.sweep.optuna_study import OptunaStudy
from raysweep.sweep.state import SweepState
from raysweep.worker.inputs import load_heads


def first_head(state: SweepState, config: StudyConfig) -> Path | None:
    """Returns the head that a study starts from: that of the best probe of the same encoder and shots."""
    if config.mode.starts_from != "best_probe":
        return None
    return state.best_heads.get((config.encoder_name, config.shots))


def head_signature(state: SweepState, head: Path) -> str:
    """Returns the signature of the weights of a head.

    Raises:
        TrialError: the head cannot be read, and its signature is not known from before.
    """
    return state.head_weights.get(head) or weights_signature(load_heads(head)[0][0])


def gives_a_head(state: SweepState, config: StudyConfig) -> bool:
    """Whether another study of this sweep starts from a study's best head."""
    mine = config.encoder_name, config.shots
    return config.mode.gives_heads and any(
        other.mode.starts_from == "best_probe" and (other.encoder_name, other.shots) == mine
        for other in state.experiment.studies()
    )


def keep_best_head(
    state: SweepState, config: StudyConfig, optuna_study: OptunaStudy, trial: int, checkpoint: Path
) -> None:
    """Keeps the best head of a study, and the signature of its weights. A head that cannot be read has none."""
    state.best_heads[config.encoder_name, config.shots] = checkpoint
    try:
        (head, *_), _ = load_heads(checkpoint)
    except TrialError:  # whoever starts from it says so
        return
    weights = optuna_study.head_weights(trial)
    if weights is None:
        weights = weights_signature(head)
        optuna_study.keep_head_weights(trial, weights)
    state.head_weights[checkpoint] = weights
