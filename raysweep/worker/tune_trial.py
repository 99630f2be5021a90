"""One Tune trial: a Population in one Train run, or the test of a group's chosen classifiers."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from raysweep.errors import RaysweepError, one_line
from raysweep.storage.copies import local_path
from raysweep.storage.paths import write_atomically
from raysweep.worker.job import Job, TestWork, TrainLoopConfig, TrainWork, TrialResult, Work, WorkReport, to_tune

Results = tuple[TrialResult, ...]
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED")


def run_work(config: Mapping[str, Work], jobs: Mapping[str, Job]) -> None:
    """Tune's trainable: runs a piece of a group's work and reports the result.

    An error is reported and not raised, so that the study's journal holds the reason, and Tune uses the same process
    again. Only the loss of a worker is raised.

    Args:
        config: `work`, in a dict because Tune requires one.
        jobs: jobs by group name.
    """
    from ray import tune

    work = config["work"]
    job = jobs[work.group]
    try:
        tune.report(to_tune(_do(work, job)))
    except Exception as error:
        folder = local_path(job.studies[work.studies[0]].folder)
        with suppress(RaysweepError, OSError):  # the storage may be the cause of the error
            write_atomically(folder / "trials" / work.error_folder / "error.txt", traceback.format_exc())
        if lost_a_worker(error):
            raise  # the setting is not the cause: Tune runs the work again on other nodes
        reason = one_line(error) or "no message"
        tune.report(to_tune(WorkReport(error=f"{type(error).__name__}: {reason[:500]}")))


def _do(work: Work, job: Job) -> WorkReport:
    if isinstance(work, TestWork):
        from raysweep.worker.evaluate import run_test

        return WorkReport(tested=run_test(job, work))
    if job.mode.trains_together:
        return WorkReport(
            trials=train_in_smaller_populations(lambda part: _train(part, job, part.micro_batch_size), work)
        )
    train = partial(_train, work, job)
    return WorkReport(trials=train_with_smaller_batches(train, work.micro_batch_size, initial_micro_batch_size(job)))


def initial_micro_batch_size(job: Job) -> int:
    """Returns the rows per forward pass of one worker, before memory has run out."""
    from raysweep.training.loop import CPU_MICRO_BATCH

    share: int = math.ceil(job.loop.batch_size / job.resources.num_workers)
    return min(job.loop.micro_batch_size or (share if job.use_gpu else CPU_MICRO_BATCH), share)


def train_with_smaller_batches(
    train: Callable[[int | None], Results], micro_batch_size: int | None, share: int
) -> Results:
    """Trains, and trains again with micro-batches of half the size each time that memory runs out.

    This starts the Train run again and not the step: workers would have to agree on a new step, and the others wait for
    the gradients of the one without memory. Training continues from the checkpoint of the last epoch.

    Args:
        train: trains with a micro-batch size; None for all rows of a worker's share.
        micro_batch_size: first size to try.
        share: rows of a batch that one worker trains on.
    """
    while True:
        try:
            return train(micro_batch_size)
        except Exception as error:
            if not ran_out_of_memory(error) or (micro_batch_size or share) == 1:
                raise
        # Outside the handler the error is freed, and with it the stack frames that hold the model.
        micro_batch_size = math.ceil((micro_batch_size or share) / 2)


def train_in_smaller_populations(train: Callable[[TrainWork], Results], work: TrainWork) -> Results:
    """Trains a Population; if memory runs out, one half of its trials after the other, and so on.

    The weights of a head do not depend on the heads that train beside it.
    """
    try:
        return train(work)
    except Exception as error:
        if not ran_out_of_memory(error) or len(work.trials) == 1:
            raise
    half = len(work.trials) // 2
    parts = work.trials[:half], work.trials[half:]
    return tuple(result for part in parts for result in train_in_smaller_populations(train, replace(work, trials=part)))


def ran_out_of_memory(error: Exception) -> bool:
    """Whether the error, or one of a Train run's workers, is out of memory: of a GPU, or Ray's own error of a host."""
    # By text: CUDA's libraries raise plain RuntimeErrors, and Ray keeps only the ends of a worker's error text.
    return any(words in f"{type(one).__name__} {one}" for one in _causes(error) for words in OUT_OF_MEMORY)


def lost_a_worker(error: Exception) -> bool:
    """Whether a worker process of a Train run, or its node, died for another reason than memory."""
    from ray.exceptions import RayActorError

    causes = [getattr(one, "health_check_failure", one) for one in _causes(error)]
    return any(isinstance(one, RayActorError) for one in causes) and not ran_out_of_memory(error)


def _causes(error: Exception) -> list[Exception]:
    """Returns an error, and the workers' errors if a Train run raised it."""
    return [error, *getattr(error, "worker_failures", {}).values()]


def _train(work: TrainWork, job: Job, micro_batch_size: int | None) -> Results:
    """Runs a Population with Ray Train.

    One worker runs in Train's local mode, in the process of the Tune trial, which is used again: a separate Train run
    takes seconds to start. Several workers run in a full TorchTrainer, whose reports are passed on.
    """
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raysweep.worker.train import train_worker

    work = replace(work, micro_batch_size=micro_batch_size)
    if job.resources.num_workers == 1:
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=TrainLoopConfig(job=job, work=work, report=tune.report),
            scaling_config=ScalingConfig(num_workers=0, use_gpu=job.use_gpu),
        )
    else:
        from ray.tune.integration.ray_train import TuneReportCallback

        # The name contains its trials, so that Train's own recovery finds the run again.
        name = f"trials-{work.trials[0].number}-{work.trials[-1].number}-{micro_batch_size or 'all'}"
        folder = local_path(job.studies[work.studies[0]].folder)
        trainer = TorchTrainer(
            train_worker,
            train_loop_config=TrainLoopConfig(job=job, work=work, report=None),
            scaling_config=ScalingConfig(
                num_workers=job.resources.num_workers,
                use_gpu=job.use_gpu,
                resources_per_worker=worker_resources(job),
                placement_strategy=job.resources.placement,
            ),
            run_config=RunConfig(name=name, storage_path=f"{folder}/train", callbacks=[TuneReportCallback()]),
        )
    results: Results = trainer.fit().return_value
    return results


def worker_resources(job: Job) -> dict[str, float]:
    """Returns the Ray resources of one worker."""
    gpus = {"GPU": job.resources.gpus_per_worker} if job.use_gpu else {}
    return {"CPU": job.resources.cpus_per_worker, **gpus}


def work_resources(job: Job, work: Work) -> dict[str, float]:
    """Returns the Ray resources of a Tune trial itself.

    If several workers train, that is one byte of memory, because Train's placement group lies outside the trial. Ray
    refuses an empty bundle, and with a fraction of a CPU the last worker would never fit.
    """
    trains_elsewhere = job.resources.num_workers > 1 and isinstance(work, TrainWork)
    return {"memory": 1} if trains_elsewhere else worker_resources(job)
