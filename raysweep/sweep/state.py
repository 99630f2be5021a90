"""The state that the studies of one sweep share: images, encoders, Ray, MLflow, and what was found so far."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from raysweep.cluster.address import joins_cluster
from raysweep.cluster.nodes import check_nodes, wait_for_nodes
from raysweep.cluster.resources import Resources, local_resources
from raysweep.cluster.session import RaySession
from raysweep.errors import DataError
from raysweep.experiment.config import Experiment
from raysweep.experiment.sections import Shots
from raysweep.experiment.studies import RowConfig
from raysweep.images.index import BadRow, ImageIndex
from raysweep.images.near_copies import Groups
from raysweep.images.pass_tasks import IndexReference
from raysweep.images.passes import put_index
from raysweep.images.rows import Rows, select_rows, write_quarantine
from raysweep.results.progress import Progress
from raysweep.results.recorder import Recorder
from raysweep.storage.copies import location, on_every_node, remove
from raysweep.storage.paths import SweepPaths, write_atomically
from raysweep.sweep.encoder_card import LazyEncoder, read_card
from raysweep.training.ranking import Ranking

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


@dataclass(frozen=True, slots=True)
class StartHead:
    """A head that fine-tuning may start from.

    Attributes:
        checkpoint: file of heads, of which the first one is used.
        score: rank of its validation metrics, from `Ranking.key`.
        weights: signature of its weights when it was chosen; None if it is not known.
    """

    checkpoint: Path
    score: tuple[float, float]
    weights: str | None = None


@dataclass
class SweepState:
    """The state that the studies of one sweep share.

    Attributes:
        experiment: the validated experiment.
        paths: paths of all files.
        index: the images.
        recorder: writes to MLflow.
        progress: writes progress to the terminal.
        ray: starts Ray, or joins a cluster.
        run_id: id of the sweep's MLflow run; empty before its start.
        view: link to the saved view in MLflow, without the server's address; empty before.
        encoders: encoders used so far, by name.
        bad_rows: rows that a pass could not decode, by row id.
        start_heads: heads that fine-tuning starts from, by encoder and shots.
        near_copies: groups of near copies, once they are known; they are part of the index's groups.
        journal: the journal of the studies' trials, once it is open.
        failures: studies that could not be opened, with the reason.
        gpu_precision: precision on GPUs, `fp32` or `bf16`; None before it is known.
        num_new_trials: trials that this invocation has run.
        num_encoder_passes: encoder passes that this invocation has made.
    """

    experiment: Experiment
    paths: SweepPaths
    index: ImageIndex
    recorder: Recorder
    progress: Progress
    ray: RaySession
    run_id: str = ""
    view: str = ""
    encoders: dict[str, LazyEncoder] = field(default_factory=dict)
    bad_rows: dict[int, BadRow] = field(default_factory=dict)
    start_heads: dict[tuple[str, Shots], StartHead] = field(default_factory=dict)
    near_copies: Groups = ()
    journal: BaseStorage | None = None
    failures: list[str] = field(default_factory=list)
    gpu_precision: str | None = None
    num_new_trials: int = 0
    num_encoder_passes: int = 0

    @property
    def ranking(self) -> Ranking:
        """How studies and baselines are ranked; `within_study` says how their trials and epochs are."""
        return Ranking(self.experiment.metric, self.experiment.direction)

    @cached_property
    def resources(self) -> Resources:
        """Resources to run on. Starts Ray on first use, because a finished sweep does not need it."""
        present = wait_for_nodes(self.experiment.resources, self.ray, self.progress.say)
        self._check_places()
        return present

    def _check_places(self) -> None:
        """Raises an error if some node cannot see the storage or the source."""
        mark = self.paths.caches / f".seen-{uuid.uuid4().hex}"
        places = {f"storage: '{self.experiment.storage}'": location(mark)}
        first = self.index.table.slice(0, 1).to_pylist()[0]
        if first["image"] is None:
            places[f"data.source: '{self.experiment.data.source}'"] = on_every_node(first["path"])
        write_atomically(mark, "")
        try:
            check_nodes(places)
        finally:
            remove(mark)

    @property
    def present(self) -> Resources:
        """Resources to run on. Ray is not started for this if the sweep runs on this machine."""
        return self.resources if joins_cluster() else local_resources()

    @cached_property
    def rows(self) -> Rows:
        """Usable rows of each split. Read it only after every cache exists: passes find bad rows and near copies."""
        return select_rows(self.index, list(self.bad_rows.values()))

    @cached_property
    def index_reference(self) -> IndexReference:
        """Reference to the index in Ray's object store, for training runs that decode images themselves."""
        return put_index(self.index)

    def encoder(self, config: RowConfig) -> LazyEncoder:
        """Returns the encoder of a study; loads it only if it has no card yet."""
        name = config.encoder_name
        if name not in self.encoders:
            self.encoders[name] = read_card(config.encoder, self.experiment.seed, self.paths.caches, self.progress.say)
        return self.encoders[name]

    def set_aside(self, bad_rows: Sequence[BadRow]) -> None:
        """Adds rows that could not be decoded to the quarantine.

        Raises:
            DataError: the quarantine holds more than the experiment allows.
        """
        self.bad_rows |= {row.row_id: row for row in bad_rows}
        if not self.bad_rows:
            return
        everything = [*self.index.bad_rows, *self.bad_rows.values()]
        write_quarantine(self.paths.quarantine, everything)
        share, limit = len(everything) / self.index.num_rows_found, self.experiment.data.max_bad_fraction
        if share > limit:
            first = "; ".join(f"{row.source}: {row.reason}" for row in everything[:3])
            found = f"{len(everything)} of {self.index.num_rows_found} images ({share:.1%})"
            raise DataError(f"{found} cannot be used, data.max_bad_fraction allows {limit:.1%}: {first}")
