"""The heads from which fine-tuning starts: the best of each encoder (LP-FT: Kumar et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raysweep.encoders.base import weights_signature
from raysweep.errors import TrialError
from raysweep.experiment.studies import RowConfig, StudyConfig
from raysweep.sweep.state import StartHead, SweepState
from raysweep.worker.inputs import load_heads


def first_head(state: SweepState, config: StudyConfig) -> StartHead | None:
    """Returns the head that a study starts from: the best one of the same encoder and shots, or None for a new one."""
    if config.mode.starts_from != "best_head":
        return None
    return state.start_heads.get((config.encoder_name, config.shots))


def head_signature(head: StartHead) -> str:
    """Returns the signature of the weights of a head.

    Raises:
        TrialError: the head cannot be read, and its signature is not known from before.
    """
    return head.weights or weights_signature(load_heads(head.checkpoint)[0][0])


def starts_a_study(state: SweepState, config: RowConfig) -> bool:
    """Whether another study of this sweep may start from the head of a row."""
    mine = config.encoder_name, config.shots
    return config.reads_features and any(
        other.mode.starts_from == "best_head" and (other.encoder_name, other.shots) == mine
        for other in state.experiment.studies()
    )


def offer_head(
    state: SweepState, config: RowConfig, checkpoint: Path, validation: Mapping[str, float], weights: str | None = None
) -> None:
    """Makes a head the start of its encoder's fine-tuning, if it is better on validation than those offered before.

    Args:
        state: state that all studies share.
        config: the row that the head is from.
        checkpoint: file of heads that were fitted to train images alone. One that cannot be read has no signature, and
            whoever starts from it says so.
        validation: metrics of the head.
        weights: signature of its weights, if it is known.
    """
    offered = StartHead(checkpoint, state.ranking.within_study.key(validation), weights)
    before = state.start_heads.get(place := (config.encoder_name, config.shots))
    if before is None or before.checkpoint == checkpoint or offered.score > before.score:
        state.start_heads[place] = offered


def signature_of_file(checkpoint: Path) -> str | None:
    """Returns the signature of the weights of a file's first head; None if the file cannot be read."""
    try:
        return weights_signature(load_heads(checkpoint)[0][0])
    except TrialError:
        return None
