"""Files of a study's trials: checkpoints, requests to stop, tracebacks; removes those that are not needed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from raysweep.storage.copies import fetch, list_files, local_path, remove
from raysweep.storage.paths import SweepPaths, write_atomically
from raysweep.sweep.optuna_study import OptunaStudy
from raysweep.worker.job import TrialResult

LAST = "last.safetensors"
CHECKPOINTS = ("best.safetensors", LAST)  # files of a trial


class TrialFiles:
    """Files of the trials of one study.

    Args:
        folder: folder of the study.
        paths: folders of the sweep, to which the paths in results are relative.
        optuna_study: its trials in Optuna; knows which trial goes on in the folder of another.
    """

    def __init__(self, folder: Path, paths: SweepPaths, optuna_study: OptunaStudy) -> None:
        self.trials, self._stop_files = folder / "trials", folder / "stop"
        self._paths, self._optuna_study = paths, optuna_study

    def checkpoint(self, result: TrialResult) -> Path:
        """Returns the path of a trial's best weights, on this machine."""
        assert result.checkpoint is not None, "the best trial of a study has a checkpoint"
        return local_path(self._paths.resolve(result.checkpoint))

    def stop_file(self, number: int) -> Path:
        """Returns the file that asks the workers of a trial to stop."""
        return self._stop_files / str(number)

    def ask_to_stop(self, number: int) -> None:
        """Writes the file that the worker processes of a trial look for, because Tune cannot stop them."""
        write_atomically(self.stop_file(number), "")

    def error_text(self, result: TrialResult) -> str:
        """Returns the traceback of a failed trial."""
        path = fetch(self.trials / str(result.number) / "error.txt")
        return path.read_text() if path.exists() else str(result.error)  # a process that died has written none

    def remove_unneeded(self, result: TrialResult, *, was_stopped: bool) -> None:
        """Removes files that are not needed after the end of a trial."""
        if was_stopped:
            remove(self.stop_file(result.number))
        if result.checkpoint:  # the optimiser's state takes twice the model's size
            remove(self.checkpoint(result).with_name(LAST))
        elif result.error is not None and not self._optuna_study.block.mode.trains_together:
            remove_checkpoints(self.trials / str(self._optuna_study.folder_number(result.number)))
        if result.pruned:
            self._remove_folders(result.number)

    def remove_leftovers(self) -> None:
        """Removes what killed invocations have left of trials that are over: the state of their training."""
        if self._optuna_study.block.mode.trains_together:  # such trials write only their result
            return
        unfinished = self._optuna_study.unfinished_folders
        for name in list_files(self.trials):
            folder, _, file = name.rpartition("/")
            if file.startswith(".") or (file == LAST and folder not in unfinished):
                remove(self.trials / name)

    def keep_only(self, best: TrialResult, results: Iterable[TrialResult]) -> None:
        """Removes all checkpoints but the best one."""
        for result in results:  # eight fine-tunes of a large encoder would keep 10 GB
            if result.checkpoint and result.checkpoint != best.checkpoint:
                remove(self.checkpoint(result))
            if result.pruned:  # a worker may have written again while it stopped
                self._remove_folders(result.number)

    def _remove_folders(self, number: int) -> None:
        """Removes the files of a stopped trial, because its weights are not needed."""
        for folder_number in {number, self._optuna_study.folder_number(number)}:
            remove(self.trials / str(folder_number))


def remove_checkpoints(folder: Path) -> None:
    """Removes the checkpoints in the folder of a trial."""
    for name in CHECKPOINTS:
        remove(folder / name)
