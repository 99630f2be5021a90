"""One Tune trial: a Population in one Train run, or the test of what a group's studies chose."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

from raysweep.errors import RaysweepError
from raysweep.storage.copies import local_path
from raysweep.storage.paths import write_atomically
from raysweep.worker.job import Job, TestWork, TrainLoopConfig, TrainWork, TrialResult, Work, WorkReport, to_tune

Results = tuple[TrialResult, ...]
OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "ALLOC_FAILED")


def run_work(config: Mapping[str, Work], jobs: Mapping[str, Job]) -> None:
    """Tune's trainable: does a piece of a group's work and reports what came of it.

    An error is reported rather than raised, so that the study's journal can say what went wrong, and Tune uses the
    same process again.

    Args:
        config: `work`; Tune wants a dict.
        jobs: by the group's name.
    """
    from ray import tune

    work = config["work"]
    job = jobs[work.group]
    try:
        tune.report(to_tune(_do(work, job)))
    except Exception as error:
        folder = local_path(job.studies[work.studies[0]].folder)
        with suppress(RaysweepError, OSError):  # the storage may be what is at fault
            write_atomically(folder / "trials" / work.error_folder / "error.txt", traceback.format_exc())
        if lost_a_worker(error):
            raise  # no setting is at fault: Tune runs the work again where there are other nodes
        reason = " ".join(str(error).split()) or "no message"
        tune.report(to_tune(WorkReport(error=f"{type(error).__name__}: {reason[:500]}")))


def _do(work: Work, job: Job) -> WorkReport:
    if isinstance(work, TestWork):
        from raysweep.worker.evaluate import run_test

        return WorkReport(tested=run_test(job, work))
    train = partial(_train, work, job)
    return WorkReport(trials=within_memory(train, work.micro_batch_size, rows_to_begin_with(job)))


def rows_to_begin_with(job: Job) -> int:
    """Rows of a batch that one worker trains on at once, where memory has not run out."""
    from raysweep.training.loop import CPU_MICRO_BATCH

    share: int = math.ceil(job.loop.batch_size / job.resources.num_workers)
    return min(job.loop.micro_batch_size or (share if job.use_gpu else CPU_MICRO_BATCH), share)


def within_memory(train: Callable[[int | None], Results], micro_batch_size: int | None, share: int) -> Results:
    """Trains, and again with micro-batches of half the size each time that memory runs out.

    The Train run is started again, rather than the step: workers would have to agree on that, and one that has run out
    of memory leaves the others waiting for its gradients. Training goes on from the last epoch's checkpoint.

    Args:
        train: trains with micro-batches of a size; None for all rows of a worker's share at once.
        micro_batch_size: to begin with.
        share: rows of a batch that one worker trains on.
    """
    while True:
        try:
            return train(micro_batch_size)
        except Exception as error:
            if not ran_out_of_memory(error) or (micro_batch_size or share) == 1:
                raise
        # Outside of the handler the error is gone, and with it the frames that hold the model.
        micro_batch_size = math.ceil((micro_batch_size or share) / 2)


def ran_out_of_memory(error: Exception) -> bool:
    """Whether this error, or one of a Train run's workers, is about memory; Ray's own error of a host counts too."""
    # By words: CUDA's libraries raise plain RuntimeErrors, and Ray keeps only the ends of a worker's error text.
    return any(words in f"{type(one).__name__} {one}" for one in _causes(error) for words in OUT_OF_MEMORY)


def lost_a_worker(error: Exception) -> bool:
    """Whether a worker process of a Train run died, or its node did, without running out of memory."""
    from ray.exceptions import RayActorError

    causes = [getattr(one, "health_check_failure", one) for one in _causes(error)]
    return any(isinstance(one, RayActorError) for one in causes) and not ran_out_of_memory(error)


def _causes(error: Exception) -> list[Exception]:
    """An error, and those of the workers where it is a Train run's."""
    return [error, *getattr(error, "worker_failures", {}).values()]


def _train(work: TrainWork, job: Job, micro_batch_size: int | None) -> Results:
    """Runs a Population through Ray Train.

    One worker runs in Train's local mode, inside the Tune trial, whose process is used again: a Train run of its own
    takes seconds to start. Several workers get a full TorchTrainer, whose reports are passed on.
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

        # Named after its trials, so that Train's own recovery finds the run again.
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
    """What one worker holds, in Ray's terms."""
    gpus = {"GPU": job.resources.gpus_per_worker} if job.use_gpu else {}
    return {"CPU": job.resources.cpus_per_worker, **gpus}


def work_resources(job: Job, work: Work) -> dict[str, float]:
    """What a Tune trial itself holds.

    While several workers train, that is next to nothing, since Train's placement group lies outside of it. Ray refuses
    an empty bundle, and a fraction of a CPU would keep the last worker from ever fitting.
    """
    trains_elsewhere = job.resources.num_workers > 1 and isinstance(work, TrainWork)
    return {"memory": 1} if trains_elsewhere else worker_resources(job)
